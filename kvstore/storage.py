"""Where the files of a store lie: a local folder, or a bucket of an object store. Knows keys and bytes, not what they mean.

A key is a relative path with slashes. Two implementations: a folder must sync and rename, a bucket has neither but creates and
replaces whole objects at once. Bulk arrays are read by tensorstore from the same place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable
from urllib.parse import urlsplit

from kvstore.errors import KVStoreError

STAGING = ".staging"
"""Folder of a store for everything not yet committed; readers never look into it."""
_TENSORSTORE_DRIVERS = {"s3": "s3", "gs": "gcs"}


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
    AWS_REGION, AWS_ENDPOINT_URL and so on).

    Raises:
        KVStoreError: a URL of another scheme.
    """
    if not isinstance(location, (str, Path)):
        return location
    text = str(location)
    if "://" not in text:
        # tensorstore takes no '..', and workers may run elsewhere
        return Folder(Path(os.path.abspath(Path(text).expanduser())))  # noqa: PTH100  # resolve() would follow links
    url = urlsplit(text)
    if url.scheme == "file":
        return Folder(Path(url.path))
    if url.scheme not in _TENSORSTORE_DRIVERS or not url.netloc or not url.path.strip("/"):
        raise KVStoreError(f"store: got {text!r}, expected a folder, s3://bucket/prefix or gs://bucket/prefix")
    return Bucket(url.scheme, url.netloc, url.path.strip("/"))


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
            return (self.root / key).stat().st_size
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
        except OSError:
            staged.unlink(missing_ok=True)
            raise
        return staged


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A prefix in an object store, by obstore: conditional puts, retries with growing pauses."""

    scheme: str
    bucket: str
    prefix: str

    @property
    def location(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}"

    def read(self, key: str, last_bytes: int | None = None) -> bytes:
        import obstore

        with self._errors(key):
            options = None if last_bytes is None else {"range": {"suffix": last_bytes}}
            return bytes(obstore.get(self._client, key, options=options).bytes())  # type: ignore[arg-type]  # a suffix range

    def size(self, key: str) -> int | None:
        import obstore

        try:
            with self._errors(key):
                return int(obstore.head(self._client, key)["size"])
        except FileNotFoundError:
            return None

    def entries(self, prefix: str) -> Iterator[Entry]:
        import obstore

        with self._errors(prefix):
            for page in obstore.list(self._client, prefix):
                for found in page:
                    yield Entry(str(found["path"]), int(found["size"]), found["last_modified"].timestamp())

    def write(self, key: str, content: bytes | Path, *, replace: bool) -> bool:
        import obstore

        body = content.read_bytes() if isinstance(content, Path) else content
        try:
            with self._errors(key):
                # One request: an upload in parts cannot be made conditional.
                obstore.put(self._client, key, body, mode="overwrite" if replace else "create", use_multipart=False)
        except FileExistsError:
            return False
        return True

    def delete(self, key: str) -> None:
        import obstore

        with contextlib.suppress(FileNotFoundError), self._errors(key):
            obstore.delete(self._client, key)

    @contextlib.contextmanager
    def scratch(self, stem: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix=f"kvpipe-{stem}-") as folder:
            yield Path(folder)

    def tensorstore_spec(self, key: str) -> dict[str, Any]:
        spec: dict[str, Any] = {
            "driver": _TENSORSTORE_DRIVERS[self.scheme],
            "bucket": self.bucket,
            "path": f"{self.prefix}/{key}/",
        }
        if self.scheme == "s3":
            if "AWS_ACCESS_KEY_ID" in os.environ:
                spec["aws_credentials"] = {"type": "environment"}  # else it looks for files, and says so on stderr
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            spec |= {name: value for name, value in (("endpoint", endpoint), ("aws_region", region)) if value}
        return spec

    @property
    def _client(self) -> Any:
        return _client(self.location)

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Turn what the client raises into the errors a folder gives."""
        from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PreconditionError

        where = f"{self.location}/{key}"
        try:
            yield
        except (NotFoundError, FileNotFoundError) as error:
            raise FileNotFoundError(f"{where} does not exist") from error
        except (AlreadyExistsError, PreconditionError, FileExistsError) as error:
            raise FileExistsError(f"{where} exists") from error
        except (BaseError, OSError) as error:
            raise OSError(
                f"{where}: {str(error).splitlines()[0]}; check the bucket, the credentials and AWS_ENDPOINT_URL in the "
                "environment. What is committed is kept"
            ) from error


@functools.lru_cache(maxsize=16)
def _client(location: str) -> Any:
    """One connection pool per store and process."""
    from obstore.store import from_url

    plain = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return from_url(location, client_options={"allow_http": plain.startswith("http://")})


def _refuse_unreadable(error: OSError) -> None:
    """A folder may be absent, but one that cannot be listed must not look empty."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _sync_folder(path: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
