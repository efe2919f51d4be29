"""A hard limit on the bytes of a store: no task begins that could pass it, even if nothing in it compresses.

Every byte below the store's location counts: shards, commit records with their texts, sample tables, tokenizer, metadata, logs.
Knows tasks and layouts, not how tasks run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvstore.codec import KINDS, Kind
from kvstore.compaction import loose_table_bytes
from kvstore.groups import Group
from kvstore.layout import Layout
from kvstore.manifest import Manifest
from kvstore.metadata import TOKEN_ARRAYS
from kvstore.spec import KVSpec
from kvstore.storage import Storage
from pipeline.data.windows import Window
from pipeline.models.load import tokenizer_files
from pipeline.tasks import Task

_CHUNK_EXTRA = 128
"""Most that a compressor and a checksum add to a chunk, beside a 256th of it (zstd's ZSTD_compressBound)."""
_RECORD_BYTES = 1024
"""Of an object in a commit with its copy of the array's metadata in staging, of a layer's fidelity, of a line of the log, of a window in
the manifest: at most."""
_REPEAT_BYTES = 96
"""Of a sample that an earlier window had, and of how often this one has it."""
END_BYTES = 160 * 2**10
"""What is written once at the end: headers of the sample tables, the gate's record, the plot of the run."""
_START_BYTES = 64 * 2**10
"""Manifest, metadata and records of an empty store, about."""


class ByteBudget:
    """Admits windows and tasks to a store as long as all admitted fit; used by one thread, and the only one that adds to the store.

    Args:
        max_bytes: the limit; None admits everything.
    """

    def __init__(self, storage: Storage, manifest: Manifest, max_bytes: int | None) -> None:
        self._storage, self._manifest, self._max_bytes = storage, manifest, max_bytes
        self.used_bytes = 0
        """What lay in the store when it was last counted, with room for its tables, and the worst of what was admitted since."""
        self.recount()

    def recount(self) -> None:
        """Count what really is there; to be called when no admitted task is running."""
        if self._max_bytes is not None:
            self.used_bytes = store_bytes(self._storage) + loose_table_bytes(self._storage)

    def admits(self, item: Task | Window) -> bool:
        """Whether the task may begin, or the window be entered; if so, room is kept for it."""
        if self._max_bytes is None:
            return True
        worst = task_bytes(self._manifest, item) if isinstance(item, Task) else window_bytes(item)
        if self.used_bytes + worst + END_BYTES > self._max_bytes:
            return False
        self.used_bytes += worst
        return True


def store_bytes(storage: Storage) -> int:
    """Bytes of everything below a store's location."""
    return sum(entry.size_bytes for entry in storage.entries(""))


def window_bytes(window: Window) -> int:
    """Most bytes that entering a window may add to the store, were all of its samples repeats."""
    return 4 * _RECORD_BYTES + _REPEAT_BYTES * len(window.samples)


def task_bytes(manifest: Manifest, task: Task) -> int:
    """Most bytes a task may add to the store."""
    layout = manifest.layout
    chunks = sum(layout.padded(len(sample.input_ids)) for sample in task.samples) // layout.chunk_tokens
    rows = json.dumps([dataclasses.asdict(sample.row) for sample in task.samples], ensure_ascii=False, indent=4)
    return most_bytes(manifest.groups, layout, chunks, len(rows.encode()), manifest.token_arrays)


def most_bytes(
    groups: Sequence[Group], layout: Layout, chunks: int, rows_bytes: int, token_arrays: Sequence[str] = ("input_ids",)
) -> int:
    """Most bytes a shard may take: its values uncompressed, and everything written about it.

    Args:
        chunks: that its samples take up.
        rows_bytes: of those samples in its commit record.
        token_arrays: names of the arrays beside keys and values.
    """
    per_shard = layout.shard_tokens // layout.chunk_tokens
    arrays = [(len(group.layers), _row_bytes(group, kind)) for group in groups for kind in KINDS]
    total = 0
    for layers, row_bytes in [*arrays, *((1, np.dtype(TOKEN_ARRAYS[name].dtype).itemsize) for name in token_arrays)]:
        chunk_bytes = layout.chunk_tokens * row_bytes
        total += layers * (chunks * (chunk_bytes + chunk_bytes // 256 + _CHUNK_EXTRA) + 16 * per_shard) + 4
    num_layers = sum(len(group.layers) for group in groups)
    return (
        total + 2 * rows_bytes + _RECORD_BYTES * (len(arrays) + len(token_arrays) + num_layers + 2)
    )  # rows also go into a table


def _row_bytes(group: Group, kind: Kind) -> int:
    """Bytes of one token of one layer."""
    return int(np.prod(group.code_shape(kind))) * group.storage_dtype(kind).itemsize


def refuse_small_budget(max_bytes: int | None, tokenizer: Any, stored: KVSpec) -> None:
    """Refuse a limit that an empty store would pass already, before one is made.

    Raises:
        ValueError: it would.
    """
    if max_bytes is None:
        return
    kept = sum(map(len, tokenizer_files(tokenizer).values()))
    calibration = 2 * 4 * stored.values_per_token  # mean and step of every channel, float32
    needed = kept + calibration + _START_BYTES + END_BYTES
    if needed > max_bytes:
        raise ValueError(
            f"--max-bytes: got {max_bytes:,}, but a store without a single shard takes about {needed:,} bytes ({kept:,} the tokenizer, "
            f"{calibration:,} the calibration); nothing was written. 'kvpipe plan' with the same arguments says how much is needed"
        )
