"""How much a teacher computes at once, what it does when memory runs out, and which of its layers are in memory when."""

from __future__ import annotations

import functools
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvstore import open_store
from kvstore.commits import SampleRow
from pipeline.config import ExtractConfig
from pipeline.executors import RayExecutor
from pipeline.extract import extract
from pipeline.models.load import load_causal_lm
from pipeline.models.resolve import resolve_model
from pipeline.repair import repair_store
from pipeline.tasks import CPU_BATCH_TOKENS, MAX_BATCH_TOKENS, TaskSample, fit_batch_tokens
from pipeline.teacher import Batch, SampleTooLargeError, Teacher
from pipeline.worker import TeacherInfo, Worker
from tests.checkpoints import save_checkpoint

LENGTHS = [5, 64, 40, 64, 3, 64, 64, 17, 64, 64, 130, 128]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("teacher") / "llama", "llama", tie_word_embeddings=False)


@pytest.fixture
def teacher(checkpoint: Path) -> Teacher:
    return Teacher(functools.partial(load_causal_lm, checkpoint, "float32", "cpu"))


def samples_of(lengths: list[int]) -> list[TaskSample]:
    draw = np.random.default_rng(0)
    offsets = np.cumsum([0, *lengths]).tolist()
    return [
        TaskSample(
            row=SampleRow(id=str(n), source="s", shard=0, token_start=offset, num_tokens=length, crc32c=0, count=1, text=None),
            offset=offset,
            input_ids=draw.integers(0, 256, length).astype(np.int32),
            beside={},
        )
        for n, (length, offset) in enumerate(zip(lengths, offsets, strict=False))
    ]


def computed(teacher: Teacher, samples: list[TaskSample], batch_tokens: int) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """Keys and values by sample and layer; what memory ran out for comes again and overwrites."""
    found: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def take(layer: int, batch: Batch, key: Tensor, value: Tensor) -> None:
        first = 0
        for sample, length in zip(batch.samples, batch.lengths, strict=True):
            found[sample.row.id, layer] = key[first : first + length].cpu(), value[first : first + length].cpu()
            first += length

    teacher.compute(samples, teacher.spec.layer_numbers, None, batch_tokens, take)
    return found


def num_bytes(teacher: Teacher) -> int:
    return sum(parameter.nbytes for parameter in teacher.model.parameters())


# Out of memory.


def limit_rows(teacher: Teacher, most_tokens: int) -> list[int]:
    """Let a block in the middle run out of memory above so many tokens; returns the sizes of what was tried."""
    tried: list[int] = []

    def run_out(_module: Any, args: tuple[Tensor, ...]) -> None:
        tried.append(args[0].shape[0] * args[0].shape[1])
        if tried[-1] > most_tokens:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate room for {tried[-1]} tokens")

    teacher.model.model.layers[2].register_forward_pre_hook(run_out)
    return tried


def test_what_memory_runs_out_for_is_made_again_in_halves_with_the_same_bits(teacher: Teacher, checkpoint: Path) -> None:
    samples = samples_of(LENGTHS)
    expected = computed(teacher, samples, 1024)
    tight = Teacher(functools.partial(load_causal_lm, checkpoint, "float32", "cpu"))
    tried = limit_rows(tight, 200)
    got = computed(tight, samples, 1024)
    assert tried[0] > 200, "memory did run out"
    assert tight.batch_tokens(1024) <= 200
    assert got.keys() == expected.keys()
    for where, pair in expected.items():
        for one, other in zip(got[where], pair, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-6 * float(other.abs().max()))
    tried.clear()
    computed(tight, samples, 1024)
    assert max(tried) <= 200, "later tasks know"


def test_a_sample_that_does_not_fit_alone_is_named(teacher: Teacher) -> None:
    limit_rows(teacher, 100)
    with pytest.raises(SampleTooLargeError, match=r"a sample of 130 tokens alone does not fit cpu .* smaller --seq-len"):
        computed(teacher, samples_of([130]), 1024)


