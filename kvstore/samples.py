"""Which samples a store holds and where, read from parquet tables compacted from the commit records (FORMAT.md 6).

A commit record is the truth; parquet is its fast form. A shard that is in no table yet is read from its record.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int32, Int64, UInt32

from kvstore.commits import Commit, committed_shards, contradictions, merge_fidelity, read_commit
from kvstore.errors import KVStoreError, StoreFormatError
from kvstore.layout import Layout
from kvstore.manifest import SAMPLES, read_manifest
from kvstore.records import Sha256, bytes_sha256, parse
from kvstore.repeats import read_repeats
from kvstore.storage import MAX_RECORD_BYTES, Storage

ROWS = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("shard", pa.int32()),
        ("token_start", pa.int64()),
        ("num_tokens", pa.int32()),
        ("crc32c", pa.uint32()),
        ("count", pa.int32()),
        ("text", pa.string()),
    ]
)
SUMMARY = pa.schema(
    [
        ("shard", pa.int32()),
        ("num_samples", pa.int32()),
        ("num_tokens", pa.int64()),
        ("stored_bytes", pa.int64()),
    ]
)
COLUMN_DIGESTS = b"kvpipe.columns"
HASH_DIGITS = 16
_SUMMARY = re.compile(rf"{SAMPLES}/summary-(?P<part>[0-9a-f]{{{HASH_DIGITS}}})-(?P<own>[0-9a-f]{{{HASH_DIGITS}}})\.parquet")
_PART = re.compile(rf"{SAMPLES}/part-(?P<own>[0-9a-f]{{{HASH_DIGITS}}})\.parquet")
_MAY_BE_NULL = {"text"}
_MOST_TABLE_BYTES = 2**29
"""A part has some 16 MiB of rows, or one shard's; more, when it is decompressed, is there to fill memory."""
_REMEDY = "'kvpipe repair' rebuilds it from commits/, and so does deleting the files in samples/ and extracting again"


def is_summary(key: str) -> bool:
    return _SUMMARY.fullmatch(key) is not None


def is_part(key: str) -> bool:
    return _PART.fullmatch(key) is not None


def part_key(summary_key: str) -> str:
    """The part a summary belongs to: its name begins with the part's."""
    match = _SUMMARY.fullmatch(summary_key)
    assert match is not None
    return f"{SAMPLES}/part-{match['part']}.parquet"


def rows_of(commits: Iterable[Commit]) -> pa.Table:
    """The rows of some shards as a table."""
    return pa.Table.from_pylist([dataclasses.asdict(row) for commit in commits for row in commit.samples], schema=ROWS)


def summary_of(commits: Iterable[Commit]) -> pa.Table:
    """One row for each shard."""
    return pa.Table.from_pylist(
        [
            {
                "shard": commit.shard,
                "num_samples": len(commit.samples),
                "num_tokens": commit.num_tokens,
                "stored_bytes": commit.stored_bytes,
            }
            for commit in commits
        ],
        schema=SUMMARY,
    )


def column_digest(column: pa.ChunkedArray) -> str:
    """sha256 of a column: of numbers their little-endian bytes; of texts all lengths in bytes as int64, -1 for none, then all
    the UTF-8 bytes."""
    digest = hashlib.sha256()
    if not pa.types.is_string(column.type):
        digest.update(np.ascontiguousarray(column.to_numpy()).tobytes())
        return digest.hexdigest()
    lengths = pc.fill_null(pc.cast(pc.binary_length(column), pa.int64()), -1)
    digest.update(lengths.to_numpy().astype("<i8").tobytes())
    for chunk in pc.fill_null(column.cast(pa.large_string()), "").chunks:
        _, offsets, data = chunk.buffers()
        bounds = np.frombuffer(offsets, dtype="<i8")[chunk.offset : chunk.offset + len(chunk) + 1]
        if data is not None and len(bounds):
            digest.update(memoryview(data)[bounds[0] : bounds[-1]])
    return digest.hexdigest()


