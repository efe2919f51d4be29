"""What goes wrong on real machines ends in a correct store or in an error that says what to do, and never hangs."""

from __future__ import annotations

import gzip
import json
import os
import random
import string
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from kvstore import open_store
from kvstore.verify import verify_store
from pipeline.config import ExtractConfig
from pipeline.executors import ExecutorError
from pipeline.extract import extract
from pipeline.models.resolve import resolve_model
from tests.checkpoints import save_checkpoint
from tests.pipeline.test_extract import by_id

ROOT = Path(__file__).parents[2]
GIB = 2**30
OBJECT_STORE = {"object_store_memory": 100 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("teacher"), num_hidden_layers=2, max_position_embeddings=256)


def texts(number: int) -> list[str]:
    draw = random.Random(2)
    return ["".join(draw.choice("abcdefgh ijkl") for _ in range(draw.randint(100, 400))) for _ in range(number)]


def config_of(teacher: Path, corpus: Path, out: Path, **settings: object) -> ExtractConfig:
    fixed = {"teacher": str(teacher), "data": (str(corpus),), "out": str(out), "seq_len": 256, "codec": "raw"}
    return ExtractConfig.model_validate({**fixed, **settings})


def run(config: ExtractConfig, say: Callable[[str], object] = lambda _: None) -> None:
    extract(config, resolve_model(config.teacher), say=say)


def refuse_damage(out: Path) -> None:
    report = verify_store(str(out), deep=True)
    assert report.ok, report.problems


def as_jsonl(rows: list[str]) -> bytes:
    return "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()


def as_parquet(rows: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": rows}), sink, row_group_size=100)
    return bytes(sink.getvalue())


KINDS = {
    "jsonl": as_jsonl,
    "jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows)),
    "jsonl.zst": lambda rows: b"".join(
        zstandard.compress(as_jsonl(rows[first : first + 20])) for first in range(0, len(rows), 20)
    ),
    "parquet": as_parquet,
}


@pytest.mark.parametrize(
    "kind", ["jsonl.zst", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("parquet", "jsonl", "jsonl.gz"))]
)
def test_a_data_file_cut_off_while_it_is_read_is_named_and_what_was_planned_is_kept(
    kind: str, teacher: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / f"corpus.{kind}"
    draw = random.Random(3)
    rows = ["".join(draw.choices(string.printable[:94], k=100)) for _ in range(3000)]
    whole = KINDS[kind](rows)
    corpus.write_bytes(whole)
    config = config_of(teacher, corpus, tmp_path / "store", window_tokens=2000, max_tokens=16_000)
    run(config.model_copy(update={"out": str(tmp_path / "whole")}))

    def cut(text: str) -> None:
        if "up to" in text:  # the first window is planned, and read ahead is little
            os.truncate(corpus, len(whole) // 100)

    endless = config.model_copy(update={"max_tokens": 10**6})
    with pytest.raises(ValueError, match=rf"--data: .*corpus\.{kind} is not (complete JSON lines|readable parquet).*repair it"):
        run(endless, say=cut)
    assert len(open_store(tmp_path / "store")) > 0
    refuse_damage(tmp_path / "store")
    corpus.write_bytes(whole)
    run(config)
    assert by_id(open_store(tmp_path / "store")) == by_id(open_store(tmp_path / "whole"))


def after_commits(out: Path, number: int, act: Callable[[], object]) -> threading.Thread:
    """Do something when so many shards are committed."""

    def watch() -> None:
        while len(list((out / "commits").glob("*.json"))) < number:
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(as_jsonl(texts(600)))
    return path


@pytest.fixture
def long_corpus(tmp_path: Path) -> Path:
    """Work for longer than it takes to fill gigabytes of memory."""
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(as_jsonl(texts(4000)))
    return path


@pytest.fixture
def limited_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray whose memory monitor ends workers when the machine uses 2 GiB more than now."""
    import ray

    memory = psutil.virtual_memory()
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{(memory.total - memory.available + 2 * GIB) / memory.total:.4f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ray.init(num_cpus=2, log_to_driver=False, logging_level="error", **OBJECT_STORE)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_workers_ended_for_memory_come_back_when_there_is_some_again(
    limited_memory: None, teacher: Path, long_corpus: Path, tmp_path: Path
) -> None:
    run(config_of(teacher, long_corpus, tmp_path / "whole"))
    ended: list[bool] = []

    def take_memory() -> None:
        block = np.ones(3 * GIB // 8)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not ended:
            titles = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
            if not any("ray::RayWorker" in title for title in titles):
                ended.append(True)
        del block

    thief = after_commits(tmp_path / "store", 3, take_memory)
    run(config_of(teacher, long_corpus, tmp_path / "store", workers=2, on_bad_sample="quarantine"))
    thief.join()
    assert ended, "the monitor did not fire"
    assert by_id(open_store(tmp_path / "store")) == by_id(open_store(tmp_path / "whole"))
    refuse_damage(tmp_path / "store")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_memory_that_stays_short_ends_the_run_with_advice_and_blames_no_sample(
    limited_memory: None, teacher: Path, long_corpus: Path, tmp_path: Path
) -> None:
    block: list[np.ndarray] = []
    after_commits(tmp_path / "store", 3, lambda: block.append(np.ones(3 * GIB // 8)))
    config = config_of(teacher, long_corpus, tmp_path / "store", workers=2, on_bad_sample="quarantine")
    with pytest.raises(ExecutorError, match=r"memory of its machine was nearly full: ask for fewer --workers.*run again"):
        run(config)
    block.clear()
    assert open_store(tmp_path / "store").manifest.data["dropped"] is None
    refuse_damage(tmp_path / "store")
    run(config_of(teacher, long_corpus, tmp_path / "store"))
    run(config_of(teacher, long_corpus, tmp_path / "whole"))
    assert by_id(open_store(tmp_path / "store")) == by_id(open_store(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("a_node_comes_back", [False, True])
def test_a_machine_that_goes_away_is_done_without(
    a_node_comes_back: bool, teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run(config_of(teacher, corpus, tmp_path / "whole"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **OBJECT_STORE})
    try:
        node = cluster.add_node(num_cpus=1, **OBJECT_STORE)
        config = config_of(teacher, corpus, tmp_path / "store", ray_address=cluster.address, on_bad_sample="quarantine")
        # Ray adds nodes in the main thread only.
        with ThreadPoolExecutor(1) as pool:
            extraction = pool.submit(run, config)
            while len(list((tmp_path / "store" / "commits").glob("*.json"))) < 3:
                assert not extraction.done(), extraction.result()
                time.sleep(0.005)
            assert len([entry for entry in ray.nodes() if entry["Alive"]]) == 2
            cluster.remove_node(node, allow_graceful=False)
            if a_node_comes_back:
                cluster.add_node(num_cpus=1, **OBJECT_STORE)
            extraction.result()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert by_id(open_store(tmp_path / "store")) == by_id(open_store(tmp_path / "whole"))
    refuse_damage(tmp_path / "store")
