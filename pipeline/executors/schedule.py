"""The driver's loop: keeps workers busy, gives lost tasks to others, finds samples that fail, and stops when it is told to.

Decides for any pool of workers; knows neither threads nor Ray nor teachers.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from kvstore import CodecError, KVStoreError
from kvstore.drop import quarantine_samples
from kvstore.storage import locate
from pipeline.executors.base import ExecutorError, Handle, OnBadSample, Pool, Say, Worker, WorkerLostError
from pipeline.executors.crew import KEPT, LOOK_AT, READY_TIMEOUT_S, Crew
from pipeline.failures import one_line
from pipeline.quarantine import BadSample, BadSampleError, Search, allowance, bad_samples, refusal, search, without
from pipeline.stop import NEVER, Interrupted, Stop
from pipeline.tasks import Task, TaskSample
from pipeline.worker import Job, Moments, TaskResult, TeacherInfo

_ECHO_S = 0.5
"""A signal to a whole group of processes may reach a worker before us: so long a loss waits for its explanation."""
CPU_SLOTS, GPU_SLOTS = 2, 8
"""Tasks of one worker at a time: one computes while the others compress and write. A GPU of 2023 computes a task of a 7B teacher in
half a second, which one thread compresses and writes in two: three were always busy there and kept the GPU waiting."""
_MAX_CRASHES = 2
"""The first with whatever else its worker was at, the second alone; before a sample is blamed it crashes another, alone."""
_MAX_LOSSES = 5


@dataclasses.dataclass(slots=True, eq=False, kw_only=True)
class _Item:
    """A task on its way."""

    task: Task
    crashes: int = 0
    """Times its worker's process died with it."""
    losses: int = 0
    """Times its worker was lost and it cannot be to blame."""
    failed_on: Worker | None = None
    """The worker that raised an error from it."""
    is_suspect: bool = False
    """To be run with no other task on its worker, so that a loss is its own."""
    was_cleared: bool = False
    """Whether none of its samples failed alone."""
    search: Search | None = None
    """Set while its bad samples are looked for."""
    trying: tuple[TaskSample, ...] = ()
    bad: list[BadSample] = dataclasses.field(default_factory=list)
    """Samples taken out of it."""


class ScheduledExecutor:
    """An `Executor` on any pool; used by one thread."""

    def __init__(
        self,
        pool: Pool,
        *,
        on_bad_sample: OnBadSample = "fail",
        stop: Stop = NEVER,
        say: Say = lambda _: None,
        ready_timeout_s: float = READY_TIMEOUT_S,
    ) -> None:
        """
        Args:
            on_bad_sample: whether a sample that cannot be computed ends the run, or is left out and recorded in the store.
            stop: asked again and again whether to go on.
            ready_timeout_s: how long workers may take to get a place and load the teacher.
        """
        self.crew = Crew(pool, say, ready_timeout_s)
        self.quarantining, self.stop, self.say = on_bad_sample == "quarantine", stop, say
        self.bad: dict[str, BadSample] = {}
        self.owners: dict[int, Worker] = {}
        """Who holds what calibration computed of a shard."""
        self.num_computed = 0
        """Samples."""
        self.slots = CPU_SLOTS
        self.num_workers = 0

    @property
    def bad_ids(self) -> Collection[str]:
        return self.bad.keys()

    def describe(self) -> TeacherInfo:
        infos = self.crew.start()
        if any(info.spec != infos[0].spec for info in infos):
            raise ExecutorError("workers disagree on the teacher's geometry; install the same versions on every node")
        self.slots, self.num_workers = slots_of(infos[0]), len(infos)
        if infos[0].is_partial:
            whole: TeacherInfo = self.ask("describe_whole")
            return whole
        return infos[0]

    def calibrate(self, job: Job, tasks: Sequence[Task]) -> Iterator[tuple[int, Moments]]:
        for worker, item, moments in _Round(self, "calibrate", job, iter(tasks), slots=1).results():
            self.owners[item.task.shard] = worker
            yield item.task.shard, moments

    def run(self, job: Job, tasks: Iterable[Task], replace: bool = False) -> Iterator[TaskResult]:
        for _, item, result in _Round(self, "run", job, iter(tasks), (replace,), slots=self.slots).results():
            yield dataclasses.replace(result, quarantined=tuple(item.bad)) if item.bad else result

    def ask(self, question: str, *arguments: Any) -> Any:
        while True:
            worker = self.crew.one()
            handle = self.crew.pool.start(worker, question, *arguments)
            try:
                while not self.crew.wait([handle]):
                    pass
                answer = self.crew.pool.result(handle)
            except WorkerLostError as loss:
                self.crew.lose(worker, loss, question)
            else:
                self.crew.succeeded()
                return answer

    def close(self) -> None:
        self.crew.close()


