"""What the loader delivers, against the arrays the store was written from."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from kvstore.batches import KVBatch
from kvstore.reader import Store, open_store
from kvstore.spec import KVSpec, LayerSpec
from tests.stores import ROPE, Source, random_source, small_spec, write_store
from training.loader import KVCollator, KVDataLoader, KVDataset, ReadAhead, TrainBatch
from training.losses import IGNORED
from training.mixture import sample_table
from training.sampler import BatchPlan, KVBatchSampler, SampleBatch

LENGTHS = (9, 3, 70, 1, 12, 5)


@pytest.fixture(scope="module")
def numbers() -> Source:
    return random_source(small_spec(num_layers=3), LENGTHS)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, numbers: Source) -> Store:
    return open_store(write_store(tmp_path_factory.mktemp("loader") / "kv", numbers, codec="raw"))


def request(samples: Sequence[int], targets: Sequence[int] | None = None, weights: Sequence[int] | None = None) -> SampleBatch:
    return SampleBatch(samples, step=7, num_predicted=11, targets=targets, num_targets=13, num_computed=10, weights=weights)


def load(dataset: KVDataset, batch: SampleBatch, sink_tokens: int = 0) -> TrainBatch:
    return KVCollator(sink_tokens=sink_tokens, pad_id=250)(dataset.__getitems__(batch))


def test_tokens_are_padded_on_the_right_and_only_real_ones_have_labels(store: Store, numbers: Source) -> None:
    batch = load(KVDataset(store, (0,)), request([1, 4, 3]))
    assert batch["input_ids"].shape == (3, 12)
    for row, sample in enumerate([1, 4, 3]):
        ids = numbers.input_ids[sample].tolist()
        pads = 12 - len(ids)
        assert batch["input_ids"][row].tolist() == ids + [250] * pads
        assert batch["labels"][row].tolist() == ids + [IGNORED] * pads
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * pads
    assert (batch["step"], batch["num_predicted"], batch["num_targets"], batch["num_computed"]) == (7, 11, 13, 10)
    assert batch["weights"] is None
    weighted = load(KVDataset(store, (0,)), request([1, 4, 3], weights=[1, 5, 2]))
    torch.testing.assert_close(weighted["weights"], torch.tensor([1.0, 5.0, 2.0]))


@pytest.mark.parametrize("sink_tokens", [0, 4, 100])
def test_every_row_has_the_keys_and_values_of_its_position(store: Store, numbers: Source, sink_tokens: int) -> None:
    dataset = KVDataset(store, (2, 0))
    samples = [4, 2, 1]
    batch = load(dataset, request(samples, samples), sink_tokens)
    positions = [
        (row, token) for row, sample in enumerate(samples) for token in range(sink_tokens, len(numbers.input_ids[sample]))
    ]
    assert [divmod(row, batch["input_ids"].shape[1]) for row in batch["rows"].tolist()] == positions
    assert dataset.blocks == ((0, 2),)
    ((keys, values),) = batch["teacher"]
    assert keys.shape == (2, len(positions), 2, 8)
    for slot, layer in enumerate((0, 2)):
        for row, (sample, token) in enumerate(positions):
            key, value = numbers.kv[samples[sample]][layer]
            assert np.array_equal(keys[slot, row].numpy(), key[token])
            assert np.array_equal(values[slot, row].numpy(), value[token])


def test_shuffled_targets_bring_another_samples_keys_and_values_to_the_same_positions(store: Store, numbers: Source) -> None:
    batch = load(KVDataset(store, (1,)), request([4, 1], targets=[1, 0]), sink_tokens=1)
    assert batch["input_ids"][0].tolist() == numbers.input_ids[4].tolist(), "the tokens stay the sample's own"
    assert [divmod(row, 12) for row in batch["rows"].tolist()] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    ((keys, values),) = batch["teacher"]
    expected = [numbers.kv[target][1] for target in (1, 0)]
    assert np.array_equal(keys[0].numpy(), np.concatenate([key[1:3] for key, _ in expected]))
    assert np.array_equal(values[0].numpy(), np.concatenate([value[1:3] for _, value in expected]))


def test_the_rows_are_as_many_as_the_sampler_counted(store: Store) -> None:
    table = sample_table(store, sink_tokens=4)
    for shuffle in (False, True):
        plan = BatchPlan(batch_size=6, seed=3, window_tokens=1, kv_steps=9, shuffle_targets=shuffle)
        (batch,) = KVBatchSampler(table, plan)
        loaded = load(KVDataset(store, (0,)), batch, sink_tokens=4)
        assert len(loaded["rows"]) == loaded["num_targets"] > 0
        assert int((loaded["labels"][:, 1:] != IGNORED).sum()) == loaded["num_predicted"]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory, numbers: Source) -> Store:
    """Sample i has every (i + 2)-nd token masked out, sample 3 its only one."""
    masks = {index: (np.arange(length) % (index + 2) != 0).astype(np.uint8) for index, length in enumerate(LENGTHS)}
    root = tmp_path_factory.mktemp("masked")
    return open_store(write_store(root, numbers, "raw", signal={"response_only": True}, loss_masks=masks))


def test_tokens_not_to_be_learnt_from_have_no_labels_and_no_rows(masked: Store, numbers: Source) -> None:
    samples = [4, 3, 0]
    batch = load(KVDataset(masked, (1,)), request(samples, samples), sink_tokens=2)
    learnt = [[token for token in range(LENGTHS[sample]) if token % (sample + 2)] for sample in samples]
    labels = [
        [int(numbers.input_ids[sample][token]) if token in learnt[row] else IGNORED for token in range(LENGTHS[sample])]
        for row, sample in enumerate(samples)
    ]
    assert batch["labels"].tolist() == [row + [IGNORED] * (12 - len(row)) for row in labels]
    compared = [(row, token) for row, tokens in enumerate(learnt) for token in tokens if token >= 2]
    assert [divmod(row, 12) for row in batch["rows"].tolist()] == compared
    ((keys, values),) = batch["teacher"]
    for place, (row, token) in enumerate(compared):
        key, value = numbers.kv[samples[row]][1]
        assert np.array_equal(keys[0, place].numpy(), key[token])
        assert np.array_equal(values[0, place].numpy(), value[token])


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_sampler_counts_what_the_loss_mask_leaves(masked: Store, shuffle: bool) -> None:
    plan = BatchPlan(batch_size=3, seed=1, window_tokens=1, kv_steps=9, shuffle_targets=shuffle)
    for request in KVBatchSampler(sample_table(masked, sink_tokens=2), plan):
        batch = load(KVDataset(masked, (0,)), request, sink_tokens=2)
        assert len(batch["rows"]) == batch["num_targets"]
        assert int((batch["labels"][:, 1:] != IGNORED).sum()) == batch["num_predicted"]


class Recording(Store):
    """A store that remembers which layers were asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[tuple[int, ...] | None] = []

    def read(self, sample_indices: Sequence[int], layers: Sequence[int] | None = None) -> KVBatch:
        self.asked.append(None if layers is None else tuple(layers))
        return super().read(sample_indices, layers)


