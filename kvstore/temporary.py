"""Temporary folders that killed processes do not leave for good.

The process that made a folder holds a lock on it, which the system releases when the process ends, even by SIGKILL. Making a folder
first removes the folders whose lock nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX, _LOCK = "kvpipe-", "lock"


@contextlib.contextmanager
def temporary_folder(what: str) -> Iterator[Path]:
    """A fresh empty folder on this machine, removed afterwards; where this process is killed, by the next one that calls this."""
    _sweep(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{what}-", ignore_cleanup_errors=True) as name:
        unlocked, folder = Path(name, "unlocked"), Path(name, "files")
        folder.mkdir()
        descriptor = os.open(unlocked, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            with contextlib.suppress(OSError):  # a file system without locks; there nothing can be taken for left behind
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            unlocked.rename(Path(name, _LOCK))
            yield folder
        finally:
            os.close(descriptor)


def _sweep(place: Path) -> None:
    for lock in place.glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError):
            if lock.parent.is_symlink() or lock.parent.lstat().st_uid != os.getuid():
                continue
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(descriptor)
