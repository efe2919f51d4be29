"""Closed-form maps between head counts and head dims: nothing fitted, no parameters.

Knows the last axes of a tensor and how a head is rotated; does not know layers, models, time or stores.

Suffixes: H heads, D channels of a head, S heads wanted; `...` any leading axes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kvstore.spec import RopeSpec

Channels = tuple[int | None, ...]
"""For each channel wanted, the channel it is taken from; None where it has no counterpart: zero there, mask it in a loss."""


def head_map(Ht: int, Hs: int) -> Float[Tensor, "{Hs} {Ht}"]:
    """Weights of `Ht` heads in each of `Hs`, by the overlap of equal shares of [0, 1), in float64.

    Rows sum to 1 and columns to Hs/Ht. It is the identity, the group mean (GQA, arXiv 2305.13245), repeat_interleave or,
    for uneven pairs, their natural continuation.
    """
    if Ht < 1 or Hs < 1:
        raise ValueError(f"head_map: got Ht={Ht}, Hs={Hs}, expected at least one head on each side (num_key_value_heads)")
    # Pinned to the CPU: the result is cached, a surrounding `torch.device("meta")` must not reach it.
    s = torch.arange(Hs, device="cpu")[:, None]
    t = torch.arange(Ht, device="cpu")[None, :]
    overlap = torch.minimum((s + 1) * Ht, (t + 1) * Hs) - torch.maximum(s * Ht, t * Hs)
    return overlap.clamp_min(0).to(torch.float64) / Ht


def spread_channels(source_dim: int, target_dim: int) -> Channels:
    """Evenly spaced selection without rotation in mind; every source channel is placed once when `target_dim` is larger."""
    channels: list[int | None] = [None] * target_dim
    for target, source in _spread(source_dim, target_dim):
        channels[target] = source
    return tuple(channels)


@functools.lru_cache(maxsize=256)
def key_channels(source_dim: int, target_dim: int, source_rope: RopeSpec | None, target_rope: RopeSpec | None) -> Channels:
    """Select key channels so that the selection commutes with rotation as nearly as the two embeddings allow.

    Rotated channels move as pairs, each to the pair nearest in log frequency: exact for equal bases and
    source_dim = 2 target_dim, where target pair j takes source pair 2j. Going up, source pairs are placed at their nearest
    slots. Unrotated channels are spread evenly over unrotated ones. If one side does not rotate at all there is nothing to
    commute with and all channels are spread.
    """
    if source_rope is None or target_rope is None:
        return spread_channels(source_dim, target_dim)
    source_pairs, source_rest = _split_channels(source_dim, source_rope)
    target_pairs, target_rest = _split_channels(target_dim, target_rope)
    channels: list[int | None] = [None] * target_dim
    for target, source in _match_nearest([f for _, _, f in source_pairs], [f for _, _, f in target_pairs]):
        for side in (0, 1):
            channels[int(target_pairs[target][side])] = int(source_pairs[source][side])
    for target, source in _spread(len(source_rest), len(target_rest)):
        channels[target_rest[target]] = source_rest[source]
    return tuple(channels)


def project_heads(x: Float[Tensor, "..."], num_kv_heads: int, head_axis: int = -2) -> Float[Tensor, "..."]:
    """Apply `head_map` along `head_axis` (negative) in at least fp32, rounding once; the same object for an equal count."""
    num_heads = x.shape[head_axis]
    if num_heads == num_kv_heads:
        return x
    if num_kv_heads % num_heads == 0:
        return x.repeat_interleave(num_kv_heads // num_heads, dim=head_axis)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if num_heads % num_kv_heads == 0:
        groups = x.reshape(*x.shape[:head_axis], num_kv_heads, num_heads // num_kv_heads, *x.shape[head_axis + 1 :])
        return groups.mean(dim=head_axis, dtype=dtype).to(x.dtype)
    weight_SH = _head_map_on(num_heads, num_kv_heads, x.device, dtype)
    # Autocast would run this product in bf16 inside a training step.
    with torch.autocast(x.device.type, enabled=False):
        out = weight_SH @ x.to(dtype).flatten(start_dim=head_axis + 1)
    return out.reshape(*x.shape[:head_axis], num_kv_heads, *x.shape[head_axis + 1 :]).to(x.dtype)


def select_channels(x: Float[Tensor, "... D"], channels: Channels) -> Float[Tensor, "... D2"]:
    """Gather `channels` of the last axis, zero where None; the same object when that changes nothing."""
    if channels == tuple(range(x.shape[-1])):
        return x
    index, kept = _channels_on(channels, x.device)
    chosen = x.index_select(-1, index)
    return chosen if kept is None else torch.where(kept, chosen, 0.0)


def project_geometry(
    x: Float[Tensor, "..."], num_kv_heads: int, channels: Channels, head_axis: int = -2
) -> Float[Tensor, "..."]:
    """Select channels, then map heads; the order does not matter to the result, both are linear on different axes."""
    return project_heads(select_channels(x, channels), num_kv_heads, head_axis)


def _split_channels(dim: int, rope: RopeSpec) -> tuple[list[tuple[int, int, float]], list[int]]:
    """Rotated pairs as (first channel, second channel, frequency), and the channels that pass through.

    A pair of frequency zero (models write partial rotation so) does not rotate and counts as passing through. One of negative frequency
    turns the other way: as its second channel with its first.
    """
    num_pairs = len(rope.inv_freq)
    if rope.start < 0 or rope.start + rope.rotary_dim > dim:
        raise ValueError(
            f"rope: rotates channels {rope.start}..{rope.start + rope.rotary_dim - 1}, expected them within the head dim "
            f"{dim} (RopeSpec.start={rope.start}, rotary_dim={rope.rotary_dim})"
        )
    step, gap = (2, 1) if rope.kind == "interleaved" else (1, num_pairs)
    firsts = [rope.start + step * pair for pair in range(num_pairs)]
    pairs = [
        (first, first + gap, f) if f > 0 else (first + gap, first, -f)
        for first, f in zip(firsts, rope.inv_freq, strict=True)
        if f != 0
    ]
    rotated = {channel for first, second, _ in pairs for channel in (first, second)}
    return pairs, [channel for channel in range(dim) if channel not in rotated]


def _match_nearest(source: Sequence[float], target: Sequence[float]) -> list[tuple[int, int]]:
    """Pairs (target, source) of nearest log frequency, one per entry of the shorter side."""

    def distance(a: float, b: float) -> float:
        # Rounded, so that exact ties (96 -> 64 channels) do not depend on the last bit of `log`: the first index wins.
        return round(abs(math.log(a) - math.log(b)), 9)

    if len(target) <= len(source):
        return [(j, min(range(len(source)), key=lambda i: distance(source[i], f))) for j, f in enumerate(target)]
    slots: dict[int, int] = {}
    for i, f in enumerate(source):
        j = min(range(len(target)), key=lambda j: distance(f, target[j]))
        if j not in slots or distance(f, target[j]) < distance(source[slots[j]], target[j]):
            slots[j] = i
    return sorted(slots.items())


def _spread(num_source: int, num_target: int) -> list[tuple[int, int]]:
    """Pairs (target, source), evenly spaced, one per entry of the shorter side."""
    if num_target <= num_source:
        return [(n, n * num_source // num_target) for n in range(num_target)]
    return [(m * num_target // num_source, m) for m in range(num_source)]


@functools.lru_cache(maxsize=256)
def _head_map_on(Ht: int, Hs: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # Cached across extraction and training: a tensor made in inference mode could not be saved for a later backward.
    with torch.inference_mode(mode=False):
        return head_map(Ht, Hs).to(device, dtype)


@functools.lru_cache(maxsize=256)
def _channels_on(channels: Channels, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Index of each channel, and which are kept (None: all)."""
    with torch.inference_mode(mode=False):
        index = torch.tensor([channel or 0 for channel in channels], dtype=torch.int64, device=device)
        if None not in channels:
            return index, None
        return index, torch.tensor([channel is not None for channel in channels], device=device)
