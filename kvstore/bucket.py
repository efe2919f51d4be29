"""A store in a bucket: S3 and what speaks its language, or Google Cloud Storage. Knows keys and bytes, not what they mean.

Objects appear whole, so nothing is staged; creating if absent is a conditional put. Every request is repeated with growing pauses
and given up after a while; tensorstore, which reads the bulk, is set to the same patience.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import os
import random
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from kvstore.errors import KVStoreError, LeaseLostError, StoreFormatError
from kvstore.storage import Entry, claim_key
from kvstore.temporary import temporary_folder

TENSORSTORE_DRIVERS = {"s3": "s3", "gs": "gcs"}
RETRY_S = 60.0
"""How long failing requests are repeated, unless KVPIPE_RETRY_S says otherwise: services ask for seconds, outages last hours."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
_CONNECT_S, _STALL_S = 5, 30
_UPLOAD_S, _LARGE_BYTES = 600, 8 * 2**20
"""Nothing comes back while a large object goes up: at 0.5 MB/s the largest shard takes this long."""
_WRITTEN_BY = "kvpipe-write"
"""Metadata of a created object: tells a writer that lost the answer whether the object is its own."""

Answer = TypeVar("Answer")


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A prefix in an object store, by obstore; pickles as its name, the environment gives credentials and endpoint."""

    scheme: str
    bucket: str
    prefix: str
    claim: str | None = None
    """Whoever writes through this object holds that claim. It is looked up before every write, and an object is replaced only as long as
    it is the one that was there then (a conditional put)."""

    @property
    def location(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}"

    def read(self, key: str, last_bytes: int | None = None, most_bytes: int | None = None) -> bytes:
        import obstore

        options: Any = None if last_bytes is None else {"range": {"suffix": last_bytes}}

        def get(client: Any) -> bytes:
            found = obstore.get(client, key, options=options)
            if most_bytes is not None and found.meta["size"] > most_bytes:
                raise StoreFormatError(
                    f"{self.location}/{key}: has {found.meta['size']:,} bytes, expected at most {most_bytes:,}; it was changed"
                )
            return bytes(found.bytes())

        try:
            return self._request(key, get)
        except FileNotFoundError:
            raise
        except OSError:
            if last_bytes is not None and self.size(key) == 0:
                return b""  # an empty object has no range
            raise

    def size(self, key: str) -> int | None:
        import obstore

        try:
            return int(self._request(key, lambda client: obstore.head(client, key))["size"])
        except FileNotFoundError:
            return None

    def entries(self, prefix: str) -> Iterator[Entry]:
        import obstore

        pages = self._request(prefix, lambda client: list(obstore.list(client, prefix)))
        for page in pages:
            for found in page:
                yield Entry(str(found["path"]), int(found["size"]), found["last_modified"].timestamp())

    def write(self, key: str, content: bytes | Path, *, replace: bool) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PreconditionError

        body = content.read_bytes() if isinstance(content, Path) else content
        ours = secrets.token_hex(16)
        fenced = replace and self.claim is not None
        mode: Any = "overwrite" if replace and not fenced else "create"
        if fenced and (there := self._version(key)) is not None:
            mode = there
        self._prove()

        def put(client: Any) -> bool:
            # One request: an upload in parts cannot be made conditional.
            try:
                attributes = None if mode == "overwrite" else {_WRITTEN_BY: ours}
                obstore.put(client, key, body, mode=mode, use_multipart=False, attributes=attributes)
            except (AlreadyExistsError, PreconditionError, FileExistsError):
                # Perhaps by ourselves: of a repeated request the first may have got through and its answer been lost.
                return obstore.get(client, key, options={"head": True}).attributes.get(_WRITTEN_BY) == ours
            except (NotFoundError, FileNotFoundError):
                if isinstance(mode, str):
                    raise
                return False  # what was to be replaced has been deleted since
            except BaseError as error:
                if isinstance(mode, str) or "NotImplemented" not in str(error):
                    raise
                obstore.put(client, key, body, mode="overwrite", use_multipart=False)  # a server without conditional puts
            return True

        written = self._request(
            key, put, stall_s=_UPLOAD_S if len(body) > _LARGE_BYTES else _STALL_S, may_be_missing=not replace
        )
        if fenced and not written:
            raise self._lost()
        return written

    def delete(self, key: str) -> None:
        import obstore

        self._prove()
        with contextlib.suppress(FileNotFoundError):
            self._request(key, lambda client: obstore.delete(client, key))

    def rename(self, key: str, to: str) -> None:
        self.write(to, self.read(key), replace=True)
        self.delete(key)

    def fenced(self, claim: str) -> Bucket:
        return dataclasses.replace(self, claim=claim)

    def open_claim(self, claim: str) -> None:
        """The claim's own object is what `_prove` looks for."""

    def revoke_claim(self, claim: str) -> None:
        dataclasses.replace(self, claim=None).delete(claim_key(claim))

    def _version(self, key: str) -> Any:
        """What a conditional put needs to replace just this object, None where there is none."""
        import obstore

        try:
            found = self._request(key, lambda client: obstore.head(client, key))
        except FileNotFoundError:
            return None
        return {name: found[name] for name in ("e_tag", "version") if found.get(name)}

    def _prove(self) -> None:
        """Refuse to go on for a claim that was taken over."""
        if self.claim is not None and self.size(claim_key(self.claim)) is None:
            raise self._lost()

    def _lost(self) -> LeaseLostError:
        return LeaseLostError(
            f"{self.location}: this process stood still for so long that its claim ran out and another writer took over; nothing of this "
            "step was written. Run the same command again"
        )

    @contextlib.contextmanager
    def scratch(self, stem: str) -> Iterator[Path]:
        with temporary_folder(stem) as folder:
            yield folder

    def tensorstore_spec(self, key: str) -> dict[str, Any]:
        driver = TENSORSTORE_DRIVERS[self.scheme]
        spec: dict[str, Any] = {
            "driver": driver,
            "bucket": self.bucket,
            "path": f"{self.prefix}/{key}/",
            f"{driver}_request_retries": {
                "max_retries": _num_retries(_retry_s()),
                "initial_delay": f"{_FIRST_PAUSE_S:g}s",
                "max_delay": f"{_LONGEST_PAUSE_S:g}s",
            },
        }
        # Read by tensorstore before its first request; without them it waits for ever for a server that has gone silent.
        os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", str(_CONNECT_S))
        os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(_STALL_S))
        os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
        if self.scheme == "s3":
            if os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true"):
                spec["aws_credentials"] = {"type": "anonymous"}
            elif "AWS_ACCESS_KEY_ID" in os.environ:
                spec["aws_credentials"] = {"type": "environment"}  # else it looks for files, and says so on stderr
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            spec |= {name: value for name, value in (("endpoint", _endpoint()), ("aws_region", region)) if value}
        return spec

    def _request(
        self, key: str, ask: Callable[[Any], Answer], *, stall_s: int = _STALL_S, may_be_missing: bool = False
    ) -> Answer:
        """Ask until there is an answer or patience ends, in the errors a folder gives.

        The client itself repeats refusals (5xx) and what surely was not carried out; a lost or cut answer is left to us.

        Args:
            may_be_missing: a put refused as there already, of which nothing is there: two met, and the service wants it repeated.
        """
        from obstore.exceptions import BaseError

        patience = _retry_s()
        deadline, pause = time.monotonic() + patience, _FIRST_PAUSE_S
        while True:
            try:
                return ask(_client(dataclasses.replace(self, claim=None), _endpoint(), patience, stall_s))
            except (BaseError, OSError) as error:
                text = str(error)
                missing = isinstance(error, FileNotFoundError) or type(error).__name__ == "NotFoundError"
                again = (missing and may_be_missing and "NoSuchBucket" not in text) or "HTTP error" in text
                if not again or time.monotonic() + pause > deadline:
                    raise self._plain(key, text, missing=missing and not may_be_missing) from error
            time.sleep(random.uniform(pause / 2, pause))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _plain(self, key: str, text: str, *, missing: bool) -> OSError:
        where = f"{self.location}/{key}"
        if "NoSuchBucket" in text:
            return OSError(f"{where}: there is no bucket {self.bucket!r} at {_endpoint() or 'AWS'}; make it, or mend the name")
        if missing:
            return FileNotFoundError(f"{where} does not exist")
        if "/latest/api/token" in text or "/latest/meta-data" in text:
            return OSError(
                f"{where}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (this is no machine of Amazon's, whose "
                "role would do), or AWS_SKIP_SIGNATURE=true for a public bucket"
            )
        return OSError(
            f"{where}: {text.splitlines()[0].strip()}; check the bucket, the credentials and AWS_ENDPOINT_URL in the environment. "
            "What is committed is kept"
        )


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _retry_s() -> float:
    text = os.environ.get("KVPIPE_RETRY_S", "")
    try:
        seconds = float(text or RETRY_S)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 3600:
        raise KVStoreError(f"KVPIPE_RETRY_S: got {text!r}, expected seconds from 0 to 3600")
    return seconds


