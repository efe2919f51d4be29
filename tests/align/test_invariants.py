"""The 42 invariants of alignment by number: those with a test of their own here, and where the others are proved.

Numbers are those of the project's list (resampling 1-10, spans 11-18, projection 19-29, rotation 30-34, attention and losses
35-41, layers 42). A test here is named after its number; every number must have a test.

Suffixes: B batch, T token, H heads, D channels.
"""

from __future__ import annotations

import ast
import math
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvstore.errors import FingerprintMismatchError
from kvstore.spec import RopeKind
from pipeline.align import Alignment, KVProjector, resample_kv_with_interpolation
from pipeline.align.fit import Fit
from pipeline.align.fitted import FittedMap, Retained
from pipeline.align.heads import head_map, key_channels, project_geometry, project_heads, select_channels, spread_channels
from pipeline.align.rope import rotate, unrotate
from pipeline.align.spans import align_sample
from tests.align.cases import plain_rope, uniform_spec
from tests.align.test_spans import side, to_dense
from training.losses import kv_errors, relation_errors, take_rows

HERE = Path(__file__)
ELSEWHERE = {
    1: "test_time.py::test_an_equal_length_gives_the_same_object_and_every_index",
    2: "test_time.py::test_endpoints_are_kept_and_nothing_leaves_the_range_of_the_input",
    3: "test_time.py::test_endpoints_are_kept_and_nothing_leaves_the_range_of_the_input",
    5: "test_time.py::test_resampling_is_a_linear_map",
    6: "test_time.py::test_indices_are_in_range_monotone_and_nearest",
    7: "test_time.py::test_resampling_commutes_with_reversing_time",
    9: "test_time.py::test_upsampling_by_a_whole_factor_and_striding_gives_the_input_back",
    10: "test_time.py::test_indices_are_in_range_monotone_and_nearest",
    11: "test_spans.py::test_spans_equal_a_dense_reference_byte_by_byte",
    12: "test_spans.py::test_spans_equal_a_dense_reference_byte_by_byte",
    13: "test_spans.py::test_spans_equal_a_dense_reference_byte_by_byte",
    14: "test_spans.py::test_spans_equal_a_dense_reference_byte_by_byte",
    15: "test_spans.py::test_spans_equal_a_dense_reference_byte_by_byte",
    17: "test_spans.py::test_spans_equal_a_dense_reference_byte_by_byte",
    18: "test_spans.py::test_spans_equal_a_dense_reference_byte_by_byte",
    20: "test_heads.py::test_head_map_gives_each_wanted_head_its_equal_share_of_the_heads",
    22: "test_fit.py::test_no_orthonormal_map_retains_more_than_components",
    23: "test_fit.py::test_heads_turned_towards_each_other_pool_to_more_energy",
    27: "test_fit.py::test_sums_of_parts_in_any_order_are_the_sums_of_all",
    42: "test_layers.py::test_layer_maps_are_monotone_in_range_and_end_at_the_last_layer",
}
SEEDS = st.integers(0, 2**32 - 1)
HEADS = st.integers(1, 8)
KINDS = st.sampled_from(["half", "interleaved"])
quick = settings(deadline=None, max_examples=25)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthonormal(seed: int, size: int) -> Tensor:
    return torch.linalg.qr(normal(seed, size, size))[0]


def test_every_number_is_proved_somewhere() -> None:
    here = {int(number) for number in re.findall(r"^def test_(\d\d)_", HERE.read_text(), flags=re.MULTILINE)}
    assert here | ELSEWHERE.keys() == set(range(1, 43))
    for place in ELSEWHERE.values():
        file, _, name = place.partition("::")
        tests = [node.name for node in ast.parse((HERE.parent / file).read_text()).body if isinstance(node, ast.FunctionDef)]
        assert name in tests, place


@given(
    texts=st.lists(st.sampled_from(["naïve ", "x = 1\n", "🙂", "\t日本", "word "]), min_size=1, max_size=8),
    first=st.booleans(),
    last=st.booleans(),
)
@quick
def test_16_ends_of_text_change_no_row_of_the_text(texts: list[str], first: bool, last: bool) -> None:
    teacher, student = side("bytes"), side("small")
    text = teacher.encode("".join(texts))
    end = teacher.tokenizer.eos_token_id
    framed = np.concatenate([[end] * first, text, [end] * last]).astype(np.int64)
    plain, with_ends = align_sample(teacher, student, text), align_sample(teacher, student, framed)
    rows = to_dense(with_ends.spans, len(framed))
    special = np.isin(with_ends.input_ids, [student.tokenizer.eos_token_id])
    expected = to_dense(plain.spans, len(text))
    np.testing.assert_array_equal(with_ends.input_ids[~special], plain.input_ids)
    np.testing.assert_array_equal(rows[~special][:, int(first) : int(first) + len(text)], expected)
    assert not np.delete(rows[~special], np.s_[int(first) : int(first) + len(text)], axis=1).any()


