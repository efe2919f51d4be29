"""Second moments of one teacher layer's keys and values, streamed: all that fitted projections are made of.

Knows channels and how they rotate, not where the numbers come from.

Suffixes: F rotated pairs, H heads, S student heads, R channels of a head that do not rotate, D channels of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Complex128, Float, Float64

from kvstore.spec import LayerSpec, RopeSpec

Channels = tuple[int, ...]
Matched = tuple[tuple[int, int], tuple[int, int]]
"""The channels of a rotary pair of the student, and of the teacher's pair it is fitted to."""


def rotated_pairs(rope: RopeSpec | None) -> tuple[tuple[int, int], ...]:
    """The channels (a, b) of every pair that rotates, ordered so that k[a] + j k[b] turns by a positive angle.

    A pair of frequency zero does not rotate; one of negative frequency turns the other way, so its channels are swapped.
    """
    if rope is None:
        return ()
    step, gap = (2, 1) if rope.kind == "interleaved" else (1, len(rope.inv_freq))
    firsts = [rope.start + step * pair for pair in range(len(rope.inv_freq))]
    return tuple((a, a + gap) if f > 0 else (a + gap, a) for a, f in zip(firsts, rope.inv_freq, strict=True) if f)


def resting_channels(dim: int, rope: RopeSpec | None) -> tuple[int, ...]:
    """The channels of a head that do not rotate, increasing."""
    rotated = {channel for pair in rotated_pairs(rope) for channel in pair}
    return tuple(channel for channel in range(dim) if channel not in rotated)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Sum and second moment of blocks of channels that are projected together, all of one size."""

    total: Float64[np.ndarray, "block n"] | Complex128[np.ndarray, "block n"]
    second: Float64[np.ndarray, "block n n"] | Complex128[np.ndarray, "block n n"]
    """Sum of z z^H."""

    @classmethod
    def zeros(cls, blocks: int, size: int, dtype: type) -> Moments:
        return cls(total=np.zeros((blocks, size), dtype), second=np.zeros((blocks, size, size), dtype))

    def add(self, z: Float64[np.ndarray, "block token n"] | Complex128[np.ndarray, "block token n"]) -> None:
        np.add(self.total, z.sum(axis=1), out=self.total)
        np.add(self.second, z.transpose(0, 2, 1) @ z.conj(), out=self.second)

    def merge(self, other: Moments) -> None:
        np.add(self.total, other.total, out=self.total)
        np.add(self.second, other.second, out=self.second)

    def covariance(self, count: int) -> np.ndarray:
        """Centred, [block, n, n]."""
        mean = self.total / count
        return np.asarray(self.second / count - mean[:, :, None] * mean[:, None, :].conj())


class Sums:
    """Float64 sums over tokens of one teacher layer; those of parts merge in any order, equal to rounding.

    Keys before rotation are kept per rotary pair as complex numbers z_h = k[h, a] + j k[h, b], so that memory is
    F x H x H; channels that do not rotate, and values, have a full matrix over heads and channels.
    """

    def __init__(self, layer: LayerSpec, rope: RopeSpec | None) -> None:
        """Nothing added yet.

        Args:
            rope: how keys rotate; None if a map need not commute with a rotation, as where the student has none.
        """
        heads, self.pairs, self.rest = layer.num_kv_heads, rotated_pairs(rope), resting_channels(layer.key_dim, rope)
        self.geometry = layer.geometry
        self.count = 0
        self.turning = Moments.zeros(len(self.pairs), heads, np.complex128)
        """One block per rotary pair, over heads."""
        self.resting = Moments.zeros(1, heads * len(self.rest), np.float64)
        """Key channels that do not rotate, over heads and channels."""
        self.values = Moments.zeros(1, heads * layer.value_dim, np.float64)

    def add(self, key: Float[np.ndarray, "token H D"], value: Float[np.ndarray, "token H Dv"]) -> None:
        """Count these tokens.

        Raises:
            ValueError: arrays of another geometry, or numbers that are not finite.
        """
        heads, key_dim, value_dim = self.geometry
        if key.shape != (len(value), heads, key_dim) or value.shape != (len(key), heads, value_dim):
            raise ValueError(
                f"sums: got key {list(key.shape)}, value {list(value.shape)}, expected [token, {heads}, {key_dim}] and "
                f"[token, {heads}, {value_dim}], axes [token, kv_head, dim]"
            )
        if not (np.isfinite(key).all() and np.isfinite(value).all()):
            raise ValueError("sums: got numbers that are not finite, expected finite keys and values; see 'kvpipe verify'")
        wide = key.astype(np.float64)
        a, b = ([pair[side] for pair in self.pairs] for side in (0, 1))
        self.turning.add((wide[..., a] + 1j * wide[..., b]).transpose(2, 0, 1))
        self.resting.add(wide[..., list(self.rest)].reshape(1, len(key), heads * len(self.rest)))
        self.values.add(value.astype(np.float64).reshape(1, len(key), heads * value_dim))
        self.count += len(key)

    def merge(self, other: Sums) -> None:
        """Add what another has counted.

        Raises:
            ValueError: the other is of another geometry or rotation.
        """
        if (self.geometry, self.pairs) != (other.geometry, other.pairs):
            raise ValueError(f"sums: got geometry {other.geometry}, expected {self.geometry}, and equal rotary pairs")
        self.turning.merge(other.turning)
        self.resting.merge(other.resting)
        self.values.merge(other.values)
        self.count += other.count


class CrossSums:
    """What a pretrained student makes of the same tokens, against what the teacher does; merges as `Sums` does."""

    def __init__(
        self, teacher: LayerSpec, student: LayerSpec, matched: Sequence[Matched], rest: tuple[Channels, Channels]
    ) -> None:
        """Nothing added yet.

        Args:
            matched: channels of each student pair and of the teacher pair it is fitted to.
            rest: channels that do not rotate, of the student and of the teacher.
        """
        self.geometries, self.matched, self.rest = (student.geometry, teacher.geometry), tuple(matched), rest
        heads = student.num_kv_heads, teacher.num_kv_heads
        self.count = 0
        self.turning = np.zeros((len(self.matched), *heads), np.complex128)
        """Sum of z_student z_teacher^H for every matched pair."""
        self.resting = np.zeros(tuple(side * len(channels) for side, channels in zip(heads, rest, strict=True)))
        self.values = np.zeros((heads[0] * student.value_dim, heads[1] * teacher.value_dim))

    def add(
        self,
        student: tuple[Float[np.ndarray, "token S Ds"], Float[np.ndarray, "token S Dsv"]],
        teacher: tuple[Float[np.ndarray, "_ H Dt"], Float[np.ndarray, "_ H Dtv"]],
    ) -> None:
        """Count keys and values of the same tokens.

        Raises:
            ValueError: arrays of another geometry.
        """
        for side, (key, value), (heads, key_dim, value_dim) in zip(
            ("student", "teacher"), (student, teacher), self.geometries, strict=True
        ):
            if key.shape != (len(teacher[0]), heads, key_dim) or value.shape != (len(teacher[0]), heads, value_dim):
                raise ValueError(
                    f"cross sums: got {side} key {list(key.shape)}, value {list(value.shape)}, expected [{len(teacher[0])}, {heads}, "
                    f"{key_dim}] and [{len(teacher[0])}, {heads}, {value_dim}], axes [token, kv_head, dim]"
                )
        ours, theirs = (pair[0].astype(np.float64) for pair in (student, teacher))
        for block, ((a, b), (c, d)) in enumerate(self.matched):
            self.turning[block] += (ours[..., a] + 1j * ours[..., b]).T @ (theirs[..., c] - 1j * theirs[..., d])
        sides = [x[..., list(channels)].reshape(len(x), -1) for x, channels in zip((ours, theirs), self.rest, strict=True)]
        self.resting += sides[0].T @ sides[1]
        flat = [pair[1].astype(np.float64).reshape(len(pair[1]), -1) for pair in (student, teacher)]
        self.values += flat[0].T @ flat[1]
        self.count += len(ours)

    def merge(self, other: CrossSums) -> None:
        """Add what another has counted, of the same layers."""
        self.turning += other.turning
        self.resting += other.resting
        self.values += other.values
        self.count += other.count


class QuerySums:
    """Second moments of the teacher's queries, by the key head and rotary pair they read; merges as `Sums` does."""

    def __init__(self, teacher: LayerSpec, rope: RopeSpec | None) -> None:
        self.heads, self.dim = teacher.num_kv_heads, teacher.key_dim
        self.pairs, self.rest = rotated_pairs(rope), resting_channels(teacher.key_dim, rope)
        self.count = 0
        self.turning = np.zeros((len(self.pairs), self.heads))
        """Sum of |z|^2 over the queries of a key head: a rotation does not change it, so these may be rotated."""
        self.resting = np.zeros((self.heads, len(self.rest), len(self.rest)))

    def add(self, query: Float[np.ndarray, "token Hq D"]) -> None:
        """Count queries; each key head is read by as many neighbouring query heads.

        Raises:
            ValueError: queries of another geometry.
        """
        if query.ndim != 3 or query.shape[1] % self.heads or query.shape[2] != self.dim:
            raise ValueError(
                f"query sums: got {list(query.shape)}, expected [token, a multiple of {self.heads}, {self.dim}], axes [token, head, dim]"
            )
        grouped = query.astype(np.float64).reshape(len(query), self.heads, -1, self.dim)
        squares = np.square(grouped).sum(axis=(0, 2))
        for block, (a, b) in enumerate(self.pairs):
            self.turning[block] += squares[:, a] + squares[:, b]
        chosen = (
            grouped[..., list(self.rest)]
            .transpose(1, 0, 2, 3)
            .reshape(self.heads, len(query) * grouped.shape[2], len(self.rest))
        )
        self.resting += chosen.transpose(0, 2, 1) @ chosen
        self.count += len(query) * grouped.shape[2]

    def merge(self, other: QuerySums) -> None:
        """Add what another has counted, of the same layer."""
        self.turning += other.turning
        self.resting += other.resting
        self.count += other.count
