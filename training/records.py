"""JSON that a run or somebody else wrote, read as typed, bounded values or refused with its file, field, what it holds and what was expected.

Only regular files are opened, only so many bytes of them are read, and nesting is bounded. Knows not what the records mean.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_RECORD_BYTES = 64 * 2**20
MAX_DEPTH = 64
_SHOWN = 80

Count = Annotated[int, Field(ge=0, lt=2**53)]
"""A whole number that every JSON reader takes exactly."""

Number = float | None
"""What a metric is: None where there was nothing to measure."""

Parsed = TypeVar("Parsed", bound=BaseModel)


class Record(BaseModel):
    """A record whose types are taken as they are: no text becomes a number, and no other fields are let in."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)


def read_regular(path: Path, limit: int = MAX_RECORD_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes; a pipe or a device is never waited for.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no regular file, or larger.
    """
    # Opened first and asked what it is afterwards: between a question and an opening it could be replaced.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path}: got {_kind(found.st_mode)}, expected a regular file")
        if found.st_size > limit:
            raise ValueError(f"{path}: got {found.st_size} bytes, expected at most {limit}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(limit)
    finally:
        os.close(descriptor)


def refuse_irregular(path: Path) -> None:
    """Refuse what is no regular file, without opening it.

    Raises:
        ValueError: it is something else, or missing.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ValueError(f"{path}: got nothing that can be read ({error.strerror}), expected a regular file") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: got {_kind(mode)}, expected a regular file")


def read_json(path: Path, limit: int = MAX_RECORD_BYTES) -> Any:
    """The JSON value in a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no regular file, too large, no JSON, or nested too deep.
    """
    return load_json(read_regular(path, limit), str(path))


def load_json(content: bytes | str, where: str) -> Any:
    """The JSON value of a text that lies `where`.

    Raises:
        ValueError: it is no JSON, or nested too deep.
    """
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError(f"{where}: got JSON nested deeper than {MAX_DEPTH}, expected a plain record") from None
    except ValueError as error:
        raise NotJsonError(f"{where}: not JSON ({error})") from error
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError(f"{where}: got JSON nested deeper than {MAX_DEPTH}, expected a plain record")


class NotJsonError(ValueError):
    """A text is no JSON at all: cut short by a crash, or something else. Who finds a newer or an older record may pass it over."""


def parse(kind: type[Parsed], value: Any, where: str) -> Parsed:
    """The value as a record of one kind.

    Raises:
        ValueError: it is otherwise; `where`, the field, what is there and what was expected are named.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise ValueError(f"{where}: {_told(error)}") from None


def parse_json(kind: type[Parsed], path: Path, limit: int = MAX_RECORD_BYTES) -> Parsed:
    """The value in a JSON file, where a type has more kinds of values than JSON: paths are texts there, tuples are lists.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else, as with `read_json` and `parse`.
    """
    content = read_regular(path, limit)
    load_json(content, str(path))
    try:
        return kind.model_validate_json(content, strict=True)
    except ValidationError as error:
        raise ValueError(f"{path}: {_told(error)}") from None


def _told(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    field = ".".join(map(str, first["loc"]))
    got = "nothing" if first["type"] == "missing" else _shown(first["input"])
    expected = "this field" if first["type"] == "missing" else first["msg"].removeprefix("Input should be ")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{field}: got {got}, expected {expected}{more}" if field else f"got {got}, expected {expected}{more}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else []


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))
    return next((name for is_kind, name in kinds if is_kind(mode)), "no file")