@given(T_in=st.integers(1, 40), T_out=st.integers(2, 40), slope=st.floats(-10, 10), start=st.floats(-10, 10))
@quick
def test_04_constants_stay_and_ramps_stay_ramps(T_in: int, T_out: int, slope: float, start: float) -> None:
    ramp = (start + slope * torch.arange(T_in, dtype=torch.float64))[None, None, :, None]
    expected = start + slope * (T_in - 1) * torch.arange(T_out, dtype=torch.float64) / (T_out - 1)
    found = resample_kv_with_interpolation(ramp, T_out)[0, 0, :, 0]
    torch.testing.assert_close(found, expected if T_in > 1 else torch.full_like(found, start), rtol=0, atol=1e-9)


@given(T_out=st.integers(1, 12), seed=SEEDS, order=st.permutations(range(4)))
@quick
def test_08_rows_are_independent_of_each_other_and_of_poison_in_them(T_out: int, seed: int, order: list[int]) -> None:
    x = normal(seed, 4, 2, 7, 3)
    clean = resample_kv_with_interpolation(x, T_out)
    assert torch.equal(resample_kv_with_interpolation(x[order], T_out), clean[order])
    poisoned = x.clone()
    poisoned[2] = math.nan
    kept = [0, 1, 3]
    assert torch.equal(resample_kv_with_interpolation(poisoned, T_out)[kept], clean[kept])


@given(heads=HEADS, dim=st.sampled_from([2, 8, 16]), seed=SEEDS)
@quick
def test_19_equal_geometry_is_the_same_object_without_parameters(heads: int, dim: int, seed: int) -> None:
    projector = KVProjector(heads, heads, dim, dim, trainable=True)
    k, v = normal(seed, 2, heads, 3, dim), normal(seed + 1, 2, heads, 3, dim)
    out = projector(k, v)
    assert out[0] is k
    assert out[1] is v
    assert list(projector.parameters()) == []


@given(few=HEADS, factor=st.integers(1, 5), dims=st.sampled_from([(8, 8), (8, 16), (16, 8)]), seed=SEEDS)
@quick
def test_21_orthonormal_maps_shorten_and_lifts_keep_lengths_and_angles(
    few: int, factor: int, dims: tuple[int, int], seed: int
) -> None:
    rows = head_map(few * factor, few) * factor**0.5  # orthonormal but for the length of a mean
    torch.testing.assert_close(rows @ rows.T, torch.eye(few, dtype=torch.float64))
    torch.testing.assert_close((rows.T @ rows) @ (rows.T @ rows), rows.T @ rows)
    x = normal(seed, 5, few * factor, dims[0])
    chosen = select_channels(torch.einsum("st,nta->nsa", rows, x), spread_channels(*dims))
    assert (chosen.flatten(1).norm(dim=1) <= x.flatten(1).norm(dim=1) * (1 + 1e-12)).all()
    lifted = project_heads(select_channels(x, spread_channels(dims[0], 2 * dims[0])), few * factor * factor) / factor**0.5
    gram, expected = (side.flatten(1) @ side.flatten(1).T for side in (lifted, x))
    torch.testing.assert_close(gram, expected, rtol=1e-9, atol=1e-9)


@given(heads=st.tuples(HEADS, HEADS), halve=st.booleans(), kind=KINDS, first=st.integers(0, 4000), seed=SEEDS)
@quick
def test_24_fixed_maps_commute_with_rotation_and_a_slice_does_not(
    heads: tuple[int, int], halve: bool, kind: RopeKind, first: int, seed: int
) -> None:
    Dt, Ds = 16, 8 if halve else 16
    ropes = plain_rope(Dt, kind=kind), plain_rope(Ds, kind=kind)
    positions = first + torch.arange(40)
    x = normal(seed, 40, heads[0], Dt)

    def turn(y: Tensor, side: int) -> Tensor:
        return rotate(y.transpose(0, 1), positions, ropes[side]).transpose(0, 1)

    def fixed(y: Tensor) -> Tensor:
        return project_geometry(y, heads[1], key_channels(Dt, Ds, *ropes))

    torch.testing.assert_close(fixed(turn(x, 0)), turn(fixed(x), 1), rtol=0, atol=1e-5)
    if halve:
        assert (turn(x, 0)[..., :8] - turn(x[..., :8], 1)).abs().max() > 0.1
    mixing = orthonormal(seed, Dt)
    assert (turn(x, 0) @ mixing - (turn(x @ mixing, 0))).abs().max() > 0.1, (
        "a basis over all channels is none of the rotation's"
    )


