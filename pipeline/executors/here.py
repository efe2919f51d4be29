"""Workers in this process: one teacher, used by several threads so that one computes while the others encode and write."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pipeline.executors.base import OnBadSample, Say
from pipeline.executors.crew import READY_TIMEOUT_S
from pipeline.executors.schedule import GPU_SLOTS, ScheduledExecutor
from pipeline.stop import NEVER, Stop
from pipeline.worker import TeacherInfo, TeacherSource, Worker


class SerialExecutor(ScheduledExecutor):
    """Everything in this process, without Ray: the default for one device. A sample that ends its process ends the run."""

    def __init__(
        self,
        source: TeacherSource,
        *,
        on_bad_sample: OnBadSample = "fail",
        stop: Stop = NEVER,
        say: Say = lambda _: None,
    ) -> None:
        super().__init__(
            _Threads(source, stop), on_bad_sample=on_bad_sample, stop=stop, say=say, ready_timeout_s=READY_TIMEOUT_S
        )


class _Threads:
    """A pool of one worker, whose name is 0."""

    def __init__(self, source: TeacherSource, stop: Stop) -> None:
        self._source, self._stop = source, stop
        self._worker: Worker | None = None
        self._threads = ThreadPoolExecutor(GPU_SLOTS, thread_name_prefix="task")

    def workers(self) -> list[tuple[int, Future[TeacherInfo]]]:
        # In this thread, where a signal can interrupt it.
        self._worker = Worker(self._source)
        loaded: Future[TeacherInfo] = Future()
        loaded.set_result(self._worker.describe())
        return [(0, loaded)]

    def start(self, _worker: int, method: str, /, *arguments: Any) -> Future[Any]:
        return self._threads.submit(getattr(self._worker, method), *arguments)

    def wait(self, handles: Collection[Future[Any]], timeout_s: float) -> list[Future[Any]]:
        return list(concurrent.futures.wait(handles, timeout_s, concurrent.futures.FIRST_COMPLETED).done)

    def result(self, handle: Future[Any]) -> Any:
        return handle.result()

    def replace(self, worker: int) -> None:
        """There is no other process to start one in."""

    def close(self) -> None:
        # Threads cannot be ended; who was told to stop does not wait for them.
        self._threads.shutdown(wait=not self._stop.requested, cancel_futures=True)
