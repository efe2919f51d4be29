"""Codecs: how key and value numbers become stored codes and back (FORMAT.md 4).

A quantising codec has one fixed step per channel for the whole store, `code = clip(rint((x - mean) / step))`, and leaves
entropy coding to zstd. Written once against the Python array API: numpy arrays on the host and torch tensors on any device
give the same bits. Works on one layer; knows neither files nor models, nor how steps are chosen (`calibration`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np
from array_api_compat import array_namespace, device, is_numpy_array
from jaxtyping import Float, Float32, Shaped, UInt8

from kvstore.errors import CodecError
from kvstore.spec import Dtype, parse_layers

Kind = Literal["key", "value"]
KINDS: tuple[Kind, Kind] = ("key", "value")
Form = Literal["int8", "nibble", "e4m3"]

Values = Float[Any, "*layer token kv_head dim"]
Codes = Shaped[Any, "*layer token kv_head code"]
Channels = Float32[Any, "*layer kv_head dim"]

INT8_MAX = 127
NIBBLE_MIN, NIBBLE_MAX = -8, 7
E4M3_MAX = 448.0
"""Largest finite value of float8_e4m3fn (arXiv 2209.05433)."""
_E4M3_MIN_NORMAL, _E4M3_MANTISSA_BITS = 2.0**-6, 3
_PIECE_VALUES = 262_144
"""A megabyte in float32: more leaves the cache and makes malloc fetch fresh pages for every array, less is Python's overhead."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Quantizer:
    """Fixed-step scalar quantiser of keys or of values."""

    form: Form
    """`int8`: one byte a value. `nibble`: two codes in a byte, code[j] + 8 low and code[j + dim/2] + 8 high. `e4m3`: one
    float8_e4m3fn a value, for exchange with programs that use it."""
    step_sigmas: float
    """Step in standard deviations: of the layer for `int8` and `nibble`, whose relative error is about this over sqrt(12); of
    each channel for `e4m3`, where 1 / 56 puts its largest number at eight deviations."""

    @property
    def values_per_byte(self) -> int:
        return 2 if self.form == "nibble" else 1

    def error_bound(self, deviation: Float32[Any, "..."], step: Float32[Any, "..."]) -> Float32[Any, "..."]:
        """Largest error of values that far from their mean, where the code is not clipped; float32 rounding comes on top.

        Half a step; for `e4m3` a sixteenth of the deviation, half the distance of neighbours with three bits of mantissa, and
        below its smallest normal number 2^-10 steps.
        """
        if self.form != "e4m3":
            return 0.5 * step + 0.0 * deviation
        xp = array_namespace(deviation)
        return xp.maximum(abs(deviation) / 2 ** (_E4M3_MANTISSA_BITS + 1), step * _E4M3_MIN_NORMAL / 16)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """A rung of the codec ladder."""

    name: str
    key: Quantizer | None
    """None stores the captured bits themselves."""
    value: Quantizer | None
    nominal_bits: float
    """Bits per value to expect after compression, for estimates before a run (research/codecs.md 6)."""

    def quantizer(self, kind: Kind) -> Quantizer | None:
        return self.key if kind == "key" else self.value


def _rung(name: str, form: Form, key_step: float, value_form: Form, value_step: float, nominal_bits: float) -> Codec:
    return Codec(
        name=name,
        key=Quantizer(form=form, step_sigmas=key_step),
        value=Quantizer(form=value_form, step_sigmas=value_step),
        nominal_bits=nominal_bits,
    )


CODECS = {
    codec.name: codec
    for codec in (
        Codec(name="raw", key=None, value=None, nominal_bits=12.0),
        _rung("q8", "int8", 6 / 127, "int8", 6 / 127, 6.5),
        _rung("fp8", "e4m3", 8 / E4M3_MAX, "e4m3", 8 / E4M3_MAX, 6.4),
        _rung("q8z", "int8", 0.09, "int8", 0.125, 5.3),
        _rung("mix", "int8", 0.25, "nibble", 0.5, 3.6),
        _rung("q4z", "nibble", 0.5, "nibble", 0.75, 2.8),
        _rung("q4z-min", "nibble", 0.75, "nibble", 1.0, 2.35),
    )
}
"""By name, from the most to the least faithful; `fp8` is for exchange and beaten by its neighbours."""


