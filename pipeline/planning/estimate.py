"""What an extraction will take, before it begins: bytes in every codec, hours, disk, and what would fit where it does not.

Pure arithmetic on what a trial measured, or on a published geometry and the usual bits of each codec. Knows no teacher.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvstore.codec import KINDS, Codec
from kvstore.groups import Group, plan_groups
from kvstore.layout import Layout, RowBytes, fill_shards, plan_chunk_tokens, plan_shard_tokens
from kvstore.spec import KVSpec, format_layers
from pipeline.align import default_student_layers
from pipeline.monitor.plot import LEAST_S

_LOG_LINE_BYTES, _LOGGED_SHARD_BYTES, PLOT_BYTES, _GATE_BYTES = 460, 24, 70_000, 1_200


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """What lies beside the arrays, in bytes."""

    per_token: float
    """Commit records and sample tables: ids, sources, texts."""
    per_shard: int
    """A commit record without samples."""
    spare_per_token: float
    """Room that a run with a limit keeps for sample tables not written yet, beyond what they will take."""
    own: int
    """Of an empty store: tokenizer, metadata, calibration, manifest."""
    own_files: int

    @property
    def fixed(self) -> int:
        """Whatever the data."""
        return self.own + _GATE_BYTES


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """A store in one codec."""

    codec: str
    bits_per_value: float
    """Of keys and values, as stored."""
    bytes_per_token: float
    """Of all arrays, as `kvpipe inspect` counts them."""
    shards: int | None
    total_bytes: int | None
    """Every byte of the store; None where the number of tokens is not known, as for shards."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Hours:
    """How long a run will take, in seconds."""

    start_up: float
    """Loading the teacher and probing it."""
    tokenise: float
    """The first window; later ones are tokenised while others are computed."""
    gate: float
    steady: float
    """Computing and writing, calibration included; or tokenising, where that takes longer."""
    total: float
    measured_tokens: int
    measured_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Other arguments with which the store would fit."""

    arguments: str
    total_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Everything `kvpipe plan` says."""

    teacher: str
    out: str
    codec: str
    measured: bool
    """Whether a trial with the real teacher was made; else sizes are those of Gaussian channels."""
    note: str | None
    """Why not, or what is assumed."""
    geometry: Mapping[str, Any]
    num_tokens: int | None
    is_exact: bool
    relative_error: float | None
    how: str
    chunk_tokens: int
    shard_tokens: int
    files: int | None
    rungs: tuple[Rung, ...]
    """The codec asked for first."""
    bytes_relative_error: float | None
    """Two standard errors of its bytes per token, from how much the tasks tried differ; None where there is nothing to tell by."""
    sized_tokens: int
    """Tokens that bytes per token were measured on; 0 where nothing was tried."""
    tokens_per_s: float | None
    """As tried, all workers together; None where nothing was."""
    hours: Hours | None
    """None where nothing was tried, or the number of tokens is not known."""
    student_tokens_per_s: int
    """Assumed speed of the student that reads the store."""
    read_bytes_per_s: float
    """What it will read at that speed."""
    room: Room
    tokens_that_fit: int | None
    fits: bool | None
    alternatives: tuple[Alternative, ...]

    @property
    def chosen(self) -> Rung:
        return self.rungs[0]


def scaled_layout(lengths: Sequence[int], scale: float, row: RowBytes, window: float | None = None) -> Layout:
    """The layout of data of which these are the lengths of a part.

    Args:
        scale: the tokens of all the data over those of the part.
        window: the tokens of the first window over those of the part; None for `scale`.
    """
    chunk = plan_chunk_tokens(lengths, row.layer)
    planned = scale if window is None else window
    shard = plan_shard_tokens(list(lengths) * math.ceil(min(planned, 1000)), chunk, row.token)
    layout = Layout(chunk_tokens=chunk, shard_tokens=shard, num_shards=0)
    if scale == 1:
        num_shards = sum(1 for _ in fill_shards(lengths, layout))
    else:
        known = sum(lengths)
        several = list(lengths) * math.ceil(4 * shard / known)  # the last shard, not full, must not count
        full = [sum(several[index] for index, _ in placed) for placed in fill_shards(several, layout)][:-1]
        num_shards = math.ceil(scale * known * len(full) / sum(full))
    return dataclasses.replace(layout, num_shards=num_shards)


