"""Planning is pure, covers everything once and never straddles a shard."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codec import parse_codecs
from kvstore.groups import Group, plan_groups
from kvstore.layout import MAX_SHARD_BYTES, Layout, RowBytes, plan_layout
from kvstore.spec import KVSpec, LayerSpec
from pipeline.data.samples import Sample
from pipeline.tasks import data_record, estimate_bytes, padded_length, plan_batches, plan_tasks
from tests.stores import small_spec

QWEN2_7B = KVSpec(
    layers=tuple(LayerSpec(layer=n, num_kv_heads=4, key_dim=128, value_dim=128, rope=None) for n in range(28)),
    ropes=(),
    dtype="bfloat16",
)


def samples_of(lengths: list[int]) -> list[Sample]:
    return [
        Sample(id=f"{n}", source="s", input_ids=np.full(length, n, dtype=np.int32), text=None, count=1)
        for n, length in enumerate(lengths)
    ]


def layout_of(samples: list[Sample], groups: tuple[Group, ...]) -> Layout:
    return plan_layout([len(sample.input_ids) for sample in samples], groups[0].row_bytes)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=60))
def test_tasks_place_every_sample_once_on_a_chunk_of_one_shard(lengths: list[int]) -> None:
    samples = samples_of(lengths)
    layout = layout_of(samples, plan_groups(small_spec(), parse_codecs("mix", range(3))))
    tasks = plan_tasks(samples, layout)
    placed = [sample for task in tasks for sample in task.samples]
    assert [sample.row.id for sample in placed] == [sample.id for sample in samples]
    assert len(tasks) == layout.num_shards
    for task in tasks:
        end = 0
        assert task.samples
        for sample in task.samples:
            assert sample.offset >= end
            assert sample.offset % layout.chunk_tokens == 0
            assert sample.row.token_start == task.shard * layout.shard_tokens + sample.offset
            end = sample.offset + len(sample.input_ids)
        assert end <= layout.shard_tokens


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=60),
    batch_tokens=st.integers(1, 2000),
    max_positions=st.sampled_from([500, 512, 1000]),
)
def test_batches_cover_a_task_once_within_their_budget(lengths: list[int], batch_tokens: int, max_positions: int) -> None:
    batches = plan_batches(lengths, batch_tokens, max_positions)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        (width,) = {padded_length(lengths[index], max_positions) for index in batch}
        assert max(lengths[index] for index in batch) <= width <= max_positions
        assert len(batch) == 1 or len(batch) * width <= batch_tokens
    assert plan_batches(lengths, batch_tokens, max_positions, alone=True) == [[index] for index in range(len(lengths))]


def test_the_padded_length_of_a_sample_does_not_depend_on_its_batch() -> None:
    assert [padded_length(length, 1000) for length in (1, 64, 65, 990, 1000)] == [64, 64, 128, 1000, 1000]


def test_shards_stay_within_their_bytes_and_hold_the_longest_sample() -> None:
    groups = plan_groups(QWEN2_7B, parse_codecs("mix", range(28)))
    layout = layout_of(samples_of([2048] * 500), groups)
    assert layout.chunk_tokens == 512
    assert layout.shard_tokens * 28 * 4 * 128 <= MAX_SHARD_BYTES
    assert layout_of(samples_of([100, 70_000]), groups).shard_tokens >= 70_000


@pytest.mark.parametrize(
    ("length", "layer_bytes", "chunk_tokens"),
    [
        pytest.param(2048, 512, 512, id="a quarter of the sample"),
        pytest.param(65_536, 512, 1024, id="no more than 1,024"),
        pytest.param(128, 512, 64, id="no fewer than 64"),
        pytest.param(128, 32, 128, id="the whole sample where rows are small"),
        pytest.param(200, 32, 128, id="no more than the sample"),
        pytest.param(512, 32, 256, id="8 KiB"),
        pytest.param(4, 1, 64, id="short samples"),
    ],
)
def test_a_chunk_is_a_part_of_a_sample_but_not_too_small(length: int, layer_bytes: int, chunk_tokens: int) -> None:
    assert plan_layout([length] * 9, RowBytes(token=4 * layer_bytes, layer=layer_bytes)).chunk_tokens == chunk_tokens


def test_the_estimate_for_a_million_tokens_of_qwen2_7b_is_about_13_gb() -> None:
    assert estimate_bytes(QWEN2_7B, parse_codecs("mix", range(28)), 1_000_000) == pytest.approx(12.9e9, rel=0.01)
    assert estimate_bytes(QWEN2_7B, parse_codecs("raw", range(28)), 1_000_000) == pytest.approx(43e9, rel=0.01)


def test_the_data_record_changes_with_content_order_and_count() -> None:
    one, two = samples_of([5, 6])
    records = [
        data_record(list(samples), 64)["samples"]
        for samples in (
            [one, two],
            [two, one],
            [one],
            [one, Sample(id="1", source="s", input_ids=two.input_ids, text=None, count=2)],
        )
    ]
    assert len(set(records)) == 4
    assert data_record([one, two], 64) == {"samples": records[0], "num_samples": 2, "num_tokens": 11, "seq_len": 64}
