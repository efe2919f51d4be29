"""Rotary position embedding (Su et al., arXiv 2104.09864), forwards and backwards, differentiable.

Computes in at least fp32 and rounds once at the end; channels that are not rotated keep their bits. Knows a `RopeSpec` and
positions, not the model they came from: read positions from the model's position ids, not from an arange (left padding).

Suffixes: F rotated pairs; a and b are the two channels of each pair.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from kvstore.spec import RopeKind, RopeSpec


def rope_tables(
    rope: RopeSpec, positions: Int[Tensor, "*batch token"]
) -> tuple[Float32[Tensor, "*batch token pair"], Float32[Tensor, "*batch token pair"]]:
    """Cos and sin of every token and pair, times `attention_scaling`; angles in fp32, as models compute them."""
    inv_freq_F = torch.tensor(rope.inv_freq, dtype=torch.float32, device=positions.device)
    angle = positions[..., None].to(torch.float32) * inv_freq_F
    return angle.cos() * rope.attention_scaling, angle.sin() * rope.attention_scaling


def rotate(
    x: Float[Tensor, "*lead token dim"], positions: Int[Tensor, "..."], rope: RopeSpec | None
) -> Float[Tensor, "*lead token dim"]:
    """Rotate keys to `positions`, [token] or [batch, token]; the same object where the layer has no rotation.

    Raises:
        ValueError: the rotated channels do not lie within the head, or positions do not line up with `x`.
    """
    if rope is None:
        return x
    return rotate_with(x, *rope_tables(rope, positions), kind=rope.kind, start=rope.start)


def unrotate(
    x: Float[Tensor, "*lead token dim"], positions: Int[Tensor, "..."], rope: RopeSpec | None
) -> Float[Tensor, "*lead token dim"]:
    """Undo `rotate`, its attention scaling included.

    Raises:
        ValueError: the rotated channels do not lie within the head, or positions do not line up with `x`.
    """
    if rope is None:
        return x
    return unrotate_with(x, *rope_tables(rope, positions), kind=rope.kind, start=rope.start)


def rotate_with(
    x: Float[Tensor, "*lead token dim"],
    cos: Float[Tensor, "... pair"],
    sin: Float[Tensor, "... pair"],
    *,
    kind: RopeKind,
    start: int = 0,
) -> Float[Tensor, "*lead token dim"]:
    """Rotate by the given tables, for callers that hold the ones a module used.

    Args:
        cos: [token, pair], [batch, token, pair] whose batch is the first axis of `x`, or as many axes as `x`.

    Raises:
        ValueError: the rotated channels do not lie within the head, or the tables do not line up with `x`.
    """
    a, b, cos, sin = _line_up(x, cos, sin, kind, start)
    return _put_back(x, a * cos - b * sin, b * cos + a * sin, kind, start)


def unrotate_with(
    x: Float[Tensor, "*lead token dim"],
    cos: Float[Tensor, "... pair"],
    sin: Float[Tensor, "... pair"],
    *,
    kind: RopeKind,
    start: int = 0,
) -> Float[Tensor, "*lead token dim"]:
    """Undo a rotation by these very tables; arguments as in `rotate_with`.

    Dividing by cos^2 + sin^2 undoes attention scaling and the rounding of half-precision tables along with the rotation.
    """
    a, b, cos, sin = _line_up(x, cos, sin, kind, start)
    norm = cos * cos + sin * sin
    return _put_back(x, (a * cos + b * sin) / norm, (b * cos - a * sin) / norm, kind, start)


def _line_up(x: Tensor, cos: Tensor, sin: Tensor, kind: RopeKind, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and second channels of each pair and the tables, all in the dtype to compute in and broadcastable."""
    num_pairs = cos.shape[-1]
    if cos.ndim == 3 and x.ndim > 3:
        axes = (cos.shape[0], *[1] * (x.ndim - 3), *cos.shape[1:])
        cos, sin = cos.reshape(axes), sin.reshape(axes)
    fits = cos.ndim <= x.ndim and all(n in (1, m) for n, m in zip(cos.shape[-2::-1], x.shape[-2::-1], strict=False))
    if start < 0 or start + 2 * num_pairs > x.shape[-1] or not fits:
        raise ValueError(
            f"rope: got x {list(x.shape)} and tables {list(cos.shape)} for rotary channels {start}.."
            f"{start + 2 * num_pairs - 1}, expected x [..., token, dim] with those channels within dim, and tables "
            "[token, pair] or [batch, token, pair]. In the store's order [token, kv_head, dim], transpose token and kv_head."
        )
    dtype = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    turned = x[..., start : start + 2 * num_pairs].to(dtype)
    a, b = turned.chunk(2, dim=-1) if kind == "half" else (turned[..., 0::2], turned[..., 1::2])
    return a, b, cos.to(dtype), sin.to(dtype)


def _put_back(x: Tensor, a: Tensor, b: Tensor, kind: RopeKind, start: int) -> Tensor:
    turned = torch.cat((a, b), dim=-1) if kind == "half" else torch.stack((a, b), dim=-1).flatten(-2)
    turned = turned.to(x.dtype)
    if turned.shape[-1] == x.shape[-1]:
        return turned
    return torch.cat((x[..., :start], turned, x[..., start + turned.shape[-1] :]), dim=-1)