def index_bytes(groups: Sequence[Group], layout: Layout, other_arrays: int) -> int:
    """Bytes of the indices of one shard of every array: 16 for each chunk there could be, and a checksum."""
    chunks = layout.shard_tokens // layout.chunk_tokens
    layers = [len(group.layers) for group in groups for _ in KINDS] + [1] * other_arrays
    return sum(16 * chunks * count + 4 for count in layers)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """What the sizes of a store follow from, but its codec."""

    stored: KVSpec
    lengths: Sequence[int]
    """Of the samples that are known, in tokens."""
    num_tokens: int | None
    """Of all samples."""
    window_tokens: int | None = None
    """Tokens that the layout is planned for: those of the first window; None for all."""
    other_bytes_per_token: float = 0.0
    """Of arrays beside keys and values, such as token ids, without indices."""
    other_arrays: int = 1
    records: Records = Records(per_token=0.0, per_shard=0, spare_per_token=0.0, own=0, own_files=0)
    seconds: float = 0.0
    """From its first task on, for the size of its log."""

    def layout(self, codecs: Mapping[int, Codec]) -> Layout:
        row = plan_groups(self.stored, codecs)[0].row_bytes
        known = sum(self.lengths)
        scale = 1.0 if self.num_tokens is None else self.num_tokens / known
        window = scale if self.window_tokens is None else min(scale, max(self.window_tokens / known, 1.0))
        return scaled_layout(self.lengths, scale, row, window)

    def rung(self, name: str, codecs: Mapping[int, Codec], kv_bytes_per_token: float) -> Rung:
        """The size of a store in one codec.

        Args:
            kv_bytes_per_token: of keys and values without the indices of the shards.
        """
        layout, records = self.layout(codecs), self.records
        index = layout.num_shards * index_bytes(plan_groups(self.stored, codecs), layout, self.other_arrays)
        arrays = kv_bytes_per_token + self.other_bytes_per_token + index / (self.num_tokens or sum(self.lengths))
        total = None
        if self.num_tokens is not None:
            total = round(
                self.num_tokens * (arrays + records.per_token)
                + layout.num_shards * records.per_shard
                + records.fixed
                + log_bytes(layout.num_shards, self.seconds)
            )
        return Rung(
            codec=name,
            bits_per_value=8 * kv_bytes_per_token / self.stored.values_per_token,
            bytes_per_token=arrays,
            shards=None if self.num_tokens is None else layout.num_shards,
            total_bytes=total,
        )


def log_bytes(shards: int, seconds: float) -> int:
    """Of the log of a run and its picture: a line for each shard, but at most one a second, and later one in a sixtieth of the time so
    far, up to half a minute."""
    lines = min(seconds, 60) + 60 * math.log(min(max(seconds / 60, 1), 30)) + max(seconds - 1800, 0) / 30
    picture = PLOT_BYTES if seconds >= LEAST_S else 0
    return round(_LOG_LINE_BYTES * (3 + min(shards, lines)) + _LOGGED_SHARD_BYTES * shards + picture)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What there is for a store."""

    free_bytes: int | None
    """Of the disk; None for a bucket."""
    stored_bytes: int
    """At `out` already."""
    max_bytes: int | None
    """The limit of the run."""
    slack_bytes: int
    """By which that limit must pass the size: the last shard begins only if it would fit uncompressed, and so would the sample tables that
    are not written yet."""

    @property
    def bytes(self) -> int | None:
        """Largest store there is room for; None where nothing says so."""
        disk = None if self.free_bytes is None else self.free_bytes + self.stored_bytes
        limit = None if self.max_bytes is None else self.max_bytes - self.slack_bytes
        return min((each for each in (disk, limit) if each is not None), default=None)

    def fits(self, rung: Rung) -> bool | None:
        """Whether a store of that size fits; None where its size is not known."""
        if rung.total_bytes is None:
            return None
        return self.bytes is None or rung.total_bytes <= self.bytes


def tokens_that_fit(rung: Rung, records: Records, room: int, num_tokens: int | None, shard_tokens: int) -> int:
    """How many tokens there is room for in this codec, if they are like those of the rung.

    Args:
        room: bytes there are.
        num_tokens: of the rung.
        shard_tokens: most tokens of a shard, for a rung of no known size.
    """
    each = rung.bytes_per_token + records.per_token + records.per_shard / shard_tokens
    if num_tokens is not None and rung.total_bytes is not None:
        each = (rung.total_bytes - records.fixed) / num_tokens
    return max(int((room - records.fixed) / each), 0)


def alternatives(
    rungs: Sequence[Rung], shares: Mapping[int, float], records: Records, num_tokens: int, room: int, shard_tokens: int
) -> tuple[Alternative, ...]:
    """Arguments with which a store fits that does not: the finest coarser codec, fewer layers, fewer tokens.

    Args:
        rungs: the one chosen first.
        shares: part of each layer in the bytes of keys and values; of those that `--layers` chooses from: those chosen now.
        room: bytes there are.
        shard_tokens: most tokens of a shard.
    """
    chosen, *others = rungs
    assert chosen.total_bytes is not None
    found = []
    for rung in sorted(others, key=lambda rung: -rung.bits_per_value):
        coarser = rung.bits_per_value < chosen.bits_per_value and rung.codec != "fp8"
        if coarser and rung.total_bytes is not None and rung.total_bytes <= room:
            found.append(Alternative(arguments=f"--codec {rung.codec}", total_bytes=rung.total_bytes))
            break
    fixed = records.fixed + round(num_tokens * records.per_token)
    layers = sorted(shares)
    for count in range(len(layers) - 1, 0, -1):
        kept = [layers[index] for index in default_student_layers(len(layers), count)]
        total = round(fixed + (chosen.total_bytes - fixed) * sum(shares[layer] for layer in kept))
        if total <= room:
            found.append(Alternative(arguments=f"--layers {format_layers(kept)}", total_bytes=total))
            break
    if tokens := tokens_that_fit(chosen, records, room, num_tokens, shard_tokens):
        digits = 10 ** max(len(str(tokens)) - 3, 0)
        fewer = tokens // digits * digits
        total = records.fixed + (chosen.total_bytes - records.fixed) * fewer // num_tokens
        found.append(Alternative(arguments=f"--max-tokens {fewer}", total_bytes=total))
    return tuple(found)
