"""The tasks of a run as they come: windows are planned ahead, entered into the store, handed out, and closed when they are done.

What is left of one window is in memory, and the next, which is planned meanwhile. Holds the leases of the shards it hands out.
Knows neither teacher nor text, and does not run anything itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import TypeVar

from kvstore import Store
from kvstore.commits import committed_shards
from kvstore.compaction import compact
from kvstore.lease import LAYOUT, lease
from kvstore.storage import Storage
from pipeline.config import ExtractConfig
from pipeline.data.windows import Window, Windows
from pipeline.enter import Run
from pipeline.heap import trim_heap
from pipeline.parts import Part, RunParts
from pipeline.tasks import Task, refuse_tokens, task_range

Item = TypeVar("Item")
PURPOSE = "kvpipe extract"
COMPACT_WINDOWS = 8
"""Windows whose rows become one table: a billion tokens are then some hundreds of tables, not a thousand."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Skipped:
    """A window that is stored already and was passed over."""

    ids: list[str]
    num_tokens: int


@dataclasses.dataclass(slots=True, kw_only=True)
class _Open:
    """A window some of whose tasks are not done."""

    lease: contextlib.ExitStack
    held: Storage
    """The store, to be written under that lease."""
    todo: set[int]
    """Shards still to be committed."""
    fresh: list[int]
    """Shards this run commits."""


