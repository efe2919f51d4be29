"""Which samples a store holds and where: parquet tables compacted from the commit records (FORMAT.md 6).

A commit record is the truth; parquet is its fast form. A shard that is in no table yet is read from its record.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int32, Int64, UInt32

from kvstore.commits import Commit, committed_shards, merge_fidelity, read_commit
from kvstore.errors import KVStoreError, StoreFormatError
from kvstore.manifest import SAMPLES
from kvstore.records import fsync_dir, staging_path

_ROWS = pa.schema(
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
_SUMMARY = pa.schema(
    [
        ("shard", pa.int32()),
        ("num_samples", pa.int32()),
        ("num_tokens", pa.int64()),
        ("stored_bytes", pa.int64()),
    ]
)


def compact(root: Path) -> int:
    """Move what only commit records say into one more parquet part; returns the number of shards added.

    Two processes doing so at once is harmless: readers take a shard from the first part that has it.
    """
    loose = sorted(committed_shards(root) - set(_read_summaries(root)["shard"].to_pylist()))
    if not loose:
        return 0
    commits = [read_commit(root, shard) for shard in loose]
    number = sum(1 for _ in (root / SAMPLES).glob("part-*.parquet"))
    while not _create_parquet(root, f"part-{number:05d}.parquet", _rows(commits)):
        number += 1
    _create_parquet(root, f"summary-{number:05d}.parquet", _summary(commits))
    return len(loose)


def _rows(commits: Iterable[Commit]) -> pa.Table:
    return pa.Table.from_pylist([dataclasses.asdict(row) for commit in commits for row in commit.samples], schema=_ROWS)


def _summary(commits: Iterable[Commit]) -> pa.Table:
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
        schema=_SUMMARY,
    )


def _create_parquet(root: Path, name: str, table: pa.Table) -> bool:
    staged = staging_path(root, name)
    pq.write_table(table, staged, compression="zstd", write_page_checksum=True)
    with staged.open("rb") as file:
        os.fsync(file.fileno())
    try:
        os.link(staged, root / SAMPLES / name)
    except FileExistsError:
        return False
    finally:
        staged.unlink()
    fsync_dir(root / SAMPLES)
    return True


def _read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise StoreFormatError(f"{path}: damaged parquet ({error}); delete it, it is rebuilt from commits/") from error


def _read_summaries(root: Path) -> pa.Table:
    tables = [_read_parquet(path) for path in sorted((root / SAMPLES).glob("summary-*.parquet"))]
    return pa.concat_tables(tables) if tables else _SUMMARY.empty_table()


class SampleTable:
    """The committed samples in order of shard and position; columns are read when first asked for.

    Opening reads the per-shard summary only. Safe to share between threads for reading, and pickles as its path and shards.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        committed = committed_shards(root)
        parts: dict[int, pa.Table] = {}
        seen: set[int] = set()
        summaries = []
        for path in sorted((root / SAMPLES).glob("summary-*.parquet")):
            table = _read_parquet(path)
            fresh = [shard in committed and shard not in seen for shard in table["shard"].to_pylist()]
            table = table.filter(pa.array(fresh, pa.bool_()))
            parts[int(path.stem.removeprefix("summary-"))] = table
            seen.update(table["shard"].to_pylist())
            summaries.append(table)
        self._parts = {number: set(table["shard"].to_pylist()) for number, table in parts.items()}
        self._loose = [read_commit(root, shard) for shard in sorted(committed - seen)]
        self.summary: pa.Table = pa.concat_tables([*summaries, _summary(self._loose)]).sort_by("shard")
        """One row per committed shard: shard, num_samples, num_tokens, stored_bytes."""

    def __len__(self) -> int:
        return int(np.sum(self.summary["num_samples"].to_numpy()))

    def _column(self, name: str) -> pa.ChunkedArray:
        tables = [_rows(self._loose).select(["shard", "token_start", name] if name not in _ORDER else _ORDER)]
        for number, shards in self._parts.items():
            path = self._root / SAMPLES / f"part-{number:05d}.parquet"
            table = _read_parquet(path, columns=[*_ORDER, name] if name not in _ORDER else _ORDER)
            keep = np.isin(table["shard"].to_numpy(), list(shards))
            tables.append(table.filter(pa.array(keep)))
        column = pa.concat_tables(tables).sort_by([("shard", "ascending"), ("token_start", "ascending")])[name]
        if len(column) != len(self):
            raise StoreFormatError(
                f"{self._root / SAMPLES}: {len(column)} rows, the summary says {len(self)}; delete the folder's files, "
                "they are rebuilt from commits/ by running the extraction again"
            )
        return column

    @cached_property
    def ids(self) -> list[str]:
        return list(self._column("id").to_pylist())

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
        return np.asarray(self._column("count").to_numpy())

    def fidelity(self) -> dict[str, Any]:
        """Measured fidelity of every layer over all shards, weighted by their tokens.

        Raises:
            KVStoreError: nothing is committed yet.
        """
        shards = self.summary["shard"].to_pylist()
        if not shards:
            raise KVStoreError(f"{self._root}: no shard is committed yet, so no fidelity is known")
        return merge_fidelity([read_commit(self._root, shard) for shard in shards])


_ORDER = ["shard", "token_start"]
