"""Cutting documents into samples, with the text and the masks that belong to them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.commits import sample_id
from pipeline.data.documents import Document
from pipeline.data.notes import Notes
from pipeline.data.samples import Cutter, Sample
from tests.checkpoints import byte_tokenizer

TOKENIZER = byte_tokenizer()


def cut(documents: list[Document], seq_len: int, overlap: int = 0, keep_text: bool = True) -> list[list[Sample]]:
    return list(Cutter(tokenizer=TOKENIZER, seq_len=seq_len, overlap=overlap, keep_text=keep_text).samples(documents))


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(max_size=60), max_size=8), seq_len=st.integers(2, 40))
def test_samples_hold_every_token_once_and_their_text(texts: list[str], seq_len: int) -> None:
    documents = [Document(source=str(number), text=text) for number, text in enumerate(texts)]
    for document, samples in zip(documents, cut(documents, seq_len), strict=True):
        ids = TOKENIZER(document.text)["input_ids"]
        pieces = [ids[start : start + seq_len] for start in range(0, len(ids), seq_len)]
        assert [sample.input_ids.tolist() for sample in samples] == [piece for piece in pieces if len(piece) > 1]
        for sample in samples:
            assert (sample.id, sample.source, sample.count) == (sample_id(sample.input_ids), document.source, 1)
            assert sample.text is not None
            assert TOKENIZER.decode(sample.input_ids).strip("�") in sample.text
            assert sample.role is sample.loss_mask is None


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, 90), seq_len=st.integers(2, 30), data=st.data())
def test_overlapping_samples_repeat_what_came_before_and_learn_every_token_once(
    length: int, seq_len: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(1, seq_len - 1))
    text = "".join(chr(97 + number % 26) for number in range(length))
    (samples,) = cut([Document(source="a", text=text)], seq_len, overlap)
    learnt = []
    for before, sample in itertools.pairwise(samples):
        np.testing.assert_array_equal(sample.input_ids[:overlap], before.input_ids[-overlap:])
    for number, sample in enumerate(samples):
        assert len(sample.input_ids) <= seq_len
        assert sample.loss_mask is not None
        assert sample.loss_mask.tolist() == [int(number == 0 or at >= overlap) for at in range(len(sample.input_ids))]
        learnt += sample.input_ids[sample.loss_mask == 1].tolist()
    assert learnt == (TOKENIZER(text)["input_ids"] if length > 1 else [])


def test_a_token_without_a_row_in_the_teachers_table_is_refused_with_its_document() -> None:
    documents = [Document(source="one", text="abc"), Document(source="two", text="a~c")]
    largest = TOKENIZER("~")["input_ids"][0]
    list(Cutter(tokenizer=TOKENIZER, seq_len=8, vocab_size=largest + 1).samples(documents))
    with pytest.raises(ValueError, match=rf"two: got token {largest} \('~'\), expected ids below {largest}, .*another model"):
        list(Cutter(tokenizer=TOKENIZER, seq_len=8, vocab_size=largest).samples(documents))


def test_text_is_left_out_on_request() -> None:
    ((sample,),) = cut([Document(source="a", text="some text")], 64, keep_text=False)
    assert sample.text is None


def test_a_sample_met_again_counts_and_is_learnt_from_where_either_is() -> None:
    (samples,) = cut([Document(source="a", text="abcdefgh")], 6, overlap=4)
    later, first = samples[1], cut([Document(source="b", text="cdefgh")], 6, overlap=4)[0][0]
    assert later.id == first.id
    for one, other in ((later, first), (first, later)):
        both = one.again(other)
        assert (both.count, both.loss_mask.tolist()) == (2, [1] * 6)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 130])
def test_documents_are_tokenised_several_at_a_time_whatever_their_number(size: int) -> None:
    documents = [Document(source=str(number), text=f"text {number}") for number in range(size)]
    assert [samples[0].source for samples in cut(documents, 64)] == [str(number) for number in range(size)]


def test_a_row_that_is_a_single_token_is_counted_and_said() -> None:
    notes = Notes()
    documents = [Document(source=str(number), text=text) for number, text in enumerate(["a", "ab", "b", ""])]
    list(Cutter(tokenizer=TOKENIZER, seq_len=1024, notes=notes).samples(documents))
    assert list(notes.news()) == [
        "--data: 2 x a row that is a single token, which predicts nothing and gives nothing",
        "--data: 1 x a text that is empty or null, which gives nothing",
    ]
