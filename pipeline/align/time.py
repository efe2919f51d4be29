"""The time axis where only lengths are known: true linear interpolation with both endpoints kept.

All index arithmetic is in integers: fp32 `linspace` and rounding pick other indices on long sequences. Does not know tokens or
text; with byte offsets, overlap weights are the better map. Interpolate keys before rotation only.

Suffixes: B batch, H heads, T token, D channels of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor


def linear_positions(
    T_in: int, T_out: int, device: torch.device | str | None = None
) -> tuple[Int64[Tensor, "{T_out}"], Int64[Tensor, "{T_out}"]]:
    """Output i lies at source position `whole + remainder / (T_out - 1)`, that is i (T_in - 1) / (T_out - 1).

    One output token is the last position: under causal attention it alone has seen the whole sequence.

    Raises:
        ValueError: a negative length, or tokens asked of an empty sequence.
    """
    if T_in < 0 or T_out < 0:
        raise ValueError(f"time axis: got T_in={T_in}, T_out={T_out}, expected numbers of tokens of at least 0")
    if T_in == 0 and T_out > 0:
        raise ValueError(
            f"time axis: got T_in={T_in}, T_out={T_out}, expected T_in >= 1; an empty sequence cannot be "
            "stretched. Drop the empty sample, or mask it before alignment."
        )
    if T_out <= 1:
        last = torch.full((T_out,), max(T_in - 1, 0), dtype=torch.int64, device=device)
        return last, torch.zeros_like(last)
    scaled = torch.arange(T_out, dtype=torch.int64, device=device) * (T_in - 1)
    whole = torch.div(scaled, T_out - 1, rounding_mode="floor")
    return whole, scaled - whole * (T_out - 1)


def nearest_positions(T_in: int, T_out: int, device: torch.device | str | None = None) -> Int64[Tensor, "{T_out}"]:
    """The source token nearest to each output position, halves going up.

    Raises:
        ValueError: a negative length, or tokens asked of an empty sequence.
    """
    whole, remainder = linear_positions(T_in, T_out, device)
    return whole + (2 * remainder >= max(T_out - 1, 1))


def build_safe_linear_indices(
    B: int, T_in: int, T_out: int, device: torch.device | str | None = None
) -> Int64[Tensor, "{B} {T_out}"]:
    """Nearest source index of each output position, all in [0, T_in - 1]; halves go up.

    An empty sequence has no such index: all are 0, and `safe_time_resample` makes zeros of them. Mask such rows in a loss.

    Raises:
        ValueError: a negative size.
    """
    if B < 0:
        raise ValueError(f"build_safe_linear_indices: got B={B}, expected a batch size of at least 0")
    if T_in == 0 and T_out >= 0:
        return torch.zeros((B, T_out), dtype=torch.int64, device=device)
    return nearest_positions(T_in, T_out, device).repeat(B, 1)


def safe_time_resample(x: Float[Tensor, "..."], indices: Tensor) -> Float[Tensor, "B H T_out D"]:
    """Gather tokens `indices` of `x` [B, H, T_in, D]; indices outside [0, T_in - 1] are clamped to it.

    An empty sequence gives zeros, which mean nothing: mask such rows in a loss.

    Args:
        indices: [T_out] for the whole batch or [B, T_out], of any integer dtype, on any device.

    Raises:
        ValueError: shapes or dtype do not fit.
    """
    if x.ndim != 4 or indices.ndim not in (1, 2) or (indices.ndim == 2 and indices.shape[0] != x.shape[0]):
        raise ValueError(
            f"safe_time_resample: got x {list(x.shape)} and indices {list(indices.shape)}, expected x [B, H, T_in, D] and "
            "indices [T_out] or [B, T_out]"
        )
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(
            f"safe_time_resample: indices {list(indices.shape)} have dtype {indices.dtype}, expected an integer dtype; "
            "see build_safe_linear_indices"
        )
    B, H, T_in, D = x.shape
    T_out = indices.shape[-1]
    if T_in == 0:
        return x.sum(dim=2, keepdim=True).repeat(1, 1, T_out, 1)  # a sum of nothing, which autograd can follow
    # Widen before clamping: T_in - 1 need not fit the caller's dtype.
    index = indices.to(x.device, torch.int64).clamp(0, T_in - 1)
    if index.ndim == 1:
        return x.index_select(2, index)
    return x.gather(2, index[:, None, :, None].expand(B, H, T_out, D))


Segments = Sequence[int] | Sequence[Sequence[int]] | Tensor | np.ndarray
"""Lengths in tokens, or the first token of each segment and the one behind its last; one behind the other from 0 on."""


def resample_kv_with_interpolation(
    kv: Float[Tensor, "..."],
    T_out: int,
    teacher_segments: Segments | None = None,
    student_segments: Segments | None = None,
) -> Float[Tensor, "B H T_out D"]:
    """Interpolate `kv` [B, H, T_in, D] linearly to `T_out` tokens, first and last kept; the same object when T_out == T_in.

    Computes in at least fp32 and rounds once. Padding counts as tokens: resample rows of unequal length one by one.

    Args:
        teacher_segments: parts of `kv` to be interpolated each on its own, a prompt, its reasoning and its answer say, so that
            none runs into another. Lengths that add up to T_in, or pairs (start, end) that cover it.
        student_segments: as many parts of the result, which add up to `T_out`; one without tokens is left out.

    Raises:
        ValueError: not 4-D, a negative length, tokens asked of an empty sequence or segment, or segments that do not fit.
    """
    if kv.ndim != 4:
        raise ValueError(f"resample_kv_with_interpolation: got kv {list(kv.shape)}, expected [B, H, T_in, D]")
    if teacher_segments is None and student_segments is None:
        return kv if T_out == kv.shape[2] else _interpolate(kv, T_out)
    if teacher_segments is None or student_segments is None:
        raise ValueError(
            f"resample_kv_with_interpolation: got teacher_segments {teacher_segments} and student_segments {student_segments}, "
            "expected both or neither"
        )
    lengths_in, lengths_out = _lengths(teacher_segments), _lengths(student_segments)
    for number, (given, wanted) in enumerate(zip(lengths_in, lengths_out, strict=False)):
        if wanted and not given:
            raise ValueError(
                f"resample_kv_with_interpolation: got segment {number} without tokens in teacher_segments and with {wanted} in "
                "student_segments; an empty sequence cannot be stretched: give it 0 tokens there too, or join it to another"
            )
    if sum(lengths_out) != T_out:
        raise ValueError(
            f"resample_kv_with_interpolation: got student_segments {list(student_segments)}, expected lengths that add up to "
            f"T_out={T_out}, or pairs (start, end) that cover it"
        )
    return resample_segments(kv, lengths_in, lengths_out)


def resample_segments(
    kv: Float[Tensor, "..."], lengths_in: Sequence[int], lengths_out: Sequence[int]
) -> Float[Tensor, "B H T_out D"]:
    """Interpolate segment by segment, so that none runs into another; the same object when no length changes.

    Args:
        kv: [B, H, T_in, D]; keys before rotation.
        lengths_in: tokens of each segment of `kv`, which they fill; `lengths_out` those wanted, 0 to leave a segment out.

    Raises:
        ValueError: other numbers of segments, lengths that do not fill `kv`, or tokens asked of an empty segment.
    """
    if len(lengths_in) != len(lengths_out) or kv.ndim != 4 or sum(lengths_in) != kv.shape[2] or min(lengths_in, default=0) < 0:
        raise ValueError(
            f"resample_segments: got kv {list(kv.shape)} and segments {list(lengths_in)} to {list(lengths_out)}, expected kv [B, H, T_in, D], as "
            "many segments on either side, and the first to add up to T_in"
        )
    if list(lengths_in) == list(lengths_out):
        return kv
    pieces = zip(torch.split(kv, list(lengths_in), dim=2), lengths_out, strict=True)
    return torch.cat([resample_kv_with_interpolation(piece, length) for piece, length in pieces], dim=2)


def _lengths(segments: Segments) -> list[int]:
    """Tokens of each segment.

    Raises:
        ValueError: pairs that leave a gap or overlap.
    """
    if isinstance(segments, (Tensor, np.ndarray)):
        segments = segments.tolist()
    lengths: list[int] = []
    for segment in segments:
        begin = sum(lengths)
        start, end = segment if isinstance(segment, Sequence) else (begin, begin + segment)
        if start != begin or end < start:
            raise ValueError(
                f"resample_kv_with_interpolation: got segments {list(segments)}, expected lengths of at least 0, or pairs (start, end) "
                "that follow each other from 0 on"
            )
        lengths.append(end - start)
    return lengths


def _interpolate(kv: Float[Tensor, "B H T_in D"], T_out: int) -> Float[Tensor, "B H T_out D"]:
    dtype = torch.promote_types(kv.dtype, torch.float32)
    first, second, weight_TD = _interpolation(kv.shape[2], T_out, kv.device, dtype)
    # Stores and models keep heads inside tokens, [B, T, H, D]: whole rows are taken then, not pieces of them.
    by_token = kv.stride(1) < kv.stride(2)
    rows, axis, weight = (kv.transpose(1, 2), 1, weight_TD[:, None]) if by_token else (kv, 2, weight_TD)
    below, above = (rows.index_select(axis, index).to(dtype) for index in (first, second))
    out = torch.lerp(below, above, weight).to(kv.dtype)
    return out.transpose(1, 2) if by_token else out


@functools.lru_cache(maxsize=256)
def _interpolation(
    T_in: int, T_out: int, device: torch.device, dtype: torch.dtype
) -> tuple[Int64[Tensor, "{T_out}"], Int64[Tensor, "{T_out}"], Float[Tensor, "{T_out} 1"]]:
    """The two source tokens of each output token, and the weight of the second."""
    # Kept for extraction and training: a tensor made in inference mode could not be saved for a later backward.
    with torch.inference_mode(mode=False):
        whole, remainder = linear_positions(T_in, T_out, device)
        return whole, whole + (remainder > 0), (remainder.to(dtype) / max(T_out - 1, 1))[:, None]
