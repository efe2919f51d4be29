"""Undoing and redoing a rotary position embedding (arXiv 2104.09864) with the cosines and sines a model itself used.

Knows neither models nor positions: tables come from the attention module's call, the convention from a `RopeSpec`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kvstore.spec import RopeSpec

RotaryTables = tuple[Float[Tensor, "#batch token freq"], Float[Tensor, "#batch token freq"]]
"""Cosine and sine of every frequency at every position, in float32; one row where all sequences start at 0."""


Layouts = dict[tuple[int, int | None], slice]
"""Where in tables of that width each of that many frequencies stands once, as far as it is known of a model."""


def rotary_tables(
    position_embeddings: object, num_freqs: int | None = None, layouts: Layouts | None = None
) -> RotaryTables | None:
    """Bring what a model calls `position_embeddings` into one form; None if it is no rotary table.

    Models hand over each frequency once (gpt-oss), twice in blocks `f g f g` (Llama), twice in pairs `f f g g` (Cohere),
    or as one complex number (Llama 4).

    Args:
        num_freqs: how many frequencies there are; found from the values if None, which takes a few positions to be sure.
        layouts: what is known of the model, and is added to once values leave no doubt. To look at values waits for the device.
    """
    if isinstance(position_embeddings, Tensor) and position_embeddings.is_complex():
        cos, sin = position_embeddings.real, position_embeddings.imag
    elif isinstance(position_embeddings, (tuple, list)) and len(position_embeddings) == 2:
        cos, sin = position_embeddings
    else:
        return None
    if not (isinstance(cos, Tensor) and isinstance(sin, Tensor)) or cos.ndim != 3 or cos.shape != sin.shape:
        return None
    cos, sin = cos.float(), sin.float()
    width = cos.shape[-1]
    if width != num_freqs:
        layouts = {} if layouts is None else layouts
        once = layouts.get((width, num_freqs))
        if once is None:
            half = width // 2
            fitting = [
                first
                for first, second in ((slice(half), slice(half, None)), (slice(0, None, 2), slice(1, None, 2)))
                if torch.equal(cos[..., first], cos[..., second]) and torch.equal(sin[..., first], sin[..., second])
            ]
            once = fitting[0] if fitting else slice(None)
            if len(fitting) == 1:
                layouts[width, num_freqs] = once
        cos, sin = cos[..., once], sin[..., once]
    return (cos, sin) if num_freqs in (None, cos.shape[-1]) else None


def unrotate(
    key: Float[Tensor, "batch kv_head token dim"], tables: RotaryTables, rope: RopeSpec
) -> Float[Tensor, "batch kv_head token dim"]:
    """Return keys as they were before rotation, computed in float32 and rounded once, to the dtype of `key`."""
    return rotate(key, inverse(tables), rope)


def inverse(tables: RotaryTables) -> RotaryTables:
    """Tables that rotate back.

    The inverse of `(x1 c - x2 s, x2 c + x1 s)` is `(y1 c + y2 s, y2 c - y1 s) / (c^2 + s^2)`: the rotation by the opposite angle, where
    the division also undoes YaRN's scaling of the tables and their rounding to the model's dtype.
    """
    cos, sin = tables
    norm = cos.square() + sin.square()
    return cos / norm, -sin / norm


def rotate(
    key: Float[Tensor, "batch kv_head token dim"], tables: RotaryTables, rope: RopeSpec
) -> Float[Tensor, "batch kv_head token dim"]:
    """Return keys as the attention uses them, `(x1 c - x2 s, x2 c + x1 s)`; in float32, rounded once to the dtype of `key`."""
    # A model spread over devices gets its tables moved after our hook has seen them.
    cos, sin = (table.unsqueeze(1).to(key.device) for table in tables)
    if min(rope.inv_freq) < 0:  # tables are of positive angles
        sin = -sin
    stop = rope.start + rope.rotary_dim
    turning = key[..., rope.start : stop].float()
    if rope.kind == "half":
        # Whole rows at a time: loops over halves of a head are short and slow.
        other = torch.cat(turning.chunk(2, dim=-1)[::-1], dim=-1)
        rotated = turning * torch.cat([cos, cos], dim=-1) + other * torch.cat([-sin, sin], dim=-1)
    else:
        x1, x2 = turning[..., 0::2], turning[..., 1::2]
        rotated = torch.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).flatten(-2)
    rotated = rotated.to(key.dtype)
    if rope.rotary_dim == key.shape[-1]:
        return rotated
    return torch.cat([key[..., : rope.start], rotated, key[..., stop:]], dim=-1)
