"""The workers of a run: starting them, waiting for them, and replacing those that are lost.

Decides for any pool; knows neither threads nor Ray nor tasks.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from pipeline.executors.base import ExecutorError, Handle, Pool, Say, Worker, WorkerLostError
from pipeline.failures import one_line
from pipeline.worker import TeacherInfo

READY_TIMEOUT_S = 1800.0
POLL_S = 0.5
"""How often to look whether to stop; results are taken at once."""
_NOTICE_S = 60.0
_MOST_WAIT_S = 30.0
_MAX_LOST_IN_A_ROW = 5
_LOST_PER_WORKER = 3
LOOK_AT = {
    "crash": "its process died: look for 'out of memory' in the kernel's log (dmesg) of its machine, and into the newest files of "
    "/tmp/ray/session_latest/logs",
    "memory": "Ray ended it because the memory of its machine was nearly full: ask for fewer --workers or smaller --batch-tokens; "
    "RAY_memory_usage_threshold moves the limit",
    "node": "its machine went away or cannot be reached: see 'ray status'",
}
KEPT = "What is committed is kept: run again to resume"


class Crew:
    """The workers of one pool; used by one thread."""

    def __init__(self, pool: Pool, say: Say, ready_timeout_s: float) -> None:
        self.pool, self._say, self._ready_timeout_s = pool, say, ready_timeout_s
        self.ready: list[Worker] = []
        """Those with a teacher."""
        self.starting: dict[Handle, Worker] = {}
        self._due: list[tuple[float, Worker]] = []
        """When to start a worker in place of which."""
        self._lost_in_a_row = 0
        self._last_loss = ""
        self._none_since_s: float | None = None

    def start(self) -> list[TeacherInfo]:
        """Start all workers and wait until each has loaded its teacher.

        Raises:
            ExecutorError: some are not ready in time, or keep being lost; an error of loading comes out as itself.
        """
        self.starting = {handle: worker for worker, handle in self.pool.workers()}
        infos: list[TeacherInfo] = []
        started, noticed = time.monotonic(), False
        while self.starting or self._due:
            self._replace_due()
            for handle in self.pool.wait(list(self.starting), POLL_S) if self.starting else ():
                infos += self.started(handle, must=True)
            waited = time.monotonic() - started
            if waited > _NOTICE_S and not noticed:
                self._say(f"waiting for {len(self.starting)} worker(s) to get a place and load the teacher; see 'ray status'")
                noticed = True
            if self.starting and waited > self._ready_timeout_s:
                raise ExecutorError(
                    f"{len(self.starting)} of {len(self.starting) + len(infos)} workers are not ready after {waited:.0f} s: others "
                    "may hold the cluster's CPUs or GPUs ('ray status'), or loading the teacher takes that long; ask for fewer "
                    "--workers, or wait for the others to finish"
                )
        return infos

    def one(self) -> Worker:
        """A worker with a teacher, after waiting for one if need be."""
        while not self.ready:
            self.wait([])
        return self.ready[0]

    def wait(self, handles: Collection[Handle]) -> list[Handle]:
        """Those of the work that are done, after a moment at most; meanwhile new workers get ready.

        Raises:
            ExecutorError: there is no worker, and none comes.
        """
        self._replace_due()
        self._refuse_none()
        waited_for = [*handles, *self.starting]
        if not waited_for:
            time.sleep(POLL_S)
            return []
        done = self.pool.wait(waited_for, POLL_S)
        for handle in [handle for handle in done if handle in self.starting]:
            self.started(handle)
        return [handle for handle in done if handle in handles]

    def _refuse_none(self) -> None:
        """Refuse to go on where there is no worker and none to come, or none has come for too long."""
        if self.ready:
            self._none_since_s = None
            return
        self._none_since_s = self._none_since_s or time.monotonic()
        waited = time.monotonic() - self._none_since_s
        if not (self.starting or self._due) or waited > self._ready_timeout_s:
            raise ExecutorError(
                f"no worker is left, and none came in place of the lost ones within {waited:.0f} s. {self._last_loss}. {KEPT}"
            )

    def started(self, handle: Handle, *, must: bool = False) -> list[TeacherInfo]:
        """A worker has loaded its teacher, or failed to; what it says of it.

        Args:
            must: whether its error ends the run: else we go on with the others.
        """
        worker = self.starting.pop(handle)
        try:
            info: TeacherInfo = self.pool.result(handle)
        except WorkerLostError as loss:
            self.lose(worker, loss, "loading the teacher")
            return []
        except Exception as error:
            if must or not (self.ready or self.starting):
                raise
            self._last_loss = one_line(error)
            self._say(f"a new worker could not load the teacher, the others go on: {self._last_loss}")
            return []
        self.ready.append(worker)
        return [info]

    def lose(self, worker: Worker, loss: WorkerLostError, doing: str, *, expected: bool = False) -> None:
        """Replace a worker, unless too many were lost with nothing done in between.

        Args:
            expected: whether this loss does not count.

        Raises:
            ExecutorError: that many.
        """
        self._lost_in_a_row += not expected
        self._last_loss = f"{doing}: a worker was lost, {LOOK_AT[loss.kind]} ({loss})"
        self.retire(worker)
        if self._lost_in_a_row >= max(_MAX_LOST_IN_A_ROW, _LOST_PER_WORKER * len(self.ready)):
            raise ExecutorError(
                f"{self._last_loss}. These were {self._lost_in_a_row} losses in a row with nothing done in between. {KEPT}"
            ) from loss
        # Memory that is short now may be free in a moment, and a new worker takes some at once.
        wait_s = min(2.0**self._lost_in_a_row, _MOST_WAIT_S) if loss.kind == "memory" else 0.0
        self._due.append((time.monotonic() + wait_s, worker))
        self._replace_due()

    def _replace_due(self) -> None:
        """Start workers in place of lost ones whose time has come."""
        now = time.monotonic()
        due, self._due = [entry for entry in self._due if entry[0] <= now], [entry for entry in self._due if entry[0] > now]
        for _, worker in due:
            if (replacement := self.pool.replace(worker)) is not None:
                new, handle = replacement
                self.starting[handle] = new

    def retire(self, worker: Worker) -> None:
        """Count on a worker no longer."""
        if worker in self.ready:
            self.ready.remove(worker)

    def succeeded(self) -> None:
        """Something was done: the workers are able to."""
        self._lost_in_a_row = 0

    def close(self) -> None:
        self.pool.close()
