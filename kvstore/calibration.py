"""Calibration: the mean and step of every channel, fitted once per store from the first tokens (FORMAT.md 2.5, 3.4).

Knows numbers and groups; neither files nor models.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_numpy_array
from jaxtyping import Float, Float32, Float64

from kvstore.codec import INT8_MAX, KINDS, NIBBLE_MIN, Kind, Quantizer
from kvstore.errors import CodecError
from kvstore.groups import Group

CALIBRATION_TOKENS = 65_536
"""At least so many tokens are calibrated on, or all there are."""
SINK_TOKENS = 4
"""First positions of a sample, which attend to nothing else and whose keys are often extreme; left out of calibration."""

# Reach of the code range in standard deviations of a channel: the step of a loud channel is widened until the range holds
# this much, 10 where tails are heavy. 4 for nibbles minimises the squared error of a Gaussian channel.
_INT8_REACH, _INT8_REACH_HEAVY, _HEAVY_KURTOSIS, _NIBBLE_REACH = 6.0, 10.0, 6.0, 4.0

_PIECE_VALUES = 131_072
"""A megabyte in float64."""

Channel = Float32[np.ndarray, "kv_head dim"]
Calibration = Mapping[str, Mapping[Kind, tuple[np.ndarray, np.ndarray]]]
"""Group path -> kind -> (mean, step), each float32 [layer, kv_head, dim]; empty for raw."""


@dataclasses.dataclass(slots=True)
class ChannelMoments:
    """Running power sums of one layer's channels, in float64; adding is the only way they change."""

    count: int
    sums: Float64[np.ndarray, "4 kv_head dim"]
    """Sums of x, x^2, x^3 and x^4."""

    @classmethod
    def zeros(cls, num_kv_heads: int, dim: int) -> ChannelMoments:
        return cls(0, np.zeros((4, num_kv_heads, dim)))

    def add(self, values: Float[np.ndarray, "token kv_head dim"]) -> None:
        self.merge(ChannelMoments(len(values), power_sums(values)))

    def merge(self, other: ChannelMoments) -> None:
        self.count += other.count
        self.sums += other.sums

    def mean(self) -> Float64[np.ndarray, "kv_head dim"]:
        return np.asarray(self.sums[0] / self.count)

    def variance(self) -> Float64[np.ndarray, "kv_head dim"]:
        return np.asarray(np.maximum(self.sums[1] / self.count - self.mean() ** 2, 0.0))

    def kurtosis(self) -> float:
        """Fourth central moment over squared variance, pooled over channels; 3 for Gaussian channels."""
        mean, (_, m2, m3, m4) = self.mean(), self.sums / self.count
        fourth = m4 - 4 * mean * m3 + 6 * mean**2 * m2 - 3 * mean**4
        squared = float((self.variance() ** 2).sum())
        return float(fourth.sum()) / squared if squared > 0 else 3.0


