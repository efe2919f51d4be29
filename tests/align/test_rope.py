"""Rotary embedding, forwards and backwards. Suffixes: B batch, H heads, T token, D channels of a head, F rotated pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.glm import modeling_glm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

from kvstore.spec import RopeKind, RopeSpec
from pipeline.align.rope import rope_tables, rotate, rotate_with, unrotate, unrotate_with
from tests.align.cases import plain_rope

NUM_TOKENS, DIM = 21, 32
KINDS: list[RopeKind] = ["half", "interleaved"]


def random_keys(dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    keys_BHTD = torch.randn(2, 3, NUM_TOKENS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return keys_BHTD.to(dtype)


def exact_tables(rope: RopeSpec, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables in float64, where the algebra can be tested to its rounding."""
    angle = positions[..., None].to(torch.float64) * torch.tensor(rope.inv_freq, dtype=torch.float64)
    return angle.cos() * rope.attention_scaling, angle.sin() * rope.attention_scaling


@pytest.mark.parametrize(
    ("module", "rotary_dim", "kind"),
    [
        pytest.param(modeling_llama, DIM, "half", id="llama-half"),
        pytest.param(modeling_gpt_neox, 8, "half", id="gpt-neox-half-partial"),
        pytest.param(modeling_glm, 16, "interleaved", id="glm-interleaved-partial"),
    ],
)
def test_rotating_is_what_the_models_do(module: Any, rotary_dim: int, kind: RopeKind) -> None:
    rope = plain_rope(rotary_dim, kind=kind)
    positions_BT = torch.stack((torch.arange(NUM_TOKENS), torch.arange(NUM_TOKENS) + 3000))
    keys = random_keys(torch.float32)
    cos, sin = rope_tables(rope, positions_BT)
    doubled = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    _, theirs = module.apply_rotary_pos_emb(keys, keys, *doubled)
    torch.testing.assert_close(rotate(keys, positions_BT, rope), theirs, rtol=0, atol=1e-6)


