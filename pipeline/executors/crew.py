"""The workers of a run: starting them, waiting for them, and replacing those that are lost.

Decides for any pool; knows neither threads nor Ray nor tasks.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from pipeline.executors.base import ExecutorError, Handle, Pool, Say, Worker, WorkerLost
from pipeline.worker import TeacherInfo

READY_TIMEOUT_S = 1800.0
POLL_S = 0.5
"""How often to look whether to stop; results are taken at once."""
_NOTICE_S = 60.0
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
        self._lost_in_a_row = 0
        self._last_loss = ""

    def start(self) -> list[TeacherInfo]:
        """Start all workers and wait until each has loaded its teacher.

        Raises:
            ExecutorError: some are not ready in time, or keep being lost; an error of loading comes out as itself.
        """
        self.starting = {handle: worker for worker, handle in self.pool.workers()}
        infos: list[TeacherInfo] = []
        started, noticed = time.monotonic(), False
        while self.starting:
            for handle in self.pool.wait(list(self.starting), POLL_S):
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
        deadline = time.monotonic() + self._ready_timeout_s
        while not self.ready:
            self.refuse_none(timed_out=time.monotonic() > deadline)
            for handle in self.pool.wait(list(self.starting), POLL_S):
                self.started(handle)
        return self.ready[0]

    def refuse_none(self, *, timed_out: bool = False) -> None:
        """Refuse to go on where there is no worker and none to come."""
        if not self.ready and (timed_out or not self.starting):
            raise ExecutorError(
                f"no worker is left, and none could be started in place of the lost ones ({self._last_loss}). {KEPT}"
            )

    def started(self, handle: Handle, *, must: bool = False) -> list[TeacherInfo]:
        """A worker has loaded its teacher, or failed to; what it says of it.

        Args:
            must: whether its error ends the run: else we go on with the others.
        """
        worker = self.starting.pop(handle)
        try:
            info: TeacherInfo = self.pool.result(handle)
        except WorkerLost as loss:
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

    def lose(self, worker: Worker, loss: WorkerLost, doing: str, *, expected: bool = False) -> None:
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
        replacement = self.pool.replace(worker)
        if replacement is not None:
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


def wait_for(pool: Pool, handle: Handle) -> Collection[Handle]:
    """Wait for one result, in steps after which signals are heard."""
    while not (done := pool.wait([handle], POLL_S)):
        pass
    return done


def one_line(error: Exception) -> str:
    """An exception in one short line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:297]}..."
