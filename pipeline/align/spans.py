"""The time axis between two tokenizers: which teacher tokens lie under each student token, by the bytes of the text they share.

Offsets are not asked of tokenizers, who count characters and disagree about those split over tokens, spaces and normalised text
(huggingface/tokenizers issues 156, 663, 1775): the bytes each token writes must add up to the text. Knows no store and no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from pipeline.align.time import linear_positions, nearest_positions
from pipeline.align.token_bytes import Ids, TokenBytes

TimeMode = Literal["overlap", "last", "linear", "nearest"]
"""`overlap`: the mean of the teacher tokens under a student token, by bytes; `last`: the last of them alone;
`linear` and `nearest`: by position, interpolated or not."""


class TextChangedError(ValueError):
    """A tokenizer changes a text, as one that normalises Unicode does with some texts: those cannot be aligned by bytes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SpanMap:
    """For each student token the teacher tokens it is compared with, as a sparse matrix in CSR form."""

    indptr: Int64[np.ndarray, "boundary"]
    """Student token i has the entries indptr[i]:indptr[i + 1]."""
    indices: Int64[np.ndarray, "entry"]
    """Teacher token of each entry, increasing within a student token."""
    weights: Float32[np.ndarray, "entry"]
    """They sum to 1 over a student token."""

    @property
    def kept(self) -> Bool[np.ndarray, "student"]:
        """Which student tokens have a counterpart; the others are to be masked."""
        return np.diff(self.indptr) > 0

    @property
    def coverage(self) -> float:
        """Share of student tokens that have a counterpart."""
        return float(self.kept.mean()) if len(self.kept) else 1.0

    def within(self, usable: Bool[np.ndarray, "teacher"]) -> SpanMap:
        """The same without student tokens that want a teacher token that is not usable."""
        rows = np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))
        spoilt = np.zeros(len(self.indptr) - 1, dtype=np.bool_)
        spoilt[rows[~usable[self.indices]]] = True
        kept = ~spoilt[rows]
        counts = np.where(spoilt, 0, np.diff(self.indptr))
        return SpanMap(indptr=np.concatenate([[0], np.cumsum(counts)]), indices=self.indices[kept], weights=self.weights[kept])

    def apply(self, x: Float[Tensor, "teacher ..."]) -> Float[Tensor, "student ..."]:
        """Weighted mean of the teacher's rows for every student token, zero where there is none; keys before rotation only.

        Computes in at least fp32 and rounds once; differentiable.
        """
        rows = torch.from_numpy(np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))).to(x.device)
        dtype = torch.promote_types(x.dtype, torch.float32)
        weights = torch.from_numpy(self.weights).to(x.device, dtype).reshape(-1, *[1] * (x.ndim - 1))
        parts = weights * x.index_select(0, torch.from_numpy(self.indices).to(x.device)).to(dtype)
        out = torch.zeros((len(self.indptr) - 1, *x.shape[1:]), dtype=dtype, device=x.device)
        return out.index_add(0, rows, parts).to(x.dtype)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AlignedSample:
    """One sample in the student's tokens."""

    input_ids: Int64[np.ndarray, "student"]
    spans: SpanMap
    source: Int64[np.ndarray, "student"]
    """The teacher token that writes the last byte of each student token, or is its counterpart; -1 where there is none. What is
    said of that token, its role and its mask, holds for this one."""


def align_sample(teacher: TokenBytes, student: TokenBytes, teacher_ids: Ids, mode: TimeMode = "overlap") -> AlignedSample:
    """Write a sample's text in the student's tokens and find the teacher tokens under each.

    Characters cut by either end of the sample are left out. The student's own first special tokens come first; special tokens that
    both have by the same words stay where they are; a beginning or end of text becomes the student's.

    Raises:
        ValueError: a special token the student has no counterpart of.
        TextChangedError: the student's tokenizer changes this text.
    """
    ids = np.asarray(teacher_ids, dtype=np.int64)
    if teacher.same_as(student):
        everything = np.arange(len(ids))
        spans = SpanMap(indptr=np.arange(len(ids) + 1), indices=everything, weights=np.ones(len(ids), dtype=np.float32))
        return AlignedSample(input_ids=ids, spans=spans, source=everything)
    before, behind = student.frame
    first, last = _content(teacher, ids)
    texts = _texts(teacher, student, ids[first:last])
    shared = {content: token for token, content in student.special.items()}
    found: list[tuple[np.ndarray, SpanMap, np.ndarray]] = [
        _frame(before, first - 1 if _is_end(teacher, ids[:first], "bos_token_id") else None)
    ]
    for start, stop in texts:
        piece = ids[first + start : first + stop]
        if stop - start == 1 and int(piece[0]) in teacher.special:
            found.append(_frame([shared[teacher.special[int(piece[0])]]], first + start))
            continue
        opens = start == 0 and first > 0
        student_ids, spans, source = _align_text(teacher, student, piece, mode, opens=opens)
        offset = first + start
        spans = dataclasses.replace(spans, indices=spans.indices + offset)
        found.append((student_ids, spans, np.where(source < 0, source, source + offset)))
    ends = student.tokenizer.eos_token_id
    if last < len(ids) and ends is not None and _is_end(teacher, ids[last : last + 1], "eos_token_id"):
        behind = behind or [int(ends)]
        found.append(_frame(behind[:1], last))
    return AlignedSample(
        input_ids=np.concatenate([each[0] for each in found]).astype(np.int64),
        spans=_concatenate([each[1] for each in found]),
        source=np.concatenate([each[2] for each in found]).astype(np.int64),
    )


