"""How many workers a cluster has room for and what each may use: refused here, where Ray would wait for ever. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pipeline.executors.base import ExecutorError

_MOST_CPUS_BESIDE_A_GPU = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine of a cluster."""

    cpus: int
    gpus: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Equal workers, wherever there is room."""

    workers: int
    cpus: int
    """Of each worker: as many threads as it computes with."""
    gpus: int
    """Of each worker: its teacher is spread over them."""


def place(nodes: Sequence[Node], *, workers: int, gpus_per_worker: int, device: str, flag: str = "--workers") -> Placement:
    """Decide what each worker asks for.

    Args:
        workers: how many; 0 for one per GPU (or per `gpus_per_worker` of them), on a cluster without GPUs one per node.
        gpus_per_worker: 0 for one where there are GPUs.
        device: of the teacher: 'cpu', 'cuda' or 'auto'.
        flag: the command's name for `workers`, for messages.

    Raises:
        ExecutorError: the cluster can never give that.
    """
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    has = f"the cluster has {cpus} CPUs and {gpus} GPUs on {len(nodes)} node(s)"
    if device.startswith("cuda:"):
        raise ExecutorError(
            f"device: got {device}, but Ray gives each worker its GPU; use cuda, and CUDA_VISIBLE_DEVICES to choose among GPUs"
        )
    if device == "cpu" and gpus_per_worker:
        raise ExecutorError(f"--gpus-per-worker: got {gpus_per_worker} with --device cpu; use cuda or auto")
    if (device == "cuda" or gpus_per_worker) and not gpus:
        raise ExecutorError(
            f"device: got {device}{f' and {gpus_per_worker} GPUs per worker' if gpus_per_worker else ''}, but the Ray cluster has no "
            "GPU; set it to cpu or auto, or start Ray where there are GPUs"
        )
    each = 0 if device == "cpu" or not gpus else max(gpus_per_worker, 1)
    largest = max((node.gpus for node in nodes), default=0)
    if each > largest:
        raise ExecutorError(
            f"--gpus-per-worker: got {each}, but no node has more than {largest} GPUs ({has}); a teacher is spread over the GPUs of "
            "one node only"
        )
    if not workers:
        workers = sum(min(node.gpus // each, node.cpus) for node in nodes) if each else len(nodes)
    room = _room(nodes, 1, each)
    if workers > room or not workers:
        raise ExecutorError(
            f"{flag}: got {workers}, but {has}: room for {room} worker(s) of {each} GPU(s) and a CPU each; ask for fewer"
        )
    shares = range(max(node.cpus for node in nodes), 0, -1)
    share = next(share for share in shares if _room(nodes, share, each) >= workers)
    return Placement(workers=workers, cpus=min(share, _MOST_CPUS_BESIDE_A_GPU) if each else share, gpus=each)


def _room(nodes: Sequence[Node], cpus: int, gpus: int) -> int:
    """How many workers of so many CPUs and GPUs fit: none is spread over two nodes."""
    return sum(min(node.cpus // cpus, node.gpus // gpus if gpus else node.cpus // cpus) for node in nodes)
