"""The record Alignment and its maps, in the store's order. Suffixes: T token, K kv head, D channels of a head."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import StoreFormatError
from kvstore.spec import KVSpec, LayerSpec, RopeKind
from pipeline.align import Alignment, KVProjector
from pipeline.align.layers import LAYER_MAPS
from tests.align.cases import DIM_PAIRS, HEAD_PAIRS, plain_rope, uniform_spec


def random_layer(*lead: int, num_heads: int, key_dim: int, value_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(*lead, num_heads, key_dim, generator=generator)
    return key, torch.randn(*lead, num_heads, value_dim, generator=generator)


@pytest.mark.parametrize("name", sorted(LAYER_MAPS))
def test_planning_maps_layer_numbers_over_the_full_depths(name: str) -> None:
    teacher = uniform_spec(0, 4, 16, numbers=(1, 3, 5, 7, 9, 11))
    student = uniform_spec(3, 2, 16)
    alignment = Alignment.plan(teacher, student, name)
    assert alignment.layer_map_name == name
    assert not alignment.baked
    assert alignment.layer_map == tuple(enumerate(teacher.layer_numbers[i] for i in LAYER_MAPS[name](6, 3)))
    some = Alignment.plan(teacher, student, name, student_layers=[2, 0])
    assert some.layer_map == (alignment.layer_map[0], alignment.layer_map[2])
    assert some.student == student


def test_last_aligned_is_the_default() -> None:
    alignment = Alignment.plan(uniform_spec(6, 4, 16), uniform_spec(3, 2, 16))
    assert alignment.layer_map == ((0, 3), (1, 4), (2, 5))
    assert alignment.teacher_layers == (3, 4, 5)
    assert alignment.teacher_layer_of(1) == 4


def test_a_map_made_elsewhere_may_cross_layers() -> None:
    spec = uniform_spec(40, 2, 16)
    alignment = Alignment(teacher=spec, student=spec, layer_map=((0, 33), (1, 2), (2, 33)), layer_map_name="by hand")
    assert alignment.teacher_layers == (2, 33)
    assert alignment.stored_spec().layer_numbers == (2, 33)


def test_a_deeper_student_shares_teacher_layers() -> None:
    alignment = Alignment.plan(uniform_spec(2, 4, 16), uniform_spec(4, 2, 16))
    assert alignment.layer_map == ((0, 0), (1, 0), (2, 0), (3, 1))
    assert alignment.teacher_layers == (0, 1)
    assert alignment.stored_spec().layer_numbers == (0, 1)


@pytest.mark.parametrize(("Dt", "Ds"), DIM_PAIRS)
@pytest.mark.parametrize(("Ht", "Hs"), HEAD_PAIRS)
def test_projecting_gives_the_students_geometry_as_the_projector_does(Ht: int, Hs: int, Dt: int, Ds: int) -> None:
    alignment = Alignment.plan(uniform_spec(2, Ht, Dt), uniform_spec(2, Hs, Ds))
    key, value = random_layer(5, num_heads=Ht, key_dim=Dt, value_dim=Dt)
    projected = alignment.project(1, key, value)
    k_BHTD, v_BHTD = KVProjector(Ht, Hs, Dt, Ds)(key.transpose(0, 1)[None], value.transpose(0, 1)[None])
    torch.testing.assert_close(projected, (k_BHTD[0].transpose(0, 1), v_BHTD[0].transpose(0, 1)))


@pytest.mark.parametrize("lead", [(7,), (2, 7), (3, 2, 7)], ids=["token", "batch-token", "layer-batch-token"])
def test_leading_axes_are_free_and_key_and_value_dims_may_differ(lead: tuple[int, ...]) -> None:
    teacher, student = uniform_spec(2, 4, 32, 16), uniform_spec(2, 2, 16, 24)
    key, value = random_layer(*lead, num_heads=4, key_dim=32, value_dim=16)
    projected_key, projected_value = Alignment.plan(teacher, student).project(0, key, value)
    assert projected_key.shape == (*lead, 2, 16)
    assert projected_value.shape == (*lead, 2, 24)
    channels = [*range(0, 16, 2), *range(16, 32, 2)]
    torch.testing.assert_close(projected_key, key[..., channels].reshape(*lead, 2, 2, 16).mean(-2))


def test_equal_geometry_gives_the_same_objects_back() -> None:
    alignment = Alignment.plan(uniform_spec(4, 2, 16), uniform_spec(2, 2, 16))
    key, value = random_layer(3, num_heads=2, key_dim=16, value_dim=16)
    projected = alignment.project(3, key, value)
    assert projected[0] is key
    assert projected[1] is value
    assert not alignment.is_smaller


def test_the_models_own_rotations_decide_which_key_channels_are_taken() -> None:
    teacher = uniform_spec(1, 1, 4, rope=plain_rope(4, kind="interleaved"))
    alignment = Alignment.plan(teacher, uniform_spec(1, 1, 4))
    key, value = random_layer(3, num_heads=1, key_dim=4, value_dim=4)
    projected_key, projected_value = alignment.project(0, key, value)
    assert torch.equal(projected_key, key[..., [0, 2, 1, 3]])
    assert projected_value is value


@pytest.mark.parametrize(
    ("teacher", "student", "side", "smaller"),
    [
        pytest.param(uniform_spec(2, 12, 128), uniform_spec(2, 2, 128), "student", True, id="12-to-2-heads"),
        pytest.param(uniform_spec(2, 4, 128), uniform_spec(2, 4, 64), "student", True, id="128-to-64"),
        pytest.param(uniform_spec(2, 8, 128), uniform_spec(2, 32, 128), "teacher", False, id="8-to-32-heads"),
        pytest.param(uniform_spec(2, 4, 64), uniform_spec(2, 4, 128), "teacher", False, id="64-to-128"),
        pytest.param(uniform_spec(2, 4, 64), uniform_spec(2, 4, 64), "student", False, id="equal"),
        pytest.param(uniform_spec(2, 8, 64), uniform_spec(2, 2, 128), "student", True, id="fewer-but-wider-heads"),
    ],
)
def test_layers_are_compared_and_stored_in_the_smaller_geometry(
    teacher: KVSpec, student: KVSpec, side: str, smaller: bool
) -> None:
    alignment = Alignment.plan(teacher, student)
    comparison = alignment.comparison(1)
    assert comparison.side == side
    assert alignment.is_smaller == smaller
    assert dataclasses.replace(alignment, baked=True).comparison(1).side == "student"
    key_dims = {"student": student.layer(1).key_dim, "teacher": teacher.layer(1).key_dim}
    other = key_dims["teacher" if side == "student" else "student"]
    assert len(comparison.key_kept) == len(comparison.value_kept) == key_dims[side]
    assert sum(comparison.key_kept) == sum(comparison.value_kept) == min(key_dims[side], other)


def test_pooling_the_student_undoes_what_projecting_a_teacher_upwards_repeats() -> None:
    alignment = Alignment.plan(uniform_spec(2, 8, 64), uniform_spec(2, 32, 128))
    key, value = random_layer(5, num_heads=8, key_dim=64, value_dim=64)
    up = alignment.project(1, key, value)
    assert up[0].shape == up[1].shape == (5, 32, 128)
    torch.testing.assert_close(alignment.project_student(1, *up), (key, value))
    masked = [
        channel for channel, kept in enumerate(dataclasses.replace(alignment, baked=True).comparison(1).key_kept) if not kept
    ]
    assert len(masked) == 64
    assert not up[0][..., masked].any()


def test_a_baked_store_has_the_teachers_layer_numbers_and_the_students_geometry() -> None:
    teacher = uniform_spec(6, 4, 128)
    student = dataclasses.replace(uniform_spec(3, 2, 64, 32), dtype="float32")
    stored = Alignment.plan(teacher, student, student_layers=[0, 2]).stored_spec()
    assert stored.layer_numbers == (3, 5)
    assert {layer.geometry for layer in stored.layers} == {(2, 64, 32)}
    assert stored.rope_of(5) == student.rope_of(2)
    assert (stored.dtype, stored.key_domain) == ("bfloat16", "pre_rope")


def test_layers_of_different_geometry_each_have_their_own_map() -> None:
    layers = tuple(
        LayerSpec(layer=number, num_kv_heads=heads, key_dim=dim, value_dim=dim, rope=rope)
        for number, heads, dim, rope in ((0, 4, 16, 0), (1, 2, 32, None))
    )
    teacher = KVSpec(layers=layers, ropes=(plain_rope(16),), dtype="bfloat16")
    alignment = Alignment.plan(teacher, uniform_spec(2, 1, 16))
    assert alignment.project(0, *random_layer(3, num_heads=4, key_dim=16, value_dim=16))[0].shape == (3, 1, 16)
    key, value = random_layer(3, num_heads=2, key_dim=32, value_dim=32)
    # Layer 1 of the teacher does not rotate: channels are spread, not taken by frequency.
    torch.testing.assert_close(alignment.project(1, key, value)[0], key[..., ::2].mean(-2, keepdim=True))


@given(
    num_teacher=st.integers(1, 8),
    num_student=st.integers(1, 8),
    heads=st.tuples(st.sampled_from([1, 2, 4, 12]), st.sampled_from([1, 2, 8])),
    kind=st.sampled_from(["half", "interleaved"]),
    name=st.sampled_from(sorted(LAYER_MAPS)),
    baked=st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_json_gives_an_equal_alignment_back(
    num_teacher: int, num_student: int, heads: tuple[int, int], kind: RopeKind, name: str, baked: bool
) -> None:
    teacher = uniform_spec(num_teacher, heads[0], 16, rope=plain_rope(8, kind=kind, start=4))
    alignment = Alignment.plan(teacher, uniform_spec(num_student, heads[1], 8, rope=None), name)
    alignment = dataclasses.replace(alignment, baked=baked)
    again = Alignment.from_json(json.loads(json.dumps(alignment.to_json())))
    assert again == alignment
    assert hash(again) == hash(alignment)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        pytest.param("layer_map", [[0, 0, 0]], "too many values", id="triple"),
        pytest.param("layer_map", None, "not iterable", id="no-map"),
        pytest.param("layer_map", [[0, 9]], "layer 9 is not here", id="unknown-layer"),
        pytest.param("teacher", {}, "expected the fields of KVSpec", id="no-teacher"),
    ],
)
def test_malformed_json_is_refused(field: str, value: object, message: str) -> None:
    record = Alignment.plan(uniform_spec(2, 2, 16), uniform_spec(2, 2, 16)).to_json()
    with pytest.raises(StoreFormatError, match=message):
        Alignment.from_json({**record, field: value})
    del record[field]
    with pytest.raises(StoreFormatError, match=f"'{field}'"):
        Alignment.from_json(record)


def test_unknown_maps_and_layers_are_refused_with_those_there_are() -> None:
    teacher, student = uniform_spec(4, 2, 16), uniform_spec(2, 2, 16)
    with pytest.raises(ValueError, match=r"got 'middle', expected one of \['last_aligned', 'uniform'\]"):
        Alignment.plan(teacher, student, "middle")
    with pytest.raises(ValueError, match=r"student_layers: got \[1, 7\], expected some of 0-1"):
        Alignment.plan(teacher, student, student_layers=[1, 7])
    with pytest.raises(ValueError, match=r"student_layers: got \[\]"):
        Alignment.plan(teacher, student, student_layers=[])
    alignment = Alignment.plan(teacher, student)
    key, value = random_layer(3, num_heads=2, key_dim=16, value_dim=16)
    with pytest.raises(ValueError, match="teacher layer 0 is not mapped; mapped are 2-3"):
        alignment.project(0, key, value)
    with pytest.raises(ValueError, match="student layer 5 is not mapped; mapped are 0-1"):
        alignment.project_student(5, key, value)


@pytest.mark.parametrize("layer_map", [(), ((1, 1), (0, 0)), ((0, 0), (0, 1))], ids=["empty", "unordered", "repeated"])
def test_maps_that_are_not_functions_of_increasing_student_layers_are_refused(layer_map: tuple[tuple[int, int], ...]) -> None:
    spec = uniform_spec(2, 2, 16)
    with pytest.raises(ValueError, match="expected pairs by increasing student layer"):
        Alignment(teacher=spec, student=spec, layer_map=layer_map, layer_map_name="uniform")


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(LayerSpec(layer=1, num_kv_heads=1, key_dim=16, value_dim=16, rope=0), id="other-geometry"),
        pytest.param(LayerSpec(layer=1, num_kv_heads=2, key_dim=16, value_dim=16, rope=None), id="other-rotation"),
    ],
)
def test_student_layers_that_differ_cannot_share_a_teacher_layer(second: LayerSpec) -> None:
    student = uniform_spec(2, 2, 16)
    student = dataclasses.replace(student, layers=(student.layers[0], second))
    with pytest.raises(ValueError, match="student layers 0 and 1 share teacher layer 0 but differ: num_kv_heads 2, key_dim 16"):
        Alignment.plan(uniform_spec(1, 4, 32), student)
    assert Alignment.plan(uniform_spec(2, 4, 32), student).teacher_layers == (0, 1)


def test_rotated_keys_are_aligned_only_between_equal_rotations() -> None:
    teacher = uniform_spec(2, 8, 64, key_domain="post_rope")
    same = uniform_spec(2, 2, 64, key_domain="post_rope")
    assert Alignment.plan(teacher, same).stored_spec().key_domain == "post_rope"
    other = uniform_spec(2, 2, 64, rope=plain_rope(64, base=500000.0), key_domain="post_rope")
    for student in (other, uniform_spec(2, 2, 32, key_domain="post_rope")):
        with pytest.raises(ValueError, match=r"keys are stored after rotation.*rotate differently.*key_domain pre_rope"):
            Alignment.plan(teacher, student)
    with pytest.raises(ValueError, match="key_domain: teacher post_rope, student pre_rope, expected equal"):
        Alignment.plan(teacher, uniform_spec(2, 2, 64))


@pytest.mark.parametrize(
    ("key_shape", "value_shape"),
    [
        pytest.param((4, 7, 16), (4, 7, 16), id="attention-order"),
        pytest.param((7, 4, 16), (6, 4, 16), id="k-and-v-differ"),
        pytest.param((7, 4, 8), (7, 4, 8), id="other-dim"),
        pytest.param((4, 16), (4, 16), id="no-token-axis"),
    ],
)
def test_other_shapes_are_refused_with_both_configurations(key_shape: tuple[int, ...], value_shape: tuple[int, ...]) -> None:
    alignment = Alignment.plan(uniform_spec(2, 4, 16), uniform_spec(2, 2, 8))
    with pytest.raises(ValueError, match=r"teacher layer 1: got .* expected \[\.\.\., token, 4, 16\]") as caught:
        alignment.project(1, torch.zeros(key_shape), torch.zeros(value_shape))
    for shown in (str(list(key_shape)), str(list(value_shape)), "num_kv_heads 4, key_dim 16", "num_kv_heads 2, key_dim 8"):
        assert shown in str(caught.value)
