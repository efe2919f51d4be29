"""Which layers are compared, in whose geometry, and in units of what."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvstore.manifest import write_manifest
from kvstore.reader import Store, open_store
from kvstore.spec import KVSpec, RopeSpec
from kvstore.storage import locate
from pipeline.align import Alignment
from tests.stores import Source, random_source, small_spec, write_store
from training.loader import KVDataset
from training.sampler import SampleBatch
from training.targets import KeyValue, KVTargets, measure_variances, plan_alignment, unstack

LENGTHS = (40, 7, 64, 30)
TEACHER = small_spec(num_layers=4, num_kv_heads=4, dim=8)
STUDENT = small_spec(num_layers=2, num_kv_heads=2, dim=8)


@pytest.fixture(scope="module")
def numbers() -> Source:
    return random_source(TEACHER, LENGTHS)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, numbers: Source) -> Store:
    return open_store(write_store(tmp_path_factory.mktemp("raw") / "kv", numbers, codec="raw"))


def record_alignment(root: Path, alignment: Alignment) -> Store:
    """Write an alignment into a store's manifest, as extraction does."""
    manifest = dataclasses.replace(open_store(root).manifest, alignment=alignment.to_json())
    write_manifest(locate(root), manifest)
    return open_store(root)


def bake(root: Path, numbers: Source, alignment: Alignment, **store: Any) -> Store:
    """The store extraction would write for that student: projected by its map."""
    kv = [
        {
            layer: tuple(part.numpy() for part in alignment.project(layer, *map(torch.from_numpy, sample[layer])))
            for layer in alignment.teacher_layers
        }
        for sample in numbers.kv
    ]
    baked: Any = dataclasses.replace(numbers, spec=alignment.stored_spec(), kv=kv)
    return record_alignment(write_store(root, baked, codec="raw", **store), dataclasses.replace(alignment, baked=True))


def read_targets(store: Store, targets: KVTargets, sample: int) -> list[KeyValue]:
    dataset = KVDataset(store, targets.alignment.teacher_layers)
    request = SampleBatch([sample], step=0, num_predicted=0, targets=[sample], num_targets=0, num_computed=0)
    read = dataset.__getitems__(request)
    blocks = [(torch.from_numpy(block.key), torch.from_numpy(block.value)) for block in read.targets]
    return targets.teacher_side(unstack(dataset.blocks, blocks))


def test_a_raw_store_is_mapped_to_the_student_at_load(raw: Store, numbers: Source) -> None:
    alignment = plan_alignment(raw, STUDENT, layer_map="last_aligned", layers="all")
    assert alignment.layer_map == ((0, 2), (1, 3))
    got = read_targets(raw, KVTargets(alignment), 1)
    for (_, teacher_layer), pair in zip(alignment.layer_map, got, strict=True):
        for ours, stored in zip(pair, numbers.kv[1][teacher_layer], strict=True):
            grouped = stored.reshape(len(stored), 2, 2, 8).mean(axis=2)
            np.testing.assert_allclose(ours.numpy(), grouped, rtol=1e-6)


