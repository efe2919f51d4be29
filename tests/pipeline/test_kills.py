"""SIGKILLs at random moments of one extraction by two Ray workers, and as many resumes: the store is as if nothing had happened."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from kvstore import KVStoreError, StoreNotFoundError, open_store
from kvstore.verify import verify_store
from pipeline.config import ExtractConfig
from pipeline.extract import extract
from pipeline.models.resolve import resolve_model
from tests.checkpoints import save_checkpoint
from tests.pipeline.test_extract import by_id
from tests.processes import Process, start

STDLIB = Path(json.__file__).parent


def _arguments(teacher: Path, corpus: Path, out: Path, *more: str) -> list[str | Path]:
    data: list[str | Path] = ["extract", "--teacher", teacher, "--data", corpus]
    return [*data, "--out", out, "--seq-len", "256", "--workers", "2", "--accept-fidelity", "--set", "gate_tokens=256", *more]


def _wait_for_a_random_moment(process: Process, commits: Path, draw: random.Random, most: int) -> None:
    """In one of three runs some time after its start, in the others shortly after so many more commits, at most `most`."""
    target = len(list(commits.glob("*.json"))) + draw.randint(1, most)
    deadline = time.monotonic() + (draw.uniform(0.5, 8) if draw.random() < 1 / 3 else 60)
    while time.monotonic() < deadline and process.poll() is None and len(list(commits.glob("*.json"))) < target:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.2))


def _kill(process: Process, draw: random.Random) -> bool:
    """SIGKILL the driver, or one of its Ray workers first and the driver a moment later; whether it was a worker first."""
    # Below the driver where that has started Ray, else below this process, which has.
    workers = [child for child in psutil.Process().children(recursive=True) if "ray::RayWorker" in _title(child)]
    worker_first = draw.random() < 0.5 and bool(workers)
    if worker_first:
        draw.choice(workers).send_signal(signal.SIGKILL)
        time.sleep(draw.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    return worker_first


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _is_consistent(out: Path, expected: dict[str, tuple[bytes, bytes, bytes]]) -> int:
    """What a reader sees at this moment is a part of the whole, each sample once; how many that are."""
    try:
        store = open_store(out)
    except StoreNotFoundError:
        return 0
    seen = by_id(store)
    assert max(Counter(store.samples.ids).values(), default=1) == 1
    assert seen.items() <= expected.items()
    return len(seen)


def _survive(kills: int, seed: int, tmp_path: Path, *more: str) -> None:
    """Kill and resume; `more` are arguments of the extraction."""
    draw = random.Random(seed)
    teacher = save_checkpoint(tmp_path / "teacher", "qwen2", num_hidden_layers=2, max_position_embeddings=256)
    corpus = tmp_path / "corpus.jsonl"
    text = "".join(file.read_text() for file in sorted(STDLIB.glob("*.py")))
    corpus.write_text("".join(json.dumps({"text": text[first : first + 1000]}) + "\n" for first in range(0, 40_000, 1000)))
    config = ExtractConfig(
        teacher=str(teacher),
        data=(str(corpus),),
        out=str(tmp_path / "whole"),
        seq_len=256,
        accept_fidelity=True,
        gate_tokens=256,
    )
    extract(config, resolve_model(config.teacher), say=lambda _: None)
    expected = by_id(open_store(tmp_path / "whole"))
    out, history, workers_killed = tmp_path / "cut", [], 0
    for number in range(kills):
        with start(*_arguments(teacher, corpus, out, *more)) as process:
            _wait_for_a_random_moment(process, out / "commits", draw, most=max(60 // kills, 1))
            if process.poll() is None:
                workers_killed += _kill(process, draw)
        time.sleep(0.5)  # orphaned workers may still finish the shard in hand
        history.append(_is_consistent(out, expected))
        if history[-1] == len(expected) and number < kills - 1:
            out = tmp_path / f"cut-{number}"  # complete before its time: the next kills are of a fresh extraction
    extract(config.model_copy(update={"out": str(out)}), resolve_model(config.teacher), say=lambda _: None)
    print(f"\n{kills} SIGKILLs of drivers, {workers_killed} of workers before, samples visible after each: {history}")
    assert workers_killed, "no worker was there to be killed"
    assert any(0 < visible < len(expected) for visible in history), "no kill came between the first and the last commit"
    assert by_id(open_store(out)) == expected
    report = verify_store(str(out), deep=True)
    assert report.ok, report.problems
    assert (report.num_committed, report.num_samples) == (report.num_shards, len(expected))
    _refuse_other_bits(out)


def _refuse_other_bits(out: Path) -> None:
    """The checks above are able to fail."""
    file = next(path for path in sorted((out / "kv.zarr/key/c").rglob("*")) if path.is_file())
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(KVStoreError):
        by_id(open_store(out))


@pytest.mark.timeout(280)
@pytest.mark.slow
def test_three_kills_and_resumes_end_in_the_store_of_an_uninterrupted_run(tmp_path: Path) -> None:
    """On a running cluster, which outlives its drivers."""
    import ray

    cluster = ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False, logging_level="error"
    )
    try:
        _survive(3, 20, tmp_path, "--ray-address", cluster.address_info["gcs_address"])
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_fifty_kills_and_resumes_end_in_the_store_of_an_uninterrupted_run(tmp_path: Path) -> None:
    """Each driver starts a Ray of its own, as without a cluster."""
    _survive(50, 21, tmp_path)
