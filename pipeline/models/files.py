"""Reading small text and JSON files that somebody else made: whatever is wrong with one, the message names it and the place in it.

Knows no model. It imports in milliseconds, so that commands can use it.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

_LONG_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}  # the first begins like UTF-16's
_MARKS = {**_LONG_MARKS, codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
_POINTER = b"version https://git-lfs.github.com/"


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is no such text.
        OSError: it cannot be read.
    """
    return decoded(path.read_bytes(), str(path))


def decoded(content: bytes, name: str) -> str:
    """The text of these bytes in UTF-8.

    Args:
        name: what they are, for the message.

    Raises:
        ValueError: they are no such text.
    """
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            raise ValueError(f"{name}: is text in {encoding}, expected UTF-8; 'iconv -f {encoding} -t UTF-8' converts it")
    if b"\0" in content:
        raise ValueError(f"{name}: byte {content.index(0)} is zero, expected text in UTF-8; is it a binary file, or UTF-16?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: byte {error.start} is {content[error.start]:#04x}, which is no UTF-8; save the file as UTF-8"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file is missing or damaged, or holds something else; the message begins with its name.
    """
    if (what := irregular(path)) is not None:
        raise ValueError(what)
    content = path.read_bytes()
    if (what := stand_in(content)) is not None:
        raise ValueError(f"{path.name} {what}")
    try:
        record = json.loads(decoded(content, path.name))
    except json.JSONDecodeError as error:
        raise ValueError(f"JSONDecodeError in {path.name}, line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{path.name}: its values are nested too deep to be read") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path.name}: got a JSON {type(record).__name__}, expected an object")
    return record


def irregular(path: Path) -> str | None:
    """What lies there where no file can be read from; None where one can."""
    if path.is_file():
        return None
    if path.is_symlink() and not path.exists():
        return f"{path.name} is a link to {path.readlink()}, which is not there"
    if not path.exists():
        return f"{path.name} is missing"
    return f"{path.name} is {'a folder' if path.is_dir() else 'a pipe or a device'}, expected a file"


def stand_in(content: bytes) -> str | None:
    """What these first bytes of a file are of where they are not its content but something left in its place."""
    if content.startswith(_POINTER):
        return "is a pointer of Git LFS, not the file itself; fetch it with 'git lfs pull'"
    if content[:64].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page; download the file itself"
    return "is empty; download it again" if not content else None


def one_line(error: BaseException) -> str:
    """Kind and text of another library's error, short enough to stand inside a sentence."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return text if len(text) <= 300 else text[:297] + "..."
