"""Layer maps."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.align import default_student_layers
from pipeline.align.layers import LAYER_MAPS, choose_student_layers, last_aligned, map_layers, monotone_match, uniform

LayerMap = Callable[[int, int], tuple[int, ...]]
DEPTHS = st.integers(1, 100)


@pytest.mark.parametrize("name", sorted(LAYER_MAPS))
@given(num_teacher=DEPTHS, num_student=DEPTHS)
@settings(deadline=None, max_examples=50)
def test_layer_maps_are_monotone_in_range_and_end_at_the_last_layer(name: str, num_teacher: int, num_student: int) -> None:
    mapped = LAYER_MAPS[name](num_teacher, num_student)
    assert len(mapped) == num_student
    assert list(mapped) == sorted(mapped)
    assert mapped[0] >= 0
    assert mapped[-1] == num_teacher - 1
    assert LAYER_MAPS[name](num_student, num_student) == tuple(range(num_student))


@given(num_teacher=DEPTHS, num_student=st.integers(2, 100))
@settings(deadline=None, max_examples=50)
def test_uniform_keeps_both_ends_and_is_within_half_a_layer_of_even(num_teacher: int, num_student: int) -> None:
    mapped = uniform(num_teacher, num_student)
    assert mapped[0] == 0
    for layer, teacher in enumerate(mapped):
        assert abs(2 * teacher * (num_student - 1) - 2 * layer * (num_teacher - 1)) <= num_student - 1


@pytest.mark.parametrize(
    ("layer_map", "num_teacher", "num_student", "expected"),
    [
        pytest.param(last_aligned, 6, 3, (3, 4, 5), id="last-aligned-down"),
        pytest.param(last_aligned, 2, 4, (0, 0, 0, 1), id="last-aligned-up"),
        pytest.param(uniform, 6, 3, (0, 3, 5), id="uniform-down-half-goes-up"),
        pytest.param(uniform, 2, 4, (0, 0, 1, 1), id="uniform-up"),
        pytest.param(uniform, 28, 1, (27,), id="uniform-to-one"),
        pytest.param(last_aligned, 1, 3, (0, 0, 0), id="last-aligned-from-one"),
    ],
)
def test_layer_maps_of_small_models(layer_map: LayerMap, num_teacher: int, num_student: int, expected: tuple[int, ...]) -> None:
    assert layer_map(num_teacher, num_student) == expected


@pytest.mark.parametrize("layer_map", [last_aligned, uniform])
def test_models_without_layers_are_refused(layer_map: LayerMap) -> None:
    with pytest.raises(ValueError, match="got num_teacher=0, num_student=3"):
        layer_map(0, 3)


@given(num_layers=DEPTHS, limit=st.integers(1, 12))
@settings(deadline=None, max_examples=50)
def test_default_student_layers_are_few_evenly_spread_and_include_the_last(num_layers: int, limit: int) -> None:
    layers = default_student_layers(num_layers, limit)
    assert len(layers) == min(num_layers, limit)
    assert layers[-1] == num_layers - 1
    gaps = [after - before for before, after in zip((-1, *layers), layers, strict=False)]
    assert max(gaps) - min(gaps) <= 1
    assert min(gaps) >= 1


def test_a_28_layer_student_keeps_eight_layers_by_default() -> None:
    assert default_student_layers(28) == (2, 6, 9, 13, 16, 20, 23, 27)


def test_a_limit_of_no_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="limit 0"):
        default_student_layers(4, 0)


def test_maps_are_named_or_written_out_in_the_models_own_layer_numbers() -> None:
    teacher, student = (1, 3, 5, 7), (0, 2)
    assert map_layers("last_aligned", teacher, student) == ((0, 5), (2, 7))
    assert map_layers("uniform", teacher, student) == ((0, 1), (2, 7))
    assert map_layers("2=3, 0=1", teacher, student) == ((0, 1), (2, 3))
    assert map_layers("-1=-1", teacher, student) == ((2, 7),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nearest", r"got 'nearest', expected one of \['last_aligned', 'uniform'\], or pairs STUDENT=TEACHER"),
        ("0=2", r"'0=2', teacher: .*2"),
        ("5=1", r"'5=1', student: .*5"),
        ("0=1,0=3", r"got '0=3', expected one pair STUDENT=TEACHER for each student layer"),
        ("0=1=3", r"got '0=1=3', expected one pair"),
        ("0=1,", r"got '', expected one pair|''"),
    ],
)
def test_maps_that_cannot_be_read_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        map_layers(text, (1, 3, 5, 7), (0, 2))


def test_an_aligned_store_keeps_the_layers_asked_for_or_mapped_or_eight_spread_evenly() -> None:
    student = tuple(range(3, 60, 4))
    assert choose_student_layers("3,-1", "uniform", student) == (3, 59)
    assert choose_student_layers(None, "3=0", student) == student
    spread = choose_student_layers(None, "uniform", student)
    assert len(spread) == 8
    assert set(spread) <= set(student)
    assert spread[-1] == 59


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_the_monotone_match_is_the_best_of_all(seed: int, num_student: int, num_teacher: int) -> None:
    similarity = np.random.default_rng(seed).integers(0, 4, (num_student, num_teacher)).astype(np.float64)
    found = monotone_match(similarity)
    every = itertools.combinations_with_replacement(range(num_teacher), num_student)
    best = max(sum(similarity[layer, index] for layer, index in enumerate(chosen)) for chosen in every)
    assert list(found) == sorted(found)
    assert sum(similarity[layer, index] for layer, index in enumerate(found)) == best
