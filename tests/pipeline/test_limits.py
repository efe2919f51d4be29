"""What a machine does not allow: many open files, writing, room. Commands do without it, or say in one line what they need."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore import open_store
from tests.disks import ROOT, on_a_small_disk, with_mount
from tests.pipeline.conftest import Bench, content

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MAIN = """
import contextlib, io, json, sys
from pathlib import Path
from pipeline.cli import main

def kvpipe(arguments):
    "Exit status and output of one command."
    told, before = io.StringIO(), sys.argv
    sys.argv = ["kvpipe", *arguments]
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        try:
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
    sys.argv = before
    return status, told.getvalue()

def error_of(arguments):
    "The one line of a command that fails."
    status, told = kvpipe(arguments)
    lines = [line for line in told.splitlines() if "error: " in line]
    assert (status, len(lines)) == (1, 1) and "Traceback" not in told, told
    return lines[0].partition("error: ")[2]

def works(arguments):
    status, told = kvpipe(arguments)
    assert status == 0, (arguments, told)
"""
"""For scripts that run commands one after the other in a process, which under limits of its own is not forked from others."""


def run_script(script: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-c", MAIN + script, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


FEW_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
for arguments in json.loads(sys.argv[1]):
    works(arguments)
from kvstore import open_store
from training.kv_loader import KVLoader
store = open_store(sys.argv[2])
assert len(store.read(range(len(store))).input_ids) > 0
try:
    assert sum(1 for _ in KVLoader(store, batch_size=16, layers=[0, 1], device="cpu")) > 0
except OSError as error:  # it reads several batches at a time
    told = str(error)
    assert not isinstance(error, ValueError) and "more open files than this process may have" in told and "ulimit -n" in told, told
"""


def test_64_open_files_suffice_for_a_store_of_more_files(bench: Bench, tmp_path: Path) -> None:
    assert sum(1 for path in (bench.store / "kv.zarr").rglob("c/**/*") if path.is_file()) > 64
    commands = [
        bench.extract(tmp_path / "store"),
        bench.append(tmp_path / "store"),
        ["verify", str(bench.store), "--deep"],
        ["inspect", str(bench.store)],
        ["status", str(bench.store)],
        bench.align(tmp_path / "aligned"),
        bench.train(tmp_path / "run"),
    ]
    run_script(FEW_FILES, json.dumps(commands), bench.store)
    whole = content(bench.store)
    assert {name: digest for name, digest in content(tmp_path / "store").items() if name in whole} == {
        **whole,
        **{name: digest for name, digest in content(tmp_path / "store").items() if name.endswith("zarr.json")},
    }


READ_ONLY = """
import os
store, out, read, refused = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
try:
    Path(store, "x").touch()
except OSError:
    pass
else:
    raise AssertionError("it can be written")
for arguments in read:
    works(arguments)
for arguments in refused:
    told = error_of(arguments)
    assert store in told and ("Read-only file system" in told), told
    assert "choose another" in told, told
    print(told)
from kvstore import open_store
from training.kv_loader import KVLoader
opened = open_store(store)
assert len(opened.read(range(len(opened))).input_ids) > 0
assert opened.tokenizer_path is not None
next(iter(KVLoader(opened, batch_size=16, layers=[0], device="cpu")))
"""


def commands_on(store: Path, out: Path, bench: Bench) -> tuple[str, str]:
    """Those that only read, and those that cannot."""
    (out / "ids.txt").write_text(f"{open_store(bench.store).samples.ids[3]}\n")
    place = str(store)
    read = [
        ["verify", place, "--deep"],
        ["inspect", place],
        ["status", place],
        bench.train(out / "run", store),
        ["eval", str(out / "run" / "model"), "--data", str(bench.more), "--seq-len", "256", "--max-tokens", "4000"],
        bench.align(out / "aligned", store),
        ["recode", place, "--codec", "q4z", "--out", str(out / "recoded")],
        bench.extract(out / "more", "--calibration", place, data=bench.more),
    ]
    refused = [
        ["repair", place],
        ["drop", place, "--ids", str(out / "ids.txt")],
        bench.append(store),
        bench.extract(store),
        bench.align(store / "aligned"),
        bench.train(store / "run"),
    ]
    return json.dumps(read), json.dumps(refused)


def test_a_store_mounted_for_reading_only_is_read_and_what_would_write_says_so(bench: Bench, tmp_path: Path) -> None:
    store, out = Path(shutil.copytree(bench.store, tmp_path / "store")), tmp_path / "out"
    out.mkdir()
    mount = f"mount --bind {shlex.quote(str(store))} {shlex.quote(str(store))} && mount -o remount,ro,bind {shlex.quote(str(store))}"
    command = [sys.executable, "-c", MAIN + READ_ONLY, store, out, *commands_on(store, out, bench)]
    done = with_mount(["sh", "-c", mount], command)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6
    assert content(store) == content(bench.store)


FULL = """
import shutil
from tests.pipeline.conftest import content
disk, arguments, started, whole = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
expected, refused, before = content(whole), 0, None
out = disk / "store"
for kib in map(int, sys.argv[5:]):
    if started:
        shutil.copytree(started, out)
        before = content(out)
    leave(disk, kib)
    told = error_of(arguments)
    refused += 1
    assert str(disk) in told and "o space left" in told, told
    assert "free room" in told or "mend that (space" in told, told
    if (out / "manifest.json").exists():
        from kvstore.verify import verify_store
        report = verify_store(str(out), deep=True)
        assert report.ok, report.problems
        if before:
            seen = content(out)
            assert all(seen[name] == digest for name, digest in before.items() if not name.endswith("zarr.json"))
    (disk / "filler").unlink()
    works(arguments)
    assert content(out) == expected, kib
    shutil.rmtree(out)
print(refused)
"""


def test_an_append_whose_disk_fills_up_says_so_and_goes_on_when_there_is_room(bench: Bench, tmp_path: Path) -> None:
    kib = [0, 6, *range(20, 800, 80)]
    whole = Path(shutil.copytree(bench.store, tmp_path / "whole"))
    run_script("works(json.loads(sys.argv[1]))", json.dumps(bench.append(whole)))
    append = json.dumps(bench.append(tmp_path / "disk" / "store"))
    told = on_a_small_disk(tmp_path / "disk", 8, MAIN + FULL, append, bench.store, whole, *map(str, kib))
    assert int(told) == len(kib)
    print(f"\nfull at {told.strip()} places, each gone on with to an equal store")


def test_an_aligning_whose_disk_fills_up_says_so_and_goes_on_when_there_is_room(bench: Bench, tmp_path: Path) -> None:
    kib = [0, 6, *range(20, 700, 70)]
    run_script("works(json.loads(sys.argv[1]))", json.dumps(bench.align(tmp_path / "whole")))
    align = json.dumps(bench.align(tmp_path / "disk" / "store"))
    told = on_a_small_disk(tmp_path / "disk", 8, MAIN + FULL, align, "", tmp_path / "whole", *map(str, kib))
    assert int(told) == len(kib)
    print(f"\nfull at {told.strip()} places, each gone on with to an equal store")
