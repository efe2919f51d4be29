"""Where the files of a store lie: a local folder, or a bucket of an object store. Knows keys and bytes, not what they mean.

A key is a relative path with slashes. Two implementations: a folder, which must sync and rename, here, and `bucket.Bucket`, which
has neither but creates and replaces whole objects at once. Bulk arrays are read by tensorstore from the same place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable
from urllib.parse import unquote

from kvstore.errors import KVStoreError, LeaseLostError, StoreFormatError

STAGING = ".staging"
"""Folder of a store for everything not yet committed; readers never look into it."""
CLAIM, SCRATCH = "claim-", "scratch-"
"""Beginnings of the folders in it that belong to the holder of a claim, whose name follows."""
MAX_RECORD_BYTES = 256 * 2**20
"""A record, a sample table or a tokenizer's file is no larger; only shards are."""
LEASES = f"{STAGING}/leases"
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

    @property
    def claim(self) -> str | None:
        """The claim whose holder writes through this object (`fenced`)."""

    def read(self, key: str, last_bytes: int | None = None, most_bytes: int | None = None) -> bytes:
        """The whole file, or its end.

        Args:
            most_bytes: a larger file is refused without being read.

        Raises:
            FileNotFoundError: there is none.
            StoreFormatError: it is no regular file, or too large.
        """

    def size(self, key: str) -> int | None:
        """Its size in bytes, None where there is none."""

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Everything below a folder that is no folder, in any order; none where there is no folder. Links to folders are not followed."""

    def write(self, key: str, content: bytes | Path, *, replace: bool) -> bool:
        """Make a file appear whole and durable; a local file given as content may be moved.

        Without `replace`, of several writers exactly one gets True; the others' content stays with them.
        """

    def delete(self, key: str) -> None:
        """Remove a file; it may be gone already."""

    def rename(self, key: str, to: str) -> None:
        """Give a file of this place another name; a link is renamed, not followed."""

    def fenced(self, claim: str) -> Storage:
        """The same place for the holder of a claim (`lease`): every write and delete fails once the claim has been taken over."""

    def open_claim(self, claim: str) -> None:
        """Let writes fenced by this claim pass."""

    def revoke_claim(self, claim: str) -> None:
        """Stop all writes fenced by this claim for good, those of a process that is frozen included."""

    def scratch(self, stem: str) -> contextlib.AbstractContextManager[Path]:
        """A fresh local folder from which `write` takes files cheaply; removed afterwards."""

    def tensorstore_spec(self, key: str) -> dict[str, Any]:
        """The `kvstore` member of a tensorstore spec for the folder `key`."""


def claim_key(claim: str) -> str:
    """Where the record of a claim lies (`lease`)."""
    return f"{LEASES}/{claim}.json"


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


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder on a disk or a shared file system.

    Files are read through symbolic links, as caches of downloads and of versioned data have them. Nothing is written or deleted
    behind a link: the folder it names is not the store's.
    """

    root: Path
    claim: str | None = None
    """Whoever writes through this object holds that claim; the last step of every write is a rename out of the claim's own folder,
    which is gone once the claim is."""

    @property
    def location(self) -> str:
        return str(self.root)

    def read(self, key: str, last_bytes: int | None = None, most_bytes: int | None = None) -> bytes:
        with self._opened(key) as file:
            size = os.fstat(file.fileno()).st_size
            if most_bytes is not None and size > most_bytes:
                raise StoreFormatError(
                    f"{self.root / key}: has {size:,} bytes, expected at most {most_bytes:,}; it was changed"
                )
            if last_bytes is not None:
                file.seek(max(size - last_bytes, 0))
            return file.read()

    def size(self, key: str) -> int | None:
        try:
            found = (self.root / key).stat()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def entries(self, prefix: str) -> Iterator[Entry]:
        for folder, folders, names in os.walk(self.root / prefix, onerror=_refuse_unreadable):
            for name in [*names, *(name for name in folders if Path(folder, name).is_symlink())]:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # others may clean up meanwhile
                    found = path.lstat()
                    if stat.S_ISLNK(found.st_mode):
                        with contextlib.suppress(OSError):  # a link to nothing is an entry still
                            found = path.stat()
                    size = found.st_size if stat.S_ISREG(found.st_mode) else 0
                    yield Entry(path.relative_to(self.root).as_posix(), size, found.st_mtime)

    def write(self, key: str, content: bytes | Path, *, replace: bool) -> bool:
        path = self.root / key
        self._refuse_links(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._staged(content) as staged:
            try:
                with staged.open("rb") as file:
                    os.fsync(file.fileno())
                if replace:
                    staged.replace(path)
                else:
                    os.link(staged, path)
            except FileExistsError:
                return False
            except FileNotFoundError:
                raise  # a claim that is gone has taken the staged file with it
            except OSError as error:
                raise named(error, path) from None
        _sync_folder(path.parent)
        return True

    def delete(self, key: str) -> None:
        self._refuse_links(key)
        path = self.root / key
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if self.claim is None:
                path.unlink()
                return
            taken = self._fresh("gone")
            with self._fence():
                if path.is_symlink() or path.exists():
                    path.rename(taken)
            if taken.is_dir() and not taken.is_symlink():
                shutil.rmtree(taken)
            else:
                taken.unlink()

    def rename(self, key: str, to: str) -> None:
        self._refuse_links(key)
        self._refuse_links(to)
        (self.root / key).rename(self.root / to)

    def delete_folder(self, key: str) -> None:
        """Remove a folder below the staging area with all that lies in it, but nothing behind a link."""
        self._refuse_links(f"{key}/any")
        shutil.rmtree(self.root / key, ignore_errors=True)

    @contextlib.contextmanager
    def scratch(self, stem: str) -> Iterator[Path]:
        self._refuse_links(f"{STAGING}/any")
        staging = self.root / STAGING
        staging.mkdir(parents=True, exist_ok=True)
        folder = staging / f"{SCRATCH}{self.claim or 'free'}-{stem}-{secrets.token_hex(8)}"
        folder.mkdir()
        try:
            with self._fence():
                yield folder
        except OSError as error:
            raise named(error, folder) from error.__cause__
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def fenced(self, claim: str) -> Folder:
        return dataclasses.replace(self, claim=claim)

    def open_claim(self, claim: str) -> None:
        self._refuse_links(f"{STAGING}/any")
        (self.root / STAGING / f"{CLAIM}{claim}").mkdir(parents=True)

    def revoke_claim(self, claim: str) -> None:
        self._refuse_links(f"{STAGING}/any")
        gone = self.root / STAGING / f"{SCRATCH}{claim}-revoked-{secrets.token_hex(8)}"
        # This rename is one step: after it every write of the holder fails, because its staged files are gone.
        with contextlib.suppress(FileNotFoundError):
            (self.root / STAGING / f"{CLAIM}{claim}").rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def tensorstore_spec(self, key: str) -> dict[str, Any]:
        return {"driver": "file", "path": f"{self.root / key}/"}

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[BinaryIO]:
        """A regular file; a pipe would keep its reader waiting, a device never ends."""
        path = self.root / key
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise StoreFormatError(f"{path}: {error.strerror}, expected a regular file; restore it") from error
            raise
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            os.close(descriptor)
            kind = next((name for holds, name in _KINDS if holds(mode)), "something else")
            raise StoreFormatError(f"{path}: is {kind}, expected a regular file; restore it")
        with os.fdopen(descriptor, "rb") as file:
            yield file

    def _refuse_links(self, key: str) -> None:
        """A linked folder leads out of the store; what lies there is not for us to write or delete."""
        path = self.root
        for part in Path(key).parts[:-1]:
            path /= part
            if path.is_symlink():
                raise StoreFormatError(
                    f"{path}: is a symbolic link to {path.readlink()}, expected a folder of the store's own; nothing is written or deleted "
                    "behind a link. Put the folder itself there"
                )

    def _fresh(self, stem: str) -> Path:
        """A name that is free, in the claim's folder, which must be there, or in the staging area, which is made."""
        staging = self.root / STAGING
        self._refuse_links(f"{STAGING}/{CLAIM}{self.claim}/any")
        if self.claim is not None:
            return staging / f"{CLAIM}{self.claim}" / f"{stem}-{secrets.token_hex(8)}"
        staging.mkdir(parents=True, exist_ok=True)
        return staging / f"{stem}-{secrets.token_hex(8)}"

    @contextlib.contextmanager
    def _staged(self, content: bytes | Path) -> Iterator[Path]:
        """A file to be renamed into place: content given as a file is used as it is unless a claim must be proved."""
        if isinstance(content, Path) and self.claim is None:
            yield content
            return
        staged = self._fresh("file")
        with self._fence():
            try:
                if isinstance(content, Path):
                    os.link(content, staged)
                else:
                    try:
                        staged.write_bytes(content)
                    except FileNotFoundError:
                        raise
                    except OSError as error:
                        raise named(error, staged) from None
                yield staged
            finally:
                staged.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _fence(self) -> Iterator[None]:
        """Tell a claim that was taken over from other errors."""
        try:
            yield
        except FileNotFoundError as error:
            if self.claim is None or (self.root / STAGING / f"{CLAIM}{self.claim}").is_dir():
                raise
            raise LeaseLostError(
                f"{self.root}: this process stood still for so long that its claim ran out and another writer took over; nothing of "
                "this step was written. Run the same command again"
            ) from error


def named(error: OSError, path: Path) -> OSError:
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
