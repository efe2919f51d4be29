"""How many tokens a run would store, known exactly for small data and estimated from its bytes for large. Knows no teacher."""

from __future__ import annotations

import dataclasses
import glob
import itertools
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvstore.temporary import temporary_folder
from pipeline.config import ExtractConfig
from pipeline.data.documents import Document, read_documents, shuffled
from pipeline.data.formats import compression_of, holds_rows, suffix_of
from pipeline.data.notes import Notes
from pipeline.data.samples import Cutter, Sample
from pipeline.data.windows import Limits, Window, Windows

MOST_S = 30.0
"""Read at most; the first window is what a store is laid out for."""
_ROWS_TRIED = 512
_HEAD_BYTES = 8 * 2**20
_FILES_TRIED = 16
_BLOCKS = 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DataSize:
    """What is known of the data of a run."""

    window: Window
    """The first, as far as it was read."""
    num_tokens: int | None
    """That the run would store; None where the data has no end that could be known."""
    is_exact: bool
    relative_error: float | None
    """Two standard errors of an estimate, from how much the text that was read differs among itself."""
    how: str
    """How the number came about, for people."""
    seconds_per_token: float
    """Of reading and tokenising."""

    @property
    def known_tokens(self) -> int:
        return self.window.num_tokens


def measure_data(
    config: ExtractConfig, tokenizer: Any, seq_len: int, vocab_size: int | None = None, most_s: float = MOST_S
) -> DataSize:
    """Tokenise the first window of the data, and size the rest by its bytes.

    Raises:
        ValueError: the data cannot be read, holds nothing to store, or is a pipe, of which what is read here would be lost.
    """
    if pipes := [part for part in config.data if Path(part).expanduser().is_fifo()]:
        raise ValueError(
            f"--data: {pipes[0]} is a pipe, and what 'kvpipe plan' reads of it 'kvpipe extract' would not get; give plan a file with "
            "text like that, and --max-tokens"
        )
    notes = Notes(leaves_out=config.on_bad_sample == "quarantine")
    documents = read_documents(config.data, config.text_field, config.split, as_text=config.as_text, notes=notes)
    if config.seed is not None:
        documents = shuffled(documents, config.seed)
    seen = _Seen(documents, most_s)
    cutter = Cutter(tokenizer=tokenizer, seq_len=seq_len, overlap=config.overlap, vocab_size=vocab_size, notes=notes)
    limits = Limits(window_tokens=config.window_tokens, samples=config.limit, tokens=config.max_tokens)
    window = Windows(seen, cutter, limits).next()
    elapsed, known = time.monotonic() - seen.began, window.num_tokens
    used = seen.sizes[: window.consumed.documents]
    if window.last and not seen.late:
        at_limit = "--limit" if len(window.samples) == config.limit else "--max-tokens"
        is_all = seen.ended and len(used) == len(seen.sizes)
        found = _Total(known, None, "all of the data" if is_all else at_limit)
    else:
        found = _extrapolate(config, window.samples, sum(used))
    samples = _as_many(window.samples, config.sample_tokens)
    if not config.keep_text:
        samples = [dataclasses.replace(sample, text=None) for sample in samples]
    window = dataclasses.replace(window, samples=samples)
    if config.sample_tokens is not None and (found.num_tokens is None or config.sample_tokens < found.num_tokens):
        found = _Total(config.sample_tokens, None, "--sample-tokens")
    return DataSize(
        window=window,
        num_tokens=found.num_tokens,
        is_exact=found.num_tokens == known == window.num_tokens,
        relative_error=found.relative_error,
        how=found.how,
        seconds_per_token=elapsed / known,
    )


def _as_many(samples: list[Sample], num_tokens: int | None) -> list[Sample]:
    """The first samples that have about so many tokens: in order of their ids they are a random draw."""
    total = 0
    for index, sample in enumerate(samples):
        if num_tokens is not None and total >= num_tokens:
            return samples[:index]
        total += len(sample.input_ids)
    return samples


