"""Where the files of a store lie: a local folder, or a bucket of an object store. Knows keys and bytes, not what they mean.

A key is a relative path with slashes. Two implementations: a folder, which must sync and rename, here, and `bucket.Bucket`, which
has neither but creates and replaces whole objects at once. Bulk arrays are read by tensorstore from the same place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable
from urllib.parse import unquote

from kvstore.errors import KVStoreError

STAGING = ".staging"
"""Folder of a store for everything not yet committed; readers never look into it."""
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):/(?P<rest>/?.*)")
_BUCKET_SCHEMES = ("s3", "gs")
_PREFIX = re.compile(r"[A-Za-z0-9!_.'()=,+@ -]+(/[A-Za-z0-9!_.'()=,+@ -]+)*")
"""What every tool that reads a bucket takes as it stands; the rest is escaped by some and not by others."""


class Entry(NamedTuple):
    """One file of a store."""

    key: str
    size_bytes: int
    modified_s: float
    """Seconds since 1970, by the clock of whatever holds the files."""


@runtime_checkable
class Storage(Protocol):
    """What the store needs of a place; all of it safe between threads and processes."""

    @property
    def location(self) -> str:
        """Path or URL: what `locate` turns into this."""

    def read(self, key: str, last_bytes: int | None = None) -> bytes:
        """The whole file, or its end; FileNotFoundError where there is none."""

    def size(self, key: str) -> int | None:
        """Its size in bytes, None where there is none."""

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Every file below a folder, in any order; none where there is no folder."""

    def write(self, key: str, content: bytes | Path, *, replace: bool) -> bool:
        """Make a file appear whole and durable; a local file given as content may be moved.

        Without `replace`, of several writers exactly one gets True; the others' content stays with them.
        """

    def delete(self, key: str) -> None:
        """Remove a file; it may be gone already."""

    def scratch(self, stem: str) -> contextlib.AbstractContextManager[Path]:
        """A fresh local folder from which `write` takes files cheaply; removed afterwards."""

    def tensorstore_spec(self, key: str) -> dict[str, Any]:
        """The `kvstore` member of a tensorstore spec for the folder `key`."""


def locate(location: str | Path | Storage) -> Storage:
    """The storage at a path, at `s3://bucket/prefix` or at `gs://bucket/prefix`.

    Buckets take credentials, region and endpoint from the environment, as the vendors' tools do (AWS_ACCESS_KEY_ID,
    AWS_REGION, AWS_ENDPOINT_URL and so on); failing requests are repeated for KVPIPE_RETRY_S seconds.

    Raises:
        KVStoreError: a URL of another scheme, or one that programs would read differently.
    """
    if not isinstance(location, (str, Path)):
        return location
    text = str(location)
    url = _URL.fullmatch(text)
    scheme, rest = (url["scheme"].lower(), url["rest"]) if url else ("", "")
    if url is None or ("://" not in text and scheme not in (*_BUCKET_SCHEMES, "file")):
        return Folder(_absolute(Path(text).expanduser()))
    host, _, path = rest.removeprefix("/").partition("/")
    if scheme == "file" and host in ("", "localhost") and rest.startswith("/") and path:
        return Folder(_absolute(Path(f"/{unquote(path)}")))
    prefix = path.strip("/")
    plain = _PREFIX.fullmatch(prefix) and not {".", ".."} & {*prefix.split("/")}
    if scheme in _BUCKET_SCHEMES and rest.startswith("/") and host and plain:
        from kvstore.bucket import Bucket

        return Bucket(scheme, host, prefix)
    raise KVStoreError(
        f"store: got {text!r}, expected a folder, s3://bucket/prefix or gs://bucket/prefix, the prefix of letters, digits, spaces "
        "and !_.'()=,+@- between single slashes"
    )


def _absolute(path: Path) -> Path:
    """Without '..', which tensorstore does not take, and the same on workers that run elsewhere; links stay what they are."""
    return Path(os.path.abspath(path))  # noqa: PTH100  # Path.absolute keeps '..', Path.resolve follows links


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder on a disk or a shared file system."""

    root: Path

    @property
    def location(self) -> str:
        return str(self.root)

    def read(self, key: str, last_bytes: int | None = None) -> bytes:
        with (self.root / key).open("rb") as file:
            if last_bytes is not None:
                file.seek(max(os.fstat(file.fileno()).st_size - last_bytes, 0))
            return file.read()

    def size(self, key: str) -> int | None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = (self.root / key).stat()
            return found.st_size if stat.S_ISREG(found.st_mode) else None
        return None

    def entries(self, prefix: str) -> Iterator[Entry]:
        for folder, _, names in os.walk(self.root / prefix, onerror=_refuse_unreadable):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # others may clean up meanwhile
                    found = path.stat()
                    yield Entry(path.relative_to(self.root).as_posix(), found.st_size, found.st_mtime)

    def write(self, key: str, content: bytes | Path, *, replace: bool) -> bool:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = content if isinstance(content, Path) else self._stage(content)
        try:
            with staged.open("rb") as file:
                os.fsync(file.fileno())
            if replace:
                staged.replace(path)
            else:
                os.link(staged, path)
        except FileExistsError:
            return False
        except OSError as error:
            raise _named(error, path) from None
        finally:
            if not isinstance(content, Path):
                staged.unlink(missing_ok=True)
        _sync_folder(path.parent)
        return True

    def delete(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def scratch(self, stem: str) -> Iterator[Path]:
        folder = self._fresh(stem)
        folder.mkdir()
        try:
            yield folder
        except OSError as error:
            raise _named(error, folder) from error.__cause__
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def tensorstore_spec(self, key: str) -> dict[str, Any]:
        return {"driver": "file", "path": f"{self.root / key}/"}

    def _fresh(self, stem: str) -> Path:
        staging = self.root / STAGING
        staging.mkdir(parents=True, exist_ok=True)
        return staging / f"{stem}-{secrets.token_hex(8)}"

    def _stage(self, content: bytes) -> Path:
        staged = self._fresh("file")
        try:
            staged.write_bytes(content)
        except OSError as error:
            staged.unlink(missing_ok=True)
            raise _named(error, staged) from None
        return staged


def _named(error: OSError, path: Path) -> OSError:
    """The same error with the path it is about: the system names no file where a disk is full."""
    if error.errno is not None and error.filename is None:
        error.filename = str(path)
    return error


def _refuse_unreadable(error: OSError) -> None:
    """A folder may be absent, but one that cannot be listed must not look empty."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _sync_folder(path: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
