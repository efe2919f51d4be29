"""What training from a store costs: beside no store at all, beside a teacher in memory, and how long the model waits for data."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import training.trainer
from kvstore.reader import Store, open_store
from tests.checkpoints import byte_tokenizer, randomised, tiny_config
from tests.experiments import RECIPE, STUDENT, kvpipe
from tests.stores import random_source, small_spec, write_store
from training.config import TrainConfig
from training.distill import KVDistillTrainer
from training.kv_loader import KVLoader
from training.loader import KVDataset, ReadBatch
from training.order import Shards, epoch_order
from training.report import METRICS, read_metrics
from training.sampler import SampleBatch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
STEPS, WARM = 60, 10


def bake(folder: Path, teacher: dict[str, Any], student: str, num_samples: int) -> tuple[Path, Path]:
    """A random teacher, and a store of random text baked for that student."""
    model = randomised(
        tiny_config(teacher["model_type"], **{name: value for name, value in teacher.items() if name != "model_type"})
    )
    model.save_pretrained(folder / "teacher")
    byte_tokenizer().save_pretrained(folder / "teacher")
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": "".join(chr(byte) for byte in rng.integers(32, 127, size=128))}) for _ in range(num_samples)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    kvpipe(
        *("extract", "--teacher", str(folder / "teacher"), "--data", str(folder / "text.jsonl"), "--out", str(folder / "kv")),
        *("--student", student, "--seq-len", "128", "--accept-fidelity"),
    )
    return folder / "teacher", folder / "kv"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random teacher of the demo's geometry, which has seven times its student's parameters, and a store baked for that student."""
    return bake(tmp_path_factory.mktemp("train"), {**RECIPE["teacher"]["config"], "intermediate_size": 384}, STUDENT, 1200)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A store and the student it is for."""

    store: Path
    student: str
    batch_size: int
    cycles: int
    """How often each kind of step has its turn."""


HALF_BILLION: dict[str, Any] = {
    "model_type": "qwen2",
    "num_hidden_layers": 1,
    "hidden_size": 896,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "max_position_embeddings": 512,
}
"""A layer of Qwen2-0.5B. With more, what they take and what comparing them takes grow alike."""


@pytest.fixture(params=["demo", "qwen2-0.5b"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    if request.param == "demo":
        _, store = request.getfixturevalue("demo")
        return Pair(store=store, student=STUDENT, batch_size=RECIPE["train"]["batch_size"], cycles=75)
    folder = tmp_path_factory.mktemp("half-billion")
    student = folder / "student.toml"
    student.write_text("[config]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in HALF_BILLION.items()))
    _, store = bake(folder, HALF_BILLION, str(student), 300)
    return Pair(store=store, student=str(student), batch_size=2, cycles=40)


def config(store: Path, out: Path, **over: Any) -> TrainConfig:
    fields = {name: RECIPE["train"][name] for name in ("threads", "batch_size", "learning_rate", "kv_weight")}
    every = {"eval_every": 10**6, "save_every": 10**6, "log_every": WARM, "eval_fraction": 0.0}
    return TrainConfig(
        store=str(store), out=out, device="cpu", kv_until=1.0, **{"student": STUDENT, "steps": STEPS, **fields, **every, **over}
    )


def seconds_per_step(out: Path) -> float:
    """Without the first steps."""
    seconds = {record["step"]: record["seconds"] for record in read_metrics(out / METRICS) if "loss" in record}
    return float(seconds[STEPS] - seconds[WARM]) / (STEPS - WARM)


KINDS = ("none", "reading", "whole")
BLOCK = 4
"""Steps of a kind in a row. The last is when the first batch of the next kind is read, and the first is left to settle."""


def kind_of(step: int) -> str:
    """What a step does: the kinds take turns, for this machine changes speed from one second to the next."""
    return KINDS[step // BLOCK % len(KINDS)]


class TakesTurns(KVDataset):
    """Has the tokens of some steps in memory, as if there were no store; reads all there is for the others."""

    def __init__(self, store: Store, layers: Sequence[int]) -> None:
        super().__init__(store, layers)
        self._rows = [store.read([index], layers=()) for index in range(len(store))]

    def __getitems__(self, request: SampleBatch) -> ReadBatch:
        if kind_of(request.step) != "none":
            return super().__getitems__(request)
        rows = [self._rows[index] for index in request]
        lengths = [len(row.input_ids) for row in rows]
        ids = np.concatenate([row.input_ids for row in rows])
        tokens = dataclasses.replace(
            rows[0], input_ids=ids, cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        )
        return ReadBatch(request, tokens, ())


class Compares(KVDistillTrainer):
    """Compares keys and values in some steps only, and notes when each step begins."""

    begun: ClassVar[list[float]] = []

    def training_step(self, *given: Any, **more: Any) -> Any:
        self.begun.append(time.perf_counter())
        return super().training_step(*given, **more)

    def compute_loss(self, model: Any, inputs: Any, **more: Any) -> Any:
        if kind_of(inputs["step"]) == "reading":
            inputs = {**inputs, "teacher": []}
        return super().compute_loss(model, inputs, **more)


def test_reading_from_the_store_leaves_the_speed_of_training(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, benchmark: Any
) -> None:
    monkeypatch.setattr(training.trainer, "KVDataset", TakesTurns)
    monkeypatch.setattr(training.trainer, "KVDistillTrainer", Compares)
    monkeypatch.setattr(Compares, "begun", [])
    cycle = BLOCK * len(KINDS)

    def ratios() -> tuple[float, ...]:
        whole = cycle * (pair.cycles + 1) + 1
        settings = config(pair.store, tmp_path / "run", student=pair.student, batch_size=pair.batch_size, steps=whole)
        training.trainer.run_training(settings)
        steps = np.diff(Compares.begun)[cycle:].reshape(pair.cycles, len(KINDS), BLOCK)
        none, *others = np.median(steps[..., 1:-1], axis=2).T
        return tuple(float(np.median(none / other)) for other in others)

    reading, whole = benchmark.pedantic(ratios, rounds=1)
    print(
        f"\nsteps per second of cross-entropy alone with no store: {reading:.3f} while KV is read, {whole:.3f} with the KV loss"
    )
    assert reading >= 0.95
    # The demo's student hands on as many keys and values as it is wide, so passes over them are a large part of all it does.
    assert whole >= 0.95 or pair.student == STUDENT


def alone(folder: Path, name: str, how: str, teacher: Path, settings: TrainConfig) -> tuple[float, float]:
    """Seconds per step, and peak memory in MiB, of a run in a process of its own."""
    path = folder / f"{name}.json"
    path.write_text(settings.model_dump_json())
    subprocess.run([sys.executable, "-m", "tests.online", str(path), how, str(teacher)], check=True, capture_output=True)
    peak = read_metrics(settings.out / METRICS)[-1]["peak_rss_bytes"] / 2**20
    return seconds_per_step(settings.out), peak


def test_the_same_steps_with_the_teacher_in_memory_are_slower(demo: tuple[Path, Path], tmp_path: Path, benchmark: Any) -> None:
    teacher, store = demo

    def rounds() -> list[tuple[tuple[float, float], ...]]:
        found = []
        for number in range(3):
            stored = alone(tmp_path, f"store-{number}", "store", teacher, config(store, tmp_path / f"s{number}"))
            online = alone(tmp_path, f"online-{number}", "kv", teacher, config(store, tmp_path / f"o{number}"))
            plain = alone(tmp_path, f"ce-{number}", "store", teacher, config(store, tmp_path / f"c{number}", ce_only=True))
            found.append((stored, online, plain))
        return found

    taken = benchmark.pedantic(rounds, rounds=1)
    faster = statistics.median(online[0] / stored[0] for stored, online, _ in taken)
    memory = [statistics.median(run[which][1] for run in taken) for which in range(3)]
    print(
        f"\nfrom the store {faster:.2f} times the steps per second of a teacher in memory; peak memory {memory[0]:.0f} MiB from the store, "
        f"{memory[1]:.0f} MiB with the teacher, {memory[2]:.0f} MiB for cross-entropy alone"
    )
    losses = [[record["ce"] for record in read_metrics(tmp_path / name / METRICS) if "ce" in record] for name in ("s0", "o0")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.01)
    assert faster >= 1.5
    assert memory[0] <= 1.1 * memory[2]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """200,000 tokens of four layers."""
    source = random_source(small_spec(), [512] * 400, seed=0)
    return open_store(write_store(tmp_path_factory.mktemp("large") / "kv", source, "mix"))


def multiply(seconds: float) -> None:
    """A main thread that computes outside the interpreter."""
    matrix = torch.ones(128, 128)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        matrix = matrix @ matrix * 1e-3


def count(seconds: float) -> None:
    """A main thread that holds the interpreter's lock."""
    end, number = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        number += 1