def _num_retries(seconds: float) -> int:
    """How many doubling pauses fit."""
    pause, total, count = _FIRST_PAUSE_S, 0.0, 0
    while (total := total + pause) <= seconds:
        pause, count = min(2 * pause, _LONGEST_PAUSE_S), count + 1
    return count


@functools.lru_cache(maxsize=16)
def _client(bucket: Bucket, endpoint: str | None, patience_s: float, stall_s: int) -> Any:
    """One connection pool per store and process."""
    from obstore.store import GCSStore, S3Store

    settings: dict[str, Any] = {
        "prefix": bucket.prefix,
        "client_options": {
            "connect_timeout": f"{_CONNECT_S}s",
            "read_timeout": f"{stall_s}s",
            "timeout": "1h",
            "allow_http": (endpoint or "").startswith("http://"),
        },
        "retry_config": {
            "max_retries": 1000,
            "retry_timeout": datetime.timedelta(seconds=patience_s),
            "backoff": {
                "init_backoff": datetime.timedelta(seconds=_FIRST_PAUSE_S),
                "max_backoff": datetime.timedelta(seconds=_LONGEST_PAUSE_S),
                "base": 2,
            },
        },
    }
    if bucket.scheme == "gs":
        return GCSStore(bucket.bucket, **settings)
    if endpoint:
        settings["endpoint"] = endpoint
    return S3Store(bucket.bucket, **settings)
