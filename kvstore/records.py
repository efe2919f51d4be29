"""Small JSON records: canonical form, fingerprints, differences, and seals that show any change. Knows not what they mean."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from kvstore.errors import StoreFormatError
from kvstore.storage import Storage


class Difference(NamedTuple):
    """One field in which two records differ; a missing field is None."""

    field: str
    got: Any
    expected: Any

    def __str__(self) -> str:
        return f"{self.field}: got {_shown(self.got)}, expected {_shown(self.expected)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 100 else f"{text[:97]}..."


def canonical_json(record: Any) -> str:
    """The one JSON text of a record: keys sorted, no spaces, shortest round-trip floats, no NaN."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def plain(record: Any) -> Any:
    """The record as it comes back from JSON: tuples are lists."""
    return json.loads(canonical_json(record))


def fingerprint(record: Any) -> str:
    """sha256 of the canonical JSON, in hex: the same on every machine and Python version."""
    return hashlib.sha256(canonical_json(record).encode()).hexdigest()


def differences(got: Any, expected: Any, field: str = "") -> Iterator[Difference]:
    """The leaves in which two JSON records differ, named by dotted path."""
    if isinstance(got, Mapping) and isinstance(expected, Mapping):
        for key in sorted(got.keys() | expected.keys()):
            yield from differences(got.get(key), expected.get(key), f"{field}.{key}" if field else key)
    elif isinstance(got, list) and isinstance(expected, list) and len(got) == len(expected):
        for index, (one, other) in enumerate(zip(got, expected, strict=True)):
            yield from differences(one, other, f"{field}[{index}]")
    elif got != expected:
        yield Difference(field, got, expected)


def write_sealed(storage: Storage, key: str, body: Mapping[str, Any]) -> None:
    """Write a record with its own sha256, replacing the file at once or not at all."""
    storage.write(key, _sealed(body), replace=True)


def create_sealed(storage: Storage, key: str, body: Mapping[str, Any]) -> bool:
    """Write a sealed record unless one is there; of several writers exactly one gets True."""
    return storage.write(key, _sealed(body), replace=False)


def read_sealed(storage: Storage, key: str) -> dict[str, Any]:
    """Read a sealed record and verify its sha256.

    Raises:
        FileNotFoundError: there is none.
        StoreFormatError: not JSON, not sealed, or changed since it was written.
    """
    where = f"{storage.location}/{key}"
    content = storage.read(key)
    try:
        record = json.loads(content)
        seal = record.pop("sha256")
        actual = fingerprint(record)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise StoreFormatError(f"{where}: not a sealed JSON record ({error!r}); it is truncated or damaged") from error
    if seal != actual:
        raise StoreFormatError(f"{where}: sha256 of its content is {actual}, it says {seal}; it was changed or damaged")
    return dict(record)


def bytes_sha256(content: bytes | mmap.mmap) -> str:
    """sha256 in hex."""
    return hashlib.sha256(content).hexdigest()


def _sealed(body: Mapping[str, Any]) -> bytes:
    text = json.dumps({**body, "sha256": fingerprint(body)}, ensure_ascii=False, allow_nan=False, indent=1)
    return f"{text}\n".encode()
