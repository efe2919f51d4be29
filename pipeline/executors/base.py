"""What an executor does for a run, and what it needs of the place where workers are. Knows neither threads nor Ray."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from pipeline.tasks import Task
from pipeline.worker import Job, Moments, TaskResult, TeacherInfo

OnBadSample = Literal["fail", "quarantine"]
Say = Callable[[str], object]
Worker = Any
"""A pool's name for one of its workers."""
Handle = Any
"""A pool's name for work that was started."""
Loss = Literal["crash", "memory", "node"]


class ExecutorError(ValueError):
    """Workers cannot be started, or keep being lost: the message says which task and what to look at."""


class WorkerLostError(Exception):
    """A worker ended before its work was done, which is then done elsewhere."""

    def __init__(self, kind: Loss, message: str) -> None:
        """
        Args:
            kind: `crash` when its own process died, for which a sample may be to blame; `memory` when Ray killed it to save the
                machine's memory; `node` when its machine went away.
        """
        super().__init__(message)
        self.kind: Loss = kind


@runtime_checkable
class Executor(Protocol):
    """Runs tasks on one or more workers; results come in the order they finish."""

    def describe(self) -> TeacherInfo:
        """Load the teacher everywhere, all of it at one worker at least, and say what it is."""

    def calibrate(self, job: Job, tasks: Sequence[Task]) -> Iterator[tuple[int, Moments]]:
        """Moments of every task, by shard."""

    def run(self, job: Job, tasks: Iterable[Task], replace: bool = False) -> Iterator[TaskResult]:
        """Compute and commit every task, over commits that are there only with `replace`.

        The next task is asked for when a worker is free to begin it; asking may block. Ends early when the run is to stop.

        Raises:
            BadSampleError: samples cannot be computed; shard and samples are named.
            ExecutorError: workers keep being lost.
        """

    def ask(self, question: str, *arguments: Any) -> Any:
        """Have one worker answer: the result of its method of that name."""

    @property
    def num_workers(self) -> int:
        """Known once the teacher is described."""

    @property
    def bad_ids(self) -> Collection[str]:
        """Samples found that cannot be computed; `run` leaves them out."""

    def close(self) -> None:
        """End all workers."""


@runtime_checkable
class Pool(Protocol):
    """A place where workers are. Used by one thread."""

    def workers(self) -> list[tuple[Worker, Handle]]:
        """Start all workers; the handle of each is done when its teacher is loaded, with its `TeacherInfo`."""

    def start(self, worker: Worker, method: str, /, *arguments: Any) -> Handle:
        """Have a worker do something, beside what it is doing."""

    def wait(self, handles: Collection[Handle], timeout_s: float) -> list[Handle]:
        """Those that are done, after at most so long."""

    def result(self, handle: Handle) -> Any:
        """What came of it; a worker's own exception comes out as itself.

        Raises:
            WorkerLostError: the worker is gone, and the work not done.
        """

    def replace(self, worker: Worker) -> tuple[Worker, Handle] | None:
        """End a worker and start another; None where that cannot be."""

    def close(self) -> None:
        """End all workers."""
