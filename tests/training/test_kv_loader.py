"""The loader for loops of one's own: what it delivers, that it loses no place, and that nothing is left running."""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvstore import samples
from kvstore.batches import CodeBatch
from kvstore.errors import CorruptShardError
from kvstore.reader import Store, open_store
from tests.stores import Source, random_source, small_spec, write_store
from training.handover import INTERVAL_S
from training.kv_loader import KVLoader, PackedBatch
from training.loader import KVCollator, KVDataset
from training.mixture import sample_table
from training.sampler import BatchPlan, KVBatchSampler

LENGTHS = [5, 64, 63, 65, 1, 128, 30, 7, 7, 19, 80, 2, 64, 33, 12, 9, 3, 21, 50, 11, 4]
CODECS = ["raw", "mix", "q8", "fp8"]


@pytest.fixture(scope="module")
def source() -> Source:
    return random_source(small_spec(), LENGTHS, seed=4)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, source: Source) -> Store:
    counts = [1 + index % 3 for index in range(len(LENGTHS))]
    return open_store(write_store(tmp_path_factory.mktemp("loader") / "kv", source, "mix", counts=counts))


def same(one: PackedBatch, other: PackedBatch) -> bool:
    return (
        (one.samples, one.weights, one.step) == (other.samples, other.weights, other.step)
        and torch.equal(one.input_ids, other.input_ids)
        and torch.equal(one.cu_seqlens, other.cu_seqlens)
        and one.kv.keys() == other.kv.keys()
        and all(torch.equal(a, b) for layer in one.kv for a, b in zip(one.kv[layer], other.kv[layer], strict=True))
    )


# ---- payload


@pytest.mark.parametrize("codec", CODECS)
def test_batches_hold_what_the_store_holds_bit_for_bit(codec: str, source: Source, tmp_path: Path) -> None:
    store = open_store(write_store(tmp_path / "kv", source, codec))
    seen: list[int] = []
    for batch in KVLoader(store, batch_size=4, tail="short", layers=store.spec.layer_numbers[::-1]):
        expected = store.read(batch.samples)
        np.testing.assert_array_equal(batch.input_ids.numpy(), expected.input_ids)
        np.testing.assert_array_equal(batch.cu_seqlens.numpy(), expected.cu_seqlens)
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.learnt.all()
        assert batch.has_kv.all()
        for row, layer in enumerate(expected.layers):
            np.testing.assert_array_equal(batch.kv[layer][0].numpy(), expected.key[row])
            np.testing.assert_array_equal(batch.kv[layer][1].numpy(), expected.value[row])
        seen += batch.samples
    assert sorted(seen) == list(range(len(LENGTHS)))


def test_the_same_batches_as_through_a_dataset_and_a_batch_sampler_element_for_element(store: Store) -> None:
    layers = store.spec.layer_numbers[:2]
    table = sample_table(store)
    window = 64 * 2**30 // (4 * store.spec.values_per_token)
    plan = BatchPlan(batch_size=4, seed=7, window_tokens=window, kv_steps=10**6)
    dataset, collator = KVDataset(store, layers), KVCollator(sink_tokens=0)
    loader = KVLoader(store, batch_size=4, seed=7, layers=layers)
    for request, batch in zip(KVBatchSampler(table, plan), loader, strict=True):
        expected = collator(dataset.__getitems__(request))
        padded = batch.padded()
        assert torch.equal(padded["input_ids"], expected["input_ids"])
        assert torch.equal(padded["attention_mask"], expected["attention_mask"])
        assert batch.step == expected["step"]
        assert expected["weights"] is None or list(batch.weights) == expected["weights"].tolist()
        for slot, layer in enumerate(layers):
            for side, (key, value) in zip((0, 1), itertools.repeat(expected["teacher"][0])):
                assert torch.equal(batch.kv[layer][side], (key, value)[side][slot])


