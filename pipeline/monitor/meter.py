"""What results of tasks say about a running extraction: tokens per second, how busy each stage is, when it ends."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from pipeline.monitor.reading import STAGES, WAITING, WINDOW_S, Reading
from pipeline.worker import TaskResult

_RESULTS_PER_WORKER = 4  # in a window of fewer, what the workers have in hand would be missed too much

_NO_GAP = 0.9
"""Tasks have the teacher in turn and write side by side: where their turns leave no gap, writing holds up nothing, however busy it is."""


class Meter:
    """Turns results into readings. Knows the sums and the results of the last minute, nothing else.

    Args:
        total_tokens: of all tasks of the run; None where the end of the data is not known.
        done_tokens: those of them that were committed before.
    """

    def __init__(
        self, workers: int, total_tokens: int | None, done_tokens: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total_tokens, self.done_tokens = total_tokens, done_tokens
        self._workers, self._clock, self._started = workers, clock, clock()
        self._recent: deque[tuple[float, TaskResult]] = deque()
        self._window_began = self._started
        self._shards = self._tokens = self._stored_bytes = self._computed = 0
        self._busy = dict.fromkeys(STAGES, 0.0)

    def add(self, result: TaskResult) -> None:
        now = self._clock()
        self._recent.append((now, result))
        while self._recent[0][0] < now - WINDOW_S and len(self._recent) > _RESULTS_PER_WORKER * self._workers:
            self._window_began, _ = self._recent.popleft()
        self._shards += 1
        self._tokens += result.num_tokens
        self._computed += _computed(result)
        self._stored_bytes += result.stored_bytes
        for stage, seconds in _busy([result]).items():
            self._busy[stage] += seconds

    def read(self) -> Reading:
        """The state at the last result, rates and shares over the last minute."""
        results = [result for _, result in self._recent]
        return self._reading(self._window_began, sum(map(_computed, results)), _busy(results), len(results))

    def read_whole(self) -> Reading:
        """The same over the whole run."""
        return self._reading(self._started, self._computed, self._busy, self._shards)

    def _reading(self, began: float, computed: int, busy: Mapping[str, float], num_results: int) -> Reading:
        now = self._recent[-1][0] if self._recent else self._clock()
        left = None if self.total_tokens is None else max(self.total_tokens - self.done_tokens - self._tokens, 0)
        rate = computed / (now - began) if computed and now > began else None
        available = self._workers * (now - began)
        shares = {stage: min(seconds / available, 1.0) if available else 0.0 for stage, seconds in busy.items()}
        return Reading(
            time_s=time.time(),
            seconds=now - self._started,
            shards=self._shards,
            tokens=self._tokens,
            stored_bytes=self._stored_bytes,
            left_tokens=left,
            tokens_per_s=rate,
            shares=shares,
            # With fewer results, workers that have not answered yet would look idle.
            bottleneck=_bottleneck(shares, may_wait=num_results >= 2 * self._workers),
            eta_s=None if rate is None or left is None else left / rate,
        )


def _computed(result: TaskResult) -> int:
    """Tokens whose forward passes this result took; those of calibration are kept and were done before."""
    return result.num_tokens if result.compute_s > 0 else 0


def _busy(results: list[TaskResult]) -> dict[str, float]:
    return {stage: sum((getattr(result, f"{stage}_s") for result in results), 0.0) for stage in STAGES}


def _bottleneck(shares: Mapping[str, float], *, may_wait: bool) -> str | None:
    turns = {stage: share for stage, share in shares.items() if stage != "write"}
    if sum(turns.values()) >= _NO_GAP:
        return max(turns, key=turns.__getitem__)
    busiest = max(shares, key=shares.__getitem__)
    if may_wait and 1 - sum(shares.values()) > shares[busiest]:
        return WAITING
    return busiest if shares[busiest] > 0 else None