def waits(loader: Iterator[Any], compute: Callable[[float], None], seconds: float) -> float:
    """Share of the time spent waiting for batches after the first."""
    next(loader)
    waited = 0.0
    begun = time.perf_counter()
    compute(seconds)
    while True:
        asked = time.perf_counter()
        batch = next(loader, None)
        waited += time.perf_counter() - asked
        if batch is None:
            break
        del batch  # as a loop does when it has computed: giving memory back is no waiting for data
        compute(seconds)
    return waited / (time.perf_counter() - begun)


@pytest.mark.parametrize("compute", [multiply, count], ids=["matmul", "gil-bound"])
def test_a_model_does_not_wait_for_data_where_reading_takes_less_than_computing(
    compute: Callable[[float], None], large: Store, benchmark: Any
) -> None:
    torch.set_num_threads(1)

    def share() -> float:
        found = []
        for _ in range(5):
            # Files are in memory, so what reading needs is the core that the main thread leaves to it.
            begun = time.process_time()
            number = sum(1 for _ in KVLoader(large, batch_size=16))
            per_batch = (time.process_time() - begun) / number
            loader = KVLoader(large, batch_size=16)
            found.append(waits(iter(loader), compute, per_batch / 0.8))
        return statistics.median(found)

    waited = benchmark.pedantic(share, rounds=1)
    print(
        f"\nwith a {compute.__name__}ing main thread {waited:.2%} of the time is spent waiting for data; {threading.active_count()} threads"
    )
    assert waited <= 0.02


def test_ten_million_samples_are_planned_in_three_seconds(benchmark: Any) -> None:
    shards = Shards(np.full(20_000, 500), np.full(20_000, 500 * 512))

    def plan() -> float:
        begun = time.perf_counter()
        epoch_order(shards, seed=0, epoch=0, window_tokens=2**27)
        return time.perf_counter() - begun

    taken = statistics.median(benchmark.pedantic(lambda: [plan() for _ in range(3)], rounds=1))
    print(f"\nten million samples are ordered in {taken:.2f} s")
    assert taken < 3
