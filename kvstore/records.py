"""Small JSON records on disk: canonical form, fingerprints, seals, atomic and create-once writes.

Knows files and bytes; does not know what the records mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kvstore.errors import StoreFormatError

STAGING = ".staging"
"""Folder of a store for everything not yet committed; readers never look into it."""


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


def write_sealed(path: Path, body: Mapping[str, Any], staging: Path) -> None:
    """Write a record with its own sha256, replacing the file at once or not at all."""
    _stage(body, staging).replace(path)
    fsync_dir(path.parent)


def create_sealed(path: Path, body: Mapping[str, Any], staging: Path) -> bool:
    """Write a sealed record unless one is there; of several writers exactly one gets True."""
    staged = _stage(body, staging)
    try:
        os.link(staged, path)
    except FileExistsError:
        return False
    finally:
        staged.unlink()
    fsync_dir(path.parent)
    return True


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a sealed record and verify its sha256.

    Raises:
        StoreFormatError: not JSON, not sealed, or changed since it was written.
    """
    try:
        record = json.loads(path.read_bytes())
        seal = record.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise StoreFormatError(f"{path}: not a sealed JSON record ({error!r}); it is truncated or damaged") from error
    actual = fingerprint(record)
    if seal != actual:
        raise StoreFormatError(f"{path}: sha256 of its content is {actual}, it says {seal}; it was changed or damaged")
    return dict(record)


def fsync_dir(path: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def staging_path(root: Path, stem: str) -> Path:
    """A fresh name inside the store's staging folder, which is made when missing."""
    staging = root / STAGING
    staging.mkdir(exist_ok=True)
    return staging / f"{stem}-{secrets.token_hex(8)}"


def _stage(body: Mapping[str, Any], staging: Path) -> Path:
    text = json.dumps({**body, "sha256": fingerprint(body)}, ensure_ascii=False, allow_nan=False, indent=1)
    with staging.open("x", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    return staging
