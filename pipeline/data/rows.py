"""Rows of files: JSON lines, JSON arrays, comma or tab separated values, parquet; whole, or cut short by what is wrong with one.

A row that cannot be read does not keep those after it from being read, as far as the format allows. Knows formats; not what a row
means.
"""

from __future__ import annotations

import codecs
import collections
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from pipeline.data.formats import ROWS, compression_of, suffix_of

_ZSTD_BYTES_AT_ONCE = 4096  # what comes of them is in memory at once: seldom over 100 KB, and never over 128 MB
_ROWS_AT_ONCE = 128
_CHARACTERS_AT_ONCE = 2**20
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*("|\Z|\\\Z)|[\[\]{},]', re.DOTALL)
"""A string, whole or up to the end of what was read, or what JSON is put together with."""
_WIDE_MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}

_PACKED = {"gzip": (b"\x1f\x8b\x08", ".gz"), "zstd": (b"\x28\xb5\x2f\xfd", ".zst"), "a zip archive": (b"PK\x03\x04", "")}
"""First bytes of compressed files, and the suffix that has them read."""


class Row(NamedTuple):
    """A row of a file, or why it cannot be read."""

    number: int
    """From 0, over those that cannot be read too."""
    value: Any = None
    line: int | None = None
    """Of the file, from 1, where the row begins; None where a file has no lines or not one for each row."""
    problem: str = ""
    """Why it cannot be read, said of the row: 'is not ...'."""