def align_tokens(
    teacher: TokenBytes, student: TokenBytes, teacher_ids: Ids, student_ids: Ids, mode: TimeMode = "overlap"
) -> SpanMap:
    """The teacher tokens under each student token of the same text.

    Student token i writes the bytes [a_i, b_i), teacher token j those of [c_j, d_j). Its counterparts are the tokens that overlap
    it and end no later, d_j <= b_i: those beyond have read what the student has not. Weights are the shares of the overlap.

    Raises:
        ValueError: the tokens do not write the same bytes.
    """
    teacher_ends, student_ends = (_ends(side.write(ids)) for side, ids in ((teacher, teacher_ids), (student, student_ids)))
    ours, theirs = (b"".join(side.write(ids)) for side, ids in ((student, student_ids), (teacher, teacher_ids)))
    if ours != theirs:
        at = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
        raise ValueError(
            f"tokens of {student.name} and {teacher.name} write other texts from byte {at} on: {ours[at : at + 20]!r} and "
            f"{theirs[at : at + 20]!r}; expected the same. A tokenizer that normalises text cannot be aligned by bytes"
        )
    return _spans(_starts(teacher_ends), teacher_ends, _starts(student_ends), student_ends, mode)


def overlap_spans(
    teacher_starts: Int64[np.ndarray, "teacher"],
    teacher_ends: Int64[np.ndarray, "teacher"],
    student_starts: Int64[np.ndarray, "student"],
    student_ends: Int64[np.ndarray, "student"],
    *,
    last_only: bool = False,
) -> SpanMap:
    """`align_tokens` on byte ranges, each side's in order and without overlap; empty ranges have no counterparts. O(S log T)."""
    real = np.flatnonzero(teacher_ends > teacher_starts)
    starts, ends = teacher_starts[real], teacher_ends[real]
    first = np.searchsorted(ends, student_starts, side="right")
    stop = np.searchsorted(ends, student_ends, side="right")
    first = np.where(student_ends > student_starts, np.minimum(first, stop), stop)
    if last_only:
        first = np.maximum(first, stop - 1)
    counts = stop - first
    indptr = np.concatenate([[0], np.cumsum(counts)])
    row = np.repeat(np.arange(len(counts)), counts)
    entry = np.arange(indptr[-1]) - indptr[row] + first[row]
    overlap = (ends[entry] - np.maximum(starts[entry], student_starts[row])).astype(np.float64)
    total = np.bincount(row, weights=overlap, minlength=len(counts))
    return SpanMap(indptr=indptr, indices=real[entry], weights=(overlap / total[row]).astype(np.float32))


def linear_spans(num_teacher: int, num_student: int) -> SpanMap:
    """Interpolate by position alone, first to first and last to last, whatever the tokens write: for comparison, or other text.

    Raises:
        ValueError: there is nothing to interpolate.
    """
    whole, remainder = (each.numpy() for each in linear_positions(num_teacher, num_student))
    weight = remainder / max(num_student - 1, 1)
    counts = 1 + (remainder > 0)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    indices = np.repeat(whole, counts)
    weights = np.repeat(1.0 - weight, counts)
    above = indptr[1:][remainder > 0] - 1
    indices[above] += 1
    weights[above] = weight[remainder > 0]
    return SpanMap(indptr=indptr, indices=indices, weights=weights.astype(np.float32))


def nearest_spans(num_teacher: int, num_student: int) -> SpanMap:
    """Take the one token nearest to the same share of the sample, halves going up; otherwise as `linear_spans`.

    Raises:
        ValueError: there is nothing to take from.
    """
    indices = nearest_positions(num_teacher, num_student).numpy()
    return SpanMap(
        indptr=np.arange(num_student + 1, dtype=np.int64), indices=indices, weights=np.ones(num_student, dtype=np.float32)
    )


def _spans(
    teacher_starts: np.ndarray, teacher_ends: np.ndarray, student_starts: np.ndarray, student_ends: np.ndarray, mode: TimeMode
) -> SpanMap:
    if mode == "linear":
        return linear_spans(len(teacher_ends), len(student_ends))
    if mode == "nearest":
        return nearest_spans(len(teacher_ends), len(student_ends))
    return overlap_spans(teacher_starts, teacher_ends, student_starts, student_ends, last_only=mode == "last")


