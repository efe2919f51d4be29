"""Order, batches and the held-out split: pure functions, so everything is compared exactly."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from training.held_out import held_out_batches
from training.order import Shards, Shuffle, cut_by_tokens, epoch_order, fair_turns, largest_remainder, mixed_order, permutation
from training.sampler import (
    BatchPlan,
    KVBatchSampler,
    SampleBatch,
    SampleTable,
    Tail,
)

SINK_TOKENS = 4


def table(num_samples: int, per_shard: int = 4, seed: int = 0) -> SampleTable:
    """Samples with store numbers that are no positions, in shards of equal size, of lengths 1 to 40."""
    rng = np.random.default_rng(seed)
    num_tokens = rng.integers(1, 41, size=num_samples)
    return SampleTable(
        index=np.arange(num_samples, dtype=np.int64) * 3 + 100,
        shard=np.arange(num_samples) // per_shard,
        num_tokens=num_tokens,
        count=rng.choice([1, 1, 1, 2, 7], size=num_samples),
        predicted=num_tokens - 1,
        compared=np.maximum(num_tokens - SINK_TOKENS, 0),
    )


def table_of(num_tokens: Sequence[int], count: Sequence[int]) -> SampleTable:
    """Samples of one shard, typed as a store types them."""
    return SampleTable(
        index=np.arange(len(num_tokens)),
        shard=np.zeros(len(num_tokens), dtype=np.int32),
        num_tokens=np.array(num_tokens, dtype=np.int32),
        count=np.array(count, dtype=np.int32),
        predicted=np.array(num_tokens, dtype=np.int64) - 1,
        compared=np.maximum(np.array(num_tokens, dtype=np.int64) - SINK_TOKENS, 0),
    )


def plan(**over: Any) -> BatchPlan:
    return BatchPlan(**{"batch_size": 4, "seed": 0, "window_tokens": 60, "kv_steps": 1000, **over})


def batches(samples: SampleTable, plan: BatchPlan, epoch: int = 0, **over: Any) -> list[SampleBatch]:
    sampler = KVBatchSampler(samples, plan, **over)
    sampler.set_epoch(epoch)
    return list(sampler)


def weights(batch: SampleBatch) -> list[int]:
    return [1] * len(batch) if batch.weights is None else list(batch.weights)


def test_the_permutation_is_pinned() -> None:
    assert permutation(12, 0, 3, "shards").tolist() == [8, 10, 6, 1, 4, 7, 2, 0, 11, 5, 3, 9]
    digest = hashlib.sha256(permutation(100_000, 1, 2).astype("<i8").tobytes()).hexdigest()
    assert digest == "b1629fc78387c576e6b120b755cb0e08575959a935f22314d1b558abc72d0e7a"


def test_the_order_of_an_epoch_is_pinned() -> None:
    order = epoch_order(Shards.of(np.repeat(np.arange(5), 4), np.full(20, 10)), seed=7, epoch=1, window_tokens=80)
    assert order.tolist() == [7, 5, 1, 4, 2, 0, 3, 6, 13, 17, 19, 12, 16, 15, 14, 18, 9, 8, 10, 11]


@settings(deadline=None, max_examples=50)
@given(
    shards=st.lists(st.integers(0, 9), max_size=60),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
    window_tokens=st.integers(1, 500),
)
def test_an_epoch_has_every_sample_once_and_each_shard_inside_one_window(
    shards: list[int], seed: int, epoch: int, window_tokens: int
) -> None:
    shard = np.array(sorted(shards), dtype=np.int32)
    tokens = np.full(len(shard), 10)
    order = epoch_order(Shards.of(shard, tokens), seed=seed, epoch=epoch, window_tokens=window_tokens)
    assert sorted(order.tolist()) == list(range(len(shard)))
    # A window closes once it is full, so a shard spans less than the window and one whole shard more.
    largest = 10 * int(np.bincount(shard).max(initial=0))
    for number in set(shards):
        positions = np.flatnonzero(shard[order] == number)
        assert 10 * (positions[-1] - positions[0] + 1) < window_tokens + largest + 1


def test_epochs_and_seeds_give_different_orders_and_samples_of_a_window_are_mixed() -> None:
    shard, tokens = np.repeat(np.arange(10), 20), np.full(200, 10)
    orders = [
        tuple(epoch_order(Shards.of(shard, tokens), seed=seed, epoch=epoch, window_tokens=1000))
        for seed, epoch in itertools.product(range(2), range(2))
    ]
    assert len(set(orders)) == 4
    neighbours = np.mean([shard[a] == shard[b] for a, b in itertools.pairwise(orders[0])])
    assert neighbours < 0.35, "five shards to a window: about a fifth of neighbours share their shard, all do when unshuffled"


@settings(deadline=None, max_examples=50)
@given(num_samples=st.integers(8, 60), epoch=st.integers(0, 2))
def test_ranks_and_micro_batches_cut_the_same_global_batches(num_samples: int, epoch: int) -> None:
    samples, whole_plan = table(num_samples), plan(batch_size=8)
    whole = batches(samples, whole_plan, epoch)
    assert len(whole) == num_samples // 8
    for world_size, micro in [(1, 1), (1, 4), (2, 4), (2, 2), (4, 1), (8, 1)]:
        ranks = [
            batches(samples, whole_plan, epoch, rank=rank, world_size=world_size, micro_batch_size=micro)
            for rank in range(world_size)
        ]
        assert len({len(rank) for rank in ranks}) == 1, "every rank has the same number of micro-batches"
        for number, batch in enumerate(whole):
            per_step = len(ranks[0]) // len(whole)
            parts = [rank[number * per_step + i] for i in range(per_step) for rank in ranks]
            assert [sample for part in parts for sample in part] == list(batch)
            assert [weight for part in parts for weight in weights(part)] == weights(batch)
            assert {(part.step, part.num_predicted, part.num_targets, part.num_computed) for part in parts} == {
                (batch.step, batch.num_predicted, batch.num_targets, batch.num_computed)
            }


def test_the_length_says_how_many_batches_come_and_the_rest_is_counted_as_dropped() -> None:
    sampler = KVBatchSampler(table(22), plan(batch_size=8), micro_batch_size=2, rank=1, world_size=2)
    assert (len(sampler), len(list(sampler)), sampler.micro_batches_per_step, sampler.dropped) == (4, 4, 2, 6)


def test_other_samples_are_dropped_in_another_epoch() -> None:
    used = [{sample for batch in batches(table(11), plan(), epoch) for sample in batch} for epoch in range(6)]
    assert all(len(samples) == 8 for samples in used)
    assert set.union(*used) == set(table(11).index.tolist())


def test_steps_count_on_over_epochs_and_targets_end_with_the_kv_phase() -> None:
    seen = [
        (batch.step, batch.targets is not None) for epoch in range(3) for batch in batches(table(9), plan(kv_steps=3), epoch)
    ]
    assert seen == [(0, True), (1, True), (2, True), (3, False), (4, False), (5, False)]


def test_a_step_counts_its_predicted_and_its_compared_tokens() -> None:
    (batch,) = batches(table_of([1, 3, 6, 10], [1, 1, 1, 1]), plan())
    assert batch.num_predicted == batch.num_computed == 0 + 2 + 5 + 9
    assert batch.num_targets == 0 + 0 + 2 + 6
    assert batch.targets == list(batch)
    assert batch.weights is None


def test_a_sample_the_data_had_three_times_counts_three_times_but_is_computed_once() -> None:
    (batch,) = batches(table_of([1, 3, 6, 10], [9, 2, 3, 1]), plan())
    assert batch.num_predicted == 9 * 0 + 2 * 2 + 3 * 5 + 9
    assert batch.num_targets == 9 * 0 + 2 * 0 + 3 * 2 + 6
    assert batch.num_computed == 0 + 2 + 5 + 9
    assert weights(batch) == [(9, 2, 3, 1)[sample] for sample in batch]
    (held_out,) = held_out_batches(table_of([1, 3, 6, 10], [9, 2, 3, 1]), 4)
    assert (held_out.num_predicted, held_out.num_computed, held_out.weights) == (28, 16, [9, 2, 3, 1])


def test_denominators_of_many_long_samples_do_not_overflow() -> None:
    (batch,) = batches(table_of([100_000] * 4, [100_000] * 4), plan())
    assert (batch.num_predicted, batch.num_targets) == (4 * 100_000 * 99_999, 4 * 100_000 * 99_996)


def test_only_micro_batches_with_a_repeated_sample_carry_weights() -> None:
    cut = batches(table_of([5] * 4, [1, 1, 4, 1]), plan(), micro_batch_size=1)
    assert {part[0]: part.weights for part in cut} == {0: None, 1: None, 2: [4], 3: None}
    assert {part.num_predicted for part in cut} == {7 * 4}


def test_shuffled_targets_are_other_samples_of_the_batch_and_share_their_shorter_length() -> None:
    count = [1, 4, 2, 1]
    samples = table_of([5, 6, 7, 8], count)
    (batch,) = batches(samples, plan(shuffle_targets=True))
    assert batch.targets is not None
    assert sorted(batch.targets) == sorted(batch)
    assert all(ours != theirs for ours, theirs in zip(batch, batch.targets, strict=True))
    lengths = samples.num_tokens
    assert batch.num_targets == sum(
        count[a] * (min(lengths[a], lengths[b]) - 4) for a, b in zip(batch, batch.targets, strict=True)
    )
    assert weights(batch) == [count[sample] for sample in batch], "a sample keeps its own weight"
    (plain,) = batches(samples, plan())
    assert list(plain) == list(batch), "the control sees the same samples in the same order"


def test_a_batch_survives_pickling_to_a_worker() -> None:
    batch = SampleBatch([5, 6], step=3, num_predicted=20, targets=[6, 5], num_targets=12, num_computed=11, weights=[1, 3])
    copy = pickle.loads(pickle.dumps(batch))
    assert isinstance(copy, SampleBatch)
    assert list(copy) == [5, 6]
    assert vars(copy) == vars(batch)


@pytest.mark.parametrize(
    ("samples", "over", "message"),
    [
        pytest.param(20, {"micro_batch_size": 3}, "got 8, expected a multiple of micro_batch_size x ranks = 3 x 1", id="micro"),
        pytest.param(20, {"world_size": 3}, "got 8, expected a multiple of micro_batch_size x ranks = 2 x 3", id="ranks"),
        pytest.param(20, {"world_size": 16}, "= 1 x 16", id="more ranks than samples"),
        pytest.param(7, {}, "got 8, but there are 7 training samples", id="too little data"),
    ],
)
def test_batches_that_cannot_be_cut_are_refused(samples: int, over: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVBatchSampler(table(samples), plan(batch_size=8), **over)


# ---- order, tails, balance, budgets of tokens and mixtures


@given(num_samples=st.integers(0, 50), per_shard=st.integers(1, 9), shuffle=st.sampled_from(["windowed", "global", "none"]))
@settings(deadline=None, max_examples=50)
def test_every_way_of_shuffling_has_every_sample_once(num_samples: int, per_shard: int, shuffle: Shuffle) -> None:
    samples = table(num_samples, per_shard)
    order = epoch_order(Shards.of(samples.shard, samples.num_tokens), seed=1, epoch=0, window_tokens=60, shuffle=shuffle)
    assert sorted(order.tolist()) == list(range(num_samples))
    if shuffle == "none":
        assert order.tolist() == sorted(order.tolist())


def windowed_by_loop(shard: np.ndarray, num_tokens: np.ndarray, seed: int, epoch: int, window_tokens: int) -> list[int]:
    """The rule as it is written down: shards permuted, windows filled one by one, samples permuted inside."""
    numbers = sorted(set(shard.tolist()))
    members = [np.flatnonzero(shard == number) for number in numbers]
    windows: list[list[int]] = [[]]
    filled = 0
    for place in permutation(len(members), seed, epoch, "shards"):
        if filled >= window_tokens:
            windows.append([])
            filled = 0
        windows[-1].extend(members[place].tolist())
        filled += int(num_tokens[members[place]].sum())
    return [
        window[place]
        for number, window in enumerate(windows)
        for place in permutation(len(window), seed, epoch, "window", number).tolist()
    ]


@given(num_samples=st.integers(1, 60), per_shard=st.integers(1, 9), window_tokens=st.integers(1, 400), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=100)
def test_the_windowed_order_is_the_one_written_out(num_samples: int, per_shard: int, window_tokens: int, seed: int) -> None:
    samples = table(num_samples, per_shard, seed)
    found = epoch_order(Shards.of(samples.shard, samples.num_tokens), seed=seed, epoch=1, window_tokens=window_tokens)
    assert found.tolist() == windowed_by_loop(samples.shard, samples.num_tokens, seed, 1, window_tokens)


def cut(samples: SampleTable, world_size: int, micro: int, epoch: int = 0, **over: Any) -> list[list[tuple[int, int]]]:
    """Global batches as (sample, weight) by step, in the order of the ranks' micro-batches; and that all ranks have as many."""
    plan = BatchPlan(**{"batch_size": 8, "seed": 3, "window_tokens": 60, "kv_steps": 99, **over})
    ranks = []
    for rank in range(world_size):
        sampler = KVBatchSampler(samples, plan, micro_batch_size=micro, rank=rank, world_size=world_size)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
    steps: dict[int, list[tuple[int, int]]] = {}
    for batches in zip(*ranks, strict=True):
        assert len({(batch.step, batch.num_predicted, batch.num_targets, batch.num_computed) for batch in batches}) == 1
        for batch in batches:
            assert batch, "no micro-batch is empty"
            weights = batch.weights or [1] * len(batch)
            steps.setdefault(batch.step, []).extend(zip(batch, weights, strict=True))
    return list(steps.values())


