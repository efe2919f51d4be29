"""The driver's decisions, on a pool whose workers do at once what the test says: nothing here depends on time or processes."""

from __future__ import annotations

import dataclasses
import itertools
import signal
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore import CodecError, StoreWriteError
from pipeline.executors import Executor, ExecutorError, crew, schedule
from pipeline.executors.base import Loss, Pool, WorkerLostError
from pipeline.executors.schedule import ScheduledExecutor
from pipeline.quarantine import BadSampleError
from pipeline.stop import Stop
from pipeline.tasks import Task
from pipeline.worker import Job, TaskResult, TeacherInfo
from tests.pipeline.test_quarantine import make_task
from tests.stores import small_spec

INFO = TeacherInfo(
    spec=small_spec(), is_partial=False, attn_implementation="sdpa", max_positions=512, num_embeddings=300, device="cpu"
)
Behave = Callable[[str, Task, int], None]
"""Told method, task and worker; raises what that worker raises."""


@dataclasses.dataclass(eq=False)
class Call:
    worker: int
    method: str
    task: Task | None


class ScriptedPool:
    """Calls end one at a time, the oldest first; a lost worker takes with it what else it was at."""

    def __init__(self, num_workers: int, behave: Behave = lambda *_: None) -> None:
        self._behave = behave
        self._names = itertools.count()
        self._num_workers = num_workers
        self._ended: set[int] = set()
        self.info = INFO
        self.calls: list[Call] = []
        self.pending: list[Call] = []
        self.most_at_once: Counter[int] = Counter()

    def workers(self) -> list[tuple[int, Call]]:
        return [self._launch() for _ in range(self._num_workers)]

    def _launch(self) -> tuple[int, Call]:
        name = next(self._names)
        return name, self.start(name, "load")

    def start(self, worker: int, method: str, *arguments: Any) -> Call:
        assert worker not in self._ended
        call = Call(worker, method, arguments[1] if len(arguments) > 1 else None)
        self.calls.append(call)
        self.pending.append(call)
        at_once = sum(other.worker == worker for other in self.pending)
        self.most_at_once[worker] = max(self.most_at_once[worker], at_once)
        return call

    def wait(self, handles: Collection[Call], timeout_s: float) -> list[Call]:  # noqa: ARG002  # of the protocol
        assert handles
        return [next(call for call in self.calls if call in handles)]

    def result(self, handle: Call) -> Any:
        if handle.worker in self._ended:
            raise WorkerLostError("crash", "gone")
        if handle in self.pending:
            self.pending.remove(handle)
        if handle.method == "load":
            self._behave("load", make_task(0), handle.worker)
            return self.info
        if handle.method == "describe_whole":
            return INFO
        if handle.task is None:
            return handle.method
        try:
            self._behave(handle.method, handle.task, handle.worker)
        except WorkerLostError:
            self._ended.add(handle.worker)
            raise
        return result_of(handle.task)

    def replace(self, worker: int) -> tuple[int, Call]:
        self._ended.add(worker)
        self.pending = [call for call in self.pending if call.worker != worker]
        return self._launch()

    def close(self) -> None:
        self._ended |= set(range(1000))

    def done(self, method: str) -> list[int]:
        return [call.task.shard for call in self.calls if call.method == method and call.task is not None]


