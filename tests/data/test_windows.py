"""Windows of a data set: bounded, in order, the same however they are reached, and passed over without tokenising."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.documents import Document
from pipeline.data.samples import Cutter
from pipeline.data.windows import Consumed, IdSet, Limits, Window, Windows
from tests.checkpoints import byte_tokenizer

CUTTER = Cutter(tokenizer=byte_tokenizer(), seq_len=16)
WORDS = ["alpha beta gamma delta", "the same", "a", "", "ninety nine lines of text, more or less", "the end"]


def documents(count: int, first: int = 0) -> list[Document]:
    return [
        Document(source=str(number), text=WORDS[number % len(WORDS)] + str(number % 7))
        for number in range(first, first + count)
    ]


def all_windows(windows: Windows) -> list[Window]:
    found = []
    while not found or not found[-1].last:
        found.append(windows.next())
    return found


def windows_of(found: list[Document], window_tokens: int, **limits: int) -> list[Window]:
    return all_windows(Windows(found, CUTTER, Limits(window_tokens=window_tokens, **limits)))


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 60), window_tokens=st.integers(1, 400))
def test_windows_together_hold_what_one_would(count: int, window_tokens: int) -> None:
    (whole,) = windows_of(documents(count), 10**9)
    parts = windows_of(documents(count), window_tokens)
    counts: dict[str, int] = {}
    for sample in itertools.chain.from_iterable(window.samples for window in parts):
        counts[sample.id] = counts.get(sample.id, 0) + sample.count
    assert counts == {sample.id: sample.count for sample in whole.samples}
    assert [window.number for window in parts] == list(range(len(parts)))
    assert [window.last for window in parts] == [False] * (len(parts) - 1) + [True]
    assert sum(window.consumed.documents for window in parts) == count
    assert (parts[-1].consumed.samples, parts[-1].consumed.tokens) == (len(whole.samples), whole.num_tokens)
    for window in parts:
        assert [sample.id for sample in window.samples] == sorted(sample.id for sample in window.samples)
        assert window.num_tokens < window_tokens + 64


@settings(max_examples=40, deadline=None)
@given(count=st.integers(8, 60), window_tokens=st.integers(20, 200), data=st.data())
def test_windows_after_skipped_ones_are_the_same(count: int, window_tokens: int, data: st.DataObject) -> None:
    expected = windows_of(documents(count), window_tokens)
    skipped = data.draw(st.integers(0, len(expected) - 1))
    read: list[str] = []

    def counted() -> Iterator[Document]:
        for document in documents(count):
            read.append(document.source)
            yield document

    windows = Windows(counted(), CUTTER, Limits(window_tokens=window_tokens))
    for window in expected[:skipped]:
        assert windows.may_skip(window.consumed)
        windows.skip(window.consumed, [sample.id for sample in window.samples])
    assert [_plain(window) for window in all_windows(windows)] == [_plain(window) for window in expected[skipped:]]
    assert read == [str(number) for number in range(count)]


def _plain(window: Window) -> tuple[int, list[tuple[str, int]], Consumed, bool]:
    return window.number, [(sample.id, sample.count) for sample in window.samples], window.consumed, window.last


@pytest.mark.parametrize("change", ["text", "order", "fewer"])
def test_skipping_other_documents_is_refused(change: str) -> None:
    first = windows_of(documents(40), 100)[0]
    changed = documents(40)
    if change == "text":
        changed[1] = Document(source="1", text="something else")
    elif change == "order":
        changed[0], changed[1] = changed[1], changed[0]
    else:
        changed = changed[: first.consumed.documents - 1]
    with pytest.raises(ValueError, match=r"--data: window 0 of the data is \d+ documents of sha256 .* made from"):
        Windows(changed, CUTTER, Limits(window_tokens=100)).skip(first.consumed, [])


@pytest.mark.parametrize(
    ("limits", "expected"),
    [({"samples": 3}, 3), ({"tokens": 25}, 2), ({"tokens": 0}, 6), ({"samples": 9, "tokens": 30}, 3), ({}, 6)],
)
@pytest.mark.parametrize("window_tokens", [10, 10**9])
def test_limits_stop_in_time(limits: dict[str, int], expected: int, window_tokens: int) -> None:
    found = [Document(source=str(number), text=f"text no. {number}") for number in range(6)]
    parts = windows_of(found, window_tokens, **limits)
    assert sum(len(window.samples) for window in parts) == expected
    consumed = parts[0].consumed
    assert Windows([], CUTTER, Limits(window_tokens=9, samples=consumed.samples)).may_skip(consumed) is False
    assert Windows([], CUTTER, Limits(window_tokens=9, tokens=consumed.tokens)).may_skip(consumed) is False


def test_nothing_is_read_beyond_what_is_asked_for() -> None:
    read = 0

    def endless() -> Iterator[Document]:
        nonlocal read
        for number in itertools.count():
            read = number
            yield Document(source=str(number), text=f"text no. {number}")

    windows = Windows(endless(), CUTTER, Limits(window_tokens=1000))
    assert not windows.next().last
    assert read < 300
    limited = Windows(endless(), CUTTER, Limits(window_tokens=1000, samples=5))
    assert limited.next().last


def test_data_without_a_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="no sample of at least two tokens"):
        Windows([Document(source="a", text="x")], CUTTER, Limits(window_tokens=9)).next()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.binary(min_size=32, max_size=32), max_size=50), st.lists(st.binary(min_size=32, max_size=32), max_size=10))
def test_a_set_of_ids_knows_what_it_was_given(given_ids: list[bytes], others: list[bytes]) -> None:
    for recent in (3, 10**6):  # sorted in again and again, and not at all
        ids = IdSet()
        with mock.patch("pipeline.data.windows._RECENT_IDS", recent):
            for first in [*range(0, len(given_ids), 7), 0]:
                ids.update(identity.hex() for identity in given_ids[first : first + 7])
        assert all(identity.hex() in ids for identity in given_ids)
        assert [identity.hex() in ids for identity in others] == [identity in given_ids for identity in others]


def test_a_set_of_ids_stays_right_when_it_is_large() -> None:
    import hashlib

    ids, present = IdSet(), [hashlib.sha256(str(number).encode()).hexdigest() for number in range(200_000)]
    ids.update(present[:70_000])
    ids.update(present[70_000:150_000])
    assert all(identity in ids for identity in present[:150_000:97])
    assert not any(identity in ids for identity in present[150_000::97])
