"""Making and deleting the sample tables: what commit records say, compacted into parquet (FORMAT.md 6).

A commit record is the truth; parquet is its fast form, made again from the records whenever it is gone.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from kvstore.commits import Commit, committed_shards, read_commit
from kvstore.errors import StoreWriteError
from kvstore.manifest import SAMPLES
from kvstore.records import bytes_sha256, canonical_json
from kvstore.samples import (
    COLUMN_DIGESTS,
    HASH_DIGITS,
    ROWS,
    column_digest,
    is_part,
    part_key,
    read_summaries,
    rows_of,
    summary_of,
)
from kvstore.storage import Storage

PART_BYTES = 16 * 2**20
"""Of rows and texts in a part, about: what compacting takes of memory does not grow with the store."""


def compact(storage: Storage, shards: Iterable[int] | None = None) -> int:
    """Move what only commit records say into further parts and their summaries; returns the number of shards added.

    Two processes doing so at once is harmless: readers take a shard from the first summary that has it.

    Args:
        shards: these alone, known to be committed and in no summary; None looks for them.
    """
    loose = sorted(loose_shards(storage) if shards is None else shards)
    for rows, summary in _parts(read_commit(storage, shard) for shard in loose):
        try:
            write_tables(storage, rows, summary)
        except OSError as error:
            raise StoreWriteError(
                f"{SAMPLES}/: writing the sample tables of {storage.location} failed ({error}); mend that (space, permissions, "
                "connection) and run the same command again: the shards are committed and readable without them"
            ) from error
        del rows, summary
        pa.default_memory_pool().release_unused()
    return len(loose)


def loose_table_bytes(storage: Storage) -> int:
    """The most bytes that `compact` would add, but some kilobytes of headers a part: parquet makes tables smaller than they are in memory."""
    parts = _parts(read_commit(storage, shard) for shard in sorted(loose_shards(storage)))
    return sum(rows.nbytes + summary.nbytes for rows, summary in parts)


def loose_shards(storage: Storage) -> set[int]:
    """Committed shards that only their commit records tell of."""
    listed = {shard for summary in read_summaries(storage).values() for shard in summary.shards["shard"].to_pylist()}
    return committed_shards(storage) - listed


def _parts(commits: Iterable[Commit]) -> Iterator[tuple[pa.Table, pa.Table]]:
    """The rows of shards that make one part, and their summary; a commit is let go of as soon as its rows are in a table."""
    rows, summaries, size = list[pa.Table](), list[pa.Table](), 0
    for commit in commits:
        rows.append(rows_of([commit]))
        summaries.append(summary_of([commit]))
        size += rows[-1].nbytes
        if size >= PART_BYTES:
            yield pa.concat_tables(rows), pa.concat_tables(summaries)
            rows, summaries, size = [], [], 0
    if rows:
        yield pa.concat_tables(rows), pa.concat_tables(summaries)


def write_tables(storage: Storage, rows: pa.Table, shards: pa.Table) -> None:
    """Write one part and its summary, named by what they contain.

    Args:
        rows: samples, with the schema `ROWS`.
        shards: the shards they lie in, with the schema `SUMMARY`.
    """
    part = _parquet(rows)
    name = bytes_sha256(part)[:HASH_DIGITS]
    digests = {column: column_digest(rows[column]) for column in ROWS.names}
    summary = _parquet(shards.replace_schema_metadata({COLUMN_DIGESTS: canonical_json(digests)}))
    storage.write(f"{SAMPLES}/part-{name}.parquet", part, replace=False)
    storage.write(f"{SAMPLES}/summary-{name}-{bytes_sha256(summary)[:HASH_DIGITS]}.parquet", summary, replace=False)


def forget(storage: Storage, shards: Iterable[int]) -> None:
    """Delete every table that lists one of these shards, and parts without a summary, which a killed writer leaves behind.

    The summary goes first; `compact` makes new ones. For `drop` and `repair`, which hold the whole store.
    """
    gone, kept = set(shards), set[str]()
    for key, summary in read_summaries(storage).items():
        if gone & set(summary.shards["shard"].to_pylist()):
            storage.delete(key)
        else:
            kept.add(part_key(key))
    for entry in list(storage.entries(SAMPLES)):
        if is_part(entry.key) and entry.key not in kept:
            storage.delete(entry.key)


def _parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd", write_page_checksum=True)
    return file.getvalue()
