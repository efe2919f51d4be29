"""A process that may open few files is told so; the store is not called damaged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.disks import ROOT
from tests.stores import random_source, small_spec, write_store

READ = """
import os, sys, resource
from kvstore import open_store
store = open_store(sys.argv[1])
store.read(range(len(store)))
kept = [os.open(os.devnull, os.O_RDONLY) for _ in range(10)]
resource.setrlimit(resource.RLIMIT_NOFILE, (max(kept) + 1,) * 2)
try:
    store.read(range(len(store)))
except OSError as error:
    assert not isinstance(error, ValueError), repr(error)
    print(error)
for descriptor in kept:
    os.close(descriptor)
assert len(store.read(range(len(store))).input_ids) == 256
print("read again")
"""


def test_too_few_open_files_are_no_damage(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", random_source(small_spec(), [64] * 4), "raw")
    done = subprocess.run([sys.executable, "-c", READ, str(store)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    told, again = done.stdout.splitlines()
    assert told.startswith(f"{store}: reading 4 samples at once takes more open files than this process may have")
    assert "raise the limit (ulimit -n" in told
    assert again == "read again"