def slots_of(teacher: TeacherInfo) -> int:
    return CPU_SLOTS if teacher.device == "cpu" else GPU_SLOTS


class _Round:
    """One pass of a schedule over some tasks."""

    def __init__(
        self,
        executor: ScheduledExecutor,
        method: str,
        job: Job,
        tasks: Iterator[Task],
        more: tuple[Any, ...] = (),
        *,
        slots: int,
    ) -> None:
        """Have every task done by a worker's `method(job, task, *more)`, `slots` at a time."""
        self._of, self._crew, self._pool, self._stop = executor, executor.crew, executor.crew.pool, executor.stop
        self._method, self._job, self._tasks, self._more, self._slots = method, job, tasks, more, slots
        self._queue: deque[_Item] = deque()
        """To be done before further tasks are asked for."""
        self._reserved: dict[Worker, deque[_Item]] = {}
        """For the workers that calibrated them."""
        self._running: dict[Handle, tuple[Worker, _Item]] = {}
        self._exhausted = False
        self._error: Exception | None = None
        """Raised when what is in hand is finished."""

    def results(self) -> Iterator[tuple[Worker, _Item, Any]]:
        self._crew.one()
        with self._stop.deferred():
            while True:
                while self._may_begin() and self._begin_one():
                    pass
                if not self._running and (not self._may_begin() or self._is_done()):
                    break
                done = self._crew.wait(self._running)
                if self._stop.is_over:
                    break
                for handle in done:
                    if handle in self._running:  # not so when its worker was lost a moment ago
                        yield from self._finish(handle)
            if self._error is not None and not self._stop.requested:
                raise self._error

    def _may_begin(self) -> bool:
        return not self._stop.requested and self._error is None

    def _is_done(self) -> bool:
        return self._exhausted and not self._queue and not any(self._reserved.values())

    def _items_of(self, worker: Worker) -> list[_Item]:
        return [item for who, item in self._running.values() if who is worker]

    def _begin_one(self) -> bool:
        """Give one worker something to do; False when there is nothing for any of them."""
        # A suspect waits for a worker without work, so nobody gets a second task meanwhile.
        slots = 1 if any(item.is_suspect for item in self._queue) else self._slots
        for worker in sorted(self._crew.ready, key=lambda worker: len(self._items_of(worker))):
            items = self._items_of(worker)
            if len(items) < slots and not any(item.is_suspect for item in items):
                chosen = self._choose(worker, is_idle=not items)
                if chosen is not None:
                    self._begin(worker, chosen)
                    return True
        return False

    def _choose(self, worker: Worker, *, is_idle: bool) -> _Item | None:
        for waiting in self._queue:
            elsewhere = waiting.failed_on is worker and len(self._crew.ready) > 1
            if not elsewhere and (is_idle or not waiting.is_suspect):
                self._queue.remove(waiting)
                return waiting
        if reserved := self._reserved.get(worker):
            return reserved.popleft()
        while (item := self._next_item()) is not None:
            owner = self._of.owners.get(item.task.shard)
            if self._method != "run" or owner is None or owner is worker:
                return item
            self._reserved.setdefault(owner, deque()).append(item)
        return None

    def _next_item(self) -> _Item | None:
        """The next task, without samples known to be bad; None when there is none, or no time to find out."""
        if self._exhausted or not self._may_begin():
            return None
        try:
            with self._stop.deferred(False):
                task = next(self._tasks, None)
        except Interrupted:
            task = None
        except Exception as error:  # raised when what is in hand is finished, which is worth keeping
            self._error, task = error, None
        if task is None:
            self._exhausted = True
            return None
        item = _Item(task=task)
        self._take_out(item, [self._of.bad[sample.row.id] for sample in task.samples if sample.row.id in self._of.bad])
        return item

    def _begin(self, worker: Worker, item: _Item) -> None:
        if item.search is None:
            handle = self._pool.start(worker, self._method, self._job, item.task, *self._more)
        else:
            handle = self._pool.start(worker, "probe", self._job, dataclasses.replace(item.task, samples=item.trying))
        self._running[handle] = (worker, item)

    def _finish(self, handle: Handle) -> Iterator[tuple[Worker, _Item, Any]]:
        worker, item = self._running[handle]
        try:
            result = self._pool.result(handle)
        except WorkerLostError as loss:
            self._lost(worker, loss)
        except Exception as error:
            if _breaks_its_process(error):
                self._lost(worker, WorkerLostError("crash", one_line(error)))
                return
            del self._running[handle]
            if _is_about_the_store(error):
                self._error = self._error or error
            else:
                self._failed(worker, item, error)
        else:
            del self._running[handle]
            self._crew.succeeded()
            if item.search is not None:
                self._go_on_searching(item, None)
            else:
                self._of.num_computed += len(item.task.samples) if self._method == "run" else 0
                yield worker, item, result

    def _lost(self, worker: Worker, loss: WorkerLostError) -> None:
        """Do elsewhere what a lost worker had in hand and what it was to do."""
        time.sleep(_ECHO_S)
        items = self._items_of(worker)
        self._running = {handle: entry for handle, entry in self._running.items() if entry[0] is not worker}
        self._queue.extend(self._reserved.pop(worker, ()))
        self._of.owners = {shard: owner for shard, owner in self._of.owners.items() if owner is not worker}
        if self._stop.requested:
            self._crew.retire(worker)
            return
        # That a worker dies is expected while a sample that does so is looked for, and the search is bounded.
        expected = loss.kind == "crash" and any(item.search is not None for item in items)
        self._crew.lose(worker, loss, f"shard {', '.join(str(item.task.shard) for item in items)}", expected=expected)
        for item in items:
            item.is_suspect = loss.kind != "node"
            if loss.kind != "crash":
                self._lost_innocently(item, loss)
            elif item.search is not None:
                self._go_on_searching(item, "its worker's process died")
            elif item.crashes + 1 < _MAX_CRASHES:
                item.crashes += 1
                self._queue.append(item)
            else:
                self._search(item, loss)

    def _lost_innocently(self, item: _Item, loss: WorkerLostError) -> None:
        """Queue again what a machine's memory or network ended: no sample is judged by that."""
        item.losses += 1
        if item.losses >= _MAX_LOSSES:
            raise ExecutorError(
                f"shard {item.task.shard}: its worker was lost {item.losses} times, {LOOK_AT[loss.kind]} ({loss}). {KEPT}"
            ) from loss
        self._queue.append(item)

    def _failed(self, worker: Worker, item: _Item, error: Exception) -> None:
        if item.search is not None:
            self._go_on_searching(item, one_line(error))
        elif item.failed_on is None and len(self._crew.ready) > 1:
            item.failed_on, item.is_suspect = worker, True
            self._queue.append(item)
        else:
            self._search(item, error)

    def _search(self, item: _Item, cause: Exception) -> None:
        """Look for the samples that make a task fail."""
        if item.was_cleared:
            raise ExecutorError(
                f"shard {item.task.shard}: its task fails ({one_line(cause)}), but none of its {len(item.task.samples)} samples fails "
                f"alone: try smaller --batch-tokens. {KEPT}"
            ) from cause
        self._of.say(f"shard {item.task.shard} fails ({one_line(cause)}): looking for the samples that are to blame")
        item.search, item.is_suspect = search(item.task.samples, self._allowed(item)), True
        self._go_on_searching(item, None)

    def _go_on_searching(self, item: _Item, outcome: str | None) -> None:
        assert item.search is not None
        try:
            item.trying = item.search.send(outcome)
            self._queue.appendleft(item)
        except StopIteration as found:
            item.search, item.failed_on = None, None
            self._judge(item, found.value)

    def _judge(self, item: _Item, reasons: dict[str, str]) -> None:
        bad = bad_samples(item.task, reasons)
        believed = len(bad) <= self._allowed(item) and not len(bad) == len(item.task.samples) > 1
        if not bad:
            item.was_cleared, item.crashes = True, 0
            self._queue.append(item)
        elif not (self._of.quarantining and believed):
            computed = self._of.num_computed + len(item.task.samples)
            self._error = BadSampleError(refusal([*self._of.bad.values(), *bad], computed, believed=believed))
        else:
            item.crashes = 0
            self._take_out(item, bad)
            self._queue.append(item)

    def _allowed(self, item: _Item) -> int:
        """How many samples of a task may be bad."""
        return allowance(self._of.num_computed + len(item.task.samples)) - len(self._of.bad)

    def _take_out(self, item: _Item, bad: Sequence[BadSample]) -> None:
        """Leave samples out of a task, and write that down where there is a store already: before its shard is committed."""
        if not bad:
            return
        self._of.bad.update({sample.id: sample for sample in bad})
        if self._method == "run":
            records = {sample.id: {"source": sample.source, "reason": sample.reason} for sample in bad}
            counts = {sample.row.id: sample.row.count for sample in item.task.samples if sample.row.id in records}
            quarantine_samples(locate(self._job.store), item.task.shard, records, "kvpipe extract", counts)
            item.bad += bad
        item.task = without(item.task, {sample.id for sample in bad})


def _breaks_its_process(error: Exception) -> bool:
    """Whether nothing can be computed in the worker's process any more: an error of the GPU's context stays."""
    return "CUDA error" in str(error)


def _is_about_the_store(error: Exception) -> bool:
    """Whether an error has to do with disks and records, not with samples."""
    return isinstance(error, (KVStoreError, OSError)) and not isinstance(error, CodecError)