@given(Ht=HEADS, Hs=HEADS, seed=SEEDS, order=st.permutations(range(6)))
@quick
def test_25_tokens_and_samples_may_be_permuted_before_or_after(Ht: int, Hs: int, seed: int, order: list[int]) -> None:
    projector = KVProjector(Ht, Hs, 8, 4)
    k, v = normal(seed, 6, Ht, 6, 8), normal(seed + 1, 6, Ht, 6, 8)
    for axis in (0, 2):
        index = torch.tensor(order)
        first = projector(k.index_select(axis, index), v.index_select(axis, index))
        last = [side.index_select(axis, index) for side in projector(k, v)]
        for one, other in zip(first, last, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@given(Ht=HEADS, Hs=HEADS, dims=st.sampled_from([(8, 4), (4, 8), (8, 8)]), T_out=st.integers(1, 9), seed=SEEDS)
@quick
def test_26_time_heads_and_dims_may_be_mapped_in_any_order(
    Ht: int, Hs: int, dims: tuple[int, int], T_out: int, seed: int
) -> None:
    x, channels = normal(seed, 2, Ht, 6, dims[0]), spread_channels(*dims)
    steps = {
        "time": lambda y: resample_kv_with_interpolation(y, T_out),
        "heads": lambda y: project_heads(y, Hs, head_axis=-3),
        "dims": lambda y: select_channels(y, channels),
    }
    outs = []
    for names in (("time", "heads", "dims"), ("dims", "heads", "time"), ("heads", "time", "dims")):
        y = x
        for name in names:
            y = steps[name](y)
        outs.append(y)
    for other in outs[1:]:
        torch.testing.assert_close(other, outs[0], rtol=0, atol=1e-12)


@given(seed=SEEDS, scale=st.floats(1e-20, 1e20), other=st.integers(0, 63))
@quick
def test_28_a_fit_comes_back_bit_for_bit_and_is_known_by_its_numbers(seed: int, scale: float, other: int) -> None:
    alignment = Alignment.plan(uniform_spec(2, 4, 4), uniform_spec(1, 2, 4))

    def made(key: Tensor, value: Tensor) -> Fit:
        share = {1: Retained(key=0.5, value=0.25)}
        return Fit(
            method="ridge",
            alignment=alignment,
            store="0" * 64,
            num_tokens=9,
            num_held_out_tokens=0,
            maps={1: FittedMap(key=key, value=value)},
            retained=share,
            retained_held_out={},
            attention_cosine={},
        )

    key, value = ((scale * normal(seed + side, 2, 4, 4, 4)).float() for side in range(2))
    fit = made(key, value)
    with tempfile.TemporaryDirectory() as folder:
        fit.save(Path(folder, "maps.safetensors"))
        again = Fit.load(Path(folder, "maps.safetensors"))
    assert torch.equal(again.maps[1].key, key)
    assert torch.equal(again.maps[1].value, value)
    assert again.fit_id == fit.fit_id
    changed = key.clone()
    changed.view(-1)[other] = torch.nextafter(changed.view(-1)[other], torch.tensor(torch.inf))
    with pytest.raises(FingerprintMismatchError, match="fit_id: got"):
        made(changed, value).require(alignment, fit.fit_id)


@given(Ht=HEADS, Hs=HEADS, dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]), seed=SEEDS)
@quick
def test_29_the_dtype_stays_and_any_strides_are_taken(Ht: int, Hs: int, dtype: torch.dtype, seed: int) -> None:
    projector = KVProjector(Ht, Hs, 8, 4)
    strided = normal(seed, 8, 5, Ht, 2).to(dtype).permute(3, 2, 1, 0)
    expanded = normal(seed, 1, Ht, 5, 8).to(dtype).expand(2, Ht, 5, 8)
    key, value = projector(strided, expanded)
    assert key.dtype == value.dtype == dtype
    assert key.isfinite().all()
    assert value.isfinite().all()
    again = projector(strided.contiguous(), expanded.contiguous())
    assert torch.equal(key, again[0])
    assert torch.equal(value, again[1])


