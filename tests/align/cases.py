"""Geometries the alignment tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest

from kvstore.spec import KeyDomain, KVSpec, LayerSpec, RopeKind, RopeSpec

HEAD_PAIRS = [
    pytest.param(12, 2, id="gpt-12-to-2"),
    pytest.param(28, 4, id="qwen-query-heads-28-to-4"),
    pytest.param(8, 32, id="llama-70b-8-to-llama-7b-32"),
    pytest.param(12, 8, id="uneven-down-12-to-8"),
    pytest.param(8, 12, id="uneven-up-8-to-12"),
    pytest.param(1, 7, id="multi-query-1-to-7"),
    pytest.param(7, 1, id="to-multi-query-7-to-1"),
    pytest.param(5, 3, id="coprime-5-to-3"),
    pytest.param(4, 4, id="equal-4"),
]
DIM_PAIRS = [
    pytest.param(128, 64, id="128-to-64"),
    pytest.param(64, 128, id="64-to-128"),
    pytest.param(96, 64, id="96-to-64"),
    pytest.param(64, 64, id="equal-64"),
]


def plain_rope(
    dim: int, base: float = 10000.0, kind: RopeKind = "half", start: int = 0, attention_scaling: float = 1.0
) -> RopeSpec:
    """Unscaled rotation of `dim` channels."""
    inv_freq = tuple(base ** (-2 * pair / dim) for pair in range(dim // 2))
    return RopeSpec(kind=kind, inv_freq=inv_freq, start=start, attention_scaling=attention_scaling)


def uniform_spec(
    num_layers: int,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int | None = None,
    *,
    rope: RopeSpec | Literal["plain"] | None = "plain",
    key_domain: KeyDomain = "pre_rope",
    numbers: Sequence[int] | None = None,
) -> KVSpec:
    """A model whose layers are all alike."""
    turned = plain_rope(key_dim) if rope == "plain" else rope
    layers = tuple(
        LayerSpec(
            layer=number,
            num_kv_heads=num_kv_heads,
            key_dim=key_dim,
            value_dim=key_dim if value_dim is None else value_dim,
            rope=None if turned is None else 0,
        )
        for number in (range(num_layers) if numbers is None else numbers)
    )
    return KVSpec(layers=layers, ropes=() if turned is None else (turned,), key_domain=key_domain, dtype="bfloat16")
