"""How many workers fit where: what Ray would wait for for ever is refused, and what is asked for always fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.executors import ExecutorError
from pipeline.executors.placement import Node, Placement, place

LAPTOP = [Node(cpus=8, gpus=0)]
EIGHT_GPUS = [Node(cpus=96, gpus=8)]
TWO_OF_TWO = [Node(cpus=16, gpus=2), Node(cpus=16, gpus=2)]


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus_per_worker", "device", "expected"),
    [
        pytest.param(LAPTOP, 2, 0, "auto", Placement(workers=2, cpus=4, gpus=0), id="laptop"),
        pytest.param(LAPTOP, 3, 0, "cpu", Placement(workers=3, cpus=2, gpus=0), id="cpus-shared-evenly"),
        pytest.param(EIGHT_GPUS, 0, 0, "auto", Placement(workers=8, cpus=12, gpus=1), id="one-per-gpu"),
        pytest.param(EIGHT_GPUS, 0, 4, "auto", Placement(workers=2, cpus=16, gpus=4), id="four-gpus-each"),
        pytest.param(EIGHT_GPUS, 1, 0, "cuda", Placement(workers=1, cpus=16, gpus=1), id="not-all-cpus-beside-a-gpu"),
        pytest.param(TWO_OF_TWO, 0, 2, "auto", Placement(workers=2, cpus=16, gpus=2), id="two-nodes"),
        pytest.param([*LAPTOP, *TWO_OF_TWO], 0, 0, "auto", Placement(workers=4, cpus=8, gpus=1), id="a-node-without-gpu"),
        pytest.param([*LAPTOP, *LAPTOP], 0, 0, "cpu", Placement(workers=2, cpus=8, gpus=0), id="one-per-node-without-gpus"),
        pytest.param(EIGHT_GPUS, 4, 0, "cpu", Placement(workers=4, cpus=24, gpus=0), id="cpu-asked-for"),
    ],
)
def test_a_placement(nodes: list[Node], workers: int, gpus_per_worker: int, device: str, expected: Placement) -> None:
    assert place(nodes, workers=workers, gpus_per_worker=gpus_per_worker, device=device) == expected


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus_per_worker", "device", "message"),
    [
        pytest.param(LAPTOP, 64, 0, "auto", "--workers: got 64, but the cluster has 8 CPUs and 0 GPUs", id="too-many"),
        pytest.param(EIGHT_GPUS, 9, 0, "auto", "room for 8 worker", id="more-than-gpus"),
        pytest.param(TWO_OF_TWO, 1, 4, "auto", "no node has more than 2 GPUs", id="four-gpus-on-two-nodes-of-two"),
        pytest.param(TWO_OF_TWO, 3, 2, "auto", "room for 2 worker", id="two-each-three-workers"),
        pytest.param(LAPTOP, 1, 0, "cuda", "the Ray cluster has no GPU", id="no-gpu"),
        pytest.param(LAPTOP, 1, 2, "auto", "2 GPUs per worker, but the Ray cluster has no GPU", id="no-gpu-for-two"),
        pytest.param(EIGHT_GPUS, 1, 0, "cuda:1", "Ray gives each worker its GPU", id="numbered-gpu"),
        pytest.param(EIGHT_GPUS, 1, 2, "cpu", "got 2 with --device cpu", id="gpus-on-cpu"),
        pytest.param([Node(cpus=0, gpus=0)], 0, 0, "auto", "room for 0 worker", id="a-head-without-cpus"),
        pytest.param([], 0, 0, "auto", "room for 0 worker", id="no-node"),
    ],
)
def test_what_cannot_be_placed_is_refused(
    nodes: list[Node], workers: int, gpus_per_worker: int, device: str, message: str
) -> None:
    with pytest.raises(ExecutorError, match=message):
        place(nodes, workers=workers, gpus_per_worker=gpus_per_worker, device=device)


def test_a_refusal_names_the_flag_that_the_command_has() -> None:
    with pytest.raises(ExecutorError, match=r"^--ray-workers: got 64, but the cluster has 8 CPUs"):
        place(LAPTOP, workers=64, gpus_per_worker=0, device="auto", flag="--ray-workers")


node = st.builds(Node, cpus=st.integers(0, 64), gpus=st.integers(0, 8))


@given(st.lists(node, max_size=5), st.integers(0, 12), st.integers(0, 4), st.sampled_from(["auto", "cpu", "cuda"]))
def test_what_is_placed_fits_without_splitting_a_worker_over_nodes(
    nodes: list[Node], workers: int, gpus_per_worker: int, device: str
) -> None:
    try:
        placement = place(nodes, workers=workers, gpus_per_worker=gpus_per_worker, device=device)
    except ExecutorError:
        return
    assert placement.cpus >= 1
    assert placement.gpus == gpus_per_worker or not gpus_per_worker
    fits = [min(node.cpus // placement.cpus, node.gpus // placement.gpus if placement.gpus else 999) for node in nodes]
    assert sum(fits) >= placement.workers >= max(workers, 1)
