"""How the token axis is cut into shards and chunks, and which sample goes where (FORMAT.md 7). Pure functions of lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from kvstore.records import INT32_MAX, STRICT, Natural

MIN_CHUNK_TOKENS, MAX_CHUNK_TOKENS = 64, 1024
MIN_CHUNK_BYTES = 8192
MAX_SHARD_BYTES = 256 * 2**20
MAX_SHARD_TOKENS = 65_536
_SHARDS_WANTED = 32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the token axis is cut; the same for every array of a store."""

    __pydantic_config__ = STRICT

    chunk_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)]
    """Tokens of an inner chunk, Zarr's unit of decoding; samples start on one."""
    shard_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)]
    """Tokens of a shard, Zarr's stored object and the unit of work, commit and hash."""
    num_shards: Natural

    @property
    def num_tokens(self) -> int:
        """Length of the token axis, gaps between samples included."""
        return self.shard_tokens * self.num_shards

    def padded(self, num_tokens: int) -> int:
        """Rows that a sample takes up: whole chunks."""
        return -(-num_tokens // self.chunk_tokens) * self.chunk_tokens


@dataclasses.dataclass(frozen=True, slots=True)
class RowBytes:
    """How much a token takes in the largest array of a store, before compression."""

    token: int
    """In all its layers: what a shard holds."""
    layer: int
    """In one of them: what a chunk holds."""


def plan_layout(lengths: Sequence[int], row: RowBytes, longest: int | None = None) -> Layout:
    """Cut the token axis for samples of these lengths, in tokens.

    Args:
        longest: longest sample that may come later; None for the longest of these.
    """
    chunk = plan_chunk_tokens(lengths, row.layer)
    shard = plan_shard_tokens([*lengths, *([longest] if longest else [])], chunk, row.token)
    layout = Layout(chunk_tokens=chunk, shard_tokens=shard, num_shards=0)
    return dataclasses.replace(layout, num_shards=sum(1 for _ in fill_shards(lengths, layout)))


def plan_chunk_tokens(lengths: Sequence[int], layer_bytes: int) -> int:
    """Power of two at most a quarter of the median sample, 64 to 1,024: a part of a sample is then read with little waste.

    Up to the whole median sample where a chunk would be smaller than 8 KiB: the fixed cost of one, some 20 microseconds, is then more
    than that of its bytes.
    """
    median = max(int(np.median(lengths)), 4)
    least = min(MIN_CHUNK_BYTES // layer_bytes, median)
    return int(np.clip(max(_power_of_two(median // 4), _power_of_two(least)), MIN_CHUNK_TOKENS, MAX_CHUNK_TOKENS))


def _power_of_two(number: int) -> int:
    """The largest that is no larger."""
    return 1 << max(number, 1).bit_length() - 1


def plan_shard_tokens(lengths: Sequence[int], chunk_tokens: int, token_bytes: int) -> int:
    """Multiple of the chunk that holds the longest sample; else about 1/32 of the data, 256 MiB or 65,536 tokens, the least."""
    padded = [-(-length // chunk_tokens) for length in lengths]
    by_bytes = MAX_SHARD_BYTES // token_bytes // chunk_tokens
    wanted = min(-(-sum(padded) // _SHARDS_WANTED), by_bytes, MAX_SHARD_TOKENS // chunk_tokens)
    return chunk_tokens * max(wanted, max(padded))


def fill_shards(lengths: Sequence[int], layout: Layout) -> Iterator[list[tuple[int, int]]]:
    """For each shard in turn its samples as (index, token offset inside the shard), in order; none straddles a shard."""
    placed: list[tuple[int, int]] = []
    used = 0
    for index, length in enumerate(lengths):
        padded = layout.padded(length)
        if used + padded > layout.shard_tokens:
            yield placed
            placed, used = [], 0
        placed.append((index, used))
        used += padded
    if placed:
        yield placed