def test_other_errors_are_not_taken_for_a_lack_of_memory(teacher: Teacher) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    teacher.model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        computed(teacher, samples_of([10, 10]), 1024)


@contextmanager
def address_space(more_bytes: int) -> Iterator[None]:
    """Let this process allocate so much more and not beyond."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + more_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_limit_to_the_memory_of_a_process_halves_batches_too(teacher: Teacher) -> None:
    samples = samples_of([64] * 4096)
    tokens, taken = 64 * 4096, []
    # Hidden states of all take 64 MiB, several of which are there at once: more than glibc keeps for itself.
    with address_space(200 * 2**20):
        teacher.compute(samples, [0], None, tokens, lambda _layer, batch, *_: taken.extend(batch.samples))
    assert teacher.batch_tokens(tokens) < tokens
    assert {sample.row.id for sample in taken} == {sample.row.id for sample in samples}


# Sizing.


@pytest.mark.parametrize(
    ("each", "constant", "expected"),
    [
        pytest.param(1e-5, 0.1, 32_768, id="rounded-down"),
        pytest.param(1e-7, 0.0, MAX_BATCH_TOKENS, id="more-makes-nothing-faster"),
        pytest.param(3e-4, 0.2, 1024, id="less-than-was-tried"),
        pytest.param(1e-3, 0.3, 512, id="one-sample"),
    ],
)
def test_batch_tokens_follow_from_two_small_passes(each: float, constant: float, expected: int) -> None:
    width = 512
    assert fit_batch_tokens(lambda rows: constant + each * rows * width, width) == expected


def test_batches_on_a_cpu_are_of_a_constant_size(teacher: Teacher) -> None:
    assert teacher.fit_batch_tokens([0, 1], 512) == CPU_BATCH_TOKENS


@pytest.mark.gpu
def test_batches_fit_a_gpu_and_recover_where_they_do_not(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, "llama", hidden_size=512, intermediate_size=4096, vocab_size=4096)
    teacher = Teacher(functools.partial(load_causal_lm, path, "float32", "cuda"))
    layers, samples = teacher.spec.layer_numbers, samples_of([512] * 256)
    free, total = torch.cuda.mem_get_info()
    fitted = teacher.fit_batch_tokens(layers, 512)
    assert fitted & (fitted - 1) == 0
    assert 512 <= fitted <= MAX_BATCH_TOKENS
    torch.cuda.reset_peak_memory_stats()
    expected = computed(teacher, samples, fitted)
    assert torch.cuda.max_memory_allocated() <= total - free + 0.9 * free
    assert teacher.batch_tokens(fitted) == fitted, "nothing was tried in vain"
    torch.cuda.set_per_process_memory_fraction(2**30 / total)  # half of what one product of all samples takes
    try:
        torch.cuda.empty_cache()
        got = computed(teacher, samples, 512 * 256)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert teacher.batch_tokens(512 * 256) < 512 * 256
    for where, pair in expected.items():
        for one, other in zip(got[where], pair, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-3 * float(other.abs().max()))
    before = torch.cuda.memory_allocated()
    teacher.drop_above(0)
    assert before - torch.cuda.memory_allocated() > 0.5 * sum(p.nbytes for p in load_causal_lm(path, "float32").parameters())


# Whole extractions: only what is needed.


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(Path(os.__file__).read_text()[:600])
    return path


def config_of(checkpoint: Path, corpus: Path, out: Path, **settings: Any) -> ExtractConfig:
    return ExtractConfig(
        teacher=str(checkpoint), data=(str(corpus),), out=str(out), **{"seq_len": 64, "accept_fidelity": True, **settings}
    )


def numbers_of(store: Path) -> list[np.ndarray]:
    opened = open_store(store)
    batch = opened.read(range(len(opened)))
    return [*batch.key, *batch.value]


class Watched:
    """Says of every worker of this process how much of its teacher was in memory while it computed and gated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[tuple[str, int]] = []
        for name in ("calibrate", "gate", "run", "gate_stored"):
            monkeypatch.setattr(Worker, name, self._watching(name, getattr(Worker, name)))

    def _watching(self, name: str, method: Any) -> Any:
        def call(worker: Worker, *args: Any, **kwargs: Any) -> Any:
            result = method(worker, *args, **kwargs)
            self.sizes.append((name, num_bytes(worker._teacher)))
            return result

        return call

    def of(self, name: str) -> set[int]:
        return {size for known, size in self.sizes if known == name}


