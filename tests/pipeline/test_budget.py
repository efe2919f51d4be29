"""The byte limit of a store: the worst that a shard may take is never passed, whatever is in it."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest

from kvstore.commits import read_commit
from kvstore.compaction import compact, loose_table_bytes
from kvstore.manifest import write_manifest
from kvstore.repeats import write_repeats
from kvstore.storage import locate
from pipeline.budget import END_BYTES, ByteBudget, refuse_small_budget, store_bytes, task_bytes, window_bytes
from pipeline.config import ExtractConfig
from pipeline.data.samples import Sample
from pipeline.data.windows import Consumed, Window
from pipeline.tasks import Task, TaskSample, data_record
from tests.checkpoints import byte_tokenizer
from tests.stores import Source, begin_store, small_spec, write_shard

LENGTHS = [300, 64, 5, 129, 2, 70] * 3


def incompressible(num_layers: int, dim: int) -> Source:
    """Values spread evenly over the range of any code, so that nothing can be saved."""
    rng = np.random.default_rng(0)
    spec = small_spec(num_layers=num_layers, num_kv_heads=1, dim=dim)
    return Source(
        spec=spec,
        input_ids=[rng.integers(0, 2**31 - 1, size=length, dtype=np.int32) for length in LENGTHS],
        kv=[
            {
                layer: (
                    rng.uniform(-1, 1, size=(length, 1, dim)).astype(np.float32),
                    rng.uniform(-1, 1, size=(length, 1, dim)).astype(np.float32),
                )
                for layer in spec.layer_numbers
            }
            for length in LENGTHS
        ],
    )


def task_of(path: Path, shard: int, shard_tokens: int, source: Source) -> Task:
    """The task that a committed shard came of."""
    rows = read_commit(locate(path), shard).samples
    ids = {row.id: ids for row in rows for ids in source.input_ids if len(ids) == row.num_tokens}
    samples = (
        TaskSample(row=row, offset=row.token_start - shard * shard_tokens, input_ids=ids[row.id], beside={}) for row in rows
    )
    return Task(shard=shard, samples=tuple(samples))


@pytest.mark.parametrize(("num_layers", "dim"), [pytest.param(1, 2, id="narrow"), pytest.param(6, 32, id="wide")])
@pytest.mark.parametrize("codec", ["raw", "q8", "fp8", "mix", "q4z"])
def test_no_shard_takes_more_than_was_kept_for_it(codec: str, num_layers: int, dim: int, tmp_path: Path) -> None:
    source = incompressible(num_layers, dim)
    draw = random.Random(0)
    texts = ["".join(chr(draw.randrange(32, 0x3000)) for _ in range(50 * length)) for length in LENGTHS]
    manifest, calibration, tasks = begin_store(tmp_path, source, codec)
    storage = locate(tmp_path)
    kept = 0
    for shard, indices in enumerate(tasks):
        before = store_bytes(storage)
        write_shard(tmp_path, source, manifest, calibration, shard, indices, texts=texts)
        worst = task_bytes(manifest, task_of(tmp_path, shard, manifest.layout.shard_tokens, source))
        assert store_bytes(storage) - before <= worst
        kept += worst
    compact(storage)
    written = store_bytes(storage)
    assert written <= kept + END_BYTES
    assert written > 0.3 * kept, "a bound far above what is written would waste room"


def test_tasks_are_admitted_while_all_of_them_fit(tmp_path: Path) -> None:
    source = incompressible(2, 8)
    manifest, calibration, tasks = begin_store(tmp_path, source)
    storage = locate(tmp_path)
    write_shard(tmp_path, source, manifest, calibration, 0, tasks[0])
    task = task_of(tmp_path, 0, manifest.layout.shard_tokens, source)
    worst, used = task_bytes(manifest, task), store_bytes(storage) + loose_table_bytes(storage)
    budget = ByteBudget(storage, manifest, used + END_BYTES + 2 * worst + 10)
    assert [budget.admits(task) for _ in range(4)] == [True, True, False, False]
    assert budget.used_bytes == used + 2 * worst
    (tmp_path / "progress").mkdir()
    (tmp_path / "progress" / "log").write_bytes(bytes(20))  # everything counts
    budget.recount()
    assert [budget.admits(task) for _ in range(2)] == [True, False]
    assert all(ByteBudget(storage, manifest, None).admits(task) for _ in range(100))


def test_room_is_kept_for_tables_of_what_is_committed(tmp_path: Path) -> None:
    source = incompressible(1, 8)
    draw = random.Random(0)
    texts = ["".join(chr(draw.randrange(32, 0x3000)) for _ in range(200 * length)) for length in LENGTHS]
    manifest, calibration, tasks = begin_store(tmp_path, source)
    for shard, indices in enumerate(tasks):
        write_shard(tmp_path, source, manifest, calibration, shard, indices, texts=texts)
    storage = locate(tmp_path)
    budget, before = ByteBudget(storage, manifest, 10**12), store_bytes(storage)
    compact(storage)
    after = store_bytes(storage)
    assert after - before > 2 * END_BYTES, "or nothing would be seen"
    assert after <= budget.used_bytes + END_BYTES
    budget.recount()
    assert budget.used_bytes == after


def test_windows_are_admitted_for_the_most_that_entering_them_takes(tmp_path: Path) -> None:
    manifest, _, _ = begin_store(tmp_path, incompressible(2, 8))
    storage, count = locate(tmp_path), 300
    samples = [
        Sample(id=f"{number:064x}", source="", input_ids=np.array([1, 2], dtype=np.int32), count=10**9, text=None)
        for number in range(count)
    ]
    consumed = Consumed(documents=10**9, sha256="f" * 64, samples=10**12, tokens=10**15)
    window = Window(number=1, samples=samples, consumed=consumed, last=False)
    used = store_bytes(storage)
    budget = ByteBudget(storage, manifest, used + END_BYTES + 2 * window_bytes(window) - 1)
    assert [budget.admits(window) for _ in range(2)] == [True, False]
    write_repeats(storage, 1, {sample.id: sample.count for sample in samples})
    data = {**manifest.data, "parts": [*manifest.data.get("parts", []), data_record(samples, 10**6)]}
    runs = [*manifest.runs, {"windows": [dataclasses.asdict(consumed)]}]
    write_manifest(storage, dataclasses.replace(manifest, data=data, runs=runs))
    assert 0.7 * window_bytes(window) < store_bytes(storage) - used <= window_bytes(window)


@pytest.mark.parametrize(("size", "expected"), [("9GB", 9 * 10**9), ("1.5TiB", 3 * 2**39), ("400000", 400_000), (12, 12)])
def test_a_limit_is_a_number_or_a_size(size: str | int, expected: int) -> None:
    config = ExtractConfig.model_validate({"teacher": "t", "data": ("d",), "out": "o", "max_bytes": size})
    assert config.max_bytes == expected


def test_a_limit_that_processes_would_share_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"max_bytes: got it with task_range, whose processes .*; limit such a run with max_tokens"
    ):
        ExtractConfig(teacher="t", data=("d",), out="o", max_bytes=10**9, task_range="1/2")


def test_a_limit_below_an_empty_store_is_refused() -> None:
    tokenizer, spec = byte_tokenizer(), small_spec()
    with pytest.raises(ValueError, match=r"^--max-bytes: got 1,000, but a store without a single shard takes about \d"):
        refuse_small_budget(1000, tokenizer, spec)
    refuse_small_budget(None, tokenizer, spec)
    refuse_small_budget(10**6, tokenizer, spec)
