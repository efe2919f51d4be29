"""The held-out split: a pure function, so everything is compared exactly."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.test_sampler import table
from training.held_out import held_out_batches, split_held_out


@pytest.mark.parametrize("number", [1, 2, 4, 6, 7, 11, 12])
def test_held_out_batches_have_every_sample_once_over_the_ranks_and_no_targets(number: int) -> None:
    samples = table(number)
    ranks = [held_out_batches(samples, 2, rank=rank, world_size=3) for rank in range(3)]
    every = [batch for rank in ranks for batch in rank]
    weighed = [pair for batch in every for pair in zip(batch, batch.weights or [1] * len(batch), strict=True)]
    assert sorted(sample for sample, weight in weighed if weight) == samples.index.tolist()
    assert all(batch.targets is None for batch in every)
    assert sum(batch.num_computed for batch in every) == samples.num_tokens.sum() - number
    assert sum(batch.num_predicted for batch in every) == (samples.count * (samples.num_tokens - 1)).sum()


@pytest.mark.parametrize("number", [1, 2, 4, 6, 7, 11, 12])
def test_every_rank_has_as_many_held_out_batches_and_none_is_empty(number: int) -> None:
    ranks = [held_out_batches(table(number), 2, rank=rank, world_size=3) for rank in range(3)]
    assert {len(batches) for batches in ranks} == {-(-number // 6)}
    assert all(batch for batches in ranks for batch in batches)


def ids_of(num_samples: int) -> list[str]:
    return [hashlib.sha256(bytes([index])).hexdigest() for index in range(num_samples)]


@settings(deadline=None, max_examples=50)
@given(
    sources=st.lists(st.sampled_from("abcdefghij"), min_size=2, max_size=50),
    fraction=st.floats(0.01, 0.9),
    max_tokens=st.integers(1, 2000),
)
def test_no_document_lies_on_both_sides_and_the_held_out_side_stays_in_its_limits(
    sources: list[str], fraction: float, max_tokens: int
) -> None:
    tokens = np.random.default_rng(0).integers(1, 50, size=len(sources))
    ids = ids_of(len(sources))
    train, held_out = split_held_out(ids, sources, tokens, fraction=fraction, max_tokens=max_tokens)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(len(sources)))
    assert len(train)
    assert len(held_out)
    documents = sources if len(set(sources)) > 1 else ids
    ours, theirs = {documents[i] for i in train}, {documents[i] for i in held_out}
    assert not ours & theirs
    if len(theirs) > 1:
        assert tokens[held_out].sum() <= min(fraction * tokens.sum(), max_tokens)


def test_the_split_follows_the_content_of_the_documents_and_nothing_else() -> None:
    sources = [f"document-{index // 3}" for index in range(30)]
    tokens, ids = np.full(30, 10), ids_of(30)
    _, held_out = split_held_out(ids, sources, tokens, fraction=0.2, max_tokens=1000)
    backwards = split_held_out(ids[::-1], sources[::-1], tokens, fraction=0.2, max_tokens=1000)[1]
    assert {sources[i] for i in held_out} == {sources[::-1][i] for i in backwards}
    elsewhere = [f"/other/place/{name}" for name in sources]
    moved = split_held_out(ids, elsewhere, tokens, fraction=0.2, max_tokens=1000)[1]
    assert moved.tolist() == held_out.tolist()
    by_content = sorted(set(sources), key=lambda name: min(i for i, of in zip(ids, sources, strict=True) if of == name))
    assert {sources[i] for i in held_out} == set(by_content[:2]), "a fifth of ten equal documents: the first two by hash"


def test_a_document_too_large_to_be_held_out_is_passed_over() -> None:
    ids = ids_of(6)
    names = [name for _, name in sorted(zip(ids, "abcdef", strict=True))]
    tokens = np.array([1000 if name == names[0] else 10 for name in "abcdef"])
    _, held_out = split_held_out(ids, list("abcdef"), tokens, fraction=0.02, max_tokens=1000)
    assert ["abcdef"[i] for i in held_out] == sorted(names[1:3])


def test_where_no_document_fits_the_smallest_is_held_out() -> None:
    _, held_out = split_held_out(ids_of(3), list("abc"), np.array([30, 20, 40]), fraction=0.01, max_tokens=1000)
    assert held_out.tolist() == [1]


def test_nothing_is_held_out_when_nothing_is_asked_for() -> None:
    train, held_out = split_held_out(ids_of(1), ["a"], np.array([5]), fraction=0.0, max_tokens=10)
    assert (train.tolist(), held_out.tolist()) == ([0], [])


def test_holding_out_of_a_single_sample_is_refused() -> None:
    with pytest.raises(ValueError, match=r"eval_fraction: got 0\.1, but the store has 1 sample.*--set eval_fraction=0"):
        split_held_out(ids_of(1), ["a"], np.array([5]), fraction=0.1, max_tokens=10)
