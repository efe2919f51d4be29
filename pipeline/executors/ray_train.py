"""One function on every rank of a job that Ray Train starts: several GPUs, several machines. Knows nothing of training."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.executors.base import ExecutorError, Say
from pipeline.executors.cluster import Cluster, passed_on
from pipeline.executors.placement import place
from pipeline.failures import one_line


def run_ranks(
    function: Callable[[], object],
    *,
    workers: int,
    address: str | None,
    device: str,
    shared: Path,
    name: str,
    say: Say = lambda _: None,
) -> None:
    """Call a function once on each rank, with the environment torchrun would give it, in this process's working directory.

    Args:
        workers: ranks, each with a GPU where there are any; 0 for as many as the cluster has GPUs for, or nodes.
        address: a running cluster such as 'auto'; None takes that of RAY_ADDRESS, else starts Ray here and ends it afterwards.
        device: 'cpu', 'cuda' or 'auto'.
        shared: a folder that every machine sees; Ray keeps its notes in it while the job runs.
        name: of the job's folder in it.

    Raises:
        ExecutorError: Ray cannot be started or reached, has no room for the ranks, or lost one of them.
        Exception: what the function raised on the lowest rank that failed.
    """
    cluster = Cluster(workers, address, alone="without --ray-workers training runs in this process", say=say)
    try:
        placement = place(cluster.nodes(), workers=workers, gpus_per_worker=0, device=device, flag="--ray-workers")
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

        folder = shared.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        job = TorchTrainer(
            functools.partial(_as_here, str(Path.cwd()), passed_on(), function),
            scaling_config=ScalingConfig(
                num_workers=placement.workers,
                use_gpu=placement.gpus > 0,
                resources_per_worker={"CPU": placement.cpus, **({"GPU": 1} if placement.gpus else {})},
            ),
            run_config=RunConfig(name=name, storage_path=str(folder)),
        )
        try:
            job.fit()
        except WorkerGroupError as error:
            rank, cause = min(error.worker_failures.items())
            raise _own(cause, rank) from error
        except TrainingFailedError as error:
            raise ExecutorError(f"the job on Ray failed: {one_line(error)}") from error
        finally:
            shutil.rmtree(folder / name, ignore_errors=True)
    finally:
        cluster.close()


def _as_here(folder: str, environment: dict[str, str], function: Callable[[], object]) -> None:
    """On a rank: paths and buckets of the settings mean what they mean where the command was typed."""
    os.environ.update(environment)
    try:
        os.chdir(folder)
    except OSError as error:
        raise ExecutorError(
            f"{os.uname().nodename}: {folder} is not there ({error}); start the command in a folder that all nodes share"
        ) from error
    function()


def _own(cause: Exception, rank: int) -> Exception:
    """What the function raised, where it did; otherwise what became of the rank."""
    while (inner := getattr(cause, "cause", None) or getattr(cause, "_base_exc", None)) is not None:
        cause = inner
    if type(cause).__module__.startswith("ray."):
        return ExecutorError(f"rank {rank} was lost: {one_line(cause)}; its machine's memory, and Ray's log, may say why")
    return cause
