"""Errors of the operating system, in any command: one line with the path and the next step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvstore import open_store
from tests.disks import ROOT, with_mount
from tests.stores import random_source, small_spec, write_store

COMMANDS = """
import contextlib, io, json, sys
from pathlib import Path
from pipeline.cli import main

store, other, ids = sys.argv[1:]
def run(*arguments):
    told = io.StringIO()
    sys.argv = ["kvpipe", *arguments]
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0), told.getvalue()
    return 0, told.getvalue()

for arguments in (["verify", store, "--deep"], ["inspect", store], ["status", store]):
    status, told = run(*arguments)
    assert status == 0, told
for arguments in (
    ["repair", store],
    ["drop", store, "--ids", ids],
    ["recode", store, "--codec", "q8", "--out", f"{store}/recoded"],
    ["merge", store, other, "--out", f"{store}/merged"],
):
    status, told = run(*arguments)
    print(status, *[line.partition("error: ")[2] for line in told.splitlines() if "error: " in line], sep="|")
    assert "Traceback" not in told, told
"""


@pytest.mark.slow
def test_a_read_only_store_is_looked_at_and_what_would_write_says_so_in_one_line(tmp_path: Path) -> None:
    source = random_source(small_spec(), [64, 40, 64])
    store, other = write_store(tmp_path / "store", source, "raw"), write_store(tmp_path / "other", source, "raw")
    (tmp_path / "ids").write_text(open_store(store).samples.ids[0])
    mount = ["sh", "-c", 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0"', store]
    done = with_mount(mount, [sys.executable, "-c", COMMANDS, store, other, tmp_path / "ids"])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert line.startswith(f"1|{store}/")
        assert line.endswith(
            ": Read-only file system; mount it for writing, or choose another place, and run the same command again: what is "
            "committed or saved is kept"
        )


def test_a_limit_of_file_sizes_is_named(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", random_source(small_spec(), [2000]), "raw")
    limited = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "from pipeline.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", limited, "recode", str(store), "--codec", "q8", "--out", str(tmp_path / "recoded")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "error: " in last
    assert str(tmp_path / "recoded") in last
    assert "File too large" in last