class _Seen:
    """Passes documents on, notes their bytes, and ends after some time."""

    def __init__(self, documents: Iterable[Document], most_s: float) -> None:
        self._documents, self._most_s, self.began = documents, most_s, time.monotonic()
        self.sizes, self.ended, self.late = list[int](), False, False

    def __iter__(self) -> Iterator[Document]:
        for document in self._documents:
            if self.late:
                return
            self.sizes.append(len(document.content()))
            yield document
            self.late = time.monotonic() - self.began > self._most_s
        self.ended = True


class _Total(NamedTuple):
    num_tokens: int | None
    relative_error: float | None
    how: str


def _extrapolate(config: ExtractConfig, samples: Sequence[Sample], read_bytes: int) -> _Total:
    known = sum(len(sample.input_ids) for sample in samples)
    limits = {"--limit": config.limit and config.limit * known // len(samples), "--max-tokens": config.max_tokens}
    limit, most = min(((name, most) for name, most in limits.items() if most), key=lambda item: item[1], default=("", None))
    all_bytes = text_bytes(config.data, config.text_field, config.split, as_text=config.as_text)
    if all_bytes is None:
        return _Total(most, None, f"{limit}, if the data has as much" if most else "the data does not say how large it is")
    total = round(known * max(all_bytes / read_bytes, 1.0))
    error = _relative_error(samples)
    if most and most < total:
        return _Total(most, error if limit == "--limit" else None, limit)
    return _Total(total, error, f"{all_bytes / 1e6:,.0f} MB of text at the tokens per byte of the first {known:,}")


def _relative_error(samples: Sequence[Sample]) -> float:
    """Two standard errors of tokens per byte of text over blocks of samples, relative to their mean."""
    size = max(len(samples) // _BLOCKS, 1)
    blocks = [samples[first : first + size] for first in range(0, len(samples), size)]
    rates = [
        sum(len(sample.input_ids) for sample in block) / max(sum(len((sample.text or "").encode()) for sample in block), 1)
        for block in blocks
    ]
    return 2 * statistics.stdev(rates) / len(rates) ** 0.5 / statistics.fmean(rates) if len(rates) > 1 else 1.0


def text_bytes(data: Sequence[str], text_field: str, split: str, *, as_text: bool = False) -> int | None:
    """Bytes of text in local files, from their sizes and the share of text at the beginning of some; None for other data."""
    files: list[Path] = []
    for part in data:
        path = Path(part).expanduser()
        if not path.is_file() and not glob.has_magic(part):
            return None
        files += (
            [path] if path.is_file() else [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
        )
    rows = [file for file in files if holds_rows(file) and not as_text]
    texts = set(files).difference(rows)
    if any(compression_of(file) for file in texts):
        return None
    total = sum(file.stat().st_size for file in texts)
    if rows:
        tried = rows[:: max(len(rows) // _FILES_TRIED, 1)]
        shares = [_text_share(file, text_field, split) for file in tried]
        total += round(statistics.fmean(shares) * sum(file.stat().st_size for file in rows))
    return total


def _text_share(file: Path, text_field: str, split: str) -> float:
    """Bytes of text per byte of a file of rows, at its beginning."""
    if suffix_of(file) == ".parquet":
        return _parquet_text_share(file, text_field)
    with temporary_folder("plan") as folder, file.open("rb") as source:
        head = Path(folder, file.name)
        content = source.read(_HEAD_BYTES)
        whole = len(content) == file.stat().st_size
        if not whole and not compression_of(file):
            content = content[: content.rfind(b"\n") + 1] or content
        head.write_bytes(content)
        found = 0
        try:
            for document in read_documents([str(head)], text_field, split, notes=Notes(leaves_out=True)):
                found += len(document.content())
        except ValueError:
            if whole or not found:
                raise  # else only cut off where we cut it
        return found / max(len(content), 1)


def _parquet_text_share(file: Path, text_field: str) -> float:
    import pyarrow.parquet as pq

    num_rows = pq.ParquetFile(file).metadata.num_rows
    rows = read_documents([str(file)], text_field, notes=Notes(leaves_out=True))
    sizes = [len(row.content()) for row in itertools.islice(rows, _ROWS_TRIED)]
    return statistics.fmean(sizes) * num_rows / file.stat().st_size if sizes else 0.0