def test_without_targets_no_keys_and_values_are_read(store: Store) -> None:
    recording = Recording(store.location)
    batch = load(KVDataset(recording, (0, 1)), request([0, 2]))
    assert recording.asked == [()]
    assert batch["teacher"] == []
    assert len(batch["rows"]) == 0


def test_a_batch_is_one_read_of_the_layers_wanted(store: Store) -> None:
    recording = Recording(store.location)
    load(KVDataset(recording, (2, 1)), request([0, 2, 5], [0, 2, 5]))
    assert recording.asked == [(1, 2)]


def test_layers_of_different_geometry_come_as_blocks(tmp_path: Path) -> None:
    spec = KVSpec(
        layers=(
            LayerSpec(layer=0, num_kv_heads=2, key_dim=8, value_dim=8, rope=0),
            LayerSpec(layer=1, num_kv_heads=1, key_dim=4, value_dim=6, rope=None),
            LayerSpec(layer=2, num_kv_heads=2, key_dim=8, value_dim=8, rope=0),
        ),
        ropes=(ROPE,),
        dtype="float32",
    )
    numbers = random_source(spec, (5, 8))
    dataset = KVDataset(open_store(write_store(tmp_path / "kv", numbers, codec="raw")), (0, 1, 2))
    assert dataset.blocks == ((0, 2), (1,))
    batch = load(dataset, request([1], [1]))
    assert [tuple(key.shape) for key, _ in batch["teacher"]] == [(2, 8, 2, 8), (1, 8, 1, 4)]
    assert np.array_equal(batch["teacher"][1][1][0].numpy(), numbers.kv[1][1][1])


