"""Small JSON records: canonical form, fingerprints, differences, seals that show any change, and parsing into typed, bounded values.

A seal proves that a record is whole, not who wrote it: everything read from a store passes `parse`, which refuses fields of another
type or range. Knows how records are checked, not what they mean.
"""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

import pydantic

from kvstore.errors import StoreFormatError
from kvstore.storage import MAX_RECORD_BYTES, Storage

Record = TypeVar("Record")

STRICT = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""For `__pydantic_config__` of every record: no field of another type, none that is unknown, no NaN."""
INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1
Sha256 = Annotated[str, pydantic.StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""In hex."""
FileName = Annotated[str, pydantic.StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+@=, -]{0,199}$")]
"""A plain name inside one folder: no separator, no drive, no control character, and not hidden."""
StoreKey = Annotated[
    str, pydantic.StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$", max_length=1000)
]
"""Path of a file relative to the store: no `..`, nothing absolute, nothing hidden."""
Count = Annotated[int, pydantic.Field(ge=1, le=INT32_MAX)]
Natural = Annotated[int, pydantic.Field(ge=0, le=INT32_MAX)]
Size = Annotated[int, pydantic.Field(ge=0, le=INT64_MAX)]

_MOST_SHOWN = 5


class Difference(NamedTuple):
    """One field in which two records differ; a missing field is None."""

    field: str
    got: Any
    expected: Any

    def __str__(self) -> str:
        return f"{self.field}: got {_shown(self.got)}, expected {_shown(self.expected)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=repr)
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


def parse_json(content: str | bytes, where: str) -> Any:
    """JSON of unknown origin as plain values.

    Raises:
        StoreFormatError: it is no JSON, nested too deep, or holds a number without an end.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError, MemoryError) as error:
        raise StoreFormatError(f"{where}: not a JSON record ({_reason(error)}); it is truncated or damaged") from error


def parse(kind: type[Record], content: str | bytes | Mapping[str, Any] | list[Any], where: str, fields: str = "") -> Record:
    """Turn JSON of unknown origin, or plain values from it, into a typed value.

    Args:
        kind: a dataclass or TypedDict whose `__pydantic_config__` is `STRICT`, or a type made of such.
        fields: number of the section of FORMAT.md that lists the fields; the message names it.

    Raises:
        StoreFormatError: fields are missing, unknown, of another type or out of range; each is named with its place.
    """
    try:
        text = content if isinstance(content, (str, bytes)) else canonical_json(content)
        value: Record = _adapter(kind).validate_json(text)  # type: ignore[arg-type]  # types are hashable
        return value
    except pydantic.ValidationError as error:
        raise StoreFormatError(f"{where}: {_listed(error)}{f' (FORMAT.md {fields})' if fields else ''}") from error
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise StoreFormatError(f"{where}: {_reason(error)}{f' (FORMAT.md {fields})' if fields else ''}") from error


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(kind)


def _listed(error: pydantic.ValidationError) -> str:
    found = error.errors(include_url=False, include_context=False)
    shown = [f"{_place(one['loc'])}{_message(one['type'], one['msg'], one['input'])}" for one in found[:_MOST_SHOWN]]
    return "; ".join(shown) + (f"; and {len(found) - _MOST_SHOWN} more" if len(found) > _MOST_SHOWN else "")


def _place(loc: tuple[int | str, ...]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
    return f"{path[:200]}: " if path else ""


def _message(kind: str, message: str, value: Any) -> str:
    if kind == "missing":
        return "is missing"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return "unknown field; the store is of a later kvpipe or was changed"
    expected = message.removeprefix("Input should be ").removeprefix("Value error, ")
    return f"got {repr(value)[:80]}, expected {expected}"


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    return str(error)[:300]


def write_sealed(storage: Storage, key: str, body: Mapping[str, Any]) -> None:
    """Write a record with its own sha256, replacing the file at once or not at all."""
    storage.write(key, _sealed(body), replace=True)


def create_sealed(storage: Storage, key: str, body: Mapping[str, Any]) -> bool:
    """Write a sealed record unless one is there; of several writers exactly one gets True."""
    return storage.write(key, _sealed(body), replace=False)


class Sealed(NamedTuple):
    """A record whose seal fits; its fields are not checked yet."""

    body: dict[str, Any]
    text: str
    """Canonical JSON of `body`."""
    sha256: str
    where: str

    def parse(self, kind: type[Record], fields: str = "") -> Record:
        """The record as a typed value; arguments and errors are those of `records.parse`."""
        return parse(kind, self.text, self.where, fields)


def unseal(storage: Storage, key: str) -> Sealed:
    """Read a sealed record and verify its sha256.

    Raises:
        FileNotFoundError: there is none.
        StoreFormatError: not a regular file, too large, not JSON, not sealed, or changed since it was written.
    """
    where = f"{storage.location}/{key}"
    content = storage.read(key, most_bytes=MAX_RECORD_BYTES)
    try:
        record = json.loads(content)
        seal = record.pop("sha256")
        text = canonical_json(record)
        actual = bytes_sha256(text.encode())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, MemoryError) as error:
        raise StoreFormatError(f"{where}: not a sealed JSON record ({error!r:.200}); it is truncated or damaged") from error
    if seal != actual:
        raise StoreFormatError(
            f"{where}: sha256 of its content is {actual}, it says {str(seal)[:80]}; it was changed or damaged"
        )
    return Sealed(record, text, actual, where)


def read_sealed(storage: Storage, key: str) -> dict[str, Any]:
    """The fields of a sealed record as they are, unchecked; errors as of `unseal`."""
    return unseal(storage, key).body


def bytes_sha256(content: bytes | mmap.mmap) -> str:
    """sha256 in hex."""
    return hashlib.sha256(content).hexdigest()


def _sealed(body: Mapping[str, Any]) -> bytes:
    text = json.dumps({**body, "sha256": fingerprint(body)}, ensure_ascii=False, allow_nan=False, indent=1)
    return f"{text}\n".encode()
