"""Codecs: how key and value numbers become stored codes and back (FORMAT.md 4).

A quantising codec has one fixed step per channel for the whole store, `code = clip(rint((x - mean) / step))`, and leaves
entropy coding to zstd; its error per value is at most half a step wherever the code is not clipped. Works on numpy arrays
of one layer; knows neither files nor models.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Float64, Shaped

from kvstore.errors import CodecError
from kvstore.spec import Dtype

Values = Float[np.ndarray, "token kv_head dim"]
Codes = Shaped[np.ndarray, "token kv_head code"]
Channel = Float32[np.ndarray, "kv_head dim"]

_INT8_MAX = 127
_NIBBLE_MIN, _NIBBLE_MAX = -8, 7
# Reach of the code range in standard deviations of a channel: the step of a loud channel is widened until the range holds
# this much, 10 where tails are heavy. 4 for nibbles minimises the squared error of a Gaussian channel.
_INT8_REACH, _INT8_REACH_HEAVY, _HEAVY_KURTOSIS, _NIBBLE_REACH = 6.0, 10.0, 6.0, 4.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Quantizer:
    """Fixed-step scalar quantiser of keys or of values."""

    bits: Literal[8, 4]
    """8: one int8 per value; 4: two codes in a byte, code[j] + 8 low and code[j + dim/2] + 8 high."""
    step_sigmas: float
    """Step in units of the layer's standard deviation; relative error is about this over sqrt(12)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """A rung of the codec ladder."""

    name: str
    key: Quantizer | None
    """None stores the captured bits themselves."""
    value: Quantizer | None
    nominal_bits: float
    """Bits per value to expect after compression, for estimates before a run."""

    def quantizer(self, kind: Literal["key", "value"]) -> Quantizer | None:
        return self.key if kind == "key" else self.value


CODECS = {
    codec.name: codec
    for codec in (
        Codec(name="raw", key=None, value=None, nominal_bits=12.0),
        Codec(
            name="q8",
            key=Quantizer(bits=8, step_sigmas=6 / 127),
            value=Quantizer(bits=8, step_sigmas=6 / 127),
            nominal_bits=6.5,
        ),
        Codec(
            name="mix",
            key=Quantizer(bits=8, step_sigmas=0.25),
            value=Quantizer(bits=4, step_sigmas=0.5),
            nominal_bits=3.6,
        ),
    )
}


def codec_named(name: str) -> Codec:
    """The codec of that name.

    Raises:
        CodecError: there is none; the message lists those there are.
    """
    try:
        return CODECS[name]
    except KeyError:
        raise CodecError(f"codec: got {name!r}, expected one of {', '.join(CODECS)}") from None


