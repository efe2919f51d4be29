"""Documents of a data set: reads texts and conversations from files, `datasets` folders or the hub, one after another.

Knows files and rows; knows neither tokenizers nor what becomes of a document.
"""

from __future__ import annotations

import codecs
import dataclasses
import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.data.formats import NO_TEXT, PERHAPS_ROWS, TEXT, holds_rows, is_known, suffix_of
from pipeline.data.notes import Notes
from pipeline.data.rows import Row, damages, file_rows, opened, packed_as, shown_type, wide_encoding, without_nulls
from pipeline.data.turns import CHAT_FIELDS, ROW_FIELDS, Message, conversation, refuse_surrogates
from pipeline.models.resolve import HUB_TIMEOUT_S, one_line, within

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_SHUFFLE_BUFFER = 10_000
TEXT_BYTES_AT_ONCE = 16 * 2**20
"""A larger text file is several documents, cut at line ends, so that no file is in memory whole."""
_MEASURED_DOCUMENTS = 256


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text, or a conversation, with its origin."""

    source: str
    """File, or file and row: pieces of one document share it."""
    text: str = ""
    messages: tuple[Message, ...] | None = None
    """The turns of a conversation, whose text a chat template makes; None for plain text."""
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the chat template gets beside the turns, such as `tools`."""
    line: int | None = None
    """Of its file, from 1, where it is a row of a file that has lines."""
    problem: str = ""
    """Why the row could not be read, said of it: 'is not ...'; it then has no text."""

    @property
    def where(self) -> str:
        """Its place in the data, for people."""
        file, _, row = self.source.rpartition(":")
        if self.line is not None:
            return f"{file}, line {self.line}"
        return f"{file}, row {row}" if file and row.isdecimal() else self.source

    def content(self) -> bytes:
        """Everything that decides which tokens come of it, as bytes."""
        if self.messages is None:
            return self.text.encode()
        turns: list[Any] = [message.identity() for message in self.messages]
        if self.variables:
            turns.append(dict(self.variables))
        return json.dumps(turns, ensure_ascii=False, default=str).encode()


def read_documents(
    data: Sequence[str],
    text_field: str = "text",
    split: str = "train",
    *,
    as_text: bool = False,
    notes: Notes | None = None,
) -> Iterator[Document]:
    """Read the documents of every part of `data` in order.

    Args:
        as_text: files are plain text, whatever their names say.
        notes: told what is to be said of the files. Where they have bad rows left out, such a row is a document with a problem.

    Raises:
        ValueError: a part does not exist or cannot be read, or a row has no text; file and line are named.
    """
    reader = _Reader(text_field, split, as_text, Notes() if notes is None else notes)
    for part in data:
        yield from reader.part(part)


