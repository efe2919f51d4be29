"""Which samples a trial tries: from all over the data, and as forward passes run them. Knows lengths; neither teachers nor stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from pipeline.data.samples import Sample
from pipeline.tasks import padded_length, plan_batches

PLACES = 16
"""All over the data, from which samples come where they are not whole tasks."""

_Item = TypeVar("_Item")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How workers cut a task into forward passes."""

    batch_tokens: int
    max_positions: int
    alone: bool

    def batches(self, samples: Sequence[Sample]) -> list[tuple[list[Sample], int]]:
        """The samples of each forward pass and the length each is padded to."""
        lengths = [len(sample.input_ids) for sample in samples]
        found = plan_batches(lengths, self.batch_tokens, self.max_positions, alone=self.alone)
        width = (lambda length: length) if self.alone else (lambda length: padded_length(length, self.max_positions))
        return [([samples[row] for row in rows], width(lengths[rows[0]])) for rows in found]

    def padded_tokens(self, samples: Sequence[Sample]) -> int:
        """Tokens the teacher computes, padding included."""
        return sum(len(rows) * width for rows, width in self.batches(samples))

    def cut(self, samples: Sequence[Sample], most_padded: float | int) -> list[Sample]:
        """Whole forward passes, evenly spread, of at most so many padded tokens; of a larger one a part, of one sample at least."""
        batches = self.batches(samples)
        total = sum(len(rows) * width for rows, width in batches)
        count = max(int(len(batches) * min(most_padded / total, 1.0)), 1)
        chosen = [batches[(2 * turn + 1) * len(batches) // (2 * count)] for turn in range(count)]
        if count == 1:
            rows, width = chosen[0]
            return rows[: max(int(most_padded // width), 1)]
        return [sample for rows, _ in chosen for sample in rows]


def scattered_samples(
    tasks: Sequence[Sequence[Sample]], padded_tokens: float, batching: Batching, least: int
) -> list[list[Sample]]:
    """Samples of so many tokens together: of as many tasks as make them up, or of parts of several.

    Args:
        least: how many parts there are at least.
    """
    longest = max(len(sample.input_ids) for samples in tasks for sample in samples)
    places = max(int(padded_tokens / _mean_tokens(tasks, batching)), min(PLACES, int(padded_tokens // longest)), least)
    chosen = _spread(tasks, places)
    share, generator = padded_tokens / len(chosen), np.random.default_rng(0)
    pieces = []
    for samples in chosen:
        # Drawn at random: those of one forward pass, or of one place in a task, are of one length.
        count = min(max(int(len(samples) * share / batching.padded_tokens(samples)), 1), len(samples))
        drawn = generator.choice(len(samples), count, replace=False)
        pieces.append([samples[index] for index in sorted(drawn.tolist())])
    return pieces


def whole_tasks(
    tasks: Sequence[Sequence[Sample]], padded_tokens: float, batching: Batching, workers: int
) -> list[list[Sample]]:
    """Tasks of so many tokens together, the same number for each worker; where one each is too much, forward passes of one."""
    each = int(padded_tokens / workers / _mean_tokens(tasks, batching))
    chosen = _spread(tasks, max(each, 1) * workers)
    if each < 1:
        return [batching.cut(samples, padded_tokens / workers) for samples in chosen]
    return [list(samples) for samples in chosen]


def _mean_tokens(tasks: Sequence[Sequence[Sample]], batching: Batching) -> float:
    """Of a task, padding included."""
    return sum(map(batching.padded_tokens, tasks)) / len(tasks)


def _spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """So many of them, evenly spread, or all there are."""
    count = min(count, len(items))
    return [items[(2 * turn + 1) * len(items) // (2 * count)] for turn in range(count)]