def storage_dtype(quantizer: Quantizer | None, dtype: Dtype) -> np.dtype[Any]:
    """Type of the stored array: zarr has no bfloat16, whose bits are stored as uint16."""
    if quantizer is None:
        return np.dtype({"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[dtype])
    return np.dtype(np.int8 if quantizer.bits == 8 else np.uint8)


def code_dim(quantizer: Quantizer | None, dim: int) -> int:
    """Length of the last stored axis for a head of `dim` channels.

    Raises:
        CodecError: two 4-bit codes share a byte, so `dim` must be even.
    """
    if quantizer is None or quantizer.bits == 8:
        return dim
    if dim % 2:
        raise CodecError(f"value_dim: got {dim}, expected an even number for 4-bit codes; use --codec q8")
    return dim // 2


@dataclasses.dataclass(slots=True)
class ChannelMoments:
    """Running power sums of one layer's channels, in float64; adding is the only way they change."""

    count: int
    sums: Float64[np.ndarray, "4 kv_head dim"]
    """Sums of x, x^2, x^3 and x^4."""

    @classmethod
    def zeros(cls, num_kv_heads: int, dim: int) -> ChannelMoments:
        return cls(0, np.zeros((4, num_kv_heads, dim)))

    def add(self, values: Values) -> None:
        x = values.astype(np.float64)
        self.count += len(x)
        power = x
        for order in range(4):
            self.sums[order] += power.sum(axis=0)
            power = power * x

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


def fit_quantizer(quantizer: Quantizer, moments: ChannelMoments) -> tuple[Channel, Channel]:
    """Mean and step of every channel of one layer (research: fixed step, widened for loud channels).

    Raises:
        CodecError: no values were seen, or they are not finite.
    """
    if moments.count == 0 or not np.isfinite(moments.sums).all():
        raise CodecError(f"calibration: got {moments.count} tokens or values that are not finite; expected finite values")
    sigma_c = np.sqrt(moments.variance())
    sigma = float(np.sqrt(np.mean(sigma_c**2)))
    if quantizer.bits == 8:
        reach = _INT8_REACH_HEAVY if moments.kurtosis() > _HEAVY_KURTOSIS else _INT8_REACH
        floor = reach * sigma_c / _INT8_MAX
    else:
        floor = _NIBBLE_REACH * sigma_c / -_NIBBLE_MIN
    step = np.maximum(quantizer.step_sigmas * sigma, floor)
    step[step == 0] = 1.0  # a layer without any variance: every code is 0 and decodes to the mean exactly
    return moments.mean().astype(np.float32), step.astype(np.float32)


def encode(quantizer: Quantizer | None, values: Values, mean: Channel | None, step: Channel | None) -> Codes:
    """Codes of one layer's values, as they lie on disk; `mean` and `step` are None for raw.

    Raises:
        CodecError: a value is not finite.
    """
    if not np.isfinite(values).all():
        bad = np.argwhere(~np.isfinite(values))[0].tolist()
        raise CodecError(f"values: NaN or infinity at [token, kv_head, dim] {bad}; the teacher's output is broken there")
    if quantizer is None:
        return np.asarray(values.view(np.uint16) if values.dtype == ml_dtypes.bfloat16 else values)
    assert mean is not None
    assert step is not None
    scaled = np.rint((values.astype(np.float32) - mean) / step)
    if quantizer.bits == 8:
        return np.asarray(np.clip(scaled, -_INT8_MAX, _INT8_MAX).astype(np.int8))
    code = (np.clip(scaled, _NIBBLE_MIN, _NIBBLE_MAX) - _NIBBLE_MIN).astype(np.uint8)
    half = code.shape[-1] // 2
    return np.asarray(code[..., :half] | code[..., half:] << 4)


def decode(
    quantizer: Quantizer | None,
    codes: Shaped[np.ndarray, "*layer token kv_head code"],
    mean: Float32[np.ndarray, "*layer kv_head dim"] | None,
    step: Float32[np.ndarray, "*layer kv_head dim"] | None,
) -> Float32[np.ndarray, "*layer token kv_head dim"]:
    """Values as float32: `code * step + mean`; for raw the exact values."""
    if quantizer is None:
        if codes.dtype == np.uint16:
            return np.asarray((codes.astype(np.uint32) << 16).view(np.float32))
        return codes.astype(np.float32, copy=False)
    assert mean is not None
    assert step is not None
    if quantizer.bits == 4:
        codes = np.concatenate([codes & 15, codes >> 4], axis=-1).astype(np.int8) + np.int8(_NIBBLE_MIN)
    values = codes.astype(np.float32)
    values *= step[..., None, :, :]
    values += mean[..., None, :, :]
    return values


def saturated(quantizer: Quantizer | None, codes: Codes) -> int:
    """How many codes stand at the end of their range, where the error bound does not hold."""
    if quantizer is None:
        return 0
    if quantizer.bits == 8:
        return int((np.abs(codes.astype(np.int16)) == _INT8_MAX).sum())
    low, high = codes & 15, codes >> 4
    return int(((low == 0) | (low == 15)).sum() + ((high == 0) | (high == 15)).sum())