class _Reader:
    """Reads parts of a data set with one set of settings."""

    def __init__(self, text_field: str, split: str, as_text: bool, notes: Notes) -> None:
        self._text_field, self._split, self._as_text, self._notes = text_field, split, as_text, notes
        self._wanted = (text_field, *ROW_FIELDS)

    def part(self, part: str) -> Iterator[Document]:
        """The documents of one part: a file, a glob, a folder of `datasets`, or an id of the hub."""
        path = Path(part).expanduser()
        if path.is_dir():
            yield from self._documents(part, _numbered(_dataset_folder_rows(path, self._split)))
        elif path.is_file() or path.is_fifo():
            yield from self._file(path)
        elif glob.has_magic(part):
            files = sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
            if not files:
                raise ValueError(
                    f"--data: no file matches {part!r}; quote the pattern, and mind that '**' is needed for subfolders"
                )
            for file in files:
                yield from self._file(Path(file))
        elif _HUB_ID.fullmatch(part) and not is_known(part):
            yield from self._documents(part, _numbered(_hub_rows(part, self._split)))
        else:
            raise ValueError(
                f"--data: {part} does not exist; expected a file, a glob, a datasets folder or a hub id like org/name"
            )

    def _file(self, path: Path) -> Iterator[Document]:
        suffix = suffix_of(path)
        if self._as_text:
            yield from self._text_file(path)
        elif holds_rows(path):
            yield from self._documents(_name(path), file_rows(path, self._wanted))
        elif suffix in NO_TEXT:
            raise ValueError(
                f"--data: {path} is {NO_TEXT[suffix]} (by its suffix {suffix}). Leave it out"
                + ("" if "--as-text" in NO_TEXT[suffix] else ", or give --as-text if it is plain text all the same")
            )
        else:
            yield from self._text_file(path, is_sure=suffix in TEXT and suffix not in PERHAPS_ROWS)

    def _text_file(self, path: Path, *, is_sure: bool = True) -> Iterator[Document]:
        damaged = damages()  # not in the except clause: who stops early may close this while the interpreter ends
        try:
            with opened(path) as file:
                if not is_sure:
                    self._know(path, file.peek(4096)[:4096])
                yield from self._text_pieces(path, file)
        except damaged as error:
            raise ValueError(f"--data: {path} cannot be read: {error}; repair it or leave it out") from error

    def _know(self, path: Path, head: bytes) -> None:
        """Look into a file whose name does not say for sure what it is."""
        suffix = suffix_of(path)
        if re.match(rb"\s*\[?\s*\{\s*\"[^\"\n]*\"\s*:", head.removeprefix(codecs.BOM_UTF8)):
            raise ValueError(
                f"--data: {path} holds JSON, which its name does not say; call it .jsonl or .json to have its rows read, or give "
                "--as-text to store it as it is"
            )
        if suffix and suffix not in TEXT:
            self._notes.read_as_text(suffix, str(path))

    def _text_pieces(self, path: Path, file: BinaryIO) -> Iterator[Document]:
        """The file as one document, or as several cut at line ends where it is long."""
        wide = wide_encoding(file) or packed_as(file, path)
        done, rest = 0, b""
        while block := file.read(TEXT_BYTES_AT_ONCE):
            content = rest + block
            end = content.rfind(b"\n") + 1 if len(block) == TEXT_BYTES_AT_ONCE else len(content)
            rest = content[end:]
            if end:
                yield self._text_document(path, content[:end], done, wide)
            done += end
        if rest:
            yield self._text_document(path, rest, done, wide)

    def _text_document(self, path: Path, content: bytes, start: int, wide: str) -> Document:
        marked = content.removeprefix(codecs.BOM_UTF8) if start == 0 else content
        try:
            text, zero = marked.decode("utf-8"), content.find(b"\0")
            if zero < 0:
                return Document(source=_name(path), text=text)
            problem = f"is no text: it holds the byte 0 (byte {start + zero}){f': it is {wide}' if wide else ''}"
        except UnicodeDecodeError as error:
            first = start + error.start + len(content) - len(marked)
            problem = f"is not UTF-8 text (byte {first}){f': it is {wide}' if wide else ''}"
        return self._bad(Document(source=_name(path), problem=problem))

    def _documents(self, name: str, rows: Iterable[Row]) -> Iterator[Document]:
        for row in rows:
            source, problem = f"{name}:{row.number}", row.problem
            if not problem:
                try:
                    found = self._document(source, row)
                except ValueError as error:
                    problem = str(error)
            yield self._bad(Document(source=source, line=row.line, problem=problem)) if problem else found

    def _bad(self, document: Document) -> Document:
        if not self._notes.leaves_out:
            raise self._notes.refusal(document.where, document.problem)
        return document

    def _document(self, source: str, row: Row) -> Document:
        value = row.value
        text, chat = value.get(self._text_field), _chat_field(value)
        if isinstance(text, str) and not (chat and (not text or (self._text_field == chat and text.lstrip().startswith("[")))):
            refuse_surrogates(text)
            return Document(source=source, text=text, line=row.line)
        field = self._text_field if text and self._text_field not in CHAT_FIELDS else chat
        if field is None:
            return self._without_text(source, row)
        if not isinstance(value[field], (list, tuple, str)):
            raise ValueError(f"has neither a text nor a list of messages in {field!r}, but {shown_type(value[field])}")
        messages, variables = conversation(value, field)
        document = Document(source=source, messages=messages, variables=variables, line=row.line)
        refuse_surrogates([[message.as_given() for message in messages], variables])
        return document

    def _without_text(self, source: str, row: Row) -> Document:
        """A row whose text is null is an empty one; a row without such a field is of another data set."""
        chats = [row.value[field] for field in CHAT_FIELDS if field in row.value]
        is_empty = (
            row.value[self._text_field] is None
            if self._text_field in row.value
            else bool(chats) and not any(chat is not None for chat in chats)
        )
        if not is_empty:
            raise ValueError(
                f"has neither a text nor a list of messages in {self._text_field!r}; its fields are {', '.join(row.value) or 'none'}. "
                "--text-field names another; a message is an object with 'role' and 'content', or 'from' and 'value'"
            )
        return Document(source=source, line=row.line)


