"""Second moments of one teacher layer's keys and values, streamed: all that a fitted projection is made of.

Knows channels and how they rotate, not where the numbers come from.

Suffixes: F rotated pairs, H heads, R channels of a head that do not rotate, D channels of a head.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Complex128, Float, Float64

from kvstore.spec import LayerSpec, RopeSpec


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
