"""Documents to samples: tokenises them and cuts them to length.

Knows tokenizers; knows neither the teacher nor what a store has already.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from kvstore.commits import sample_id
from pipeline.data.chat import Conversation, render
from pipeline.data.documents import Document
from pipeline.data.notes import BadRowError, Notes
from pipeline.data.turns import REASONING, ROLES

_TOKENIZE_AT_ONCE = 16
MIN_SAMPLE_TOKENS = 2
"""A sample of one token predicts nothing."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A piece of a document, tokenised."""

    id: str
    source: str
    input_ids: Int32[np.ndarray, "token"]
    text: str | None
    count: int
    """How often the data had exactly these tokens; they are stored once."""
    role: UInt8[np.ndarray, "token"] | None = None
    """Number in `chat.ROLES` of whom a token is from; None for plain text."""
    loss_mask: UInt8[np.ndarray, "token"] | None = None
    """1 for tokens to learn from; None where that is all of them."""

    @property
    def beside(self) -> dict[str, UInt8[np.ndarray, "token"]]:
        """What is known of each token beside its id, by the name of the array that holds it."""
        known = {"role": self.role, "loss_mask": self.loss_mask}
        return {name: array for name, array in known.items() if array is not None}

    def again(self, other: Sample) -> Sample:
        """This sample, counted once more as another with the same tokens; what either is to be learnt from is."""
        mask = self.loss_mask if other.loss_mask is None or self.loss_mask is None else self.loss_mask | other.loss_mask
        return dataclasses.replace(self, count=self.count + other.count, loss_mask=mask)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cutter:
    """How documents become samples."""

    tokenizer: Any
    """A fast Hugging Face tokenizer."""
    seq_len: int
    """Longest sample in tokens."""
    overlap: int = 0
    """Tokens that a later sample of a document repeats from the one before, as context: `loss_mask` is 0 there."""
    keep_text: bool = True
    vocab_size: int | None = None
    """Rows of the teacher's embedding table; ids beyond them are refused here, where a GPU would abort. None refuses none."""
    notes: Notes = dataclasses.field(default_factory=Notes)
    """Told what is odd in the documents; decides whether a conversation that cannot be rendered is left out."""

    def samples(self, documents: Iterable[Document]) -> Iterator[list[Sample]]:
        """The samples of each document in turn, consecutive pieces of at most `seq_len` tokens; pieces of a single token are left
        out.

        Raises:
            BadRowError: a conversation cannot be rendered, and such rows are not to be left out.
            ValueError: a token has no row in the teacher's embedding table.
        """
        for batch in batched(documents, _TOKENIZE_AT_ONCE):
            texts = [document.text for document in batch if document.messages is None]
            encoded = iter(self._encode(texts)) if texts else iter(())
            for document in batch:
                if document.messages is None:
                    yield self._plain(document, *next(encoded))
                else:
                    yield self._conversation(document)

    def _encode(self, texts: list[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        encoded = self.tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
        return zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)

    def _plain(self, document: Document, ids: list[int], offsets: list[tuple[int, int]]) -> list[Sample]:
        if document.problem:
            self.notes.leave_out(f"{document.where} {document.problem}")
            return []
        if not document.text:
            self.notes.count("a text that is empty or null, which gives nothing")
        self._note_length(ids)
        return list(self._text(document, ids, offsets))

    def _note_length(self, ids: Sized) -> None:
        if len(ids) == 1:
            self.notes.count("a row that is a single token, which predicts nothing and gives nothing")

    def _text(self, document: Document, ids: list[int], offsets: list[tuple[int, int]]) -> Iterator[Sample]:
        input_ids = np.array(ids, dtype=np.int32)
        for piece, repeated in self._pieces(len(ids)):
            mask = None
            if self.overlap:
                mask = np.ones(piece.stop - piece.start, dtype=np.uint8)
                mask[:repeated] = 0
            yield self._sample(document, input_ids[piece], _text_of(document.text, offsets[piece]), None, mask)

    def _conversation(self, document: Document) -> list[Sample]:
        assert document.messages is not None
        try:
            found = render(self.tokenizer, document.messages, document.where, document.variables)
        except BadRowError as error:
            if not self.notes.leaves_out:
                raise
            self.notes.leave_out(str(error))
            return []
        self._note(document, found)
        return list(self._cut(document, found))

    def _note(self, document: Document, found: Conversation) -> None:
        """Count what of a conversation is not learnt from though somebody may expect it."""
        assert document.messages is not None
        self._note_length(found.input_ids)
        if not found.loss_mask.any():
            held_back = any(not message.is_learnt for message in document.messages)
            why = "whose assistant's turns say 'weight' 0 or 'train' false" if held_back else "in which no assistant speaks"
            self.notes.count(f"a conversation {why}, so there is nothing to learn from it")
        for message in document.messages:
            if message.role.lower() not in ROLES:
                self.notes.count(
                    f"a turn of role {message.role[:40]!r}, which the chat template gets as it is and which is not learnt from; "
                    "known roles are system, user, assistant, tool and their usual names"
                )
            thoughts = [str(message.turn[name]) for name in REASONING if message.turn and message.turn.get(name)]
            if any(thought.strip() not in found.text for thought in thoughts):
                self.notes.count("a turn whose reasoning the chat template leaves out")
        tools = [tool.get("function", tool) for tool in document.variables.get("tools", ())]
        if any(isinstance(tool, Mapping) and str(tool.get("name")) not in found.text for tool in tools):
            self.notes.count("a row with 'tools' that the chat template leaves out")

    def _cut(self, document: Document, found: Conversation) -> Iterator[Sample]:
        for piece, repeated in self._pieces(len(found.input_ids)):
            mask = found.loss_mask[piece].copy()
            mask[:repeated] = 0
            text = _text_of(found.text, found.offsets[piece])
            yield self._sample(document, found.input_ids[piece], text, found.role[piece], mask)

    def _pieces(self, num_tokens: int) -> Iterator[tuple[slice, int]]:
        """Each piece of a document and how many tokens at its beginning the piece before has too."""
        start = 0
        while num_tokens - start >= MIN_SAMPLE_TOKENS:
            repeated = self.overlap if start else 0
            stop = min(start + self.seq_len, num_tokens)
            # Nothing but repeated tokens would be a sample to learn nothing from.
            if stop - start <= repeated:
                return
            yield slice(start, stop), repeated
            start = stop - self.overlap if stop < num_tokens else num_tokens

    def _sample(
        self, document: Document, input_ids: np.ndarray, text: str, role: np.ndarray | None, mask: np.ndarray | None
    ) -> Sample:
        if self.vocab_size is not None and (largest := int(input_ids.max())) >= self.vocab_size:
            raise ValueError(
                f"{document.source}: got token {largest} ({self.tokenizer.convert_ids_to_tokens(largest)!r}), expected ids below "
                f"{self.vocab_size}, the teacher's vocabulary; the tokenizer in its folder belongs to another model"
            )
        return Sample(
            id=sample_id(input_ids),
            source=document.source,
            input_ids=input_ids,
            text=text if self.keep_text else None,
            count=1,
            role=role,
            loss_mask=mask,
        )


def _text_of(text: str, offsets: list[tuple[int, int]]) -> str:
    spans = [(first, last) for first, last in offsets if last > first]
    return text[spans[0][0] : spans[-1][1]] if spans else ""


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of at most `size` items."""
    remaining = iter(items)
    while batch := list(itertools.islice(remaining, size)):
        yield batch


Progress = Callable[[int], object]
"""Told the tokens added, now and then."""