@given(seed=SEEDS, kind=KINDS, first=st.integers(0, 100_000), scaling=st.sampled_from([1.0, 0.8, 1.3]))
@quick
def test_30_rotation_keeps_lengths_and_is_undone(seed: int, kind: RopeKind, first: int, scaling: float) -> None:
    rope = plain_rope(16, kind=kind, attention_scaling=scaling)
    positions = first + torch.arange(5)
    x = normal(seed, 3, 5, 16)
    turned = rotate(x, positions, rope)
    torch.testing.assert_close(turned.norm(dim=-1), scaling * x.norm(dim=-1), rtol=1e-6, atol=0)
    for dtype, atol in ((torch.float64, 1e-6), (torch.float32, 5e-6), (torch.bfloat16, 4e-2)):
        given_x = x.to(dtype)
        torch.testing.assert_close(unrotate(rotate(given_x, positions, rope), positions, rope), given_x, rtol=0, atol=atol * 5)


def test_32_scale_is_undone_by_its_square() -> None:
    rope = plain_rope(8, attention_scaling=1.5)
    x, positions = normal(0, 1, 4, 8), torch.arange(4)
    backwards = rotate(rotate(x, positions, rope), -positions, rope) / 1.5**2
    torch.testing.assert_close(backwards, x, rtol=0, atol=1e-6)


@given(seed=SEEDS, kind=KINDS, a=st.integers(-2000, 2000), b=st.integers(-2000, 2000))
@quick
def test_31_rotations_add_up_and_logits_know_distances_only(seed: int, kind: RopeKind, a: int, b: int) -> None:
    rope, x, q = plain_rope(16, kind=kind), normal(seed, 1, 1, 16), normal(seed + 1, 1, 1, 16)

    def at(y: Tensor, position: int) -> Tensor:
        return rotate(y, torch.tensor([position]), rope)

    torch.testing.assert_close(at(at(x, a), b), at(x, a + b), rtol=0, atol=2e-3)
    torch.testing.assert_close((at(q, a) * at(x, b)).sum(), (at(q, a - b) * x).sum(), rtol=0, atol=5e-3)


@given(seed=SEEDS, kind=KINDS, start=st.integers(0, 8), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
@quick
def test_33_channels_that_do_not_rotate_keep_their_bits(seed: int, kind: RopeKind, start: int, dtype: torch.dtype) -> None:
    x = normal(seed, 2, 5, 16).to(dtype)
    turned = rotate(x, 3 + torch.arange(5), plain_rope(8, kind=kind, start=start))
    assert torch.equal(turned[..., :start], x[..., :start])
    assert torch.equal(turned[..., start + 8 :], x[..., start + 8 :])


@given(heads=st.tuples(HEADS, HEADS), halve=st.booleans(), seed=SEEDS)
@quick
def test_34_equal_rotation_makes_the_loss_before_and_after_rotating_equal(
    heads: tuple[int, int], halve: bool, seed: int
) -> None:
    Dt, Ds = 16, 8 if halve else 16
    ropes, positions = (plain_rope(Dt), plain_rope(Ds)), torch.arange(30)
    teacher, student = normal(seed, 30, heads[0], Dt), normal(seed + 1, 30, heads[1], Ds)

    def turn(y: Tensor, side: int) -> Tensor:
        return rotate(y.transpose(0, 1), positions, ropes[side]).transpose(0, 1)

    def project(y: Tensor) -> Tensor:
        return project_geometry(y, heads[1], key_channels(Dt, Ds, *ropes))

    before = (student - project(teacher)).square().mean()
    after = (turn(student, 1) - project(turn(teacher, 0))).square().mean()
    torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-9)


def attend(q: Tensor, k: Tensor, v: Tensor, **how: bool) -> Tensor:
    return scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, **how)[0]


@given(seed=SEEDS, heads=HEADS)
@quick
def test_35_a_map_of_values_may_come_after_attention(seed: int, heads: int) -> None:
    q, k, v = (normal(seed + n, heads, 7, 8) for n in range(3))
    matrix = normal(seed + 3, 8, 5)
    torch.testing.assert_close(attend(q, k, v) @ matrix, attend(q, k, v @ matrix))