def _align_text(
    teacher: TokenBytes, student: TokenBytes, ids: np.ndarray, mode: TimeMode, *, opens: bool
) -> tuple[np.ndarray, SpanMap, np.ndarray]:
    """The same for tokens without special ones.

    Args:
        opens: whether the text began here, where sentencepiece puts a space of its own.
    """
    written = teacher.write(ids)
    whole = b"".join(written)
    skip = 1 if opens and teacher.prepends_space and whole.startswith(b" ") else 0
    text, cut = _whole_characters(whole[skip:])
    skip += cut
    student_ids = student.encode(text)
    ours, content = student.write(student_ids), text.encode()
    student_ends = _ends(ours)
    joined = b"".join(ours)
    if joined == b" " + content:
        student_ends = student_ends - 1
    elif joined != content:
        at = next(
            (at for at, (a, b) in enumerate(zip(joined, content, strict=False)) if a != b), min(len(joined), len(content))
        )
        raise TextChangedError(
            f"tokenizer {student.name}: changes the text from byte {at} on: got {joined[at : at + 20]!r} of {content[at : at + 20]!r}, expected "
            "tokens that write the text as it is. A tokenizer that normalises text cannot be aligned by bytes"
        )
    teacher_ends = _ends(written) - skip
    teacher_starts, student_starts = (
        _starts(teacher_ends, -skip),
        np.maximum(_starts(student_ends, len(content) - len(joined)), 0),
    )
    spans = _spans(teacher_starts, teacher_ends, student_starts, student_ends, mode)
    # The first teacher token that reaches the student token's end writes its last byte.
    source = np.searchsorted(teacher_ends, student_ends, side="left")
    return student_ids, spans, np.minimum(source, len(ids) - 1)


def _content(teacher: TokenBytes, ids: np.ndarray) -> tuple[int, int]:
    """Where a sample's text begins and ends between a beginning and an end of text."""
    first = 0
    while first < len(ids) and _is_end(teacher, ids[first : first + 1], "bos_token_id"):
        first += 1
    last = len(ids)
    while last > first and _is_end(teacher, ids[last - 1 : last], "eos_token_id"):
        last -= 1
    return first, last


def _texts(teacher: TokenBytes, student: TokenBytes, ids: np.ndarray) -> list[tuple[int, int]]:
    """Runs of tokens without special ones, and special ones alone."""
    known = set(student.special.values())
    special = np.array([int(token) in teacher.special for token in ids], dtype=np.bool_)
    strangers = {teacher.special[int(token)] for token in ids[special]} - known
    if strangers:
        raise ValueError(
            f"tokenizer {student.name}: has no special token {', '.join(sorted(strangers))}, which the sample has; expected one of the same words. "
            "Conversations in another chat template are not the student's: extract them for it, or train on plain text"
        )
    edges = np.flatnonzero(np.diff(special, prepend=not special[0] if len(special) else False) | special)
    return [(int(a), int(b)) for a, b in zip(edges, [*edges[1:], len(ids)], strict=True)]


def _frame(ids: Sequence[int], counterpart: int | None) -> tuple[np.ndarray, SpanMap, np.ndarray]:
    """Special tokens, the last of which has a counterpart or none of which has."""
    has = np.zeros(len(ids), dtype=np.int64)
    has[-1:] = counterpart is not None
    indices = np.full(int(has.sum()), -1 if counterpart is None else counterpart, dtype=np.int64)
    spans = SpanMap(
        indptr=np.concatenate([[0], np.cumsum(has)]), indices=indices, weights=np.ones(len(indices), dtype=np.float32)
    )
    return np.array(ids, dtype=np.int64), spans, np.where(has == 1, -1 if counterpart is None else counterpart, -1)


def _concatenate(maps: Sequence[SpanMap]) -> SpanMap:
    counts = np.concatenate([np.diff(each.indptr) for each in maps])
    return SpanMap(
        indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        indices=np.concatenate([each.indices for each in maps]),
        weights=np.concatenate([each.weights for each in maps]),
    )


def _is_end(side: TokenBytes, ids: np.ndarray, which: str) -> bool:
    return len(ids) > 0 and getattr(side.tokenizer, which, None) == int(ids[-1])


def _whole_characters(content: bytes) -> tuple[str, int]:
    """The text of whole characters, and how many bytes of a cut one come before it."""
    cut = next((at for at, byte in enumerate(content[:4]) if byte & 0xC0 != 0x80), 0)
    for end in range(len(content), max(len(content) - 4, cut - 1), -1):
        try:
            return content[cut:end].decode(), cut
        except UnicodeDecodeError:
            continue
    raise ValueError(f"the sample's tokens do not write UTF-8 text: got {content[:40]!r}; expected text")


def _ends(written: Sequence[bytes]) -> Int64[np.ndarray, "token"]:
    return np.cumsum([len(each) for each in written], dtype=np.int64)


def _starts(ends: Int64[np.ndarray, "token"], first: int = 0) -> Int64[np.ndarray, "token"]:
    return np.concatenate([[first], ends[:-1]]).astype(np.int64)[: len(ends)]