@pytest.mark.parametrize("codec", ["raw", "mix"])
def test_upper_layers_leave_memory_while_tasks_run_and_come_back_for_the_gate(
    codec: str, checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.worker.KEPT_BYTES", 0)  # else nothing is left for `run` to compute
    whole = num_bytes(Teacher(functools.partial(load_causal_lm, checkpoint, "float32", "cpu")))
    every, some = tmp_path / "every", tmp_path / "some"
    for out, layers in ((every, "all"), (some, "0,1")):
        with monkeypatch.context() as patch:
            watched = Watched(patch)
            said: list[str] = []
            config = config_of(checkpoint, corpus, out, codec=codec, layers=layers)
            extract(config, resolve_model(config.teacher), say=said.append)
        assert any(f"{CPU_BATCH_TOKENS:,} padded tokens at once on cpu" in line for line in said)
        assert watched.of("gate") == (set() if codec == "raw" else {whole})
        assert watched.of("gate_stored") == {whole}
        (size,) = watched.of("run")
        assert size == whole if layers == "all" else size < 0.6 * whole
    expected, got = numbers_of(every), numbers_of(some)
    assert len(got) == 4
    for one, other in zip(got, [expected[0], expected[1], expected[4], expected[5]], strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_stopped_extraction_of_lower_layers_goes_on_to_the_same_bits_and_its_repair_uses_the_same_batches(
    checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    settings = {"layers": "0-1", "codec": "raw"}
    for name in ("whole", "cut"):
        config = config_of(checkpoint, corpus, tmp_path / name, **settings)
        extract(config, resolve_model(config.teacher), say=lambda _: None)
    cut = open_store(tmp_path / "cut")
    assert cut.manifest.layout.num_shards > 1
    assert cut.manifest.runs[0]["settings"]["batch_tokens"] == CPU_BATCH_TOKENS
    assert [layer.layer for layer in cut.manifest.teacher.layers] == [0, 1, 2, 3], "the manifest knows every layer"
    gone = sorted((tmp_path / "cut" / "commits").glob("*.json"))[-1]
    gone.unlink()
    assert repair_store(str(tmp_path / "cut")).report.ok
    for one, other in zip(numbers_of(tmp_path / "cut"), numbers_of(tmp_path / "whole"), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_of_several_ray_workers_only_one_loads_upper_layers_and_the_bits_are_the_same(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial: list[bool] = []

    class Asked(RayExecutor):
        def describe(self) -> TeacherInfo:
            info = super().describe()
            pool = self.crew.pool
            for worker in self.crew.ready:
                handle = pool.start(worker, "describe")
                while not pool.wait([handle], 1.0):
                    pass
                partial.append(pool.result(handle).is_partial)
            return info

    monkeypatch.setattr("pipeline.extract.RayExecutor", Asked)
    for name, workers in (("alone", 0), ("ray", 2)):
        config = config_of(checkpoint, corpus, tmp_path / name, layers="0-1", codec="raw", workers=workers)
        extract(config, resolve_model(config.teacher), say=lambda _: None)
    assert partial == [False, True]
    assert open_store(tmp_path / "ray").manifest.fingerprint == open_store(tmp_path / "alone").manifest.fingerprint
    for one, other in zip(numbers_of(tmp_path / "ray"), numbers_of(tmp_path / "alone"), strict=True):
        np.testing.assert_array_equal(one, other)
