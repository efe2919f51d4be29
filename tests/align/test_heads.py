"""Head and channel maps. Suffixes: B batch, H heads, T token, D channels of a head."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.spec import RopeSpec
from pipeline.align.heads import head_map, key_channels, project_geometry, project_heads, select_channels, spread_channels
from pipeline.align.rope import rotate
from pipeline.align.time import resample_kv_with_interpolation
from tests.align.cases import DIM_PAIRS, HEAD_PAIRS, plain_rope

NUM_TOKENS = 33
POSITIONS_T = torch.arange(NUM_TOKENS)


def random_keys(num_heads: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, num_heads, NUM_TOKENS, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(Ht=st.integers(1, 24), Hs=st.integers(1, 24))
@settings(deadline=None, max_examples=50)
def test_head_map_gives_each_wanted_head_its_equal_share_of_the_heads(Ht: int, Hs: int) -> None:
    weights = head_map(Ht, Hs)
    share = Fraction(Ht, Hs)
    for s in range(Hs):
        for t in range(Ht):
            overlap = max(Fraction(0), min((s + 1) * share, Fraction(t + 1)) - max(s * share, Fraction(t)))
            assert weights[s, t].item() == pytest.approx(float(overlap / share), abs=1e-15)
    torch.testing.assert_close(weights.sum(1), torch.ones(Hs, dtype=torch.float64))
    torch.testing.assert_close(weights.sum(0), torch.full((Ht,), Hs / Ht, dtype=torch.float64))


def test_head_map_of_equal_counts_is_exactly_the_identity() -> None:
    assert torch.equal(head_map(7, 7), torch.eye(7, dtype=torch.float64))


@pytest.mark.parametrize(("few", "many"), [(2, 12), (4, 28), (8, 32), (1, 7)])
def test_divisible_head_maps_are_group_mean_and_repeat_and_undo_each_other(few: int, many: int) -> None:
    down, up = head_map(many, few), head_map(few, many)
    x = random_keys(many, 6)
    torch.testing.assert_close(project_heads(x, few, -3), x.reshape(2, few, many // few, NUM_TOKENS, 6).mean(2))
    y = random_keys(few, 6)
    assert torch.equal(project_heads(y, many, -3), y.repeat_interleave(many // few, dim=1))
    torch.testing.assert_close(down @ up, torch.eye(few, dtype=torch.float64))


def backwards(rope: RopeSpec) -> RopeSpec:
    return dataclasses.replace(rope, inv_freq=tuple(-f for f in rope.inv_freq))


def test_a_head_map_without_heads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got Ht=0, Hs=2, expected at least one head .*num_key_value_heads"):
        head_map(0, 2)


@pytest.mark.parametrize(("Ht", "Hs"), HEAD_PAIRS)
def test_mapping_heads_commutes_with_rotation(Ht: int, Hs: int) -> None:
    x, rope = random_keys(Ht, 16), plain_rope(16)
    mapped_then_rotated = rotate(project_heads(x, Hs, -3), POSITIONS_T, rope)
    torch.testing.assert_close(mapped_then_rotated, project_heads(rotate(x, POSITIONS_T, rope), Hs, -3))


def test_equal_bases_and_half_the_dim_select_every_second_pair() -> None:
    pairs = list(range(0, 64, 2))
    assert key_channels(128, 64, plain_rope(128), plain_rope(64)) == tuple(pairs + [64 + i for i in pairs])


def test_equal_rotations_select_every_channel_in_place() -> None:
    rope = plain_rope(64, kind="interleaved", start=32)
    assert key_channels(128, 128, rope, rope) == tuple(range(128))


@pytest.mark.parametrize(
    ("source_dim", "source", "target_dim", "target"),
    [
        pytest.param(128, plain_rope(128), 64, plain_rope(64), id="half"),
        pytest.param(128, plain_rope(128), 32, plain_rope(32), id="half-to-a-quarter"),
        pytest.param(64, plain_rope(64), 128, plain_rope(128), id="half-up"),
        pytest.param(64, plain_rope(64, kind="interleaved"), 32, plain_rope(32, kind="interleaved"), id="interleaved"),
        pytest.param(64, plain_rope(64), 32, plain_rope(32, kind="interleaved"), id="half-to-interleaved"),
        pytest.param(64, plain_rope(64, kind="interleaved"), 64, plain_rope(64), id="interleaved-to-half-of-equal-dim"),
        pytest.param(128, plain_rope(64), 64, plain_rope(32), id="partial"),
        pytest.param(64, backwards(plain_rope(64)), 32, plain_rope(32), id="turning-backwards-to-forwards"),
        pytest.param(64, plain_rope(64), 32, backwards(plain_rope(32, kind="interleaved")), id="forwards-to-backwards"),
        pytest.param(96, plain_rope(64, start=32), 48, plain_rope(32), id="partial-at-the-end-to-start"),
        pytest.param(48, plain_rope(32), 96, plain_rope(64, start=32, kind="interleaved"), id="partial-up"),
    ],
)
def test_frequency_selection_commutes_with_rotation(
    source_dim: int, source: RopeSpec, target_dim: int, target: RopeSpec
) -> None:
    x = random_keys(2, source_dim)
    channels = key_channels(source_dim, target_dim, source, target)
    selected_then_rotated = rotate(select_channels(x, channels), POSITIONS_T, target)
    rotated_then_selected = select_channels(rotate(x, POSITIONS_T, source), channels)
    torch.testing.assert_close(selected_then_rotated, rotated_then_selected, atol=1e-5, rtol=0)
    used = [channel for channel in channels if channel is not None]
    assert len(used) == len(set(used)) == min(source_dim, target_dim)


def test_the_first_half_of_the_channels_does_not_commute_with_rotation() -> None:
    x = random_keys(2, 128)
    sliced_then_rotated = rotate(x[..., :64], POSITIONS_T, plain_rope(64))
    rotated_then_sliced = rotate(x, POSITIONS_T, plain_rope(128))[..., :64]
    assert (sliced_then_rotated - rotated_then_sliced).abs().max() > 1


@pytest.mark.parametrize("dim", [64, 32], ids=["same-dim", "half-the-dim"])
def test_with_equal_rotation_the_loss_before_and_after_rotating_is_the_same(dim: int) -> None:
    teacher, student = random_keys(8, 64), random_keys(2, dim, seed=1)
    source, target = plain_rope(64), plain_rope(dim)
    channels = key_channels(64, dim, source, target)
    before = (project_geometry(teacher, 2, channels, -3) - student).square().mean()
    rotated = rotate(teacher, POSITIONS_T, source)
    after = (project_geometry(rotated, 2, channels, -3) - rotate(student, POSITIONS_T, target)).square().mean()
    torch.testing.assert_close(before, after, rtol=1e-6, atol=0)


def test_of_unequal_bases_each_pair_takes_the_one_nearest_in_log_frequency() -> None:
    source = RopeSpec(kind="half", inv_freq=(1.0, 0.1, 0.001))
    target = RopeSpec(kind="half", inv_freq=(0.5, 0.2, 0.0011))
    assert key_channels(6, 6, source, target) == (0, 1, 2, 3, 4, 5)
    slower = RopeSpec(kind="half", inv_freq=(0.04, 0.002, 0.0005))
    assert key_channels(6, 6, source, slower) == (1, 2, 2, 4, 5, 5)


def test_going_up_a_contested_slot_goes_to_the_nearest_pair() -> None:
    source = RopeSpec(kind="half", inv_freq=(1.0, 0.011))
    target = RopeSpec(kind="half", inv_freq=(0.01, 0.001, 0.0001))
    assert key_channels(4, 6, source, target) == (1, None, None, 3, None, None)


def test_exact_ties_go_to_the_faster_pair_whatever_the_rounding_of_log() -> None:
    # 96 -> 64 channels: wanted pair j lies at pair 1.5 j of the source.
    channels = key_channels(96, 64, plain_rope(96), plain_rope(64))
    assert channels[:32] == tuple(3 * j // 2 for j in range(32))


def test_pairs_of_frequency_zero_count_as_not_rotated() -> None:
    source = RopeSpec(kind="half", inv_freq=(1.0, 0.0))
    target = RopeSpec(kind="half", inv_freq=(1.0,))
    assert key_channels(4, 4, source, target) == (0, 2, 1, 3)


def test_unrotated_channels_wanted_of_a_wholly_rotated_head_are_left_out() -> None:
    channels = key_channels(8, 8, plain_rope(8), plain_rope(4))
    assert [channel is None for channel in channels] == [False] * 4 + [True] * 4


@pytest.mark.parametrize(("source", "target"), [(None, plain_rope(4)), (plain_rope(8), None), (None, None)])
def test_without_rotation_on_one_side_channels_are_spread(source: RopeSpec | None, target: RopeSpec | None) -> None:
    assert key_channels(8, 4, source, target) == (0, 2, 4, 6)


def test_rotated_channels_outside_the_head_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rotates channels 8\.\.39, expected them within the head dim 32"):
        key_channels(32, 32, plain_rope(32, start=8), plain_rope(32))


@given(source_dim=st.integers(1, 200), target_dim=st.integers(1, 200))
@settings(deadline=None, max_examples=50)
def test_spreading_uses_distinct_channels_in_order_and_as_many_as_fit(source_dim: int, target_dim: int) -> None:
    channels = spread_channels(source_dim, target_dim)
    used = [channel for channel in channels if channel is not None]
    assert len(channels) == target_dim
    assert len(used) == min(source_dim, target_dim)
    assert used == sorted(set(used))
    assert used[0] == 0
    assert used[-1] < source_dim


@pytest.mark.parametrize(("Dt", "Ds"), DIM_PAIRS)
def test_the_value_map_is_orthonormal(Dt: int, Ds: int) -> None:
    matrix = select_channels(torch.eye(Dt, dtype=torch.float64), spread_channels(Dt, Ds))
    gram = matrix.T @ matrix if Dt >= Ds else matrix @ matrix.T
    assert torch.equal(gram, torch.eye(min(Dt, Ds), dtype=torch.float64))


def test_a_map_that_changes_nothing_gives_the_same_object_back() -> None:
    x = random_keys(4, 16)
    assert project_geometry(x, 4, tuple(range(16)), -3) is x


def test_channels_without_a_counterpart_are_zero_even_where_the_source_is_not_finite() -> None:
    x_HD = torch.tensor([[float("nan"), 2.0]])
    assert torch.equal(select_channels(x_HD, (1, None)), torch.tensor([[2.0, 0.0]]))


@pytest.mark.parametrize(("Ht", "Hs"), [(12, 8), (2, 8)])
def test_head_channel_and_time_maps_commute(Ht: int, Hs: int) -> None:
    x = random_keys(Ht, 64)
    channels = key_channels(64, 32, plain_rope(64), plain_rope(32))
    one = resample_kv_with_interpolation(project_geometry(x, Hs, channels, -3), 50)
    other = select_channels(project_heads(resample_kv_with_interpolation(x, 50), Hs, -3), channels)
    torch.testing.assert_close(one, other)


def test_tokens_and_samples_are_mapped_independently() -> None:
    x = random_keys(12, 32)
    tokens = torch.randperm(NUM_TOKENS, generator=torch.Generator().manual_seed(3))
    shuffled = project_geometry(x.flip(0)[:, :, tokens], 8, spread_channels(32, 16), -3)
    assert torch.equal(shuffled, project_geometry(x, 8, spread_channels(32, 16), -3).flip(0)[:, :, tokens])


@pytest.mark.parametrize("head_axis", [-2, -3])
def test_the_head_axis_may_be_the_stores_or_attentions(head_axis: int) -> None:
    x = random_keys(6, 8)
    moved = x.transpose(1, 2) if head_axis == -2 else x
    out = project_heads(moved, 4, head_axis)
    expected = torch.einsum("st,btnd->bsnd", head_map(6, 4), x)
    torch.testing.assert_close(out.transpose(1, 2) if head_axis == -2 else out, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_is_kept_and_means_are_taken_in_single_precision_and_rounded_once(dtype: torch.dtype) -> None:
    x = random_keys(12, 8).to(dtype)
    exact = x.to(torch.float64).reshape(2, 2, 6, NUM_TOKENS, 8).mean(2)
    torch.testing.assert_close(project_heads(x.to(torch.float32), 2, -3).to(torch.float64), exact, rtol=0, atol=2e-7)
    assert torch.equal(project_heads(x, 2, -3), project_heads(x.to(torch.float32), 2, -3).to(dtype))


def test_autocast_does_not_lower_the_precision() -> None:
    x = random_keys(12, 8).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = project_heads(x, 2, -3)
    assert torch.equal(inside, project_heads(x, 2, -3))


def test_expanded_and_strided_inputs_are_accepted() -> None:
    x = random_keys(1, 32)[..., ::2].expand(2, 6, NUM_TOKENS, 16)
    assert torch.equal(
        project_geometry(x, 2, spread_channels(16, 8), -3), project_geometry(x.contiguous(), 2, spread_channels(16, 8), -3)
    )


def test_maps_first_used_in_inference_mode_serve_training_afterwards() -> None:
    # A geometry no other test uses, so that the cached map is made here.
    with torch.inference_mode():
        project_geometry(torch.ones(1, 11, 3, 22), 5, spread_channels(22, 34), -3)
    x = torch.ones(1, 11, 3, 22, requires_grad=True)
    torch.autograd.backward(project_geometry(x, 5, spread_channels(22, 34), -3).sum())
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(x, 5 / 11))