def test_padded_views_put_every_number_in_its_place_and_zeros_elsewhere(store: Store) -> None:
    batch = next(iter(KVLoader(store, batch_size=5)))
    layer = store.spec.layer_numbers[0]
    key, value = batch.padded_kv(layer)
    mask = batch.padded()["attention_mask"]
    for sample, (start, end) in enumerate(itertools.pairwise(batch.cu_seqlens.tolist())):
        assert torch.equal(key[sample, :, : end - start].transpose(0, 1), batch.kv[layer][0][start:end])
        assert torch.equal(value[sample, :, : end - start].transpose(0, 1), batch.kv[layer][1][start:end])
        assert mask[sample].tolist() == [1] * (end - start) + [0] * (batch.max_seqlen - end + start)
        assert not key[sample, :, end - start :].any()


def test_without_layers_only_tokens_are_read(store: Store) -> None:
    for batch in KVLoader(store, batch_size=4, layers=()):
        assert batch.kv == {}
        assert len(batch.input_ids) == batch.cu_seqlens[-1]


def test_a_batch_stays_as_it_is_while_later_ones_are_read(store: Store) -> None:
    kept = []
    for batch in KVLoader(store, batch_size=2):
        kept.append((batch, [side.clone() for pair in batch.kv.values() for side in pair]))
    for batch, copies in kept:
        assert all(
            torch.equal(side, copy) for side, copy in zip((s for p in batch.kv.values() for s in p), copies, strict=True)
        )


# ---- place


def epoch(loader: KVLoader) -> list[PackedBatch]:
    return list(loader)


@pytest.mark.parametrize("over", [{"batch_size": 4}, {"batch_tokens": 130}, {"batch_size": 4, "tail": "short"}], ids=str)
def test_at_every_step_a_resumed_loop_goes_on_as_the_uninterrupted_one(store: Store, over: dict[str, Any]) -> None:
    straight = KVLoader(store, **over, seed=3)
    expected = [*epoch(straight), *epoch(straight)]
    assert straight.state_dict()["epoch"] == 2
    for taken in range(len(expected)):
        first = KVLoader(store, **over, seed=3, prefetch_bytes=10**9)
        taken_batches = list(itertools.islice(itertools.chain.from_iterable(epoch_of(first) for _ in range(2)), taken))
        state = json.loads(json.dumps(first.state_dict()))
        assert len(json.dumps(state)) < 1024
        second = KVLoader(store, **over, seed=3, prefetch_bytes=1)
        second.load_state_dict(state)
        assert second.state_dict() == state, "a state is its own before anything is read"
        found = [*taken_batches, *(batch for _ in range(2 - second.epoch) for batch in second)]
        assert len(found) == len(expected)
        assert all(same(one, other) for one, other in zip(found, expected, strict=True)), taken


def epoch_of(loader: KVLoader) -> Any:
    return iter(loader)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_ranks_reads_the_same_global_batches_and_goes_on_from_anothers_state(
    store: Store, world_size: int
) -> None:
    whole = [batch.samples for batch in KVLoader(store, batch_size=4, seed=5)]
    ranks = [KVLoader(store, batch_size=4, seed=5, rank=rank, world_size=world_size) for rank in range(world_size)]
    steps = list(zip(*(iter(rank) for rank in ranks), strict=True))
    assert [tuple(sample for batch in step for sample in batch.samples) for step in steps] == whole
    half = KVLoader(store, batch_size=4, seed=5)
    for _ in itertools.islice(half, 2):
        pass
    for rank in ranks:
        rank.load_state_dict(half.state_dict())
    steps = list(zip(*(iter(rank) for rank in ranks), strict=True))
    assert [tuple(sample for batch in step for sample in batch.samples) for step in steps] == whole[2:]
    assert len({json.dumps(rank.state_dict()) for rank in ranks}) == 1


def test_a_resumed_loop_reads_nothing_that_it_skips(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, ...]] = []
    genuine = Store.read_codes

    def read(self: Store, indices: Sequence[int], *rest: Any, **how: Any) -> CodeBatch:
        reads.append(tuple(indices))
        return genuine(self, indices, *rest, **how)

    loader = KVLoader(store, batch_size=4)
    whole = [batch.samples for batch in loader]
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "samples_consumed": 12})
    monkeypatch.setattr(Store, "read_codes", read)
    assert [batch.samples for batch in loader] == whole[3:]
    assert reads == whole[3:]


