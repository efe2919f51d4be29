"""Finding the samples that make a task fail, without running anything."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvstore.commits import SampleRow
from pipeline.quarantine import bad_samples, refusal, search, without
from pipeline.tasks import Task, TaskSample


def make_task(num_samples: int, shard: int = 0) -> Task:
    samples = []
    for number in range(num_samples):
        row = SampleRow(
            id=f"{shard:04d}{number:060d}",
            source=f"doc {number}",
            shard=shard,
            token_start=64 * number,
            num_tokens=2,
            crc32c=0,
            count=1,
            text=None,
        )
        samples.append(TaskSample(row=row, offset=64 * number, input_ids=np.array([number, 1], dtype=np.int32), beside={}))
    return Task(shard=shard, samples=tuple(samples))


def find(task: Task, bad: set[int], most: int = 100, company: int = 1) -> tuple[list[str], list[int]]:
    """Sources found, and the sizes of all tries; `company` bad samples must be together for a try to fail."""
    hunt, sizes, outcome = search(task.samples, most), [], None
    while True:
        try:
            group = hunt.send(outcome)
        except StopIteration as end:
            return [sample.source for sample in bad_samples(task, end.value)], sizes
        sizes.append(len(group))
        hits = sum(int(sample.input_ids[0]) in bad for sample in group)
        outcome = "why" if hits >= company else None


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1))))
def test_exactly_the_bad_samples_are_found(case: tuple[int, set[int]]) -> None:
    num_samples, bad = case
    found, _ = find(make_task(num_samples), bad)
    assert found == [f"doc {number}" for number in sorted(bad)]


@given(st.integers(2, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))))
def test_one_bad_sample_costs_a_logarithm_of_tries_and_two_tasks_of_computing(case: tuple[int, int]) -> None:
    num_samples, bad = case
    found, sizes = find(make_task(num_samples), {bad})
    assert found == [f"doc {bad}"]
    assert len(sizes) <= 2 * math.ceil(math.log2(num_samples)) + 1
    assert sum(sizes) <= 2 * num_samples + 1


def test_samples_that_fail_only_in_company_are_not_blamed() -> None:
    assert find(make_task(16), {3, 12}, company=2)[0] == []


def test_a_task_of_one_sample_is_tried_again_before_it_is_blamed() -> None:
    assert find(make_task(1), {0}) == (["doc 0"], [1])
    assert find(make_task(1), set()) == ([], [1])


def test_a_search_ends_soon_after_it_has_found_more_than_are_believed() -> None:
    found, sizes = find(make_task(1024), set(range(1024)), most=8)
    assert len(found) == 9
    assert len(sizes) < 60


def test_what_is_left_of_a_task_keeps_its_place() -> None:
    task = make_task(4)
    left = without(task, {task.samples[1].row.id})
    assert [sample.offset for sample in left.samples] == [0, 128, 192]
    assert without(task, {"another"}) is task


def test_a_refusal_names_samples_and_says_what_to_do() -> None:
    task = make_task(20, shard=7)
    bad = bad_samples(task, {sample.row.id: "got NaN" for sample in task.samples[:12]})
    text = refusal(bad[:1], 20, believed=True)
    assert "sample 000700000000 (doc 0), shard 7: got NaN" in text
    assert "--on-bad-sample quarantine" in text
    assert "got 12 of 20 computed so far, expected at most 8" in refusal(bad, 20, believed=False)
