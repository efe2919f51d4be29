"""Resampling of the time axis. Suffixes: B batch, H heads, T token, D channels of a head."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.align import build_safe_linear_indices, resample_kv_with_interpolation, safe_time_resample
from pipeline.align.spans import nearest_spans
from pipeline.align.time import linear_positions, resample_segments

LENGTHS = st.integers(1, 40)
SEEDS = st.integers(0, 1000)
quick = settings(deadline=None, max_examples=50)


def random_kv(num_tokens: int, seed: int = 0, num_samples: int = 2) -> torch.Tensor:
    shape = (num_samples, 3, num_tokens, 4)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def exact_positions(T_in: int, T_out: int) -> list[Fraction]:
    if T_out == 1:
        return [Fraction(T_in - 1)]
    return [Fraction(i * (T_in - 1), T_out - 1) for i in range(T_out)]


@given(T_in=LENGTHS, T_out=LENGTHS)
@quick
def test_positions_are_exact(T_in: int, T_out: int) -> None:
    whole, remainder = linear_positions(T_in, T_out)
    got = [Fraction(w) + Fraction(r, max(T_out - 1, 1)) for w, r in zip(whole.tolist(), remainder.tolist(), strict=True)]
    assert got == exact_positions(T_in, T_out)
    assert all(0 <= r < max(T_out - 1, 1) for r in remainder.tolist())


@given(T_in=LENGTHS, T_out=LENGTHS, B=st.integers(0, 3))
@quick
def test_indices_are_in_range_monotone_and_nearest(T_in: int, T_out: int, B: int) -> None:
    indices = build_safe_linear_indices(B, T_in, T_out, torch.device("cpu"))
    assert indices.shape == (B, T_out)
    assert indices.dtype == torch.int64
    for row in indices.tolist():
        assert row == sorted(row)
        assert all(0 <= index < T_in for index in row)
        assert all(abs(index - u) <= Fraction(1, 2) for index, u in zip(row, exact_positions(T_in, T_out), strict=True))


def test_long_sequences_get_the_indices_of_exact_arithmetic() -> None:
    # Here fp32 `linspace` followed by rounding picks another index in ten places.
    got = build_safe_linear_indices(1, 4096, 131072, torch.device("cpu"))[0]
    assert got.tolist() == [(2 * i * 4095 + 131071) // (2 * 131071) for i in range(131072)]


@given(T=st.integers(0, 40))
@quick
def test_an_equal_length_gives_the_same_object_and_every_index(T: int) -> None:
    kv = random_kv(T)
    assert resample_kv_with_interpolation(kv, T) is kv
    assert build_safe_linear_indices(1, T, T, torch.device("cpu"))[0].tolist() == list(range(T))


@given(T_in=LENGTHS, T_out=st.integers(2, 40), seed=SEEDS)
@quick
def test_endpoints_are_kept_and_nothing_leaves_the_range_of_the_input(T_in: int, T_out: int, seed: int) -> None:
    kv = random_kv(T_in, seed)
    out = resample_kv_with_interpolation(kv, T_out)
    assert out.shape == (2, 3, T_out, 4)
    assert torch.equal(out[:, :, 0], kv[:, :, 0])
    assert torch.equal(out[:, :, -1], kv[:, :, -1])
    assert bool((out <= kv.amax(2, keepdim=True) + 1e-12).all())
    assert bool((out >= kv.amin(2, keepdim=True) - 1e-12).all())


@given(T_in=LENGTHS, T_out=LENGTHS)
@quick
def test_interpolation_is_linear_not_nearest_neighbour(T_in: int, T_out: int) -> None:
    ramp = torch.arange(T_in, dtype=torch.float64)[None, None, :, None]
    out = resample_kv_with_interpolation(3 * ramp - 2, T_out).flatten()
    expected = torch.tensor([float(3 * u - 2) for u in exact_positions(T_in, T_out)], dtype=torch.float64)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=0)


@given(T_in=LENGTHS, T_out=LENGTHS, value=st.floats(-1e4, 1e4, width=32))
@quick
def test_a_constant_sequence_stays_constant(T_in: int, T_out: int, value: float) -> None:
    out = resample_kv_with_interpolation(torch.full((1, 1, T_in, 1), value), T_out)
    assert torch.equal(out, torch.full((1, 1, T_out, 1), value))


@given(T_in=LENGTHS, T_out=LENGTHS, seed=SEEDS)
@quick
def test_resampling_is_a_linear_map(T_in: int, T_out: int, seed: int) -> None:
    x, y = random_kv(T_in, seed), random_kv(T_in, seed + 1)
    both = resample_kv_with_interpolation(2 * x - 3 * y, T_out)
    apart = 2 * resample_kv_with_interpolation(x, T_out) - 3 * resample_kv_with_interpolation(y, T_out)
    torch.testing.assert_close(both, apart)


@given(T_in=LENGTHS, T_out=st.integers(2, 40), seed=SEEDS)
@quick
def test_resampling_commutes_with_reversing_time(T_in: int, T_out: int, seed: int) -> None:
    kv = random_kv(T_in, seed)
    torch.testing.assert_close(
        resample_kv_with_interpolation(kv.flip(2), T_out), resample_kv_with_interpolation(kv, T_out).flip(2)
    )


def test_each_sample_is_resampled_from_itself_alone() -> None:
    kv = random_kv(9, num_samples=3)
    clean = resample_kv_with_interpolation(kv, 14)
    kv[1] = float("nan")
    poisoned = resample_kv_with_interpolation(kv, 14)
    assert torch.equal(poisoned[[0, 2]], clean[[0, 2]])
    assert torch.equal(resample_kv_with_interpolation(kv[[2, 0]], 14), clean[[2, 0]])


@given(T_in=st.integers(2, 12), factor=st.integers(1, 6), seed=SEEDS)
@quick
def test_upsampling_by_a_whole_factor_and_striding_gives_the_input_back(T_in: int, factor: int, seed: int) -> None:
    kv = random_kv(T_in, seed)
    finer = resample_kv_with_interpolation(kv, factor * (T_in - 1) + 1)
    assert torch.equal(finer[:, :, ::factor], kv)


def test_one_output_token_is_the_last_position() -> None:
    kv = random_kv(7)
    assert torch.equal(resample_kv_with_interpolation(kv, 1), kv[:, :, -1:])
    assert build_safe_linear_indices(2, 7, 1, torch.device("cpu")).tolist() == [[6], [6]]


def test_a_single_input_token_is_repeated() -> None:
    kv = random_kv(1)
    assert torch.equal(resample_kv_with_interpolation(kv, 5), kv.expand(-1, -1, 5, -1))


@pytest.mark.parametrize("T_in", [0, 5])
def test_no_output_tokens_give_an_empty_tensor(T_in: int) -> None:
    device = torch.device("cpu")
    assert resample_kv_with_interpolation(random_kv(T_in), 0).shape == (2, 3, 0, 4)
    assert build_safe_linear_indices(2, T_in, 0, device).shape == (2, 0)
    assert safe_time_resample(random_kv(T_in), build_safe_linear_indices(2, T_in, 0, device)).shape == (2, 3, 0, 4)


@pytest.mark.parametrize(("T_in", "T_out"), [(0, 1), (0, 9), (-1, 3), (4, -1)])
def test_impossible_lengths_are_refused(T_in: int, T_out: int) -> None:
    if min(T_in, T_out) < 0:
        with pytest.raises(ValueError, match=rf"got T_in={T_in}, T_out={T_out}, expected"):
            build_safe_linear_indices(2, T_in, T_out, torch.device("cpu"))
    if T_in >= 0:
        with pytest.raises(ValueError, match=rf"got T_in={T_in}, T_out={T_out}, expected"):
            resample_kv_with_interpolation(random_kv(T_in), T_out)
    with pytest.raises(ValueError, match=rf"got T_in={T_in}, T_out={T_out}, expected"):
        nearest_spans(T_in, T_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T_out", [0, 1, 9])
def test_an_empty_sequence_gives_zeros_of_the_length_asked_for(T_out: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 0, 4).to(dtype).requires_grad_()
    indices = build_safe_linear_indices(2, 0, T_out, x.device)
    assert (indices.dtype, indices.tolist()) == (torch.int64, [[0] * T_out] * 2)
    for chosen in (indices, indices[0], torch.arange(T_out) - 3):
        out = safe_time_resample(x, chosen)
        assert out.dtype == dtype
        assert torch.equal(out, torch.zeros((2, 3, T_out, 4), dtype=dtype))
        torch.autograd.backward(out.sum())
    assert safe_time_resample(torch.zeros(0, 3, 0, 4), indices[:0]).shape == (0, 3, T_out, 4)
    for function in (build_safe_linear_indices, safe_time_resample):
        assert "mask such rows in a loss" in " ".join(str(function.__doc__).lower().split())


def test_a_negative_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="got B=-1"):
        build_safe_linear_indices(-1, 4, 4, torch.device("cpu"))


def test_rows_of_indices_can_be_edited_one_by_one() -> None:
    indices = build_safe_linear_indices(2, 8, 4, torch.device("cpu"))
    indices[0, 0] = 3
    assert indices[1, 0] == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_indices_of_any_integer_dtype_are_gathered_and_clamped(dtype: torch.dtype) -> None:
    # 300 tokens: the limit to clamp to does not fit one byte.
    x = random_kv(300)
    raw = [0, 81, 127] if dtype in (torch.int8, torch.uint8) else [-5, 81, 1000]
    clamped = [min(max(index, 0), 299) for index in raw]
    assert torch.equal(safe_time_resample(x, torch.tensor(raw, dtype=dtype)), x[:, :, clamped])
    if dtype == torch.int8:
        assert torch.equal(safe_time_resample(x, torch.tensor([-128], dtype=dtype)), x[:, :, :1])


def test_index_81_of_80_tokens_is_clamped() -> None:
    x = random_kv(80)
    assert torch.equal(safe_time_resample(x, torch.tensor([[81], [-1]])), torch.stack((x[0, :, -1:], x[1, :, :1])))


def test_each_sample_may_have_its_own_indices() -> None:
    x = random_kv(6)
    out = safe_time_resample(x, torch.tensor([[0, 5, 5], [2, 1, 0]]))
    assert torch.equal(out, torch.stack((x[0][:, [0, 5, 5]], x[1][:, [2, 1, 0]])))


def test_gradients_flow_through_both_resamplers() -> None:
    kv = random_kv(5).requires_grad_()
    indices = build_safe_linear_indices(2, 5, 3, torch.device("cpu"))
    torch.autograd.backward(safe_time_resample(kv, indices).sum() + resample_kv_with_interpolation(kv, 9).sum())
    assert kv.grad is not None
    assert kv.grad.sum() == pytest.approx(2 * 3 * 4 * (3 + 9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_interpolated_in_single_precision_and_rounded_once(dtype: torch.dtype) -> None:
    kv = random_kv(37).to(dtype)
    out = resample_kv_with_interpolation(kv, 90)
    assert out.dtype == dtype
    assert torch.equal(out, resample_kv_with_interpolation(kv.to(torch.float32), 90).to(dtype))


@pytest.mark.parametrize(
    ("x_shape", "indices", "message"),
    [
        pytest.param((3, 8, 4), torch.zeros(2, dtype=torch.int64), r"x \[3, 8, 4\]", id="x-not-4d"),
        pytest.param((2, 3, 8, 4), torch.zeros(3, 2, dtype=torch.int64), r"indices \[3, 2\]", id="batch-differs"),
        pytest.param((2, 3, 8, 4), torch.zeros(2), "dtype torch.float32, expected an integer", id="float-indices"),
        pytest.param((2, 3, 8, 4), torch.zeros(2, dtype=torch.bool), "dtype torch.bool", id="bool-indices"),
    ],
)
def test_what_cannot_be_gathered_is_refused_with_its_shape(
    x_shape: tuple[int, ...], indices: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        safe_time_resample(torch.zeros(x_shape), indices)


def test_interpolating_a_tensor_that_is_not_4d_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got kv \[2, 8, 4\], expected \[B, H, T_in, D\]"):
        resample_kv_with_interpolation(torch.zeros(2, 8, 4), 3)


@given(segments=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=50)
def test_segments_are_resampled_each_on_its_own(segments: list[tuple[int, int]]) -> None:
    lengths_in, lengths_out = ([pair[side] for pair in segments] for side in (0, 1))
    kv = torch.randn(2, 3, sum(lengths_in), 4)
    out = resample_segments(kv, lengths_in, lengths_out)
    first_in = first_out = 0
    for length_in, length_out in segments:
        piece = kv[:, :, first_in : first_in + length_in]
        assert torch.equal(out[:, :, first_out : first_out + length_out], resample_kv_with_interpolation(piece, length_out))
        first_in, first_out = first_in + length_in, first_out + length_out
    assert out.shape[2] == first_out


@pytest.mark.parametrize(("lengths_in", "lengths_out"), [([2, 3], [4]), ([2, 2], [1, 1]), ([5, 0], [5, 1]), ([6, -1], [1, 1])])
def test_segments_that_do_not_fit_are_refused(lengths_in: list[int], lengths_out: list[int]) -> None:
    with pytest.raises(ValueError, match=r"got kv \[1, 1, 5, 2\] and segments|an empty sequence cannot be"):
        resample_segments(torch.zeros(1, 1, 5, 2), lengths_in, lengths_out)


@pytest.mark.parametrize("pairs", [False, True], ids=["lengths", "pairs"])
@given(segments=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=25)
def test_interpolation_takes_segments_of_both_sides(pairs: bool, segments: list[tuple[int, int]]) -> None:
    lengths_in, lengths_out = ([pair[side] for pair in segments] for side in (0, 1))
    kv = torch.randn(2, 3, sum(lengths_in), 4)

    def said(lengths: list[int]) -> list[Any]:
        ends = [sum(lengths[: at + 1]) for at in range(len(lengths))]
        return [(end - length, end) for length, end in zip(lengths, ends, strict=True)] if pairs else lengths

    out = resample_kv_with_interpolation(
        kv, sum(lengths_out), teacher_segments=said(lengths_in), student_segments=said(lengths_out)
    )
    assert torch.equal(out, resample_segments(kv, lengths_in, lengths_out))
    assert resample_kv_with_interpolation(kv, kv.shape[2], said(lengths_in), said(lengths_in)) is kv


def test_segments_of_none_are_interpolation_as_a_whole() -> None:
    kv = random_kv(100)
    out = resample_kv_with_interpolation(kv, 60, teacher_segments=None, student_segments=None)
    assert torch.equal(out, resample_kv_with_interpolation(kv, 60))


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        pytest.param([2, 3], None, "expected both or neither", id="student-missing"),
        pytest.param(None, [2, 2], "expected both or neither", id="teacher-missing"),
        pytest.param([2, 2], [2, 2], "the first to add up to T_in", id="teacher-short"),
        pytest.param([2, 3], [2, 3], r"got student_segments \[2, 3\], expected .* T_out=4", id="student-long"),
        pytest.param([5], [2, 2], "many segments on either side", id="other-number"),
        pytest.param([(0, 2), (3, 5)], [2, 2], "follow each other from 0 on", id="gap"),
        pytest.param([(0, 3), (2, 5)], [2, 2], "follow each other from 0 on", id="overlap"),
        pytest.param([6, -1], [2, 2], "lengths of at least 0", id="negative"),
        pytest.param(
            [5, 0],
            [3, 1],
            "got segment 1 without tokens in teacher_segments and with 1 in .* an empty sequence cannot be",
            id="empty",
        ),
        pytest.param([], [], r"T_out=4", id="none"),
    ],
)
def test_segments_that_do_not_cover_the_axis_are_refused(teacher: Any, student: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resample_kv_with_interpolation(torch.zeros(1, 1, 5, 2), 4, teacher_segments=teacher, student_segments=student)


@pytest.mark.parametrize("made", [torch.tensor, np.array])
def test_segments_may_be_tensors_and_arrays(made: Any) -> None:
    kv = random_kv(5)
    wanted = resample_segments(kv, [2, 3], [1, 3])
    assert torch.equal(resample_kv_with_interpolation(kv, 4, made([2, 3]), made([1, 3])), wanted)
    assert torch.equal(resample_kv_with_interpolation(kv, 4, made([(0, 2), (2, 5)]), made([(0, 1), (1, 4)])), wanted)


@pytest.mark.parametrize(("T_in", "T_out"), [(-1, 5), (5, -1), (0, -1)])
def test_negative_sizes_are_named_as_what_they_are(T_in: int, T_out: int) -> None:
    with pytest.raises(ValueError, match=rf"got T_in={T_in}, T_out={T_out}, expected numbers of tokens of at least 0$"):
        build_safe_linear_indices(2, T_in, T_out)