def codec_named(name: str) -> Codec:
    """The codec of that name.

    Raises:
        CodecError: there is none; the message lists those there are.
    """
    try:
        return CODECS[name]
    except KeyError:
        raise CodecError(f"codec: got {name!r}, expected one of {', '.join(CODECS)}") from None


def parse_codecs(text: str, layers: Iterable[int]) -> dict[int, Codec]:
    """Parse `mix`, or `mix,0=raw,24-27=q8` with exceptions by teacher layer number; the later exception wins.

    Raises:
        CodecError: an unknown codec, or an exception for a layer that is not stored.
    """
    numbers = tuple(layers)
    default, *exceptions = (part.strip() for part in text.split(","))
    chosen = dict.fromkeys(numbers, codec_named(default))
    for exception in exceptions:
        where, equals, name = exception.partition("=")
        try:
            if not equals:
                raise ValueError(f"got {exception!r}, expected LAYERS=CODEC after the first comma, as in 'mix,0=raw,24-27=q8'")
            chosen.update(dict.fromkeys(parse_layers(where, numbers), codec_named(name.strip())))
        except ValueError as error:
            raise CodecError(f"codec {text!r}: {error}") from None
    return chosen


def format_codecs(codecs: Mapping[int, Codec]) -> str:
    """One text for each choice of codecs: `parse_codecs` reads it back."""
    names = [codec.name for codec in codecs.values()]
    default = max(sorted(set(names)), key=names.count)
    return ",".join([default, *(f"{layer}={codec.name}" for layer, codec in sorted(codecs.items()) if codec.name != default)])