def file_rows(path: Path, wanted: Sequence[str]) -> Iterator[Row]:
    """The rows of a file whose name says that it holds some.

    Args:
        wanted: fields that a row is asked for; a table's other columns are not read.

    Raises:
        ValueError: the file is cut short or damaged so that what follows cannot be read.
    """
    kind = ROWS[suffix_of(path)]
    if kind == "parquet":
        yield from _parquet_rows(path, wanted)
        return
    damaged: tuple[type[Exception], ...] = (
        *damages(),
        ValueError,
        csv.Error,
    )  # not in the except clause: who stops early may close this while the interpreter ends
    what = "comma separated values" if kind == "comma" else "tab separated values" if kind == "tab" else "JSON lines"
    try:
        with opened(path) as file:
            if wide := wide_encoding(file):
                raise ValueError(f"it is {wide}, expected UTF-8 (convert it: iconv -f {wide} -t UTF-8)")
            if packed := packed_as(file, path):
                raise ValueError(f"it is {packed}")
            newline = "" if kind in ("comma", "tab") else None
            text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)
            if kind in ("comma", "tab"):
                yield from _separated_rows(text, "," if kind == "comma" else "\t")
            elif kind == "json" and _begins_array(file):
                what = "JSON"
                yield from _array_rows(text)
            else:
                yield from _line_rows(text)
    except damaged as error:
        raise ValueError(f"--data: {path} is not complete {what}: {error}; repair it or leave it out") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, nested too deep, or says a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}, column {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:  # a number of thousands of digits; the advice after it is for programmers
        raise ValueError(str(error).partition(";")[0]) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {_twice(key for key, _ in pairs)!r} stands twice in one object")
    return found


def _twice(names: Iterable[str]) -> str | None:
    """The first name that is there more than once."""
    return next((name for name, count in collections.Counter(names).items() if count > 1), None)


def _json_row(number: int, line: int | None, text: str) -> Row:
    if bad := invalid_byte(text):
        return Row(number, line=line, problem=f"is not UTF-8 ({bad})")
    try:
        value = parse_json(text)
    except ValueError as error:
        return Row(number, line=line, problem=f"cannot be read as JSON: {error}")
    if not isinstance(value, dict):
        return Row(number, line=line, problem=f"is not an object but {shown_type(value)}")
    return Row(number, value, line)


def _line_rows(text: IO[str]) -> Iterator[Row]:
    number = 0
    for line, content in enumerate(text, start=1):
        if content := content.strip("\ufeff \t\r\n\f\v"):
            yield _json_row(number, line, content)
            number += 1


def _begins_array(file: Any) -> bool:
    return bool(file.peek(4096)[:4096].removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["))


def _array_rows(text: IO[str]) -> Iterator[Row]:
    for number, element in enumerate(_elements(text)):
        yield _json_row(number, None, element)


def _elements(text: IO[str]) -> Iterator[str]:
    """The text of each element of a JSON array, in memory one after another; whether an element is JSON is not asked."""
    held = text.read(_CHARACTERS_AT_ONCE)
    start = place = held.index("[") + 1
    depth = 1
    while depth:
        found = _TOKEN.search(held, place)
        if found is None or found[1] not in (None, '"'):
            # A string may go on in what follows: looked for again from where it begins.
            place = len(held) if found is None else found.start()
            more = text.read(max(_CHARACTERS_AT_ONCE, len(held)))
            if not more:
                raise EOFError("the array does not end")
            held, place, start = held[start:] + more, place - start, 0
            continue
        place, token = found.end(), found[0]
        depth += (token in "[{") - (token in "]}")
        if (depth == 1 and token == ",") or not depth:
            element = held[start : found.start()].strip()
            if element or depth:
                yield element
            start = place
    if (held[place:] + text.read(_CHARACTERS_AT_ONCE)).strip():
        raise ValueError("something follows the array")


def _separated_rows(text: IO[str], delimiter: str) -> Iterator[Row]:
    """Rows by the names in the first; a field in quotation marks may hold separators and line ends."""
    csv.field_size_limit(2**31 - 1)  # of the whole process; the usual 128 KiB is less than a long text
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    names = next(reader, [])
    if (twice := _twice(names)) is not None:
        raise ValueError(f"the column {twice!r} stands twice in the first line")
    number, line = -1, reader.line_num + 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            number += 1
            yield Row(number, line=line, problem=f"is not made of separated values: {error}")
            line = reader.line_num + 1
            continue
        if cells is None:
            return
        if cells:
            number += 1
            yield _separated_row(number, line, names, cells)
        line = reader.line_num + 1


def _separated_row(number: int, line: int, names: Sequence[str], cells: Sequence[str]) -> Row:
    if len(cells) != len(names):
        return Row(number, line=line, problem=f"has {len(cells)} values, expected {len(names)} as in the first line")
    if bad := invalid_byte("".join(cells)):
        return Row(number, line=line, problem=f"is not UTF-8 ({bad})")
    return Row(number, dict(zip(names, cells, strict=True)), line)


def _parquet_rows(path: Path, wanted: Sequence[str]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        columns = [name for name in names if name in wanted]
        for group in range(file.num_row_groups):  # one by one, for of several it reads all ahead
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns):
                for found in _table_rows(batch):
                    yield _table_row(number, names, found)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"--data: {path} is not readable parquet: {error}; repair it or leave it out") from error


def _table_rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch, in place of one that cannot be read the reason."""
    # Texts that are not UTF-8, times beyond Python's, names used twice.
    unreadable = (ValueError, OverflowError, KeyError)
    try:
        yield from batch.to_pylist()
        return
    except unreadable:
        pass
    for index in range(batch.num_rows):
        try:
            found: dict[str, Any] | str = batch.slice(index, 1).to_pylist()[0]
        except unreadable as error:
            found = f"cannot be read: {error}"
        yield found


def _table_row(number: int, names: Iterable[str], found: dict[str, Any] | str) -> Row:
    if isinstance(found, str):
        return Row(number, problem=found)
    return Row(number, {**dict.fromkeys(names), **without_nulls(found)})


def without_nulls(value: Any) -> Any:
    """A table's value without the fields that are null: a table has every field in every row."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def invalid_byte(text: str) -> str:
    """Which byte is not UTF-8 of a text decoded with `surrogateescape`, '' if all are."""
    if text.isascii():
        return ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"byte {len(text[: error.start].encode())} of the row is {ord(text[error.start]) - 0xDC00:#04x}"
    return ""


def shown_type(value: object) -> str:
    """What a value is, in words of JSON."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {str: "a string", int: "a number", float: "a number", dict: "an object", list: "a list", tuple: "a list"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def wide_encoding(file: Any) -> str:
    """The name of an encoding of two or four bytes whose byte order mark a file begins with, '' for none."""
    head = file.peek(4)[:4]
    return next((name for name, marks in _WIDE_MARKS.items() if head.startswith(marks)), "")


def packed_as(file: Any, path: Path) -> str:
    """What compressed bytes a file holds though its name does not say so, and what to do; '' for none."""
    head = file.peek(4)[:4]
    for what, (mark, suffix) in _PACKED.items():
        if head.startswith(mark):
            return f"{what}, which its name does not say: " + (f"call it {path.name}{suffix}" if suffix else "unpack it")
    return ""


def damages() -> tuple[type[Exception], ...]:
    """What is raised by reading a file that is damaged or cannot be read."""
    import zstandard

    return EOFError, OSError, zlib.error, zstandard.ZstdError


def opened(path: Path) -> Any:
    """The bytes of a file behind its compression; reading raises EOFError where a compressed file was cut short."""
    compression = compression_of(path)
    if compression and path.stat().st_size == 0:
        raise EOFError("the file is empty")
    if compression == ".gz":
        return gzip.open(path)
    return io.BufferedReader(_ZstdFile(path)) if compression == ".zst" else path.open("rb")


class _ZstdFile(io.RawIOBase):
    """A zstd file of any number of frames as bytes. The library's own reader takes a file cut inside a frame for a whole one."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._file, self._new = path.open("rb"), zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        """The frame being decompressed, None between frames."""
        self._rest, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            content = self._rest or self._file.read(_ZSTD_BYTES_AT_ONCE)
            if not content and self._frame is None:
                return 0
            if not content:
                raise EOFError("it ends inside a zstd frame")
            self._frame = self._frame or self._new()
            self._ready, self._rest = memoryview(self._frame.decompress(content)), b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        taken = min(len(buffer), len(self._ready))
        buffer[:taken], self._ready = self._ready[:taken], self._ready[taken:]
        return taken

    def close(self) -> None:
        self._file.close()
        super().close()