def test_a_baked_store_gives_the_targets_that_a_raw_one_gives_at_load(tmp_path: Path, raw: Store, numbers: Source) -> None:
    planned = Alignment.plan(TEACHER, STUDENT)
    baked = bake(tmp_path / "kv", numbers, planned)
    alignment = plan_alignment(baked, STUDENT, layer_map="last_aligned", layers="all")
    assert alignment.baked
    for one, other in zip(read_targets(baked, KVTargets(alignment), 2), read_targets(raw, KVTargets(planned), 2), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_a_store_baked_for_another_geometry_is_refused_with_both(tmp_path: Path, numbers: Source) -> None:
    baked = bake(tmp_path / "kv", numbers, Alignment.plan(TEACHER, STUDENT))
    other = small_spec(num_layers=2, num_kv_heads=1, dim=8)
    message = "got 2 layers of 1 KV heads, key_dim 8, value_dim 8 .*baked for 2 layers of 2 KV heads.*extract a raw store"
    with pytest.raises(ValueError, match=message):
        plan_alignment(baked, other, layer_map="last_aligned", layers="all")


def with_rope(spec: KVSpec, factor: float) -> KVSpec:
    ropes = tuple(
        RopeSpec(kind=rope.kind, inv_freq=tuple(frequency * factor for frequency in rope.inv_freq)) for rope in spec.ropes
    )
    return dataclasses.replace(spec, ropes=ropes)


def test_a_baked_store_fits_a_student_whose_frequencies_differ_in_the_last_bits_only(tmp_path: Path, numbers: Source) -> None:
    baked = bake(tmp_path / "kv", numbers, Alignment.plan(TEACHER, STUDENT))
    assert plan_alignment(baked, with_rope(STUDENT, 1 + 1e-7), layer_map="last_aligned", layers="all").baked
    with pytest.raises(ValueError, match="baked for"):
        plan_alignment(baked, with_rope(STUDENT, 1.5), layer_map="last_aligned", layers="all")


def test_a_map_recorded_without_baking_is_used_for_its_own_student_only(tmp_path: Path, numbers: Source) -> None:
    planned = Alignment.plan(TEACHER, STUDENT, student_layers=(1,))
    store = record_alignment(write_store(tmp_path / "kv", numbers, codec="raw"), planned)
    assert plan_alignment(store, STUDENT, layer_map="last_aligned", layers="all") == planned
    assert plan_alignment(store, STUDENT, layer_map="uniform", layers="all").layer_map == ((0, 0), (1, 3))
    wider = small_spec(num_layers=2, num_kv_heads=4, dim=8)
    assert plan_alignment(store, wider, layer_map="last_aligned", layers="all").layer_map == ((0, 2), (1, 3))


def test_a_list_of_layers_leaves_the_others_out(raw: Store, tmp_path: Path, numbers: Source) -> None:
    assert plan_alignment(raw, STUDENT, layer_map="last_aligned", layers="-1").layer_map == ((1, 3),)
    baked = bake(tmp_path / "kv", numbers, Alignment.plan(TEACHER, STUDENT))
    assert plan_alignment(baked, STUDENT, layer_map="last_aligned", layers="0").layer_map == ((0, 2),)
    with pytest.raises(ValueError, match="layers: got '7'"):
        plan_alignment(raw, STUDENT, layer_map="last_aligned", layers="7")


def test_a_larger_student_is_pooled_instead_of_inflating_the_target(raw: Store, numbers: Source) -> None:
    large = small_spec(num_layers=2, num_kv_heads=8, dim=8)
    targets = KVTargets(plan_alignment(raw, large, layer_map="last_aligned", layers="all"))
    (key, _), _ = read_targets(raw, targets, 0)
    assert np.array_equal(key.numpy(), numbers.kv[0][2][0]), "the target stays as it is stored"
    student = torch.randn(5, 8, 8)
    pooled, _ = targets.student_side({0: (student, student), 1: (student, student)})[0]
    torch.testing.assert_close(pooled, student.reshape(5, 4, 2, 8).mean(dim=2))


def test_channels_without_a_counterpart_are_not_compared(raw: Store) -> None:
    student = small_spec(num_layers=2, num_kv_heads=1, dim=16)
    targets = KVTargets(Alignment.plan(TEACHER, student))
    ours = torch.randn(3, 1, 16)
    one_side = targets.student_side({0: (ours, ours), 1: (ours, ours)})
    other_side = read_targets(raw, targets, 0)
    assert one_side[0][0].shape[1:] == other_side[0][0].shape[1:] == (1, 8)
    assert (other_side[0][0].abs().sum(dim=(0, 1)) > 0).all(), "no channel of zeros to pull the student to"


def test_variances_are_those_of_the_projected_target_about_the_mean_of_each_channel(raw: Store, numbers: Source) -> None:
    targets = KVTargets(plan_alignment(raw, STUDENT, layer_map="last_aligned", layers="all"))
    variances = measure_variances(raw, targets, sink_tokens=4)
    for row, (_, layer) in enumerate(targets.pairs):
        for kind in (0, 1):
            stored = np.concatenate([sample[layer][kind][4:] for sample in numbers.kv]).astype(np.float64)
            grouped = stored.reshape(len(stored), 2, 2, 8).mean(axis=2)
            assert variances[row, kind] == pytest.approx(grouped.var(axis=0).mean(), rel=1e-6)


def test_variances_come_from_the_first_samples_only(raw: Store, numbers: Source) -> None:
    targets = KVTargets(plan_alignment(raw, STUDENT, layer_map="last_aligned", layers="-1"))
    variances = measure_variances(raw, targets, sink_tokens=0, num_tokens=41)
    stored = np.concatenate([sample[3][1] for sample in numbers.kv[:2]])
    assert variances[0, 1] == pytest.approx(stored.reshape(-1, 2, 2, 8).mean(axis=2).var(axis=0).mean(), rel=1e-5)


def test_variances_weight_a_sample_by_its_count(tmp_path: Path, numbers: Source) -> None:
    counts = [1, 3, 1, 2]
    store = open_store(write_store(tmp_path / "kv", numbers, codec="raw", counts=counts))
    targets = KVTargets(plan_alignment(store, STUDENT, layer_map="last_aligned", layers="-1"))
    variances = measure_variances(store, targets, sink_tokens=4)
    copies = [sample[3][1][4:] for sample, count in zip(numbers.kv, counts, strict=True) for _ in range(count)]
    grouped = np.concatenate(copies).astype(np.float64).reshape(-1, 2, 2, 8).mean(axis=2)
    assert variances[0, 1] == pytest.approx(grouped.var(axis=0).mean(), rel=1e-6)


def test_a_loud_constant_key_does_not_drown_the_variance(tmp_path: Path) -> None:
    spec = small_spec(num_layers=1, num_kv_heads=1, dim=8)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(50, 1, 8)).astype(np.float32)
    loud = Source(spec=spec, input_ids=[np.arange(50, dtype=np.int32)], kv=[{0: (noise + 10_000, noise)}])
    store = open_store(write_store(tmp_path / "kv", loud, codec="raw"))
    targets = KVTargets(plan_alignment(store, spec, layer_map="last_aligned", layers="all"))
    (row,) = measure_variances(store, targets, sink_tokens=0)
    assert row[0] == pytest.approx((noise + np.float32(10_000)).astype(np.float64).var(axis=0).mean(), rel=1e-6)


def test_a_target_that_does_not_vary_is_refused(tmp_path: Path) -> None:
    spec = small_spec(num_layers=1, num_kv_heads=1, dim=8)
    flat = np.ones((9, 1, 8), dtype=np.float32)
    constant = Source(spec=spec, input_ids=[np.arange(9, dtype=np.int32)], kv=[{0: (flat, flat)}])
    store = open_store(write_store(tmp_path / "kv", constant, codec="raw"))
    targets = KVTargets(plan_alignment(store, spec, layer_map="last_aligned", layers="all"))
    with pytest.raises(
        ValueError, match=r"variance of targets: got \[0\.0, 0\.0\] .*student layer 0, teacher layer 0.*--set layers="
    ):
        measure_variances(store, targets, sink_tokens=0)
