"""Documents of a data set: reads texts and conversations from files, `datasets` folders or the hub, one after another.

Knows files and rows; knows neither tokenizers nor what becomes of a document.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.models.resolve import HUB_TIMEOUT_S, one_line, within

ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_SHUFFLE_BUFFER = 10_000
_ZSTD_BYTES_AT_ONCE = 4096  # what comes of them is in memory at once: seldom over 100 KB, and never over 128 MB
_ROWS_AT_ONCE = 128
TEXT_BYTES_AT_ONCE = 16 * 2**20
"""A larger text file is several documents, cut at line ends, so that no file is in memory whole."""
_CHAT_FIELDS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}
"""Names of roles in ShareGPT's rows and what everybody else calls them."""
_MEASURED_DOCUMENTS = 256


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    """`system`, `user`, `assistant`, `tool` or what else the chat template knows."""
    content: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text, or a conversation, with its origin."""

    source: str
    """File, or file and row: pieces of one document share it."""
    text: str = ""
    messages: tuple[Message, ...] | None = None
    """The turns of a conversation, whose text a chat template makes; None for plain text."""

    def content(self) -> bytes:
        """Everything that decides which tokens come of it, as bytes."""
        if self.messages is None:
            return self.text.encode()
        return json.dumps([[message.role, message.content] for message in self.messages], ensure_ascii=False).encode()


def read_documents(data: Sequence[str], text_field: str = "text", split: str = "train") -> Iterator[Document]:
    """Read the documents of every part of `data` in order.

    Raises:
        ValueError: a part does not exist, cannot be read, or has no such text field; the part is named.
    """
    for part in data:
        yield from _read_part(part, text_field, split)


def _read_part(part: str, text_field: str, split: str) -> Iterator[Document]:
    path = Path(part).expanduser()
    if path.is_dir():
        yield from _documents(part, _dataset_folder_rows(path, split), text_field)
    elif path.is_file() or path.is_fifo():
        yield from _read_file(path, text_field)
    elif glob.has_magic(part):
        files = sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not files:
            raise ValueError(
                f"--data: no file matches {part!r}; quote the pattern, and mind that '**' is needed for subfolders"
            )
        for file in files:
            yield from _read_file(Path(file), text_field)
    elif _HUB_ID.fullmatch(part) and not part.endswith((*ROW_SUFFIXES, ".parquet", ".txt", ".md", ".py")):
        yield from _documents(part, _hub_rows(part, split), text_field)
    else:
        raise ValueError(f"--data: {part} does not exist; expected a file, a glob, a datasets folder or a hub id like org/name")


def _read_file(path: Path, text_field: str) -> Iterator[Document]:
    if path.name.endswith(ROW_SUFFIXES):
        yield from _documents(str(path), _json_rows(path), text_field)
    elif path.suffix == ".parquet":
        yield from _documents(str(path), _parquet_rows(path), text_field)
    else:
        with path.open("rb") as file:
            yield from _text_pieces(path, file)


def _text_pieces(path: Path, file: BinaryIO) -> Iterator[Document]:
    """The file as one document, or as several cut at line ends where it is long."""
    done, rest = 0, b""
    while block := file.read(TEXT_BYTES_AT_ONCE):
        content = rest + block
        end = content.rfind(b"\n") + 1 if len(block) == TEXT_BYTES_AT_ONCE else len(content)
        rest = content[end:]
        if end:
            yield _text_document(path, content[:end], done)
        done += end
    if rest:
        yield _text_document(path, rest, done)


def _text_document(path: Path, content: bytes, start: int) -> Document:
    try:
        return Document(source=str(path), text=content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"--data: {path} is not UTF-8 text (byte {start + error.start}); convert it or leave it out") from None


def _documents(name: str, rows: Iterable[Mapping[str, Any]], text_field: str) -> Iterator[Document]:
    for number, row in enumerate(rows):
        source, found = f"{name}:{number}", row.get(text_field)
        if found is None:
            found = next((row[field] for field in _CHAT_FIELDS if row.get(field) is not None), None)
        if isinstance(found, str):
            yield Document(source=source, text=found)
        elif messages := _messages(found):
            yield Document(source=source, messages=messages)
        else:
            raise ValueError(
                f"--text-field: row {number} of {name} has neither a text nor a list of messages in {text_field!r}; its fields are "
                f"{', '.join(row) or 'none'}. A message is an object with 'role' and 'content', or 'from' and 'value'"
            )


def _messages(found: object) -> tuple[Message, ...] | None:
    """The turns of a conversation, None where this is none."""
    if not isinstance(found, (list, tuple)) or not found:
        return None
    messages = []
    for turn in found:
        if not isinstance(turn, Mapping):
            return None
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        messages.append(Message(role=_ROLES.get(role, role), content=content))
    return tuple(messages)


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    import zstandard  # not in the except clause: who stops early may close this while the interpreter ends

    try:
        with io.TextIOWrapper(_decompressed(path), encoding="utf-8-sig") as file:
            for number, line in enumerate(file):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"line {number + 1} is not an object")
                    yield row
    except (EOFError, OSError, ValueError, zstandard.ZstdError) as error:
        raise ValueError(f"--data: {path} is not complete JSON lines: {error}; repair it or leave it out") from error


def _decompressed(path: Path) -> io.BufferedReader | gzip.GzipFile:
    """The bytes of a file behind its compression; reading raises EOFError where a compressed file was cut short."""
    if path.suffix in (".gz", ".zst") and path.stat().st_size == 0:
        raise EOFError("the file is empty")
    if path.suffix == ".gz":
        return gzip.open(path)
    return io.BufferedReader(_ZstdFile(path)) if path.suffix == ".zst" else path.open("rb")


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


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        for number in range(file.num_row_groups):  # one by one, for of several it reads all ahead
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[number]):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"--data: {path} is not readable parquet: {error}; repair it or leave it out") from error


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
