"""Starting Ray here or joining a running cluster, and ending it, with errors that say what to do."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from pipeline.executors.address import Address, choose, refuse_unreachable
from pipeline.executors.base import ExecutorError, Say
from pipeline.executors.placement import Node
from pipeline.failures import one_line

# Ray's minimum is about 75 MiB; no tensor ever passes through it.
_OBJECT_STORE_BYTES = 100 * 2**20
_OURS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Set where the person at the terminal did not."""
_ALONE = "--workers 0 runs without Ray"


class Cluster:
    """A Ray this process is connected to: one that was running, or one it started and ends."""

    def __init__(self, workers: int, address: str | None, *, alone: str = _ALONE, say: Say = lambda _: None) -> None:
        """
        Args:
            workers: a Ray started here counts at least as many CPUs.
            address: a running cluster such as 'auto' or 'host:6379'; None takes the one RAY_ADDRESS names, else starts one here,
                unless there is a connection already.
            alone: how the command does without Ray, for messages.

        Raises:
            ExecutorError: it cannot be started or reached.
        """
        chosen = choose(address, os.environ)
        with _explained(chosen, alone), _signals_kept():
            for name, value in _OURS.items():
                os.environ.setdefault(name, value)
            import ray

            self.ray: Any = ray
            self._processes: list[psutil.Process] = []
            self._connected_here = not ray.is_initialized()
            if self._connected_here:
                if chosen.notice:
                    say(chosen.notice)
                self._connect(chosen, workers)

    def _connect(self, chosen: Address, workers: int) -> None:
        refuse_unreachable(chosen, uses_tls=os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"))
        before = set(psutil.Process().children())
        if chosen.where is not None:
            self.ray.init(address=chosen.where, log_to_driver=False, logging_level="critical")
        else:
            _refuse_temporary_folder()
            with _on_this_machine_only():
                self.ray.init(
                    address="local",  # without it Ray joins whatever it finds running here
                    num_cpus=max(workers, available_cpus()),
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level="critical",  # of what ends it we hear, and say it in a line
                )
        self._processes = [process for process in psutil.Process().children() if process not in before]

    def nodes(self) -> list[Node]:
        """The machines that are there now."""
        return [
            Node(cpus=int(node["Resources"].get("CPU", 0)), gpus=int(node["Resources"].get("GPU", 0)))
            for node in self.ray.nodes()
            if node["Alive"]
        ]

    def close(self) -> None:
        """Disconnect, and end what was started here."""
        if self._connected_here:
            if self._processes:
                threading.Thread(target=_end_together, args=(self._processes,), daemon=True).start()
            self.ray.shutdown()


def passed_on() -> dict[str, str]:
    """The environment variables that say how to reach a bucket, for processes on other machines.

    To be given to them as an argument: Ray shows what it is told as a runtime environment to everyone on its dashboard.
    """
    return {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "GOOGLE_", "KVPIPE_"))}


def available_cpus() -> int:
    """CPUs this process may use: of its affinity, and of its container's share."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, max(int(quota) // int(period), 1))
    return cpus


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Keep our SIGTERM handler, which Ray replaces, and hold SIGTERM back from all processes that Ray starts meanwhile.

    Slurm and others send it to every process of a job; workers must live until the driver has decided what to finish. Ray itself
    does the same with SIGINT.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    told = False
    try:
        yield
    except SystemExit as error:  # what Ray's handler raises when another thread took the signal
        told = error.code == signal.SIGTERM
        if not told:
            raise
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if told:
        signal.raise_signal(signal.SIGTERM)


def _end_together(processes: list[psutil.Process]) -> None:
    """Once Ray has ended the first of its processes, end the others: they hold SIGTERM back, and Ray would give each a second."""
    theirs = [*processes]
    for process in processes:
        with contextlib.suppress(psutil.Error):
            theirs += process.children(recursive=True)
    while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        time.sleep(0.05)
    for process in theirs:
        with contextlib.suppress(psutil.Error):
            process.kill()


@contextlib.contextmanager
def _on_this_machine_only() -> Iterator[None]:
    """Have Ray bind its ports to 127.0.0.1, because who reaches them can run code here.

    Ray has no argument for that; it does so where it takes clusters for impossible, as it does on macOS and Windows.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _refuse_temporary_folder() -> None:
    """Ray would wait for half a minute for processes that look for its folder elsewhere."""
    folder = os.environ.get("RAY_TMPDIR")
    if folder and not Path(folder).is_absolute():
        raise ExecutorError(f"RAY_TMPDIR: got {folder}, expected an absolute path, such as /tmp")


@contextlib.contextmanager
def _explained(address: Address, alone: str) -> Iterator[None]:
    """What Ray says when it cannot start, and what to do about it."""
    what = f"{address.named_by}: Ray at {address.where} cannot be joined" if address.where else "Ray did not start here"
    names = [name for name in sorted(os.environ) if name.startswith("RAY_") and name not in _OURS]
    variables = f". Of Ray's variables {', '.join(names)} are set: one may be wrong" if names else ""
    try:
        yield
    except ExecutorError:
        raise
    except OSError as error:
        raise ExecutorError(f"{what}: {str(error).rstrip('.')}. {_advice(error, address)}; {alone}") from error
    except Exception as error:  # hooks, plugins and Ray itself raise anything
        if type(error).__name__ == "AuthenticationError":  # Ray's, which may be what could not be imported
            raise ExecutorError(
                f"{what}: {_first_sentence(error)}. Every node of a cluster needs the token of its head node: set RAY_AUTH_TOKEN, or "
                "RAY_AUTH_TOKEN_PATH to a file with it, or RAY_AUTH_MODE=disabled everywhere on a network you trust"
            ) from error
        raise ExecutorError(f"{what} ({one_line(error).rstrip('.')}){variables}; {alone}") from error


def _advice(error: OSError, address: Address) -> str:
    text = str(error)
    if "AF_UNIX path length" in text:
        return "Ray's sockets lie in its temporary folder, whose name is too long: set RAY_TMPDIR to a short one such as /tmp"
    if isinstance(error, ConnectionError) and address.where:
        return (
            f"Start a cluster with 'ray start --head' and join it on its other nodes, or leave {address.named_by} out. A cluster that asks "
            "for a token wants RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH with that of its head node"
        )
    home, folder = Path("~").expanduser(), os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return (
        f"Ray keeps its token in {home}/.ray and its logs and sockets in {folder}/ray, both must be writable: set HOME (or "
        "RAY_AUTH_TOKEN_PATH to a file with a token) and RAY_TMPDIR to folders that are"
    )


def _first_sentence(error: Exception) -> str:
    return str(error).splitlines()[0].partition(". ")[0]