def storage_dtype(quantizer: Quantizer | None, dtype: Dtype) -> np.dtype[Any]:
    """Type of the stored array: zarr has no bfloat16 and no float8, whose bits are stored as unsigned integers."""
    if quantizer is None:
        return np.dtype({"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[dtype])
    return np.dtype(np.int8 if quantizer.form == "int8" else np.uint8)


def code_dim(quantizer: Quantizer | None, dim: int) -> int:
    """Length of the last stored axis for a head of `dim` channels.

    Raises:
        CodecError: two 4-bit codes share a byte, so `dim` must be even.
    """
    if quantizer is None or quantizer.form != "nibble":
        return dim
    if dim % 2:
        raise CodecError(f"head dim: got {dim}, expected an even number for 4-bit codes; use --codec q8")
    return dim // 2


def encode(quantizer: Quantizer | None, values: Values, mean: Channels | None, step: Channels | None) -> Codes:
    """Codes as they lie on disk, of one layer or several; `mean` and `step` are None for raw.

    Raises:
        CodecError: a value is not finite.
    """
    refuse_not_finite(values)
    if quantizer is None:
        return _bits(values)
    assert mean is not None
    assert step is not None
    xp = array_namespace(values)
    scaled = _deviations(xp, values, mean)
    scaled /= step[..., None, :, :]
    return _quantized(xp, quantizer, scaled)[0]


def refuse_not_finite(values: Values) -> None:
    """Name the first value that is not finite.

    Raises:
        CodecError: there is one.
    """
    xp = array_namespace(values)
    finite = xp.isfinite(values)
    if not xp.all(finite):
        bad = [int(axis[0]) for axis in xp.nonzero(~finite)]
        raise CodecError(f"NaN or infinity at [token, kv_head, dim] {bad}; the teacher's output is broken there")


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """One layer's keys or values as codes, and what encoding did to each token; where the values were, the host or a device."""

    codes: Shaped[Any, "token kv_head code"]
    measures: Float[Any, "3 token"]
    """Of each token: sum of squared deviations from the channel means (of squares for raw), NaN exactly where a value is not finite;
    sum of squared errors; and the largest error of it or a token encoded with it. Each at most the largest float32."""


def encode_measured(
    quantizer: Quantizer | None, values: Float[Any, "token kv_head dim"], mean: Channels | None, step: Channels | None
) -> Encoded:
    """The codes of `encode`, measured while the numbers are at hand: nothing is raised and nothing waits for a device.

    Few passes over memory, in place where possible and on the host in pieces that stay in its cache. Errors are exact to float32
    rounding.
    """
    xp = array_namespace(values)
    piece = max(_PIECE_VALUES // int(np.prod(values.shape[1:])), 1)
    if is_numpy_array(values) and len(values) > piece:
        pieces = (values[first : first + piece] for first in range(0, len(values), piece))
        parts = [encode_measured(quantizer, part, mean, step) for part in pieces]
        return Encoded(np.concatenate([p.codes for p in parts]), np.concatenate([p.measures for p in parts], axis=1))
    with np.errstate(invalid="ignore", over="ignore"):  # of NaN and of what overflows there are codes too; `measures` tells
        if quantizer is None:
            codes = _bits(values)
            squared = _sum_of_squares(xp, decode(None, codes, None, None))
            return Encoded(codes, _bounded(xp, values, squared, xp.zeros_like(squared), xp.zeros_like(squared)))
        assert mean is not None
        assert step is not None
        work = _deviations(xp, values, mean)
        squared = _sum_of_squares(xp, work)
        work /= step
        codes, rounded = _quantized(xp, quantizer, work)
        work -= rounded
        work *= step
        # Over all of them, for finding it token by token costs more than all the rest.
        largest = xp.maximum(xp.max(work), -xp.min(work)) if work.shape[0] else 0.0
        return Encoded(codes, _bounded(xp, values, squared, _sum_of_squares(xp, work), xp.zeros_like(squared) + largest))


def decode(
    quantizer: Quantizer | None, codes: Codes, mean: Channels | None, step: Channels | None
) -> Float32[Any, "*layer token kv_head dim"]:
    """Values as float32: `code * step + mean`; for raw the exact values."""
    xp = array_namespace(codes)
    if quantizer is None:
        if codes.dtype == xp.uint16:
            return (xp.astype(codes, xp.uint32) << 16).view(xp.float32) if is_numpy_array(codes) else _from_bfloat16(codes)
        return xp.astype(codes, xp.float32)
    assert mean is not None
    assert step is not None
    if quantizer.form == "e4m3":
        table = xp.asarray(E4M3_VALUES, device=device(codes))
        values = table[xp.astype(codes, xp.int64)]
    elif quantizer.form == "nibble":
        values = xp.astype(xp.concat([codes & 15, codes >> 4], axis=-1), xp.float32)
        values += NIBBLE_MIN
    else:
        values = xp.astype(codes, xp.float32)
    values *= step[..., None, :, :]
    values += mean[..., None, :, :]
    return values


def saturated(quantizer: Quantizer | None, codes: Codes) -> int:
    """How many codes stand at the end of their range, where the error bound does not hold."""
    if quantizer is None:
        return 0
    flat = codes.reshape(-1).view(array_namespace(codes).uint8)
    # In pieces that stay in the cache, and few passes: a shard has hundreds of megabytes.
    return sum(_at_the_end(quantizer, flat[first : first + _PIECE_VALUES]) for first in range(0, flat.shape[0], _PIECE_VALUES))


def _at_the_end(quantizer: Quantizer, byte: UInt8[Any, "byte"]) -> int:
    xp = array_namespace(byte)
    if quantizer.form == "int8":
        ends = [byte + 129 <= 2]  # 127 becomes 0, -127 becomes 2; -128 is no code
    elif quantizer.form == "e4m3":
        ends = [(byte & 0x7F) == _E4M3_MAX_BITS]
    else:
        ends = [(byte + 1) & 0x0E == 0, (byte + 16) & 0xE0 == 0]  # 15 becomes 0, and 0 becomes 1
    return sum(int(xp.count_nonzero(end)) for end in ends)


def _bits(values: Values) -> Codes:
    return values.view(array_namespace(values).uint16) if "bfloat16" in str(values.dtype) else values


def _deviations(xp: Any, values: Values, mean: Channels) -> Float32[Any, "*layer token kv_head dim"]:
    """A new array, to be worked on in place."""
    return xp.astype(values - mean[..., None, :, :], xp.float32, copy=False)


def _sum_of_squares(xp: Any, values: Float32[Any, "token kv_head dim"]) -> Float32[Any, "token"]:
    flat = xp.reshape(values, (values.shape[0], -1))
    # A product of many short rows is the quickest on the host and one of the slowest on a GPU.
    return xp.vecdot(flat, flat) if is_numpy_array(values) else xp.linalg.vector_norm(flat, axis=1) ** 2


def _bounded(
    xp: Any,
    values: Values,
    squared: Float32[Any, "token"],
    squared_error: Float32[Any, "token"],
    largest: Float32[Any, "token"],
) -> Float32[Any, "3 token"]:
    """Measures in which finite values that are too large to be squared in float32 are not mistaken for broken ones."""
    measures = xp.stack([squared, squared_error, largest])
    if is_numpy_array(values) and np.isfinite(measures).all():
        return measures
    # A device is not asked, which would mean to wait for it: there this is computed in any case.
    finite = xp.all(xp.isfinite(xp.reshape(values, (values.shape[0], -1))), axis=1)
    bounded = xp.where(xp.isnan(measures), xp.inf, measures)
    return xp.where(finite, xp.clip(bounded, max=float(np.finfo(np.float32).max)), xp.nan)


def _quantized(xp: Any, quantizer: Quantizer, scaled: Any) -> tuple[Codes, Any]:
    """Codes of numbers in steps, and the numbers they stand for, in float32."""
    if quantizer.form == "e4m3":
        codes = _e4m3_bits(xp.clip(scaled, -E4M3_MAX, E4M3_MAX))
        return codes, xp.asarray(E4M3_VALUES, device=device(codes))[xp.astype(codes, xp.int64)]
    low, high = (-INT8_MAX, INT8_MAX) if quantizer.form == "int8" else (NIBBLE_MIN, NIBBLE_MAX)
    rounded = xp.clip(xp.round(scaled), low, high)
    if quantizer.form == "int8":
        return xp.astype(rounded, xp.int8), rounded
    return _packed(xp, xp.astype(rounded - NIBBLE_MIN, xp.uint8)), rounded


def _packed(xp: Any, code: Any) -> Any:
    """Two 4-bit codes in a byte: the first half of the last axis low, the second high."""
    half = code.shape[-1] // 2
    if half % 8:
        return code[..., :half] | (code[..., half:] << 4)
    # Eight bytes at a time; no bit of a code below 16 is shifted out of its byte.
    words = code.view(xp.int64)
    return (words[..., : half // 8] | (words[..., half // 8 :] << 4)).view(xp.uint8)


def _from_bfloat16(bits: Any) -> Any:
    """torch has no shifts of unsigned 32-bit integers; it has the type itself."""
    xp = array_namespace(bits)
    return xp.astype(bits.view(xp.bfloat16), xp.float32)


def _e4m3_bits(scaled: Any) -> Any:
    """Round float32 within +-448 to float8_e4m3fn, ties to even, and return the bits.

    Normal numbers: add half of the last kept bit to the float32 bits, cut, and move the exponent's bias from 127 to 7.
    Subnormal numbers are multiples of 2^-9, and 8 of them are the bits of the smallest normal one.
    """
    xp = array_namespace(scaled)
    magnitude = abs(scaled)
    bits = magnitude.view(xp.int32)
    dropped = 23 - _E4M3_MANTISSA_BITS
    rounded = (bits + ((1 << (dropped - 1)) - 1) + ((bits >> dropped) & 1)) >> dropped
    normal = rounded - ((127 - 7) << _E4M3_MANTISSA_BITS)
    subnormal = xp.astype(xp.round(magnitude * 512), xp.int32)
    code = xp.where(magnitude >= _E4M3_MIN_NORMAL, normal, subnormal)
    negative = xp.astype(scaled.view(xp.int32) < 0, xp.int32)
    return xp.astype(code + 128 * negative, xp.uint8)


E4M3_VALUES: Float32[np.ndarray, "256"] = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""Value of each of the 256 float8_e4m3fn codes; the two NaN codes are never written."""
_E4M3_MAX_BITS = 0x7E