def test_a_single_sample_can_be_asked_for_by_its_number(store: Store, numbers: Source) -> None:
    read = KVDataset(store, (1,))[4]
    assert read.tokens.input_ids.tolist() == numbers.input_ids[4].tolist()
    assert np.array_equal(read.targets[0].key[0], numbers.kv[4][1][0])


def test_the_dataset_pickles_and_reads_the_same_elsewhere(store: Store) -> None:
    dataset = KVDataset(store, (0, 2))
    copy = pickle.loads(pickle.dumps(dataset))
    here, there = (load(each, request([0, 4], [0, 4])) for each in (dataset, copy))
    assert torch.equal(here["teacher"][0][0], there["teacher"][0][0])
    assert torch.equal(here["input_ids"], there["input_ids"])


@pytest.mark.slow
def test_worker_processes_deliver_the_same_batches_in_the_same_order(store: Store) -> None:
    table = sample_table(store)
    plan = BatchPlan(batch_size=2, seed=0, window_tokens=1000, kv_steps=2)
    sampler, collator = KVBatchSampler(table, plan), KVCollator(sink_tokens=1)
    loaders = [
        DataLoader(
            KVDataset(store, (0, 1)),
            batch_sampler=sampler,
            collate_fn=collator,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,
        )
        for workers in (0, 2)
    ]
    for ours, theirs in zip(*loaders, strict=True):
        assert ours["step"] == theirs["step"]
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        for one, other in zip(ours["teacher"], theirs["teacher"], strict=True):
            assert torch.equal(one[0], other[0])


def test_the_loader_hands_the_epoch_to_its_sampler(store: Store) -> None:
    table = sample_table(store)
    plan = BatchPlan(batch_size=2, seed=0, window_tokens=1000, kv_steps=0)
    loader = KVDataLoader(KVDataset(store, ()), batch_sampler=KVBatchSampler(table, plan), collate_fn=KVCollator(sink_tokens=1))
    first = [batch["input_ids"].tolist() for batch in loader]
    loader.set_epoch(1)
    assert [batch["step"] for batch in loader] == [3, 4, 5]
    assert [batch["input_ids"].tolist() for batch in loader] != first


def a_batch(step: int) -> TrainBatch:
    empty = torch.zeros(1, 1, dtype=torch.int64)
    return TrainBatch(
        input_ids=empty,
        attention_mask=empty,
        labels=empty,
        step=step,
        num_predicted=0,
        num_targets=0,
        num_computed=0,
        weights=None,
        rows=torch.zeros(0, dtype=torch.int64),
        teacher=[],
    )


def test_the_next_batch_is_read_while_the_present_one_is_in_use() -> None:
    reached = [threading.Event() for _ in range(4)]

    def produce() -> Iterator[TrainBatch]:
        for step, event in enumerate(reached):
            event.set()
            yield a_batch(step)

    with ThreadPoolExecutor(max_workers=1) as executor:
        ahead = ReadAhead(produce(), 3, executor)
        assert not reached[0].is_set(), "nothing is read before it is asked for"
        for step in range(3):
            assert ahead.next()["step"] == step
            if step < 2:
                assert reached[step + 1].wait(timeout=10)
    assert not reached[3].is_set(), "nothing is read beyond what will be taken"


def test_an_error_of_reading_appears_at_its_batch() -> None:
    def produce() -> Iterator[TrainBatch]:
        yield a_batch(0)
        raise ValueError("shard 3 is damaged")

    with ThreadPoolExecutor(max_workers=1) as executor:
        ahead = ReadAhead(produce(), 2, executor)
        assert ahead.next()["step"] == 0
        with pytest.raises(ValueError, match="shard 3 is damaged"):
            ahead.next()


def test_a_batch_read_later_does_not_change_an_earlier_one(store: Store) -> None:
    dataset = KVDataset(store, (0,))
    batch = load(dataset, request([0], [0]))
    before = batch["teacher"][0][0].clone()
    for _ in range(3):
        load(dataset, request([2], [2]))
    assert torch.equal(batch["teacher"][0][0], before)
