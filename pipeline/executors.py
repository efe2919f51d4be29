"""Where tasks run: in this process, or in Ray actors on one machine or a cluster. The only room that knows Ray.

Both do the same with the same worker; a task's numbers do not depend on which.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from pipeline.plan import Task
from pipeline.worker import Job, Moments, TaskResult, TeacherInfo, TeacherSource, Worker

_MAX_TRIES = 3
_MAX_LOST_IN_A_ROW = 5
_READY_TIMEOUT_S = 1800.0
# Ray's minimum is about 75 MiB; no tensor ever passes through it.
_OBJECT_STORE_BYTES = 100 * 2**20
_PASSED_ON = ("AWS_", "GOOGLE_", "KVPIPE_")
"""Beginnings of the environment variables that say how to reach a bucket."""


class ExecutorError(RuntimeError):
    """Workers cannot be started, or keep being lost: the message says which task and what to look at."""


@runtime_checkable
class Executor(Protocol):
    """Runs tasks on one or more workers; results come in the order they finish."""

    def describe(self) -> TeacherInfo:
        """Load the teacher everywhere, and say what it is."""

    def calibrate(self, job: Job, tasks: Sequence[Task]) -> Iterator[tuple[int, Moments]]:
        """Moments of every task, by shard."""

    def run(self, job: Job, tasks: Iterable[Task], replace: bool = False) -> Iterator[TaskResult]:
        """Compute and commit every task, over commits that are there only with `replace`."""

    def ask(self, question: str, *arguments: Any) -> Any:
        """Have one worker answer: the result of its method of that name."""

    def close(self) -> None:
        """End all workers."""


class SerialExecutor:
    """Everything in this process, one task after another."""

    def __init__(self, source: TeacherSource) -> None:
        self._worker = Worker(source)

    def describe(self) -> TeacherInfo:
        return self._worker.describe()

    def calibrate(self, job: Job, tasks: Sequence[Task]) -> Iterator[tuple[int, Moments]]:
        for task in tasks:
            yield task.shard, self._worker.calibrate(job, task)

    def run(self, job: Job, tasks: Iterable[Task], replace: bool = False) -> Iterator[TaskResult]:
        for task in tasks:
            yield self._worker.run(job, task, replace)

    def ask(self, question: str, *arguments: Any) -> Any:
        return getattr(self._worker, question)(*arguments)

    def close(self) -> None:
        """Nothing to end."""


class RayExecutor:
    """Ray actors that compute and write; a lost actor is replaced and its task queued again, at most three times.

    Args:
        address: a running cluster such as 'auto'; None starts a local one, which `close` ends.
    """

    def __init__(self, source: TeacherSource, workers: int, address: str | None = None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self._ray = ray
        self._started = not ray.is_initialized()
        try:
            if self._started and address:
                ray.init(address=address, log_to_driver=False, logging_level="error")
            elif self._started:
                ray.init(
                    num_cpus=max(workers, os.cpu_count() or 1),
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level="error",
                )
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise ExecutorError(
                f"Ray did not start ({type(error).__name__}: {error}). Check --ray-address; Ray keeps a token under HOME, so HOME "
                "must be writable or RAY_AUTH_TOKEN_PATH set; --workers 0 runs without Ray"
            ) from error
        self._owned: dict[int, Any] = {}
        try:
            self._new_actor = self._actor_factory(source, workers)
            self._idle = [self._new_actor() for _ in range(workers)]
        except BaseException:
            self.close()
            raise

    def _actor_factory(self, source: TeacherSource, workers: int) -> Callable[[], Any]:
        """Decide what each actor asks for, and refuse what the cluster could never give: Ray would wait for ever."""
        resources = self._ray.cluster_resources()
        if source.device.startswith("cuda") and resources.get("GPU", 0) < 1:
            raise ExecutorError(f"device: got {source.device}, but the Ray cluster has no GPU; set --device to cpu or auto")
        gpus = 1 if resources.get("GPU", 0) >= 1 and source.device != "cpu" else 0
        if gpus * workers > resources.get("GPU", 0) or workers > resources.get("CPU", 0):
            raise ExecutorError(
                f"--workers: got {workers}, but the cluster has {resources.get('CPU', 0):g} CPUs and "
                f"{resources.get('GPU', 0):g} GPUs; ask for fewer workers"
            )
        cpus = max(int(resources["CPU"]) // workers, 1) if not gpus else 1
        remote = self._ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(Worker)
        # As an argument: Ray shows what it is told as a runtime environment to everyone on its dashboard.
        environment = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
        return lambda: remote.remote(source, environment)

    def describe(self) -> TeacherInfo:
        answers = [actor.describe.remote() for actor in self._idle]
        infos = self._get(answers, "loading the teacher")
        if any(info.spec != infos[0].spec for info in infos):
            raise ExecutorError(
                "workers disagree on the teacher's geometry; make sure every node has the same files and versions"
            )
        info: TeacherInfo = infos[0]
        return info

    def calibrate(self, job: Job, tasks: Sequence[Task]) -> Iterator[tuple[int, Moments]]:
        for actor, task, moments in self._schedule(tasks, lambda actor, task: actor.calibrate.remote(job, task)):
            self._owned[task.shard] = actor
            yield task.shard, moments

    def run(self, job: Job, tasks: Iterable[Task], replace: bool = False) -> Iterator[TaskResult]:
        for _, _, result in self._schedule(list(tasks), lambda actor, task: actor.run.remote(job, task, replace)):
            yield result

    def ask(self, question: str, *arguments: Any) -> Any:
        return self._get(getattr(self._idle[0], question).remote(*arguments), question)

    def close(self) -> None:
        if self._started:
            self._ray.shutdown()

    def _get(self, references: Any, doing: str) -> Any:
        """Wait for results; a worker's own exception comes out as itself."""
        from ray.exceptions import GetTimeoutError, RayError, RayTaskError

        try:
            return self._ray.get(references, timeout=_READY_TIMEOUT_S)
        except RayTaskError as error:
            raise error.cause from error
        except GetTimeoutError as error:
            raise ExecutorError(f"{doing}: no answer from Ray within {_READY_TIMEOUT_S:.0f} s; see 'ray status'") from error
        except RayError as error:
            raise ExecutorError(
                f"{doing}: a worker was lost ({str(error).splitlines()[0]}); is there enough memory for it?"
            ) from error

    def _schedule(self, tasks: Sequence[Task], start: Callable[[Any, Task], Any]) -> Iterator[tuple[Any, Task, Any]]:
        """Keep every worker busy until all tasks are done; a worker gets the tasks it calibrated first."""
        from ray.exceptions import RayError, RayTaskError

        todo, tries, lost = deque(tasks), dict.fromkeys((task.shard for task in tasks), 0), 0
        running: dict[Any, tuple[Any, Task]] = {}
        while todo or running:
            while self._idle and todo:
                actor = self._idle.pop()
                task = self._next_task(todo, actor)
                tries[task.shard] += 1
                running[start(actor, task)] = (actor, task)
            (done,), _ = self._ray.wait(list(running), num_returns=1)
            actor, task = running.pop(done)
            try:
                result = self._ray.get(done)
            except RayTaskError as error:
                raise error.cause from error
            except RayError as error:
                lost += 1
                if tries[task.shard] >= _MAX_TRIES or lost >= _MAX_LOST_IN_A_ROW:
                    raise ExecutorError(
                        f"shard {task.shard}: its worker was lost {tries[task.shard]} times ({type(error).__name__}), {lost} losses "
                        "in a row; look for out-of-memory in the system log. What is committed is kept: run again to resume"
                    ) from error
                self._ray.kill(actor, no_restart=True)
                self._idle.append(self._new_actor())
                todo.append(task)
            else:
                lost = 0
                self._idle.append(actor)
                yield actor, task, result

    def _next_task(self, todo: deque[Task], actor: Any) -> Task:
        """The first task this worker holds results for, else the first nobody does, else the first."""
        owned = next((task for task in todo if self._owned.get(task.shard) is actor), None)
        free = next((task for task in todo if task.shard not in self._owned), None)
        task = owned or free or todo[0]
        todo.remove(task)
        return task
