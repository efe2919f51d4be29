"""The time axis where only lengths are known: true linear interpolation with both endpoints kept.

All index arithmetic is in integers: fp32 `linspace` and rounding pick other indices on long sequences. Does not know tokens or
text; with byte offsets, overlap weights are the better map. Interpolate keys before rotation only.

Suffixes: B batch, H heads, T token, D channels of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

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
    if T_in < 0 or T_out < 0 or (T_in == 0 and T_out > 0):
        raise ValueError(
            f"time axis: got T_in={T_in}, T_out={T_out}, expected T_out >= 0 and T_in >= 1; an empty sequence cannot be "
            "stretched. Drop the empty sample, or mask it before alignment."
        )
    if T_out <= 1:
        last = torch.full((T_out,), max(T_in - 1, 0), dtype=torch.int64, device=device)
        return last, torch.zeros_like(last)
    scaled = torch.arange(T_out, dtype=torch.int64, device=device) * (T_in - 1)
    whole = torch.div(scaled, T_out - 1, rounding_mode="floor")
    return whole, scaled - whole * (T_out - 1)


def build_safe_linear_indices(
    B: int, T_in: int, T_out: int, device: torch.device | str | None = None
) -> Int64[Tensor, "{B} {T_out}"]:
    """Nearest source index of each output position, all in [0, T_in - 1]; halves go up.

    Raises:
        ValueError: a negative size, or tokens asked of an empty sequence.
    """
    if B < 0:
        raise ValueError(f"build_safe_linear_indices: got B={B}, expected a batch size of at least 0")
    whole, remainder = linear_positions(T_in, T_out, device)
    nearest = whole + (2 * remainder >= max(T_out - 1, 1))
    return nearest.repeat(B, 1)


def safe_time_resample(x: Float[Tensor, "..."], indices: Tensor) -> Float[Tensor, "B H T_out D"]:
    """Gather tokens `indices` of `x` [B, H, T_in, D]; indices outside [0, T_in - 1] are clamped to it.

    Args:
        indices: [T_out] for the whole batch or [B, T_out], of any integer dtype, on any device.

    Raises:
        ValueError: shapes or dtype do not fit, or tokens are asked of an empty sequence.
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
    if T_in == 0 and T_out > 0:
        raise ValueError(f"safe_time_resample: got x {list(x.shape)} without tokens, expected T_in >= 1 for T_out={T_out}")
    # Widen before clamping: T_in - 1 need not fit the caller's dtype.
    index = indices.to(x.device, torch.int64).clamp(0, max(T_in - 1, 0))
    if index.ndim == 1:
        return x.index_select(2, index)
    return x.gather(2, index[:, None, :, None].expand(B, H, T_out, D))


def resample_segments(
    kv: Float[Tensor, "..."], lengths_in: Sequence[int], lengths_out: Sequence[int]
) -> Float[Tensor, "B H T_out D"]:
    """Interpolate segment by segment, a prompt, its reasoning and its answer say, so that none runs into another.

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
    pieces = [
        resample_kv_with_interpolation(piece, length)
        for piece, length in zip(torch.split(kv, list(lengths_in), dim=2), lengths_out, strict=True)
    ]
    return torch.cat(pieces, dim=2) if pieces else kv


def resample_kv_with_interpolation(kv: Float[Tensor, "..."], T_out: int) -> Float[Tensor, "B H T_out D"]:
    """Interpolate `kv` [B, H, T_in, D] linearly to `T_out` tokens, first and last kept; the same object when T_out == T_in.

    Computes in at least fp32 and rounds once. Padding counts as tokens: resample rows of unequal length one by one.

    Raises:
        ValueError: not 4-D, a negative length, or tokens asked of an empty sequence.
    """
    if kv.ndim != 4:
        raise ValueError(f"resample_kv_with_interpolation: got kv {list(kv.shape)}, expected [B, H, T_in, D]")
    T_in = kv.shape[2]
    if T_out == T_in:
        return kv
    dtype = torch.promote_types(kv.dtype, torch.float32)
    first, second, weight_TD = _interpolation(T_in, T_out, kv.device, dtype)
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