def test_tables_are_bitwise_those_of_a_llama_with_attention_scaling() -> None:
    config = modeling_llama.LlamaConfig(
        hidden_size=4 * DIM,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    )
    module = modeling_llama.LlamaRotaryEmbedding(config)
    positions_BT = torch.arange(5000, 5000 + NUM_TOKENS)[None]
    theirs = module(random_keys(torch.float32), positions_BT)
    assert module.attention_scaling != 1
    rope = RopeSpec(kind="half", inv_freq=tuple(module.inv_freq.tolist()), attention_scaling=float(module.attention_scaling))
    for ours, table in zip(rope_tables(rope, positions_BT), theirs, strict=True):
        assert torch.equal(ours, table[..., : DIM // 2])


@pytest.mark.parametrize("scaling", [1.0, 1.25], ids=["plain", "yarn"])
@pytest.mark.parametrize("rotary_dim", [DIM, 12], ids=["whole", "partial"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float64, 1e-12, id="fp64"),
        pytest.param(torch.float32, 1e-6, id="fp32"),
        pytest.param(torch.bfloat16, 5e-3, id="bf16"),
    ],
)
def test_unrotating_undoes_rotating(
    dtype: torch.dtype, tolerance: float, kind: RopeKind, rotary_dim: int, scaling: float
) -> None:
    rope = plain_rope(rotary_dim, kind=kind, start=4 if rotary_dim < DIM else 0, attention_scaling=scaling)
    keys = random_keys(dtype)
    positions = torch.arange(1000, 1000 + NUM_TOKENS)
    back = unrotate(rotate(keys, positions, rope), positions, rope)
    assert back.dtype == dtype
    relative = (back - keys).to(torch.float64).norm() / keys.to(torch.float64).norm()
    assert relative < tolerance


def test_unrotating_by_tables_rounded_to_bf16_undoes_a_rotation_by_those_tables() -> None:
    rope, keys = plain_rope(DIM), random_keys(torch.float32)
    cos, sin = (table.to(torch.bfloat16) for table in rope_tables(rope, torch.arange(NUM_TOKENS)))
    rotated = rotate_with(keys, cos, sin, kind="half")
    torch.testing.assert_close(unrotate_with(rotated, cos, sin, kind="half"), keys, rtol=0, atol=2e-6)
    assert (unrotate(rotated, torch.arange(NUM_TOKENS), rope) - keys).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_rotation_keeps_norms_and_attention_scaling_multiplies_them(kind: RopeKind) -> None:
    keys, positions = random_keys(), torch.arange(NUM_TOKENS)
    tables = exact_tables(plain_rope(DIM, attention_scaling=1.5), positions)
    norm = rotate_with(keys, *tables, kind=kind).norm(dim=-1)
    torch.testing.assert_close(norm, 1.5 * keys.norm(dim=-1))


@pytest.mark.parametrize("kind", KINDS)
@given(first=st.integers(-500, 5000), second=st.integers(-500, 5000))
@settings(deadline=None, max_examples=30)
def test_rotations_add_up_and_logits_see_distances_only(kind: RopeKind, first: int, second: int) -> None:
    rope, queries, keys = plain_rope(DIM), random_keys(seed=1), random_keys()

    def turn(x: torch.Tensor, shift: int) -> torch.Tensor:
        return rotate_with(x, *exact_tables(rope, torch.full((NUM_TOKENS,), shift)), kind=kind)

    torch.testing.assert_close(turn(turn(keys, first), second), turn(keys, first + second), rtol=0, atol=1e-9)
    logits = (turn(queries, first) * turn(keys, second)).sum(-1)
    torch.testing.assert_close(logits, (turn(queries, first - second) * keys).sum(-1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_that_do_not_rotate_keep_their_bits(kind: RopeKind, dtype: torch.dtype) -> None:
    rope = plain_rope(8, kind=kind, start=4, attention_scaling=1.3)
    keys = random_keys(dtype)
    rotated = rotate(keys, torch.arange(1, NUM_TOKENS + 1), rope)
    assert torch.equal(rotated[..., :4], keys[..., :4])
    assert torch.equal(rotated[..., 12:], keys[..., 12:])
    assert not torch.isclose(rotated[..., 4:12], keys[..., 4:12], rtol=1e-2).all()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        pytest.param("half", [-3.0, 2.0, 1.0, 4.0], id="half"),
        pytest.param("interleaved", [-2.0, 1.0, 3.0, 4.0], id="interleaved"),
    ],
)
def test_a_quarter_turn_of_the_first_pair(kind: RopeKind, expected: list[float]) -> None:
    x_TD = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    cos, sin = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    assert rotate_with(x_TD, cos, sin, kind=kind)[0].tolist() == expected


def test_half_precision_is_rounded_once() -> None:
    keys, rope, positions = random_keys(torch.bfloat16), plain_rope(DIM), torch.arange(700, 700 + NUM_TOKENS)
    exact = rotate(keys.to(torch.float32), positions, rope).to(torch.bfloat16)
    assert torch.equal(rotate(keys, positions, rope), exact)


def test_positions_may_differ_between_samples() -> None:
    keys, rope = random_keys(torch.float32), plain_rope(DIM)
    positions_BT = torch.stack((torch.arange(NUM_TOKENS), torch.arange(NUM_TOKENS).flip(0)))
    rotated = rotate(keys, positions_BT, rope)
    for sample in range(2):
        assert torch.equal(rotated[sample], rotate(keys[sample], positions_BT[sample], rope))
    cos, sin = (table[:, None] for table in rope_tables(rope, positions_BT))
    assert torch.equal(rotate_with(keys, cos, sin, kind="half"), rotated)


def test_a_layer_without_rotation_gives_the_same_object_back() -> None:
    keys, positions = random_keys(), torch.arange(NUM_TOKENS)
    assert rotate(keys, positions, None) is keys
    assert unrotate(keys, positions, None) is keys


@pytest.mark.parametrize("kind", KINDS)
def test_both_directions_are_differentiable(kind: RopeKind) -> None:
    keys = random_keys()[:1, :1, :3].requires_grad_()
    tables = exact_tables(plain_rope(8, attention_scaling=1.2), torch.arange(3))
    assert torch.autograd.gradcheck(lambda x: rotate_with(x, *tables, kind=kind, start=2), (keys,))
    assert torch.autograd.gradcheck(lambda x: unrotate_with(x, *tables, kind=kind, start=2), (keys,))


@pytest.mark.parametrize(
    ("num_positions", "start", "message"),
    [
        pytest.param(NUM_TOKENS, 4, r"rotary channels 4\.\.35, expected .* within dim", id="outside-the-head"),
        pytest.param(NUM_TOKENS, -1, r"rotary channels -1\.\.30", id="negative-start"),
        pytest.param(NUM_TOKENS - 1, 0, r"x \[2, 3, 21, 32\] and tables \[20, 16\]", id="other-number-of-tokens"),
    ],
)
def test_tables_that_do_not_fit_are_refused(num_positions: int, start: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotate(random_keys(), torch.arange(num_positions), plain_rope(DIM, start=start))


def test_the_stores_axis_order_is_refused_with_advice() -> None:
    keys_TKD = random_keys()[0].transpose(0, 1)
    with pytest.raises(ValueError, match="transpose token and kv_head"):
        rotate(keys_TKD, torch.arange(NUM_TOKENS), plain_rope(DIM))