@given(seed=SEEDS, kv_heads=st.integers(1, 4), repeats=st.integers(1, 4))
@quick
def test_36_attention_over_repeated_heads_is_grouped_attention(seed: int, kv_heads: int, repeats: int) -> None:
    q, k, v = normal(seed, kv_heads * repeats, 7, 8), normal(seed + 1, kv_heads, 7, 8), normal(seed + 2, kv_heads, 7, 8)
    repeated = [project_heads(side, kv_heads * repeats, head_axis=-3) for side in (k, v)]
    torch.testing.assert_close(attend(q, *repeated), attend(q, k, v, enable_gqa=True))


@given(seed=SEEDS)
@quick
def test_37_a_constant_added_to_keys_is_invisible_unless_they_rotate(seed: int) -> None:
    q, k, v = (normal(seed + n, 2, 24, 16) for n in range(3))
    shift, rope, positions = 2.0 * normal(seed + 3, 1, 1, 16), plain_rope(16), torch.arange(24)
    torch.testing.assert_close(attend(q, k + shift, v), attend(q, k, v))
    turned, moved = (attend(rotate(q, positions, rope), rotate(side, positions, rope), v) for side in (k, k + shift))
    assert (turned - moved).norm() > 0.05 * turned.norm()


@given(seed=SEEDS)
@quick
def test_38_keys_and_queries_have_a_gauge(seed: int) -> None:
    q, k, v = (normal(seed + n, 2, 7, 8) for n in range(3))
    gauge = orthonormal(seed, 8) + 0.1 * normal(seed + 4, 8, 8)
    torch.testing.assert_close(attend(q @ torch.linalg.inv(gauge).T, k @ gauge, v), attend(q, k, v), rtol=1e-5, atol=1e-6)


@given(seed=SEEDS, rows=st.lists(st.integers(0, 14), min_size=1, max_size=15, unique=True))
@quick
def test_39_the_loss_is_zero_for_equals_and_blind_to_what_is_not_compared(seed: int, rows: list[int]) -> None:
    picked, ones = torch.tensor(sorted(rows)), torch.ones(1, 2)
    student = normal(seed, 3, 2, 5, 4, dtype=torch.float32).requires_grad_()
    teacher = normal(seed + 1, 3, 2, 5, 4, dtype=torch.float32).requires_grad_()
    ours, theirs = (take_rows(side, picked) for side in (student, teacher))
    assert kv_errors([(ours, ours)], [(ours, ours)], ones, len(rows)).abs().max() == 0
    errors = kv_errors([(ours, ours)], [(theirs, theirs)], ones, len(rows))
    assert errors.min() > 0
    errors.sum().backward()
    others = [row for row in range(15) if row not in rows]
    assert student.grad is not None
    assert not student.grad.transpose(1, 2).flatten(0, 1)[others].any()
    assert teacher.grad is None
    with torch.no_grad():
        poisoned = student.clone()
        for row in others:
            poisoned[row // 5, :, row % 5] = math.nan
    again = take_rows(poisoned, picked)
    assert torch.equal(kv_errors([(again, again)], [(theirs, theirs)], ones, len(rows)), errors.detach())


@given(seed=SEEDS, scale=st.floats(0.01, 100), cut=st.integers(1, 6))
@quick
def test_40_a_common_scale_and_a_split_batch_leave_the_loss(seed: int, scale: float, cut: int) -> None:
    ours, theirs = ([normal(seed + 2 * side + kind, 7, 2, 4) for kind in range(2)] for side in range(2))
    variances = torch.tensor([[0.7, 1.9]])

    def errors(rows: slice, by: float) -> Tensor:
        student, teacher = ((by * side[0][rows], by * side[1][rows]) for side in (ours, theirs))
        return kv_errors([student], [teacher], variances * by**2, 7)

    whole = errors(slice(0, 7), 1.0)
    torch.testing.assert_close(errors(slice(0, 7), scale), whole, rtol=1e-4, atol=0)
    torch.testing.assert_close(errors(slice(0, cut), 1.0) + errors(slice(cut, 7), 1.0), whole)


@given(seed=SEEDS, heads=st.integers(1, 3))
@quick
def test_41_the_relation_loss_does_not_see_a_common_turn_of_a_relation_head(seed: int, heads: int) -> None:
    samples = torch.tensor([0, 0, 0, 1, 1])
    x, y = normal(seed, 5, heads, 6), normal(seed + 1, 5, heads, 6)
    turn = orthonormal(seed + 2, 6)
    torch.testing.assert_close(relation_errors(x @ turn, y, samples), relation_errors(x, y, samples))
    torch.testing.assert_close(relation_errors(x, y @ turn, samples), relation_errors(x, y, samples))
    assert relation_errors(x, x @ turn, samples).abs().max() == pytest.approx(0, abs=1e-9)
