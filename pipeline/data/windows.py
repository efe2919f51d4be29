"""Windows: a data set as runs of samples of bounded size, one after another, however large or unbounded it is.

A window is planned, stored and forgotten before the data is read much further. Equal samples of a window become one; those of
earlier windows are known by their ids alone. Knows samples and limits; no store.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from pipeline.data.documents import Document
from pipeline.data.samples import Cutter, Sample

ID_BYTES = 16
"""What of a sample's sha256 is kept in memory: equal by chance for one pair in 2^64 samples."""
_RECENT_IDS = 16_384
"""Kept as Python objects, which take eight times as much memory, until they are sorted in."""


class IdSet:
    """Sample ids in 16 bytes each, for tens of millions of them."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, dtype=f"S{ID_BYTES}")
        self._recent: set[bytes] = set()

    def __contains__(self, identity: str) -> bool:
        wanted = bytes.fromhex(identity)[:ID_BYTES]
        if wanted in self._recent:
            return True
        # Compared as arrays: numpy strips zero bytes from the end of a single text.
        query = np.array([wanted], dtype=self._sorted.dtype)
        place = int(np.searchsorted(self._sorted, query)[0])
        return bool((self._sorted[place : place + 1] == query).any())

    def update(self, identities: Iterable[str]) -> None:
        self._recent.update(bytes.fromhex(identity)[:ID_BYTES] for identity in identities)
        if len(self._recent) > _RECENT_IDS:
            fresh = np.sort(np.array(list(self._recent), dtype=self._sorted.dtype))
            self._recent.clear()
            # Inserted where they belong: sorting tens of millions again and again would take minutes.
            places = np.searchsorted(self._sorted, fresh)
            is_new = np.array(
                [(self._sorted[place : place + 1] != one).all() for place, one in zip(places, fresh, strict=True)]
            )
            self._sorted = np.insert(self._sorted, places[is_new], fresh[is_new])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Consumed:
    """How far into the data a window reaches: what lets a later run pass over it without making its tokens again."""

    documents: int
    """Documents of this window."""
    sha256: str
    """Of their contents, each after its length in bytes as eight bytes."""
    samples: int
    """Different samples of the data up to the end of this window."""
    tokens: int
    """Their tokens."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One bounded run of samples."""

    number: int
    samples: list[Sample]
    """In order of their ids, each once, with its count in this window; earlier windows may have had it too.

    Ids are hashes: equal sets of samples make equal stores in whatever order they come, and the first tasks, on which a store is
    calibrated, are a random draw.
    """
    consumed: Consumed
    last: bool
    """Whether the data, or what was asked of it, ends here."""

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.input_ids) for sample in self.samples)

    def forget_samples(self) -> None:
        """Let go of the samples, whoever still holds the window; to be called when they have become tasks."""
        self.samples.clear()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much of the data is wanted; a sample that the data repeats counts once."""

    window_tokens: int
    """A window ends with the document with which it has as many."""
    samples: int | None = None
    tokens: int | None = None


class Windows:
    """The windows of a data set in order; each is asked for once. Not safe between threads."""

    def __init__(self, documents: Iterable[Document], cutter: Cutter, limits: Limits) -> None:
        self._remaining, self._cutter, self._limits = iter(documents), cutter, limits
        self._held: deque[Document] = deque()
        self._seen = IdSet()
        self._number, self._samples, self._tokens = 0, 0, 0

    def next(self, progress: Callable[[int], object] = lambda _: None) -> Window:
        """Plan the next window.

        Args:
            progress: told the tokens added, now and then.

        Raises:
            ValueError: the data cannot be read, or its first window has no sample.
        """
        found: dict[str, Sample] = {}
        digest, documents, tokens, ended = hashlib.sha256(), 0, 0, False
        taken: deque[Document] = deque()
        for pieces in self._cutter.samples(self._documents(taken)):
            documents += 1
            digest.update(_framed(taken.popleft()))
            for sample in pieces:
                if sample.id in found:
                    found[sample.id] = found[sample.id].again(sample)
                elif sample.id in self._seen:
                    found[sample.id] = sample
                    tokens += len(sample.input_ids)
                elif self._ends_before(sample):
                    ended = True
                    break
                else:
                    found[sample.id] = sample
                    tokens += len(sample.input_ids)
                    self._samples, self._tokens = self._samples + 1, self._tokens + len(sample.input_ids)
                    progress(len(sample.input_ids))
                    if self._is_at_limit():
                        ended = True
                        break
            if ended or tokens >= self._limits.window_tokens:
                break
        self._held.extendleft(reversed(taken))
        window = Window(
            number=self._number,
            samples=sorted(found.values(), key=lambda sample: sample.id),
            consumed=Consumed(documents=documents, sha256=digest.hexdigest(), samples=self._samples, tokens=self._tokens),
            last=ended or self._is_at_end(),
        )
        if not found and window.number == 0:
            left_out = self._cutter.notes.first_left_out
            raise ValueError(
                "--data: no sample of at least two tokens; the documents are empty, or --max-tokens is below one sample"
                + (f". {self._cutter.notes.num_left_out:,} rows were left out, the first: {left_out}" if left_out else "")
            )
        self._pass(found)
        return window

    def may_skip(self, consumed: Consumed) -> bool:
        """Whether a window that ended so would end so under these limits too, and not be the last."""
        samples, tokens = self._limits.samples, self._limits.tokens
        return (samples is None or consumed.samples < samples) and (not tokens or consumed.tokens < tokens)

    def skip(self, consumed: Consumed, ids: Iterable[str]) -> None:
        """Pass over a window that is stored, without making its tokens.

        Args:
            ids: of all its samples.

        Raises:
            ValueError: the documents are not those it was made from.
        """
        digest, documents = hashlib.sha256(), 0
        for document in itertools.islice(self._documents(deque(maxlen=0)), consumed.documents):
            digest.update(_framed(document))
            documents += 1
        if documents < consumed.documents or digest.hexdigest() != consumed.sha256:
            raise ValueError(
                f"--data: window {self._number} of the data is {documents} documents of sha256 {digest.hexdigest()[:12]}, the store "
                f"was made from {consumed.documents} of {consumed.sha256[:12]}; the data, its order or --seed has changed. Give the same "
                "data to go on, or choose another --out"
            )
        self._samples, self._tokens = consumed.samples, consumed.tokens
        self._pass(ids)

    def _pass(self, ids: Iterable[str]) -> None:
        self._seen.update(ids)
        self._number += 1

    def _ends_before(self, sample: Sample) -> bool:
        return bool(self._limits.tokens and self._tokens + len(sample.input_ids) > self._limits.tokens)

    def _is_at_limit(self) -> bool:
        return self._limits.samples is not None and self._samples >= self._limits.samples

    def _is_at_end(self) -> bool:
        following = next(self._documents(deque(maxlen=0)), None)
        if following is not None:
            self._held.appendleft(following)
        return following is None

    def _documents(self, taken: deque[Document]) -> Iterator[Document]:
        """The documents not yet used, kept in `taken` as they go: several are tokenised at a time, and a window may end before the
        last of them."""
        while document := self._held.popleft() if self._held else next(self._remaining, None):
            taken.append(document)
            yield document


def _framed(document: Document) -> bytes:
    content = document.content()
    return len(content).to_bytes(8, "little") + content
