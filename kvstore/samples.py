"""Which samples a store holds and where, read from parquet tables compacted from the commit records (FORMAT.md 6).

A commit record is the truth; parquet is its fast form. A shard that is in no table yet is read from its record.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int32, Int64, UInt32

from kvstore.commits import Commit, committed_shards, merge_fidelity, read_commit
from kvstore.errors import KVStoreError, StoreFormatError
from kvstore.manifest import SAMPLES, read_manifest
from kvstore.records import bytes_sha256
from kvstore.repeats import read_repeats
from kvstore.storage import Storage

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


def part_key(summary_key: str) -> str:
    """The part a summary belongs to: its name begins with the part's."""
    return f"{SAMPLES}/part-{PurePosixPath(summary_key).name.split('-')[1]}.parquet"


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


def _decode(content: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """Read parquet in this thread alone: threads of `read_table` may let go of our bytes while the interpreter ends, and abort it."""
    file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
    table = file.read(columns, use_threads=False)
    return table if columns is None else table.select(columns)


def read_parquet(storage: Storage, key: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a table, page checksums verified.

    Raises:
        StoreFormatError: it is missing or damaged.
    """
    where = f"{storage.location}/{key}"
    try:
        content = storage.read(key)
    except FileNotFoundError:
        content = b""
    try:
        return _decode(content, columns)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise StoreFormatError(
            f"{where}: missing or damaged parquet ({error}); 'kvpipe repair' rebuilds it from commits/, and so does deleting "
            "the files in samples/ and extracting again"
        ) from error


def read_summaries(storage: Storage) -> dict[str, pa.Table]:
    """Every summary by its key, its content proved by the hash in its name."""
    keys = sorted(entry.key for entry in storage.entries(SAMPLES))
    tables = {}
    for key in keys:
        name = PurePosixPath(key)
        if not name.name.startswith("summary-"):
            continue
        content = storage.read(key)
        if not name.stem.endswith(bytes_sha256(content)[:HASH_DIGITS]):
            raise StoreFormatError(
                f"{storage.location}/{key}: its content does not hash to its name; it is damaged. 'kvpipe repair' rebuilds it "
                "from commits/"
            )
        tables[key] = _decode(content)
    return tables


def listed_shards(storage: Storage) -> dict[int, tuple[int, int]]:
    """Tokens and stored bytes of the shards that are in a summary; those committed since are not among them."""
    return {
        row["shard"]: (row["num_tokens"], row["stored_bytes"])
        for table in read_summaries(storage).values()
        for row in table.to_pylist()
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
            for key, table in tables.items():
                shards = set(table["shard"].to_pylist())
                if lost := sorted(shards - committed):
                    raise StoreFormatError(
                        f"shard {', '.join(map(str, lost[:5]))}: listed in {storage.location}/{key}, but there is no commit "
                        "record; it is lost. Restore it, or make it again with 'kvpipe repair'"
                    )
                if fresh := shards - seen:
                    self._parts[part_key(key)] = fresh, json.loads(table.schema.metadata[COLUMN_DIGESTS])
                    keep = pa.array([shard in fresh for shard in table["shard"].to_pylist()], pa.bool_())
                    summaries.append(table.filter(keep).replace_schema_metadata(None))
                seen |= shards
            self._loose = [read_commit(storage, shard) for shard in sorted(committed - seen)]
        self.summary: pa.Table = pa.concat_tables([*summaries, summary_of(self._loose)]).sort_by("shard")
        """One row per committed shard: shard, num_samples, num_tokens, stored_bytes."""

    def __len__(self) -> int:
        return int(np.sum(self.summary["num_samples"].to_numpy()))

    def _column(self, name: str) -> pa.ChunkedArray:
        wanted = list(dict.fromkeys([*_ORDER, name]))
        tables = [rows_of(self._loose).select(wanted)]
        for key, (shards, digests) in self._parts.items():
            table = read_parquet(self._storage, key, wanted)
            for column in wanted:
                same_type = table.schema.field(column).type == ROWS.field(column).type
                if not same_type or column_digest(table[column]) != digests[column]:
                    raise StoreFormatError(
                        f"{self._storage.location}/{key}: column {column!r} is not what its summary says; it is damaged. 'kvpipe "
                        "repair' rebuilds it from commits/"
                    )
            tables.append(table.filter(pa.array(np.isin(table["shard"].to_numpy(), list(shards)))))
        column = pa.concat_tables(tables).sort_by([("shard", "ascending"), ("token_start", "ascending")])[name]
        if len(column) != len(self):
            raise StoreFormatError(
                f"{self._storage.location}/{SAMPLES}: {len(column)} rows, the summaries say {len(self)}; 'kvpipe repair' rebuilds "
                "them from commits/"
            )
        return column

    @cached_property
    def ids(self) -> list[str]:
        """Hex sha256 of every sample's tokens.

        Raises:
            StoreFormatError: an id stands twice: a sample is stored once.
        """
        ids = list(self._column("id").to_pylist())
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
        return list(self._column("source").to_pylist())

    @cached_property
    def text(self) -> list[str | None]:
        return list(self._column("text").to_pylist())

    @cached_property
    def shard(self) -> Int32[np.ndarray, "sample"]:
        return np.asarray(self._column("shard").to_numpy())

    @cached_property
    def token_start(self) -> Int64[np.ndarray, "sample"]:
        return np.asarray(self._column("token_start").to_numpy())

    @cached_property
    def num_tokens(self) -> Int32[np.ndarray, "sample"]:
        return np.asarray(self._column("num_tokens").to_numpy())

    @cached_property
    def crc32c(self) -> UInt32[np.ndarray, "sample"]:
        return np.asarray(self._column("crc32c").to_numpy())

    @cached_property
    def count(self) -> Int32[np.ndarray, "sample"]:
        """How often the data had each sample, over all parts of it."""
        count = np.array(self._column("count").to_numpy())
        if repeats := read_repeats(self._storage, read_manifest(self._storage)):
            count += np.array([repeats.get(identity, 0) for identity in self.ids], dtype=count.dtype)
        return count

    def fidelity(self) -> dict[str, Any]:
        """Measured fidelity of every layer over all shards, weighted by their tokens.

        Raises:
            KVStoreError: nothing is committed yet.
        """
        shards = self.summary["shard"].to_pylist()
        if not shards:
            raise KVStoreError(f"{self._storage.location}: no shard is committed yet, so no fidelity is known")
        return merge_fidelity([read_commit(self._storage, shard) for shard in shards])


_ORDER = ["shard", "token_start"]
