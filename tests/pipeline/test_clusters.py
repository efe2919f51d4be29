"""Which Ray a command uses, what that Ray listens on, and what is said where it cannot be used: real Ray, real sockets."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.executors import ExecutorError
from pipeline.executors.address import Address, choose, refuse_unreachable
from tests import processes
from tests.checkpoints import save_checkpoint

TEXT = Path(json.__file__)
JOINING = "RAY_ADDRESS=head:6379: joining this cluster"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("teacher") / "llama", "llama", num_hidden_layers=2)


@pytest.mark.parametrize(
    ("flag", "variable", "where", "named_by", "notice"),
    [
        pytest.param(None, None, None, "--ray-address", None, id="neither"),
        pytest.param(None, "  ", None, "--ray-address", None, id="empty-variable"),
        pytest.param("", None, None, "--ray-address", None, id="empty-flag"),
        pytest.param(None, "head:6379", "head:6379", "RAY_ADDRESS", JOINING, id="variable"),
        pytest.param("auto", "head:6379", "head:6379", "RAY_ADDRESS", JOINING, id="auto-means-the-variable"),
        pytest.param(None, "auto", "auto", "RAY_ADDRESS", "RAY_ADDRESS=auto: joining this cluster", id="auto-by-variable"),
        pytest.param(None, "local", None, "RAY_ADDRESS", None, id="local-by-variable"),
        pytest.param(
            "local", "head:1", None, "--ray-address", "--ray-address local is used, not RAY_ADDRESS=head:1", id="local"
        ),
        pytest.param("b:2", "a:1", "b:2", "--ray-address", "--ray-address b:2 is used, not RAY_ADDRESS=a:1", id="flag-wins"),
        pytest.param("a:1", "a:1", "a:1", "--ray-address", None, id="both-the-same"),
        pytest.param("[::1]:6379", None, "[::1]:6379", "--ray-address", None, id="ipv6"),
    ],
)
def test_the_flag_goes_before_the_variable_and_what_is_joined_unasked_is_said(
    flag: str | None, variable: str | None, where: str | None, named_by: str, notice: str | None
) -> None:
    chosen = choose(flag, {} if variable is None else {"RAY_ADDRESS": variable})
    assert chosen == Address(where=where, named_by=named_by, notice=notice)


@pytest.mark.parametrize(
    "address", ["ray://head:10001", "http://head:8265", "head", "head:", ":6379", "head:99999", "head:²", "a/b:1"]
)
def test_an_address_of_another_form_is_refused_and_whoever_named_it_is_named(address: str) -> None:
    with pytest.raises(ExecutorError, match=r"^RAY_ADDRESS: got .*, expected 'auto' or host:port .* Unset RAY_ADDRESS"):
        choose(None, {"RAY_ADDRESS": address})
    with pytest.raises(ExecutorError, match=r"^--ray-address: got .*or in a shell there$"):
        choose(address, {})


@pytest.fixture
def web_server() -> Iterator[int]:
    """The port of a server that is not Ray's."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[method-assign,assignment]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_port_that_is_not_rays_is_refused_at_once(web_server: int) -> None:
    address = Address(where=f"127.0.0.1:{web_server}")
    with pytest.raises(ExecutorError, match=rf"what answers at 127\.0\.0\.1:{web_server} is not Ray's port"):
        refuse_unreachable(address, uses_tls=False)
    refuse_unreachable(address, uses_tls=True)
    with pytest.raises(ExecutorError, match="nothing answers at"):
        refuse_unreachable(Address(where=f"{'x' * 70}.invalid:1"), uses_tls=False)


LISTENING = """
import json, psutil, sys
from pipeline.executors.cluster import Cluster
cluster = Cluster(2, None)
import ray

class Idle:
    def ready(self):
        return True

actors = [ray.remote(num_cpus=1)(Idle).remote() for _ in range(2)]
ray.get([actor.ready.remote() for actor in actors])
found = [
    (process.name(), connection.laddr.ip)
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]
    for connection in process.net_connections("inet")
    if connection.status == psutil.CONN_LISTEN
]
cluster.close()
print(json.dumps(found))
"""


def test_a_ray_started_for_one_machine_listens_on_that_machine_alone() -> None:
    done = processes.Process(LISTENING).finish()
    listening = json.loads(done.stdout.splitlines()[-1])
    assert len(listening) >= 6, f"{listening}: gcs_server, raylet, two workers and the driver have ports"
    assert {ip.removeprefix("::ffff:") for _, ip in listening} <= {"127.0.0.1", "::1"}, listening