class TaskFlow:
    """The tasks of this run's share of all windows that are not committed yet, in order.

    Consume `wave` from one thread, and tell `done` of every result from the same.

    Args:
        num_embeddings: of the teacher; token ids must be below.
        stored: told the tokens found committed already.
    """

    def __init__(
        self,
        run: Run,
        windows: Windows,
        parts: RunParts,
        first: Part,
        *,
        num_embeddings: int,
        stored: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._run, self._windows, self._parts = run, windows, parts
        self._num_embeddings, self._stored = num_embeddings, stored
        self._open: dict[int, _Open] = {}
        self._fresh: list[int] = []
        self._closed = 0
        self._items = self._all_items(first)
        self._held: Task | Window | None = None
        self.range = range(first.first_shard, first.first_shard)
        """Shards of this run's share in the newest window."""
        self._planned_tokens, self._is_planned = 0, False

    def wave(self, admits: Callable[[Task | Window], bool]) -> Iterator[Task]:
        """The next tasks, up to the first that is not admitted, or to the first whose window is not."""
        while (item := self._held or next(self._items, None)) is not None:
            self._held = item
            if not admits(item):
                return
            self._held = None
            if isinstance(item, Task):
                yield item

    @property
    def is_stopped(self) -> bool:
        """Whether something is left that was not admitted."""
        return self._held is not None

    @property
    def total_tokens(self) -> int | None:
        """Tokens of all tasks of this run, those committed before included; None until its last window is planned."""
        return self._planned_tokens if self._is_planned else None

    def done(self, shard: int) -> None:
        """A task has been committed: the window it closes is put into a table now and then, and its lease ends."""
        number = next(number for number, window in self._open.items() if shard in window.todo)
        window = self._open[number]
        window.todo.remove(shard)
        if not window.todo:
            self._close(number)

    def close(self) -> None:
        """Give up every lease; to be called at the end, whatever happened."""
        self._items.close()
        for window in self._open.values():
            window.lease.close()
        self._open.clear()

    def _all_items(self, first: Part) -> Generator[Task | Window, None, None]:
        """Every later window before it is entered, and its tasks after that."""
        yield from self._enter(first, 0, last=self._run.first.last)
        if self._run.first.last:
            return
        for number, item in enumerate(_ahead(self._later_windows()), start=1):
            if isinstance(item, _Skipped):
                self._parts.know(item.ids)
                share = round(item.num_tokens * share_size(self._run.config))
                self._planned_tokens += share
                self._stored(share)
                continue
            yield item
            with lease(self._run.storage, LAYOUT, LAYOUT + 1, PURPOSE, wait=self._run.say) as held:
                part = self._parts.enter(item, held)
            item.forget_samples()
            yield from self._enter(part, number, last=item.last)

    def _later_windows(self) -> Iterator[Window | _Skipped]:
        store = Store(self._run.storage)
        committed = set(store.samples.summary["shard"].to_pylist())
        for number in itertools.count(1):
            recorded = self._parts.recorded(number)
            if recorded is not None and self._windows.may_skip(recorded.consumed) and committed.issuperset(recorded.shards):
                ids = self._parts.ids_of(store, recorded.part)
                self._windows.skip(recorded.consumed, ids)
                yield _Skipped(ids=ids, num_tokens=recorded.num_tokens)
                continue
            window = self._windows.next()
            refuse_tokens(window, self._num_embeddings)
            yield window
            if window.last:
                return

    def _enter(self, part: Part, window: int, *, last: bool) -> Iterator[Task]:
        """The tasks of this run's share of a window, under a lease."""
        chosen = share_of(self._run.config, len(part.tasks), window)
        tasks = part.tasks[chosen.start : chosen.stop]
        part.tasks.clear()
        self.range = range(part.first_shard + chosen.start, part.first_shard + chosen.stop)
        self._planned_tokens += sum(task.num_tokens for task in tasks)
        self._is_planned = last
        committed = set() if part.is_new else committed_shards(self._run.storage) & {task.shard for task in tasks}
        open_lease = contextlib.ExitStack()
        held = open_lease.enter_context(lease(self._run.storage, self.range.start, self.range.stop, PURPOSE))
        if committed:
            self._run.say(f"resuming {self._run.storage.location}: {len(committed)} of {len(tasks)} shards are committed")
            self._stored(sum(task.num_tokens for task in tasks if task.shard in committed))
        shards = [task.shard for task in tasks if task.shard not in committed]
        self._open[part.number] = _Open(lease=open_lease, held=held, todo=set(shards), fresh=shards)
        if not shards:
            self._close(part.number)
        tasks.reverse()
        while tasks:  # each is let go of when it is handed out: the next window takes its place in memory
            task = tasks.pop()
            if task.shard not in committed:
                yield dataclasses.replace(task, claim=held.claim)

    def _close(self, number: int) -> None:
        window = self._open.pop(number)
        trim_heap()
        with window.lease:
            self._fresh += window.fresh
            self._closed += 1
            if self._closed % COMPACT_WINDOWS == 0 and self._fresh:
                # Under a lease, for a drop at the same time would find its texts written into a table again.
                compact(window.held, self._fresh)
                self._fresh = []
                trim_heap()


def share_of(config: ExtractConfig, num_tasks: int, window: int) -> range:
    """The tasks of a window that fall to this run; with each window the shares move on by one, for a small one has not enough for
    all."""
    if config.task_range is None:
        return range(num_tasks)
    number, total = (int(part) for part in config.task_range.split("/"))
    task_range(config.task_range, num_tasks)
    return task_range(f"{(number - 1 + window) % total + 1}/{total}", num_tasks)


def share_size(config: ExtractConfig) -> float:
    """Of all tasks, about what falls to this run."""
    return 1.0 if config.task_range is None else 1 / int(config.task_range.split("/")[1])


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, the next one made in a thread while this one is used; an error comes where its item would."""
    upcoming = _in_background(lambda: next(items, None))
    while (item := upcoming.result()) is not None:
        upcoming = _in_background(lambda: next(items, None))
        yield item


def _in_background(call: Callable[[], Item]) -> Future[Item]:
    """A daemon thread's result: a pool would keep the interpreter from ending while a slow source is read."""
    future: Future[Item] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # handed over, as concurrent.futures does
            future.set_exception(error)

    threading.Thread(target=work, name="plan-ahead", daemon=True).start()
    return future