@given(
    num_samples=st.integers(1, 50),
    tail=st.sampled_from(["drop", "pad", "short"]),
    shape=st.sampled_from([(1, 8), (2, 2), (4, 1), (1, 2), (8, 1), (2, 4)]),
)
@settings(deadline=None, max_examples=80)
def test_tails_are_dropped_padded_with_weight_0_or_short_and_counted(
    num_samples: int, tail: Tail, shape: tuple[int, int]
) -> None:
    samples = dataclasses.replace(table(num_samples), count=np.ones(num_samples, dtype=np.int64))
    world_size, micro = shape
    if tail == "drop" and num_samples < 8:
        return
    steps = cut(samples, world_size, micro, tail=tail)
    plan = BatchPlan(batch_size=8, seed=3, window_tokens=60, kv_steps=99, tail=tail)
    sampler = KVBatchSampler(samples, plan, micro_batch_size=micro, world_size=world_size)
    drawn = [pair for step in steps for pair in step]
    real = [index for index, weight in drawn if weight]
    assert len(set(real)) == len(real) == num_samples - sampler.dropped
    assert len(drawn) - len(real) == sampler.padded
    assert all(len(step) == 8 for step in steps[:-1])
    if tail != "short":
        assert len(steps[-1]) == 8
    else:
        assert len(steps[-1]) == max(num_samples % 8 or 8, world_size * (8 // micro // world_size))


def test_a_padded_step_counts_only_what_is_real() -> None:
    samples = table(11)
    plan = BatchPlan(batch_size=8, seed=3, window_tokens=60, kv_steps=99, tail="pad")
    (last,) = [batch for batch in KVBatchSampler(samples, plan) if batch.step == 1]
    real = [index for index, weight in zip(last, last.weights or (), strict=True) if weight]
    rows = (np.array(real) - 100) // 3
    assert len(real) == 3
    assert last.num_computed == samples.predicted[rows].sum()
    assert last.num_predicted == (samples.count * samples.predicted)[rows].sum()
    assert last.num_targets == (samples.count * samples.compared)[rows].sum()


@given(num_samples=st.integers(16, 60), seed=st.integers(0, 5), shape=st.sampled_from([(1, 2), (2, 2), (4, 1), (4, 2)]))
@settings(deadline=None, max_examples=40)
def test_balancing_keeps_the_samples_of_every_global_batch_and_evens_out_tokens(
    num_samples: int, seed: int, shape: tuple[int, int]
) -> None:
    samples, (world_size, micro) = table(num_samples, seed=seed), shape
    plain, even = (cut(samples, world_size, micro, balance=balance) for balance in (False, True))
    assert [sorted(step) for step in plain] == [sorted(step) for step in even]

    def largest(steps: list[list[tuple[int, int]]]) -> int:
        tokens = [[int(samples.num_tokens[(index - 100) // 3]) for index, _ in step] for step in steps]
        return sum(max(sum(step[first : first + micro]) for first in range(0, 8, micro)) for step in tokens)

    assert largest(even) <= largest(plain)


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=6))
@settings(deadline=None, max_examples=200)
def test_in_turns_every_source_keeps_its_proportion_to_less_than_one(counts: list[int]) -> None:
    turns, total = fair_turns(counts), sum(counts)
    assert np.bincount(turns, minlength=len(counts)).tolist() == counts
    for source, count in enumerate(counts):
        exact = count * np.arange(1, total + 1) / max(total, 1)
        assert (np.abs(np.cumsum(turns == source) - exact) < 1).all()


@example(sizes=[1, 1, 1, 1], weights=[1.0, 0.125, 0.125, 0.125], total=10, epochs=1)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 1), min_size=4, max_size=4),
    total=st.integers(1, 80),
    epochs=st.integers(1, 4),
)
@settings(deadline=None, max_examples=80)
def test_mixtures_have_their_proportions_in_every_prefix_and_go_round_each_source(
    sizes: list[int], weights: list[float], total: int, epochs: int
) -> None:
    shares = weights[: len(sizes)]
    firsts = np.concatenate([[0], np.cumsum(sizes)])
    orders = [
        (size, lambda epoch, size=size, first=first: first + permutation(size, "source", int(first), epoch))
        for size, first in zip(sizes, firsts, strict=False)
    ]
    counts = largest_remainder(shares, total)
    assert sum(counts) == total
    everything: list[int] = []
    for epoch in range(epochs):
        order = mixed_order(orders, shares, total=total, epoch=epoch)
        sources = np.searchsorted(firsts, order, side="right") - 1
        for source, count in enumerate(counts):
            have = np.cumsum(sources == source)
            assert have[-1] == count
            assert (np.abs(have - count * np.arange(1, total + 1) / total) <= 1).all()
        everything += order.tolist()
    for size, first in zip(sizes, firsts, strict=False):
        drawn = [index for index in everything if first <= index < first + size]
        often = np.bincount(np.array(drawn, dtype=np.int64) - first, minlength=size)
        assert often.max() - often.min() <= 1, "each source is gone through evenly, over epochs too"


def test_a_mixture_is_cut_alike_for_all_ranks_and_draws_its_shares() -> None:
    samples = dataclasses.replace(table(40), store=np.arange(40) // 30)
    one, four = (cut(samples, *shape, shares=(1.0, 1.0)) for shape in ((1, 8), (4, 2)))
    assert one == four
    for step in one:
        stores = [samples.store[(index - 100) // 3] for index, _ in step]
        assert stores.count(0) == stores.count(1) == 4


def passes(
    samples: SampleTable, number: int, rank: int = 0, world_size: int = 1, micro: int | None = None
) -> list[SampleBatch]:
    """Batches of at most 90 tokens, of whole passes over the samples."""
    plan = BatchPlan(batch_size=8, batch_tokens=90, seed=3, window_tokens=60, kv_steps=99)
    sampler = KVBatchSampler(samples, plan, micro_batch_tokens=micro, rank=rank, world_size=world_size)
    return [batch for at in range(number) for batch in sampler.batches_of(at)]


def rows_of(batch: SampleBatch) -> np.ndarray:
    """The samples of a batch that count, as rows of the table."""
    kept = [index for index, weight in zip(batch, batch.weights or [1] * len(batch), strict=True) if weight]
    return (np.array(kept, dtype=np.int64) - 100) // 3


@given(num_tokens=st.lists(st.integers(1, 50), max_size=60), budget=st.integers(1, 120))
@settings(deadline=None, max_examples=200)
def test_runs_of_samples_fill_their_budget_of_tokens_as_far_as_they_can(num_tokens: list[int], budget: int) -> None:
    cuts = cut_by_tokens(np.array(num_tokens, dtype=np.int64), budget).tolist()
    assert (cuts[0], cuts[-1]) == (0, len(num_tokens))
    for start, stop in itertools.pairwise(cuts):
        assert sum(num_tokens[start:stop]) <= budget or stop - start == 1
        assert sum(num_tokens[start : stop + 1]) > budget or stop == len(num_tokens)


@given(num_samples=st.integers(1, 60), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_with_a_budget_of_tokens_a_pass_has_every_sample_once_and_no_step_more_than_it_may(num_samples: int, seed: int) -> None:
    samples = table(num_samples, seed=seed)
    samples.num_tokens[::17] += 100
    first, both = passes(samples, 1), passes(samples, 2)
    for one in (both[: len(first)], both[len(first) :]):
        assert sorted(np.concatenate([rows_of(batch) for batch in one]).tolist()) == list(range(num_samples))
        assert all(samples.num_tokens[rows].sum() <= 90 or len(rows) == 1 for rows in map(rows_of, one))
    assert [batch.step for batch in both] == list(range(len(both)))


@given(num_samples=st.integers(1, 60), shape=st.sampled_from([(2, 90), (4, 90), (1, 30), (2, 12)]))
@settings(deadline=None, max_examples=60)
def test_steps_of_a_budget_are_the_same_however_they_are_cut(num_samples: int, shape: tuple[int, int]) -> None:
    samples, (world_size, micro) = table(num_samples), shape
    whole = passes(samples, 2)
    ranks = [passes(samples, 2, rank, world_size, micro) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    by_step: dict[int, list[SampleBatch]] = {}
    for batch in itertools.chain.from_iterable(ranks):
        assert batch, "no micro-batch is empty"
        by_step.setdefault(batch.step, []).append(batch)
    for expected in whole:
        parts = by_step.pop(expected.step)
        assert len(parts) == world_size * -(-90 // (micro * world_size))
        assert sorted(np.concatenate([rows_of(part) for part in parts]).tolist()) == sorted(rows_of(expected).tolist())
        assert {part.num_predicted for part in parts} == {expected.num_predicted}
        assert {(part.num_targets, part.num_computed) for part in parts} == {(expected.num_targets, expected.num_computed)}
    assert not by_step


def test_epochs_of_a_trainer_go_on_through_passes_of_unequal_numbers_of_steps() -> None:
    samples = table(50)
    plan = BatchPlan(batch_size=8, batch_tokens=90, seed=3, window_tokens=60, kv_steps=99)
    sampler = KVBatchSampler(samples, plan, micro_batch_tokens=45)
    steps = [len(sampler.cuts(number)) - 1 for number in range(6)]
    assert len(set(steps)) > 1, "or there is nothing to be tested"
    straight = [list(batch) for batch in passes(samples, 6, micro=45)]
    epochs = []
    for epoch in range(4):
        again = KVBatchSampler(samples, plan, micro_batch_tokens=45)
        again.set_epoch(epoch)
        epochs += [list(batch) for batch in again]
        assert len(epochs) == (epoch + 1) * len(again) == (epoch + 1) * steps[0] * 2
    assert epochs == straight[: len(epochs)]
