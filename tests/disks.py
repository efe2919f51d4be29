"""Real disks of a few megabytes, for programs to fill, and folders that are mounted for reading only."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]

LEAVE = """
import errno
def leave(disk, kib):
    "Fill a disk but for so many KiB."
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
        file.truncate(max(file.tell() - 1024 * kib, 0))
"""
"""For scripts: fills a disk but for some room."""


def with_mount(mount: Sequence[str | Path], command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Run a command that alone sees something mounted; skips the test where nothing can be."""
    mounting, running = shlex.join(map(str, mount)), shlex.join(map(str, command))
    if not shutil.which("unshare") or subprocess.run([*_NAMESPACE, "sh", "-c", mounting], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = f"{mounting} && exec {running}"
    return subprocess.run([*_NAMESPACE, "sh", "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT)


def on_a_small_disk(disk: Path, megabytes: int, script: str, *arguments: str | Path) -> str:
    """What a Python script prints while a disk of so many megabytes lies at `disk`, its first argument."""
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", disk]
    done = with_mount(mount, [sys.executable, "-c", LEAVE + script, disk, *arguments])
    assert done.returncode == 0, done.stderr
    return done.stdout
