"""Which samples make a task fail: found by trying parts of it, and what is said of them. Pure; runs nothing itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Generator, Sequence

from pipeline.tasks import Task, TaskSample

MOST_SHARE = 0.1
"""Of the samples computed so far at most this share may be bad: with more it is not the samples."""
MOST_AT_FIRST = 8
"""As many may be bad in any case."""
_SHOWN = 8

Search = Generator[tuple[TaskSample, ...], str | None, dict[str, str]]
"""Yields samples to try together, is sent why that failed (None: it went well), returns ids of bad samples with the reason."""


class BadSampleError(ValueError):
    """Samples cannot be computed: take them out of the data, or have them left out with --on-bad-sample quarantine."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BadSample:
    """A sample that is left out, and why."""

    id: str
    source: str
    shard: int
    reason: str

    def __str__(self) -> str:
        return f"sample {self.id[:12]} ({self.source}), shard {self.shard}: {self.reason}"


def bad_samples(task: Task, reasons: dict[str, str]) -> list[BadSample]:
    """The records of some samples of a task."""
    return [
        BadSample(id=sample.row.id, source=sample.row.source, shard=task.shard, reason=reasons[sample.row.id])
        for sample in task.samples
        if sample.row.id in reasons
    ]


def without(task: Task, ids: Collection[str]) -> Task:
    """The task without some of its samples; the rows of the others stay where they are."""
    kept = tuple(sample for sample in task.samples if sample.row.id not in ids)
    return task if len(kept) == len(task.samples) else dataclasses.replace(task, samples=kept)


def allowance(num_computed: int) -> int:
    """How many bad samples are believed among so many."""
    return max(MOST_AT_FIRST, int(MOST_SHARE * num_computed))


def search(samples: Sequence[TaskSample], most: int) -> Search:
    """Find the samples that fail alone, of samples that fail together, by halving; ends when there are more than `most`.

    A sample is bad only when it failed alone. Nothing is found where samples fail only in company.
    """
    found: dict[str, str] = {}

    def halve(group: tuple[TaskSample, ...], reason: str | None) -> Generator[tuple[TaskSample, ...], str | None, None]:
        """`group` fails; `reason` is why, None where that is only inferred."""
        if len(found) > most:
            return
        if len(group) == 1:
            reason = reason or (yield group)
            if reason is not None:
                found[group[0].row.id] = reason
            return
        left, right = group[: len(group) // 2], group[len(group) // 2 :]
        reason = yield left
        if reason is None:
            yield from halve(right, None)  # a crash less: each costs a worker
            return
        yield from halve(left, reason)
        reason = yield right
        if reason is not None:
            yield from halve(right, reason)

    yield from halve(tuple(samples), None)
    return found


def refusal(bad: Sequence[BadSample], num_samples: int, *, believed: bool) -> str:
    """What to tell a person whose run ends because of bad samples.

    Args:
        num_samples: computed so far.
        believed: whether it is the samples' fault.
    """
    shown = "\n  ".join(map(str, bad[:_SHOWN])) + ("\n  ..." if len(bad) > _SHOWN else "")
    if not believed:
        return (
            f"bad samples: got {len(bad)} of {num_samples:,} computed so far, expected at most {allowance(num_samples)} and never all "
            f"of a shard; more are the teacher's or the machine's fault rather than the samples':\n  {shown}\n"
            "Try another --dtype (float16 overflows where bfloat16 does not), fewer --batch-tokens, and the checkpoint on other "
            "text. What is committed is kept: the same command goes on from there"
        )
    return (
        f"{len(bad)} sample(s) cannot be computed:\n  {shown}\n"
        "Take them out of the data, or leave them out with --on-bad-sample quarantine, which records them in the store. What is "
        "committed is kept: the same command goes on from there"
    )
