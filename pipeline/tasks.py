"""Planning: which samples go into which shard, and which run together in one forward pass.

Pure functions of lengths and settings, so that a resumed or retried run plans exactly the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from kvstore import manifest
from kvstore.codec import Codec
from kvstore.commits import SampleRow, token_crc32c
from kvstore.layout import Layout, fill_shards
from kvstore.spec import KVSpec
from pipeline.data.samples import Sample
from pipeline.data.windows import Window

PAD_MULTIPLE = 64
"""Samples are padded to a multiple of this: what a sample's numbers are depends on the padded length alone."""

CPU_BATCH_TOKENS = 8192
"""Padded tokens of a forward pass on a CPU, whose speed hardly depends on them."""
MAX_BATCH_TOKENS = 65_536
"""More makes no GPU faster."""
_PROBE_TOKENS = 2048
_USABLE_SHARE = 0.7
"""Of a GPU's free memory: encoding needs some, and some is lost between blocks of other sizes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TaskSample:
    """One sample of a task and where it goes."""

    row: SampleRow
    offset: int
    """First token inside the shard."""
    input_ids: Int32[np.ndarray, "token"]
    beside: Mapping[str, UInt8[np.ndarray, "token"]]
    """What else is stored of each token, by array name."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One shard's worth of samples for one worker."""

    shard: int
    samples: tuple[TaskSample, ...]
    claim: str | None = None
    """Under which the shard is written, by whatever process (`kvstore.lease`)."""

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.input_ids) for sample in self.samples)


def plan_tasks(samples: Sequence[Sample], layout: Layout, first_shard: int = 0) -> list[Task]:
    """Fill shards from `first_shard` on with samples in order: each starts on a chunk, none straddles a shard."""
    lengths = [len(sample.input_ids) for sample in samples]
    return [
        Task(
            shard=shard,
            samples=tuple(
                TaskSample(
                    row=_row(samples[index], shard, shard * layout.shard_tokens + offset),
                    offset=offset,
                    input_ids=samples[index].input_ids,
                    beside=samples[index].beside,
                )
                for index, offset in placed
            ),
        )
        for shard, placed in enumerate(fill_shards(lengths, layout), start=first_shard)
    ]


def task_range(text: str, num_tasks: int) -> range:
    """Parse `3/8`, the third of eight equal runs of tasks, counted from 1.

    Raises:
        ValueError: not of that form.
    """
    number, slash, total = text.partition("/")
    if not (slash and number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise ValueError(f"--task-range: got {text!r}, expected N/M with N from 1 to M, for instance 3/8")
    return range((int(number) - 1) * num_tasks // int(total), int(number) * num_tasks // int(total))


def refuse_tokens(window: Window, num_embeddings: int) -> None:
    """Refuse token ids the teacher has no embedding for.

    Raises:
        ValueError: there are some; on a GPU they would end the process.
    """
    largest = max((int(sample.input_ids.max()) for sample in window.samples), default=0)
    if largest >= num_embeddings:
        raise ValueError(
            f"token ids: got {largest}, but the teacher has {num_embeddings} embeddings; the tokenizer is not the teacher's"
        )


def _row(sample: Sample, shard: int, token_start: int) -> SampleRow:
    return SampleRow(
        id=sample.id,
        source=sample.source,
        shard=shard,
        token_start=token_start,
        num_tokens=len(sample.input_ids),
        crc32c=token_crc32c(sample.input_ids),
        count=sample.count,
        text=sample.text,
    )


def plan_batches(lengths: Sequence[int], batch_tokens: int, max_positions: int, *, alone: bool = False) -> list[list[int]]:
    """Group the samples of a task into forward passes: equal padded lengths together, at most `batch_tokens` of them.

    Args:
        max_positions: the model's limit, which padding must not pass.
        alone: one sample at a time and unpadded, for RoPE types whose frequencies depend on the longest of a batch.
    """
    if alone:
        return [[index] for index in range(len(lengths))]
    buckets: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        buckets.setdefault(padded_length(length, max_positions), []).append(index)
    batches = []
    for padded, members in sorted(buckets.items()):
        rows = max(batch_tokens // padded, 1)
        # Evenly, for nine rows as eight and one keep a GPU less busy than as five and four.
        batches += [part.tolist() for part in np.array_split(members, math.ceil(len(members) / rows))]
    return batches


def fit_batch_tokens(memory_share: Callable[[int], float], width: int) -> int:
    """Padded tokens of a forward pass that fit a GPU, from two small passes: a power of two, so that equal GPUs get equal numbers.

    Args:
        memory_share: runs so many samples and says which share of the free memory that took; may raise torch's out-of-memory error.
        width: padded tokens of a sample.
    """
    rows = max(_PROBE_TOKENS // width, 1)
    once, twice = memory_share(rows), memory_share(2 * rows)
    each = max(twice - once, 1e-9) / rows
    tokens = width * (rows + (_USABLE_SHARE - once) / each)
    return 1 << (int(min(max(tokens, width), MAX_BATCH_TOKENS)).bit_length() - 1)


def padded_length(length: int, max_positions: int) -> int:
    """Length a sample is padded to."""
    return min(-(-length // PAD_MULTIPLE) * PAD_MULTIPLE, max(max_positions, length))


def data_record(samples: Sequence[Sample], seq_len: int) -> dict[str, Any]:
    """Identity of the data of a store: every sample in order, by content."""
    return manifest.data_record(((sample.id, sample.count, len(sample.input_ids)) for sample in samples), seq_len)


def estimate_bytes(spec: KVSpec, codecs: Mapping[int, Codec], num_tokens: int) -> int:
    """Size of a store before it is written, from the usual bits per value of each layer's codec."""
    bits = 0.0
    for layer in spec.layers:
        codec = codecs[layer.layer]
        doubled = codec.key is None and spec.dtype == "float32"
        bits += layer.num_kv_heads * (layer.key_dim + layer.value_dim) * codec.nominal_bits * (2 if doubled else 1)
    return int(bits / 8 * num_tokens)