def test_threads_hand_over_sooner_while_a_loader_iterates_and_as_before_when_all_are_done(store: Store) -> None:
    before = sys.getswitchinterval()
    first, second = (iter(KVLoader(store, batch_size=4)) for _ in range(2))
    next(first)
    next(second)
    assert sys.getswitchinterval() == pytest.approx(INTERVAL_S)
    first.close()
    assert sys.getswitchinterval() == pytest.approx(INTERVAL_S)
    assert len(list(second)) == 4
    assert sys.getswitchinterval() == before


def test_an_epoch_is_planned_by_the_summary_of_the_shards_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [batch.samples for batch in KVLoader(store, batch_size=4, layers=())]
    fresh, genuine, read = open_store(store.location), samples.SampleTable._columns, list[str]()
    monkeypatch.setattr(samples.SampleTable, "_columns", lambda table, names: (read.extend(names), genuine(table, names))[1])
    loader = KVLoader(fresh, batch_size=4, layers=())
    assert len(loader) == len(expected)
    loader.load_state_dict({**loader.state_dict(), "samples_consumed": 8})
    assert not read
    assert [batch.samples for batch in loader] == expected[2:]
    assert read


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "0" * 64}, "state: fingerprint: got '0000"),
        ({"plan_hash": "0" * 64}, "it is of another store, or of another seed"),
        ({"version": 2}, "state: version: got 2, expected 1"),
        ({"samples_consumed": 3}, "got samples_consumed 3, expected the end of a batch of epoch 0: 0, 4, 8, 12, "),
        ({"samples_consumed": 999}, "got samples_consumed 999, expected the end of a batch of epoch 0"),
        ({"epoch": None}, "state: epoch: got None, expected a valid integer"),
        ({"epoch": True}, "state: epoch: got True, expected a valid integer"),
        ({"epoch": "1"}, "state: epoch: got '1', expected a valid integer"),
        ({"epoch": -1}, "state: epoch: got -1, expected greater than or equal to 0"),
        ({"epoch": 2**80}, "state: epoch: got 1208925819614629174706176, expected"),
        ({"samples_consumed": 4.0}, "state: samples_consumed: got 4.0, expected a valid integer"),
        ({"samples_consumed": -4}, "state: samples_consumed: got -4, expected greater"),
        ({"fingerprint": ["x"] * 999}, "state: fingerprint: got .*, expected a valid string"),
        ({"surprise": 1}, "state: surprise: got 1, expected"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(store: Store, change: dict[str, Any], message: str) -> None:
    loader = KVLoader(store, batch_size=4)
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict({**loader.state_dict(), **change})


def test_another_seed_or_batch_size_is_another_plan_and_balance_is_not(store: Store) -> None:
    state = KVLoader(store, batch_size=4).state_dict()
    for over in ({"seed": 1}, {"batch_size": 2}, {"batch_tokens": 99}, {"shuffle": "global"}, {"tail": "pad"}):
        with pytest.raises(ValueError, match="plan_hash"):
            KVLoader(store, **{"batch_size": 4, **over}).load_state_dict(state)
    KVLoader(store, batch_size=4, balance=True, layers=()).load_state_dict(state)


def test_a_padded_tail_has_weight_0_and_is_reported(store: Store) -> None:
    loader = KVLoader(store, batch_size=4, tail="pad")
    assert (loader.dropped, loader.padded, len(loader)) == (0, 3, 6)
    weights = [weight for batch in loader for weight in batch.weights]
    assert weights.count(0) == 3
    assert sum(weights) == store.samples.count.sum()
    assert KVLoader(store, batch_size=4).dropped == 1


# ---- reading ahead


class Slow:
    """Reads that take their time, and tell how many bytes of codes are read or waiting."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, delays: Sequence[float] = (), broken: Sequence[int] = ()) -> None:
        self.begun = 0
        genuine = Store.read_codes

        def read(store: Store, indices: Sequence[int], *rest: Any, **how: Any) -> CodeBatch:
            number, self.begun = self.begun, self.begun + 1
            if number < len(delays):
                time.sleep(delays[number])
            if tuple(indices) == tuple(broken):
                raise CorruptShardError("shard 2: injected")
            return genuine(store, indices, *rest, **how)

        monkeypatch.setattr(Store, "read_codes", read)


def loader_threads() -> int:
    return sum(thread.name.startswith("kv-loader") for thread in threading.enumerate())


def test_batches_come_in_order_whatever_reads_are_slow(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [batch.samples for batch in KVLoader(store, batch_size=4)]
    Slow(monkeypatch, delays=[0.3, 0, 0.1, 0, 0])
    assert [batch.samples for batch in KVLoader(store, batch_size=4)] == expected


def test_a_batch_is_given_back_as_soon_as_the_loop_lets_go_of_it(store: Store) -> None:
    loader = iter(KVLoader(store, batch_size=4))
    batch = next(loader)
    ids, key = weakref.ref(batch.input_ids), weakref.ref(batch.kv[0][0])
    assert ids() is not None
    del batch
    assert (ids(), key()) == (None, None), "the loader keeps what it has handed over"
    loader.close()  # type: ignore[attr-defined]  # a generator


def test_reading_ahead_keeps_to_its_budget_and_one_batch_is_always_admitted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    loader = iter(KVLoader(store, batch_size=4, prefetch_bytes=1))
    next(loader)
    time.sleep(0.2)
    assert slow.begun == 1, "the next is larger than the budget: it is read when it is asked for"
    assert len(list(loader)) == 4
    slow.begun = 0
    generous = iter(KVLoader(store, batch_size=4, prefetch_bytes=10**9))
    next(generous)
    for _ in range(50):
        if slow.begun == 5:
            break
        time.sleep(0.05)
    assert slow.begun == 5, "all that follow are read while the first is in use"
    generous.close()


def test_an_error_comes_where_its_batch_would_and_leaves_nothing_running(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = KVLoader(store, batch_size=4, prefetch_bytes=10**9)
    Slow(monkeypatch, broken=[batch.samples for batch in KVLoader(store, batch_size=4)][2])
    batches = iter(loader)
    assert len(list(itertools.islice(batches, 2))) == 2
    with pytest.raises(CorruptShardError, match="injected"):
        next(batches)
    assert loader_threads() == 0
    assert loader.state_dict()["samples_consumed"] == 8, "the batch that failed is still to come"


@pytest.mark.parametrize("how", ["break", "raise", "close"])
def test_a_loop_that_stops_early_leaves_no_threads(store: Store, how: str) -> None:
    loader = KVLoader(store, batch_size=2)
    if how == "close":
        batches = iter(loader)
        next(batches)
        batches.close()
    else:
        try:
            for _ in loader:
                if how == "break":
                    break
                raise RuntimeError("of the loop's own")
        except RuntimeError:
            pass
    assert loader_threads() == 0
    assert loader.state_dict()["samples_consumed"] == 2


def test_a_loop_ends_with_an_error_where_another_one_has_begun(store: Store) -> None:
    loader = KVLoader(store, batch_size=4)
    first = iter(loader)
    next(first)
    second = iter(loader)
    begun = [next(second).samples]
    with pytest.raises(RuntimeError, match="another loop over it has begun"):
        next(first)
    whole = [batch.samples for batch in KVLoader(store, batch_size=4)]
    assert begun + [batch.samples for batch in second] == whole[1:], "the later loop goes on undisturbed"
    third = iter(loader)
    next(third)
    loader.load_state_dict(loader.state_dict())
    with pytest.raises(RuntimeError, match="or a state was loaded"):
        next(third)
    assert loader_threads() == 0


def test_epochs_leave_no_threads_and_files_open(store: Store) -> None:
    loader = KVLoader(store, batch_size=4)
    list(loader)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(30):
        list(loader)
    assert loader_threads() == 0
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
    assert loader.epoch == 31