def power_sums(values: Float[Any, "token kv_head dim"]) -> Float64[Any, "4 kv_head dim"]:
    """What `ChannelMoments` holds of these values, computed where they are; on the host in pieces that stay in its cache."""
    xp = array_namespace(values)
    sums = xp.zeros((4, *values.shape[1:]), dtype=xp.float64, device=device(values))
    num_tokens = int(values.shape[0])
    step = max(_PIECE_VALUES // int(np.prod(values.shape[1:])), 1) if is_numpy_array(values) else max(num_tokens, 1)
    for first in range(0, num_tokens, step):
        x = xp.astype(values[first : first + step], xp.float64)
        square = x * x
        for order, power in enumerate((x, square, square * x, square * square)):
            sums[order] += xp.sum(power, axis=0)
    return sums


Moments = Mapping[tuple[int, Kind], ChannelMoments]
"""By teacher layer and kind."""


def calibration_mask(lengths: Sequence[int]) -> np.ndarray:
    """Which tokens of samples laid end to end count: all but the sinks, of a short sample its second half."""
    return np.concatenate([np.arange(length) >= min(SINK_TOKENS, length // 2) for length in lengths])


def refuse_broken_sample(
    values: Float[np.ndarray, "token kv_head dim"], samples: Sequence[tuple[str, int]], layer: int, kind: Kind, origin: str
) -> None:
    """Name the first sample with a value that is not finite, before it spoils the sums of all.

    Args:
        samples: id and number of tokens of each, end to end.
        origin: the store they are read from.

    Raises:
        CodecError: there is one.
    """
    finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if not finite.all():
        ends = np.cumsum([num_tokens for _, num_tokens in samples])
        identity = samples[int(np.searchsorted(ends, int(finite.argmin()), side="right"))][0]
        raise CodecError(
            f"sample {identity[:12]} of {origin}, layer {layer}, {kind}: got NaN or infinity, expected finite values. 'kvpipe verify "
            f"{origin} --deep' lists all such samples; 'kvpipe repair' makes them again, 'kvpipe drop' takes them out"
        )


def fit_quantizer(quantizer: Quantizer, moments: ChannelMoments) -> tuple[Channel, Channel]:
    """Mean and step of every channel of one layer: a fixed step, widened for loud channels (research/codecs.md 6).

    Raises:
        CodecError: no values were seen, or they are not finite.
    """
    if moments.count == 0 or not np.isfinite(moments.sums).all():
        raise CodecError(f"calibration: got {moments.count} tokens or values that are not finite; expected finite values")
    sigma_c = np.sqrt(moments.variance())
    if quantizer.form == "e4m3":
        step = quantizer.step_sigmas * sigma_c
    else:
        sigma = float(np.sqrt(np.mean(sigma_c**2)))
        reach = _INT8_REACH_HEAVY if moments.kurtosis() > _HEAVY_KURTOSIS else _INT8_REACH
        floor = reach * sigma_c / INT8_MAX if quantizer.form == "int8" else _NIBBLE_REACH * sigma_c / -NIBBLE_MIN
        step = np.maximum(quantizer.step_sigmas * sigma, floor)
    # A channel without variance, or with less than float32 can divide by: every code is 0 and decodes to the mean.
    step[step < np.finfo(np.float32).tiny] = 1.0
    return moments.mean().astype(np.float32), step.astype(np.float32)


def fit_groups(groups: Sequence[Group], moments: Moments) -> Calibration:
    """Calibration of every quantised array from the moments of what it will hold.

    Raises:
        CodecError: whatever `fit_quantizer` refuses; the layer is named.
    """
    calibration: dict[str, dict[Kind, tuple[np.ndarray, np.ndarray]]] = {}
    for group in groups:
        for kind in KINDS:
            quantizer = group.quantizer(kind)
            if quantizer is None:
                continue
            fits = []
            for layer in group.layers:
                try:
                    fits.append(fit_quantizer(quantizer, moments[layer, kind]))
                except CodecError as error:
                    raise CodecError(f"layer {layer}, {kind}: {error}") from None
            calibration.setdefault(group.path, {})[kind] = (np.stack([m for m, _ in fits]), np.stack([s for _, s in fits]))
    return calibration


def channels_of(calibration: Calibration, group: Group, kind: Kind, slot: int) -> tuple[Channel, Channel] | tuple[None, None]:
    """Mean and step of one layer's keys or values; None for raw."""
    if group.quantizer(kind) is None:
        return None, None
    mean, step = calibration[group.path][kind]
    return mean[slot], step[slot]


def calibration_fingerprint(calibration: Calibration) -> str | None:
    """sha256 over every mean and step array; None for raw."""
    if not calibration:
        return None
    digest = hashlib.sha256()
    for path in sorted(calibration):
        for kind in KINDS:
            for name, array in zip(("mean", "step"), calibration[path].get(kind, ()), strict=False):
                digest.update(f"{path}/{kind}_{name}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
    return digest.hexdigest()