def result_of(task: Task) -> TaskResult:
    return TaskResult(
        shard=task.shard,
        num_samples=len(task.samples),
        num_tokens=0,
        stored_bytes=0,
        batch_tokens=1,
        compute_s=0.0,
        copy_s=0.0,
        encode_s=0.0,
        write_s=0.0,
    )


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job whose store remembers what is quarantined."""
    monkeypatch.setattr(schedule, "_ECHO_S", 0.0)
    monkeypatch.setattr(crew, "_MOST_WAIT_S", 0.0)
    monkeypatch.setattr(schedule, "quarantine_samples", lambda _, shard, bad, *__: RECORDED.append((shard, dict(bad))))
    RECORDED.clear()
    return Job(store=str(tmp_path), layers=(0,), alignment=None, batch_tokens=64)


RECORDED: list[tuple[int, dict[str, dict[str, str]]]] = []


def executor_on(pool: ScriptedPool, **settings: Any) -> ScheduledExecutor:
    executor = ScheduledExecutor(pool, **settings)
    assert isinstance(pool, Pool)
    assert isinstance(executor, Executor)
    executor.describe()
    return executor


def contains(task: Task, bad: str) -> bool:
    return any(sample.source == bad for sample in (entry.row for entry in task.samples))


def lose_with(bad: str, kind: Loss = "crash") -> Behave:
    def behave(method: str, task: Task, worker: int) -> None:
        if contains(task, bad):
            raise WorkerLostError(kind, "end of file")

    return behave


def raise_with(bad: str, error: Exception) -> Behave:
    def behave(method: str, task: Task, worker: int) -> None:
        if contains(task, bad):
            raise error

    return behave


def tasks_with(bad_shard: int, num_tasks: int = 6, num_samples: int = 5) -> list[Task]:
    """Tasks, in one of which sample 3 is called bad."""
    tasks = [make_task(num_samples, shard) for shard in range(num_tasks)]
    samples = list(tasks[bad_shard].samples)
    samples[3] = dataclasses.replace(samples[3], row=dataclasses.replace(samples[3].row, source="bad"))
    tasks[bad_shard] = dataclasses.replace(tasks[bad_shard], samples=tuple(samples))
    return tasks


def test_one_worker_is_asked_for_the_whole_teacher_where_all_have_loaded_a_part(job: Job) -> None:
    pool = ScriptedPool(3)
    assert ScheduledExecutor(pool).describe() == INFO
    assert {call.method for call in pool.calls} == {"load"}
    pool = ScriptedPool(3)
    pool.info = dataclasses.replace(INFO, is_partial=True)
    assert ScheduledExecutor(pool).describe() == INFO
    assert [call.worker for call in pool.calls if call.method == "describe_whole"] == [0]


def test_every_task_is_done_once_and_two_at_a_time_by_each_worker(job: Job) -> None:
    pool = ScriptedPool(3)
    results = list(executor_on(pool).run(job, [make_task(2, shard) for shard in range(20)]))
    assert sorted(result.shard for result in results) == list(range(20))
    assert sorted(pool.done("run")) == list(range(20))
    assert set(pool.most_at_once.values()) == {2}


def test_the_next_task_is_asked_for_when_a_worker_is_free(job: Job) -> None:
    pool, given, finished = ScriptedPool(2), 0, 0

    def tasks() -> Iterator[Task]:
        nonlocal given
        for shard in itertools.count():
            assert given - finished < 4, "two workers of two tasks each have no room for a fifth"
            given += 1
            yield make_task(1, shard)

    for _ in executor_on(pool).run(job, tasks()):
        finished += 1
        if finished == 50:
            break
    assert given == 53, "fifty are done and three in hand when the fiftieth result is given"


def test_calibration_is_one_task_at_a_time_and_its_worker_gets_the_task_later(job: Job) -> None:
    pool = ScriptedPool(2)
    executor = executor_on(pool)
    tasks = [make_task(2, shard) for shard in range(6)]
    assert sorted(shard for shard, _ in executor.calibrate(job, tasks[:4])) == [0, 1, 2, 3]
    assert set(pool.most_at_once.values()) == {1}
    list(executor.run(job, tasks))
    who = {(call.method, call.task.shard): call.worker for call in pool.calls if call.task is not None}
    assert all(who["run", shard] == who["calibrate", shard] for shard in range(4))


def test_what_a_dead_worker_calibrated_is_done_by_another(job: Job) -> None:
    died: list[int] = []

    def behave(method: str, task: Task, worker: int) -> None:
        if method == "run" and not died:
            died.append(worker)
            raise WorkerLostError("crash", "killed")

    pool = ScriptedPool(2, behave)
    executor = executor_on(pool)
    tasks = [make_task(2, shard) for shard in range(6)]
    list(executor.calibrate(job, tasks))
    assert sorted(result.shard for result in executor.run(job, tasks)) == list(range(6))


def test_a_sample_that_kills_its_worker_is_found_left_out_and_recorded_before_its_shard_is_done(job: Job) -> None:
    pool = ScriptedPool(3, lose_with("bad"))
    executor = executor_on(pool, on_bad_sample="quarantine")
    results = {result.shard: result for result in executor.run(job, tasks_with(2))}
    assert sorted(results) == list(range(6))
    assert [bad.source for bad in results[2].quarantined] == ["bad"]
    assert results[2].num_samples == 4
    assert all(not result.quarantined for shard, result in results.items() if shard != 2)
    ((shard, records),) = RECORDED
    assert shard == 2
    assert [entry["source"] for entry in records.values()] == ["bad"]
    assert set(executor.bad_ids) == set(records)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_sample_that_raises_is_found_left_out_and_recorded(num_workers: int, job: Job) -> None:
    pool = ScriptedPool(num_workers, raise_with("bad", CodecError("got NaN")))
    executor = executor_on(pool, on_bad_sample="quarantine")
    results = {result.shard: result for result in executor.run(job, tasks_with(2))}
    assert sorted(results) == list(range(6))
    assert [bad.reason for bad in results[2].quarantined] == ["CodecError: got NaN"]
    assert pool.done("run").count(2) == (2 if num_workers == 1 else 3), "once more on another worker where there is one"


@pytest.mark.parametrize("behave", [lose_with("bad"), raise_with("bad", RuntimeError("index out of range"))])
def test_by_default_a_bad_sample_ends_the_run_when_what_is_in_hand_is_done(behave: Behave, job: Job) -> None:
    pool = ScriptedPool(2, behave)
    results: list[TaskResult] = []
    with pytest.raises(BadSampleError, match=r"(?s)1 sample\(s\) cannot be computed.*\(bad\), shard 1:.*--on-bad-sample"):
        results.extend(executor_on(pool).run(job, tasks_with(1, num_tasks=200)))
    assert not RECORDED
    assert not pool.pending
    assert sorted(result.shard for result in results) == sorted(set(pool.done("run")) - {1})


def test_a_sample_found_while_calibrating_is_left_out_of_both_and_recorded_when_there_is_a_store(job: Job) -> None:
    pool = ScriptedPool(2, raise_with("bad", CodecError("got NaN")))
    executor = executor_on(pool, on_bad_sample="quarantine")
    tasks = tasks_with(2)
    assert sorted(shard for shard, _ in executor.calibrate(job, tasks)) == list(range(6))
    assert len(executor.bad_ids) == 1
    assert not RECORDED
    results = {result.shard: result for result in executor.run(job, tasks)}
    assert results[2].num_samples == 4
    assert [shard for shard, _ in RECORDED] == [2]


@pytest.mark.parametrize("num_bad", [5, 40])
def test_samples_that_are_all_bad_are_not_believed(num_bad: int, job: Job) -> None:
    def behave(method: str, task: Task, worker: int) -> None:
        if task.samples:
            raise CodecError("got NaN")

    pool = ScriptedPool(2, behave)
    with pytest.raises(BadSampleError, match="the teacher's or the machine's fault rather than the samples'"):
        list(executor_on(pool, on_bad_sample="quarantine").run(job, [make_task(num_bad, 0)]))
    assert not RECORDED


def test_a_task_that_fails_only_as_a_whole_is_run_again_and_then_ends_the_run(job: Job) -> None:
    def behave(method: str, task: Task, worker: int) -> None:
        if len(task.samples) > 4:
            raise RuntimeError("out of memory")

    pool = ScriptedPool(1, behave)
    with pytest.raises(
        ExecutorError, match=r"(?s)shard 3: its task fails \(RuntimeError: out of memory\).*smaller --batch-tokens"
    ):
        list(executor_on(pool, on_bad_sample="quarantine").run(job, [make_task(8, 3)]))
    assert not RECORDED


def test_a_kill_from_outside_is_nobodys_fault(job: Job) -> None:
    kills = iter([True, True, False, True, True, *[False] * 100])

    def behave(method: str, task: Task, worker: int) -> None:
        if method == "run" and task.shard % 3 == 0 and next(kills):
            raise WorkerLostError("crash", "killed")

    results = list(executor_on(ScriptedPool(2, behave)).run(job, [make_task(3, shard) for shard in range(12)]))
    assert sorted(result.shard for result in results) == list(range(12))
    assert all(result.num_samples == 3 for result in results)


@pytest.mark.parametrize(("kind", "message"), [("memory", "memory of its machine was nearly full"), ("node", "'ray status'")])
def test_losses_by_memory_or_network_end_the_run_and_never_blame_a_sample(kind: Loss, message: str, job: Job) -> None:
    pool = ScriptedPool(2, lose_with("bad", kind))
    with pytest.raises(ExecutorError, match=rf"(?s)shard 1.*{message}.*run again to resume"):
        list(executor_on(pool, on_bad_sample="quarantine").run(job, tasks_with(1)))
    assert not RECORDED
    assert "probe" not in {call.method for call in pool.calls}


def test_losses_in_a_row_with_nothing_done_in_between_end_the_run(job: Job) -> None:
    def behave(method: str, task: Task, worker: int) -> None:
        if method != "load":
            raise WorkerLostError("node", "socket closed")

    pool = ScriptedPool(2, behave)
    with pytest.raises(ExecutorError, match="losses in a row with nothing done in between"):
        list(executor_on(pool).run(job, [make_task(1, shard) for shard in range(20)]))


def test_workers_that_die_while_they_load_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def behave(method: str, task: Task, worker: int) -> None:
        raise WorkerLostError("memory", "killed")

    monkeypatch.setattr(crew, "_MOST_WAIT_S", 0.0)
    with pytest.raises(ExecutorError, match=r"loading the teacher: a worker was lost.*5 losses in a row"):
        executor_on(ScriptedPool(1, behave))


def test_a_replacement_that_cannot_load_is_done_without(job: Job) -> None:
    told: list[str] = []

    def behave(method: str, task: Task, worker: int) -> None:
        if method == "load" and worker >= 2:
            raise OSError("no such folder")
        if method == "run" and worker == 0:
            raise WorkerLostError("node", "gone")

    executor = executor_on(ScriptedPool(2, behave), say=told.append)
    assert len(list(executor.run(job, [make_task(1, shard) for shard in range(9)]))) == 9
    assert any("could not load the teacher, the others go on: OSError: no such folder" in text for text in told)


def test_an_error_of_the_store_is_no_samples_and_comes_out_as_itself(job: Job) -> None:
    pool = ScriptedPool(2, raise_with("bad", StoreWriteError("disk full")))
    with pytest.raises(StoreWriteError, match="disk full"):
        list(executor_on(pool, on_bad_sample="quarantine").run(job, tasks_with(1)))
    assert pool.done("run").count(1) == 1
    assert "probe" not in {call.method for call in pool.calls}


def test_a_broken_gpu_context_costs_the_worker_not_the_sample(job: Job) -> None:
    broken: set[int] = set()

    def behave(method: str, task: Task, worker: int) -> None:
        if (method == "run" and task.shard == 2 and not broken) or worker in broken:
            broken.add(worker)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    pool = ScriptedPool(2, behave)
    results = list(executor_on(pool, on_bad_sample="quarantine").run(job, [make_task(3, shard) for shard in range(8)]))
    assert sorted(result.shard for result in results) == list(range(8))
    assert len(broken) == 1
    assert not RECORDED


def test_an_error_of_the_data_comes_when_what_is_in_hand_is_done(job: Job) -> None:
    def tasks() -> Iterator[Task]:
        yield from (make_task(1, shard) for shard in range(3))
        raise ValueError("--data: corpus.jsonl.gz ends early")

    done: list[TaskResult] = []
    with pytest.raises(ValueError, match="ends early"):
        done.extend(executor_on(ScriptedPool(2)).run(job, tasks()))
    assert sorted(result.shard for result in done) == [0, 1, 2]


def test_a_stop_finishes_what_is_in_hand_and_begins_nothing_more(job: Job) -> None:
    stop = Stop(grace_s=60.0)
    pool = ScriptedPool(2)
    done = []
    for result in executor_on(pool, stop=stop).run(job, (make_task(1, shard) for shard in itertools.count())):
        done.append(result.shard)
        if len(done) == 5:
            stop.on_signal(signal.SIGTERM)
    assert sorted(done) == sorted(pool.done("run"))
    assert 5 < len(done) <= 9


def test_a_stop_without_grace_drops_what_is_in_hand(job: Job) -> None:
    stop = Stop(grace_s=0.0)
    done = []
    for result in executor_on(ScriptedPool(2), stop=stop).run(job, (make_task(1, shard) for shard in itertools.count())):
        done.append(result.shard)
        if len(done) == 5:
            stop.on_signal(signal.SIGTERM)
    assert len(done) == 5


def test_workers_lost_after_a_stop_are_not_missed(job: Job) -> None:
    stop = Stop(grace_s=60.0)

    def behave(method: str, task: Task, worker: int) -> None:
        if stop.requested and method == "run":
            raise WorkerLostError("crash", "SIGTERM")

    pool = ScriptedPool(2, behave)
    done = []
    for result in executor_on(pool, stop=stop).run(job, (make_task(1, shard) for shard in itertools.count())):
        done.append(result.shard)
        if len(done) == 5:
            stop.on_signal(signal.SIGTERM)
    assert len(done) == 5
    assert len([call for call in pool.calls if call.method == "load"]) == 2


def test_a_signal_while_tasks_are_planned_ends_the_planning(job: Job) -> None:
    stop = Stop(grace_s=60.0)

    def tasks() -> Iterator[Task]:
        yield from (make_task(1, shard) for shard in range(3))
        stop.on_signal(signal.SIGTERM)
        raise AssertionError("planned on after a signal")

    done = [result.shard for result in executor_on(ScriptedPool(2), stop=stop).run(job, tasks())]
    assert sorted(done) == [0, 1, 2]
    assert stop.requested


def test_a_question_is_asked_again_when_its_worker_is_lost(job: Job) -> None:
    class Flaky(ScriptedPool):
        def result(self, handle: Call) -> Any:
            if handle.method == "gate" and handle.worker == 0:
                raise WorkerLostError("crash", "killed")
            return super().result(handle)

    assert executor_on(Flaky(1)).ask("gate") == "gate"