def _read_table(storage: Storage, key: str, schema: pa.Schema, columns: Sequence[str]) -> pa.Table:
    """Columns of a parquet file of unknown origin: its types by the schema, a summary's content by the hash in its name.

    Read in this thread alone: threads of `read_table` may let go of our bytes while the interpreter ends, and abort it.
    """
    where = f"{storage.location}/{key}"
    try:
        content = storage.read(key, most_bytes=MAX_RECORD_BYTES)
    except FileNotFoundError:
        raise StoreFormatError(f"{where}: missing or damaged parquet; {_REMEDY}") from None
    named = _SUMMARY.fullmatch(key)
    if named is not None and not bytes_sha256(content).startswith(named["own"]):
        raise StoreFormatError(f"{where}: its content does not hash to its name; it is damaged. {_REMEDY}")
    try:
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        found = file.schema_arrow
        texts = [name for name in columns if name in found.names and pa.types.is_string(found.field(name).type)]
        if found.names != schema.names or found.types != schema.types:
            raise StoreFormatError(f"got columns {found.names} of {[*map(str, found.types)]}, expected {_described(schema)}")
        size = sum(file.metadata.row_group(number).total_byte_size for number in range(file.metadata.num_row_groups))
        if file.metadata.num_rows > len(content) or not 0 <= size <= _MOST_TABLE_BYTES:
            raise StoreFormatError(f"got {file.metadata.num_rows:,} rows of {size:,} bytes in {len(content):,} bytes")
        # Texts as they are encoded: a value that stands in the file once may stand in its rows any number of times.
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True, read_dictionary=texts)
        table = file.read(columns, use_threads=False).select(columns)
        for name in texts:
            table = table.set_column(columns.index(name), name, _decoded(table[name]))
        table.validate(full=True)
        if nulls := [name for name in columns if name not in _MAY_BE_NULL and table[name].null_count]:
            raise StoreFormatError(f"nulls in {', '.join(nulls)}")
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
        raise StoreFormatError(f"{where}: missing or damaged parquet ({error}); {_REMEDY}") from error
    return table.replace_schema_metadata(found.metadata)


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts, once it is known that memory holds them."""
    lengths = (pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0 for chunk in column.chunks)
    if (size := sum(lengths)) > _MOST_TABLE_BYTES:
        raise StoreFormatError(f"got texts of {size:,} bytes, expected at most {_MOST_TABLE_BYTES:,}")
    return column.cast(pa.string())


def _described(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def read_part(storage: Storage, key: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of samples, or some of their columns, page checksums verified.

    Raises:
        StoreFormatError: it is missing or damaged.
    """
    return _read_table(storage, key, ROWS, ROWS.names if columns is None else columns).replace_schema_metadata(None)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One summary."""

    shards: pa.Table
    """With the schema `SUMMARY`."""
    digests: dict[str, str]
    """Of each column of its part."""


def read_summary(storage: Storage, key: str) -> Summary:
    """One summary, by its key.

    Raises:
        StoreFormatError: it is missing or damaged.
    """
    where = f"{storage.location}/{key}"
    table = _read_table(storage, key, SUMMARY, SUMMARY.names)
    digests = parse(
        dict[str, Sha256], (table.schema.metadata or {}).get(COLUMN_DIGESTS, b""), f"{where}: kvpipe.columns", "6.6"
    )
    if digests.keys() != set(ROWS.names):
        raise StoreFormatError(f"{where}: kvpipe.columns has {sorted(digests)}, expected {sorted(ROWS.names)}; {_REMEDY}")
    shard, num_samples, num_tokens, stored_bytes = (table[name].to_numpy() for name in SUMMARY.names)
    bad = (shard < 0) | (num_samples < 0) | (num_tokens < num_samples) | (stored_bytes < 0)
    if bad.any() or len(np.unique(shard)) < len(shard):
        row = int(bad.argmax())
        raise StoreFormatError(
            f"{where}: shard {shard[row]} has {num_samples[row]} samples, {num_tokens[row]} tokens and {stored_bytes[row]} bytes, or a shard "
            f"stands twice; {_REMEDY}"
        )
    return Summary(shards=table.replace_schema_metadata(None), digests=digests)


def read_summaries(storage: Storage) -> dict[str, Summary]:
    """Every summary by its key; errors as of `read_summary`."""
    keys = sorted(entry.key for entry in storage.entries(SAMPLES))
    return {key: read_summary(storage, key) for key in keys if is_summary(key)}


def listed_shards(storage: Storage) -> dict[int, tuple[int, int]]:
    """Tokens and stored bytes of the shards that are in a summary; those committed since are not among them."""
    return {
        row["shard"]: (row["num_tokens"], row["stored_bytes"])
        for summary in read_summaries(storage).values()
        for row in summary.shards.to_pylist()
    }


class SampleTable:
    """The committed samples in order of shard and position; columns are read when first asked for.

    Opening reads the per-shard summaries only. Safe to share between threads for reading.

    Raises:
        StoreFormatError: a summary is damaged, or lists a shard whose commit record is lost.
    """

    def __init__(self, storage: Storage, commits: Sequence[Commit] | None = None) -> None:
        """Open the tables of a store.

        Args:
            commits: look at these records alone.
        """
        self._storage = storage
        self._parts: dict[str, tuple[set[int], dict[str, str]]] = {}
        summaries: list[pa.Table] = []
        if commits is not None:
            self._loose = list(commits)
        else:
            # In this order: a shard is committed before a summary lists it, and others may be writing.
            tables, committed, seen = read_summaries(storage), committed_shards(storage), set[int]()
            for key, summary in tables.items():
                table = summary.shards
                shards = set(table["shard"].to_pylist())
                if lost := sorted(shards - committed):
                    raise StoreFormatError(
                        f"shard {', '.join(map(str, lost[:5]))}: listed in {storage.location}/{key}, but there is no commit "
                        "record; it is lost. Restore it, or make it again with 'kvpipe repair'"
                    )
                if fresh := shards - seen:
                    self._parts[part_key(key)] = fresh, summary.digests
                    keep = pa.array([shard in fresh for shard in table["shard"].to_pylist()], pa.bool_())
                    summaries.append(table.filter(keep))
                seen |= shards
            self._loose = [read_commit(storage, shard) for shard in sorted(committed - seen)]
        self.summary: pa.Table = pa.concat_tables([*summaries, summary_of(self._loose)]).sort_by("shard")
        """One row per committed shard: shard, num_samples, num_tokens, stored_bytes."""

    def __len__(self) -> int:
        return int(np.sum(self.summary["num_samples"].to_numpy()))

    def refuse_outside(self, layout: Layout) -> None:
        """Make sure that what the summaries say fits the shards.

        Raises:
            StoreFormatError: a shard that does not exist, or of more samples or tokens than it can hold.
        """
        shard, num_samples, num_tokens, _ = (self.summary[name].to_numpy() for name in SUMMARY.names)
        if len(beyond := shard[shard >= layout.num_shards]):
            raise StoreFormatError(
                f"shard {', '.join(map(str, beyond[:5]))}: committed, but the manifest has {layout.num_shards} shards "
                f"({self._storage.location}); the manifest is older than the data, or a record strayed in. See 'kvpipe verify'"
            )
        most = layout.shard_tokens // layout.chunk_tokens
        full = (num_samples > most) | (num_tokens > layout.shard_tokens)
        if full.any():
            row = int(full.argmax())
            raise StoreFormatError(
                f"shard {shard[row]}: {num_samples[row]} samples of {num_tokens[row]} tokens, expected at most {most} of {layout.shard_tokens} "
                f"({self._storage.location}); {_REMEDY}"
            )

    def rows_of_shard(self, shard: int) -> tuple[int, int]:
        """First sample of a shard, and the one after its last."""
        first, last = np.searchsorted(self.shard, [shard, shard + 1])
        return int(first), int(last)

    def _columns(self, names: Sequence[str]) -> pa.Table:
        """Columns in order of shard and position, compared with the digests and numbers of the summaries."""
        wanted = list(dict.fromkeys([*_ORDER, *names]))
        tables = [rows_of(self._loose).select(wanted)]
        for key, (shards, digests) in self._parts.items():
            table = read_part(self._storage, key, wanted)
            for column in wanted:
                if column_digest(table[column]) != digests[column]:
                    raise StoreFormatError(
                        f"{self._storage.location}/{key}: column {column!r} is not what its summary says; it is damaged. {_REMEDY}"
                    )
            tables.append(table.filter(pa.array(np.isin(table["shard"].to_numpy(), list(shards)))))
        try:
            table = pa.concat_tables(tables).sort_by([("shard", "ascending"), ("token_start", "ascending")])
        except (pa.ArrowException, MemoryError) as error:
            raise StoreFormatError(f"{self._storage.location}/{SAMPLES}: {error}; {_REMEDY}") from error
        if len(table) != len(self):
            raise StoreFormatError(
                f"{self._storage.location}/{SAMPLES}: {len(table)} rows, the summaries say {len(self)}; {_REMEDY}"
            )
        return table

    @cached_property
    def _numbers(self) -> dict[str, np.ndarray]:
        """Every column of numbers: each sample in its shard, none over another, and as many as the summaries say."""
        table, layout = self._columns(_NUMBERS), read_manifest(self._storage).layout
        columns = {name: np.ascontiguousarray(table[name].to_numpy()) for name in _NUMBERS}
        shard, start = columns["shard"].astype(np.int64), columns["token_start"]
        stop = start + columns["num_tokens"]
        first = shard * layout.shard_tokens
        free = np.concatenate([[0], -(-stop[:-1] // layout.chunk_tokens) * layout.chunk_tokens])
        free = np.where(np.concatenate([[True], shard[1:] != shard[:-1]]), first, free)[: len(shard)]
        bad = (start % layout.chunk_tokens != 0) | (start < free) | (stop > first + layout.shard_tokens)
        bad |= (columns["num_tokens"] < 1) | (columns["count"] < 1)
        if bad.any():
            row = int(bad.argmax())
            raise StoreFormatError(
                f"shard {shard[row]}, sample {row}: rows {start[row]} to {stop[row]}, counted {columns['count'][row]} times; it overlaps "
                f"another sample, leaves the shard or has no count ({self._storage.location}). {_REMEDY}"
            )
        bounds = np.searchsorted(shard, self.summary["shard"].to_numpy(), side="left"), len(shard)
        ends = np.append(bounds[0][1:], bounds[1]) if len(bounds[0]) else bounds[0]
        total = np.concatenate([[0], np.cumsum(columns["num_tokens"], dtype=np.int64)])
        found = {"num_samples": ends - bounds[0], "num_tokens": total[ends] - total[bounds[0]]}
        for name, numbers in found.items():
            differs = numbers != self.summary[name].to_numpy()
            if differs.any():
                row = int(differs.argmax())
                raise StoreFormatError(
                    f"shard {self.summary['shard'][row]}: its summary says {name} {self.summary[name][row]}, its samples have {numbers[row]} "
                    f"({self._storage.location}). {_REMEDY}"
                )
        return columns

    @cached_property
    def ids(self) -> list[str]:
        """Hex sha256 of every sample's tokens.

        Raises:
            StoreFormatError: an id stands twice: a sample is stored once.
        """
        column = self._columns(["id"])["id"]
        if not pc.all(pc.match_substring_regex(column, "^[0-9a-f]{64}$"), min_count=0).as_py():
            raise StoreFormatError(f"{self._storage.location}/{SAMPLES}: an id is no sha256 in hex (FORMAT.md 5.3); {_REMEDY}")
        ids = list(column.to_pylist())
        if len(set(ids)) < len(ids):
            (twice, _), *_ = Counter(ids).most_common(1)
            where = [int(self.shard[index]) for index, identity in enumerate(ids) if identity == twice]
            raise StoreFormatError(
                f"shard {', '.join(map(str, where))}: sample {twice} is stored {len(where)} times, expected once "
                f"({self._storage.location}); a shard was copied in, or two parts overlap. 'kvpipe verify' lists all"
            )
        return ids

    @cached_property
    def source(self) -> list[str]:
        return list(self._columns(["source"])["source"].to_pylist())

    @cached_property
    def text(self) -> list[str | None]:
        return list(self._columns(["text"])["text"].to_pylist())

    @cached_property
    def shard(self) -> Int32[np.ndarray, "sample"]:
        return self._numbers["shard"]

    @cached_property
    def token_start(self) -> Int64[np.ndarray, "sample"]:
        return self._numbers["token_start"]

    @cached_property
    def num_tokens(self) -> Int32[np.ndarray, "sample"]:
        return self._numbers["num_tokens"]

    @cached_property
    def crc32c(self) -> UInt32[np.ndarray, "sample"]:
        return self._numbers["crc32c"]

    @cached_property
    def stored_count(self) -> Int32[np.ndarray, "sample"]:
        """How often the part of the data that stored it had each sample."""
        return self._numbers["count"]

    @cached_property
    def count(self) -> Int64[np.ndarray, "sample"]:
        """How often the data had each sample, over all parts of it."""
        count = self.stored_count.astype(np.int64)
        if repeats := read_repeats(self._storage, read_manifest(self._storage)):
            count += np.array([repeats.get(identity, 0) for identity in self.ids], dtype=np.int64)
        return count

    def fidelity(self) -> dict[str, Any]:
        """Measured fidelity of every layer over all shards, weighted by their tokens.

        Raises:
            KVStoreError: nothing is committed yet.
        """
        shards = self.summary["shard"].to_pylist()
        if not shards:
            raise KVStoreError(f"{self._storage.location}: no shard is committed yet, so no fidelity is known")
        manifest = read_manifest(self._storage)
        commits = [read_commit(self._storage, shard) for shard in shards]
        for commit in commits:
            for message, _ in contradictions(manifest, commit):
                raise StoreFormatError(f"{message} ({self._storage.location}); see 'kvpipe verify'")
        return merge_fidelity(commits)


_ORDER = ["shard", "token_start"]
_NUMBERS = ["shard", "token_start", "num_tokens", "crc32c", "count"]