def _chat_field(row: Mapping[str, Any]) -> str | None:
    """The first field of a row with a conversation in it."""
    return next((field for field in CHAT_FIELDS if row.get(field) not in (None, [], (), "", "[]", "null")), None)


def _name(path: Path) -> str:
    """The path as a text that can be stored: bytes that are not UTF-8 are written out."""
    return str(path).encode(errors="backslashreplace").decode()


def _numbered(rows: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for number, row in enumerate(rows):
        yield Row(number, {**dict.fromkeys(row), **without_nulls(dict(row))})


def _dataset_folder_rows(path: Path, split: str) -> Iterator[Mapping[str, Any]]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise ValueError(
            f"--data: {path} was not saved by datasets' save_to_disk; for the text files in it give a glob like '{path}/**/*.txt'"
        ) from None
    yield from _split_of(loaded, split, str(path))


def _split_of(loaded: Any, split: str, name: str) -> Iterable[Mapping[str, Any]]:
    import datasets

    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"--split: got {split!r}, but {name} has {', '.join(loaded)}")
        loaded = loaded[split]
    rows: Iterable[Mapping[str, Any]] = loaded
    return rows


def _hub_rows(name: str, split: str) -> Iterator[Mapping[str, Any]]:
    from huggingface_hub import HfApi, errors

    repo, _, config = name.partition(":")
    # The bases of the hub's own error are the HTTP library's.
    failures: tuple[type[BaseException], ...] = (OSError, ValueError, *errors.HfHubHTTPError.__bases__)
    try:
        # Asked first, as for models: by itself the library retries for half a minute.
        within(HUB_TIMEOUT_S, lambda: HfApi().dataset_info(repo, timeout=HUB_TIMEOUT_S))
        import datasets

        yield from datasets.load_dataset(repo, config or None, split=split, streaming=True)
    except failures as error:
        raise ValueError(
            f"--data: there is no file or folder {name!r} here, and the hub data set {repo!r} cannot be read "
            f"({one_line(error)}); check its name and split and the connection, or give local files with --data FILE"
        ) from error


def shuffled(documents: Iterable[Document], seed: int, buffer: int = _SHUFFLE_BUFFER) -> Iterator[Document]:
    """Shuffle through a buffer of documents: a whole shuffle when there are fewer, in bounded memory when there are more."""
    key = int.from_bytes(hashlib.sha256(f"documents {seed}".encode()).digest()[:16], "little")
    raw = np.random.Philox(key=key)  # only raw output is frozen across numpy versions (NEP 19)
    held: list[Document] = []
    for document in documents:
        if len(held) < buffer:
            held.append(document)
            continue
        slot = int(raw.random_raw()) % buffer
        yield held[slot]
        held[slot] = document
    yield from (held[slot] for slot in np.argsort(raw.random_raw(len(held)), kind="stable"))


def subsampled(
    read: Callable[[], Iterable[Document]], bytes_wanted: Callable[[Sequence[Document]], float], seed: int
) -> Iterator[Document]:
    """A random share of the documents over all of the data, in their order; reads the data once more to know its size.

    Args:
        read: gives the documents, the same every time.
        bytes_wanted: from the first documents, how many bytes of text are wanted in all.
        seed: of the draw; each document is in or out by its number alone.
    """
    total, first = 0, list[Document]()
    for document in read():
        total += len(document.content())
        if len(first) < _MEASURED_DOCUMENTS:
            first.append(document)
    if not first:
        return
    share = bytes_wanted(first) / total
    key = int.from_bytes(hashlib.sha256(f"sample {seed}".encode()).digest()[:16], "little")
    raw = np.random.Philox(key=key)  # only raw output is frozen across numpy versions (NEP 19)
    yield from (document for document in read() if int(raw.random_raw()) < share * 2**64)
