"""Workers in Ray actors, each with a teacher of its own: on this machine, or on a cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Collection
from typing import Any

from kvstore.storage import Storage
from pipeline.executors.base import Loss, OnBadSample, Say, WorkerLostError
from pipeline.executors.cluster import Cluster, passed_on
from pipeline.executors.crew import READY_TIMEOUT_S
from pipeline.executors.placement import place
from pipeline.executors.schedule import GPU_SLOTS, ScheduledExecutor
from pipeline.node import NodeInfo, Nonce, inspect_node, nonce_in, refuse_different
from pipeline.stop import NEVER, Stop
from pipeline.worker import TeacherInfo, TeacherSource, Worker


class RayExecutor(ScheduledExecutor):
    """Ray actors that compute and write; a lost actor is replaced and its tasks are given to others."""

    def __init__(
        self,
        source: TeacherSource,
        workers: int,
        address: str | None = None,
        *,
        gpus_per_worker: int = 0,
        storage: Storage | None = None,
        on_bad_sample: OnBadSample = "fail",
        stop: Stop = NEVER,
        say: Say = lambda _: None,
        ready_timeout_s: float = READY_TIMEOUT_S,
    ) -> None:
        """
        Args:
            workers: how many; 0 for as many as the cluster has GPUs for, or nodes.
            address: a running cluster such as 'auto'; None takes that of RAY_ADDRESS, else starts a local one, which `close` ends.
            gpus_per_worker: GPUs one teacher is spread over; 0 for one where there are any.
            storage: where the store is or will be: every worker must see it.

        Raises:
            ExecutorError: Ray cannot be started or reached, or has no room for the workers.
        """
        cluster = Cluster(workers, address, say=say)
        try:
            pool = _Actors(cluster, source, workers, gpus_per_worker, storage)
        except BaseException:
            cluster.close()
            raise
        super().__init__(pool, on_bad_sample=on_bad_sample, stop=stop, say=say, ready_timeout_s=ready_timeout_s)


class RayWorker:
    """What runs in an actor: a worker, made by a call of its own so that an error of loading comes out as itself."""

    def load(
        self, source: TeacherSource, environment: dict[str, str], threads: int, nonce: Nonce | None
    ) -> tuple[TeacherInfo, NodeInfo]:
        """Look at this machine and load the teacher.

        Args:
            environment: variables a process on another machine lacks: a bucket's credentials.
            threads: CPUs to compute with.
        """
        import torch

        os.environ.update(environment)
        torch.set_num_threads(threads)
        node = inspect_node(source.path, nonce)
        self._worker = Worker(source)
        return self._worker.describe(), node

    def call(self, method: str, *arguments: Any) -> Any:
        """A method of the worker."""
        return getattr(self._worker, method)(*arguments)


class _Actors:
    """A pool of equal actors."""

    def __init__(
        self, cluster: Cluster, source: TeacherSource, workers: int, gpus_per_worker: int, storage: Storage | None
    ) -> None:
        self._cluster, self._ray = cluster, cluster.ray
        self._placement = place(cluster.nodes(), workers=workers, gpus_per_worker=gpus_per_worker, device=source.device)
        self._source = dataclasses.replace(source, num_gpus=self._placement.gpus)
        self._actor_class = self._ray.remote(
            num_cpus=self._placement.cpus,
            num_gpus=self._placement.gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=GPU_SLOTS,
            scheduling_strategy="SPREAD",
        )(RayWorker)
        self._actors: list[Any] = []
        self._nodes: list[NodeInfo] = []
        self._loading: set[Any] = set()
        self._held = contextlib.ExitStack()
        self._nonce = self._held.enter_context(nonce_in(storage)) if storage is not None else None

    def workers(self) -> list[tuple[Any, Any]]:
        return [self._launch() for _ in range(self._placement.workers)]

    def start(self, worker: Any, method: str, *arguments: Any) -> Any:
        return worker.call.remote(method, *arguments)

    def wait(self, handles: Collection[Any], timeout_s: float) -> list[Any]:
        done, _ = self._ray.wait(list(handles), num_returns=len(handles), timeout=0)
        if not done:
            done, _ = self._ray.wait(list(handles), num_returns=1, timeout=timeout_s)
        return list(done)

    def result(self, handle: Any) -> Any:
        from ray.exceptions import RayError, RayTaskError, UnserializableException

        is_load = handle in self._loading
        self._loading.discard(handle)
        try:
            answer = self._ray.get(handle)
        except RayTaskError as error:
            raise error.cause from error
        except UnserializableException as error:
            raise RuntimeError(str(error).strip().splitlines()[-1]) from error
        except RayError as error:
            raise WorkerLostError(self._kind(error), str(error).strip().splitlines()[0]) from error
        if is_load:
            info, node = answer
            self._nodes.append(node)
            refuse_different(self._nodes)
            return info
        return answer

    def replace(self, worker: Any) -> tuple[Any, Any]:
        self._end(worker)
        return self._launch()

    def close(self) -> None:
        self._held.close()
        for actor in [*self._actors]:
            self._end(actor)
        self._cluster.close()

    def _end(self, actor: Any) -> None:
        self._actors.remove(actor)
        self._ray.kill(actor, no_restart=True)

    def _launch(self) -> tuple[Any, Any]:
        actor = self._actor_class.remote()
        threads = int(os.environ.get("OMP_NUM_THREADS") or self._placement.cpus)
        handle = actor.load.remote(self._source, passed_on(), threads, self._nonce)
        self._actors.append(actor)
        self._loading.add(handle)
        return actor, handle

    def _kind(self, error: Exception) -> Loss:
        from ray.exceptions import ActorDiedError, OutOfMemoryError

        if isinstance(error, OutOfMemoryError):
            return "memory"
        return "crash" if isinstance(error, ActorDiedError) and "node" not in _cause(error) else "node"


def _cause(error: Exception) -> str:
    """The part of Ray's text on why an actor died; its lines before that name the node's address."""
    return str(error).partition("The actor is dead because ")[2].partition(".")[0]