def one_error(done: subprocess.CompletedProcess[str], expected: str) -> str:
    """The line that ends a command that failed."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert expected in lines[0]
    assert "ExecutorError" not in lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        pytest.param({"RAY_ADDRESS": "127.0.0.1:1"}, "RAY_ADDRESS: nothing answers at 127.0.0.1:1", id="unreachable"),
        pytest.param(
            {"RAY_ADDRESS": "ray://127.0.0.1:10001"},
            "RAY_ADDRESS: got ray://127.0.0.1:10001",
            id="client",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"RAY_RUNTIME_ENV_HOOK": "no.such"},
            "Of Ray's variables RAY_RUNTIME_ENV_HOOK are set",
            id="hook",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"RAY_TMPDIR": "relative"},
            "RAY_TMPDIR: got relative, expected an absolute path",
            id="relative-folder",
            marks=pytest.mark.slow,
        ),
        pytest.param({"RAY_TMPDIR": "/proc/nope"}, "its logs and sockets in /proc/nope/ray", id="folder"),
    ],
)
def test_what_the_environment_says_of_ray_is_named_where_it_cannot_be_used(
    environment: dict[str, str], expected: str, teacher: Path, tmp_path: Path
) -> None:
    clean = {name: None for name in os.environ if name.startswith("RAY_") and name != "RAY_USAGE_STATS_ENABLED"}
    arguments = ("--teacher", teacher, "--data", TEXT, "--out", "store", "--limit", "3", "--workers", "1")
    for command in ("extract", "plan"):
        one_error(processes.kvpipe(command, *arguments, cwd=tmp_path, environment={**clean, **environment}), expected)


def test_training_on_a_cluster_that_is_not_there_is_one_line_with_advice_that_training_can_take(
    teacher: Path, tmp_path: Path
) -> None:
    made = processes.kvpipe(
        *("extract", "--teacher", teacher, "--data", TEXT, "--out", "store", "--limit", "3", "--accept-fidelity"), cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr
    arguments = ("train", "--store", "store", "--student", teacher, "--out", "run", "--steps", "2", "--ray-workers", "2")
    done = processes.kvpipe(*arguments, "--ray-address", "127.0.0.1:1", cwd=tmp_path)
    one_error(done, "--ray-address: nothing answers at 127.0.0.1:1")
    failing = {"RAY_ADDRESS": None, "RAY_TMPDIR": "/proc/nope"}
    line = one_error(processes.kvpipe(*arguments, cwd=tmp_path, environment=failing), "Ray did not start here")
    assert "--workers 0" not in line
    assert "without --ray-workers training runs in this process" in line
    keys = (tmp_path / "store" / "kv.zarr" / "key").rglob("*")
    next(path for path in keys if path.is_file() and path.name != "zarr.json").unlink()
    done = processes.kvpipe("repair", "store", "--workers", "1", cwd=tmp_path, environment=failing)
    assert "--workers 0 runs without Ray" in one_error(done, "Ray did not start here")


@pytest.mark.slow
def test_workers_run_on_the_cluster_that_the_variable_names(teacher: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folder = Path("/tmp") / f"kvpipe-ray-{os.getpid()}"  # names of sockets must be short
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={address.partition(':')[2]}"]
    command += [f"--temp-dir={folder}", "--num-cpus=1", "--include-dashboard=false", "--object-store-memory=100000000"]
    environment = {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": address}
    start = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=start, start_new_session=True, **quiet) as cluster:  # type: ignore[call-overload]
        try:
            until = time.monotonic() + 60
            while not list(folder.glob("session_*/sockets/raylet")) and time.monotonic() < until:
                time.sleep(0.5)
            time.sleep(3)  # until the node is known, too
            arguments = (
                "--teacher",
                teacher,
                "--data",
                TEXT,
                "--out",
                "store",
                "--limit",
                "3",
                "--codec",
                "raw",
                "--workers",
                "1",
            )
            done = processes.kvpipe("extract", *arguments, cwd=tmp_path, environment=environment)
            assert done.returncode == 0, done.stderr
            assert f"RAY_ADDRESS={address}: joining this cluster" in done.stderr
        finally:
            cluster.terminate()
            cluster.wait(30)
            shutil.rmtree(folder, ignore_errors=True)
