"""What extracting costs beside the teacher's own forward pass, and beside the loop people write: in one run, side by side.

Steady state: loading, calibration and the gate are left out on both sides; calibration comes from a small store made before. Every
figure is the median of the rounds' ratios, for machines change speed from one minute to the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from kvstore import open_store
from kvstore.storage import locate
from pipeline.config import ExtractConfig
from pipeline.extract import ExtractSummary, extract
from pipeline.models.resolve import resolve_model
from pipeline.monitor.run_log import LogReader
from pipeline.tasks import plan_batches
from tests.checkpoints import byte_tokenizer, randomised, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """A teacher with random weights and how much text it reads in one round."""

    name: str
    config: dict[str, Any]
    seq_len: int
    num_samples: int
    batch_tokens: int | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    threads: int = 2

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])


DEMO = Geometry(
    name="demo teacher",
    config={
        "num_hidden_layers": 6,
        "hidden_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 352,
        "max_position_embeddings": 512,
        "initializer_range": 0.05,
    },
    seq_len=128,
    num_samples=1200,
    threads=1,  # as the demo runs it
)
HALF_B = Geometry(
    name="0.5B geometry",
    config={
        "num_hidden_layers": 24,
        "hidden_size": 896,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
    },
    seq_len=512,
    num_samples=10,
    batch_tokens=2048,
)
SEVEN_B = Geometry(
    name="Qwen2-7B geometry",
    config={
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18_944,
        "vocab_size": 152_064,
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
    },
    seq_len=2048,
    num_samples=320,
    dtype=torch.bfloat16,
    device="cuda",
)


class Bench:
    """A teacher on disk, text for it, and the model in memory for the other side of every comparison."""

    def __init__(self, geometry: Geometry, folder: Path) -> None:
        self.geometry, self.folder = geometry, folder
        config = tiny_config("qwen2", **geometry.config)
        if geometry.device == "cpu":
            model = randomised(config, dtype=geometry.dtype)
        else:
            with torch.device(geometry.device):
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=geometry.dtype).eval()
        model.save_pretrained(folder / "teacher")
        byte_tokenizer().save_pretrained(folder / "teacher")
        self.model: Any = model
        self.text = self._documents(geometry.num_samples, "text")
        first = self._documents(8, "first")
        self.calibration = folder / "calibration"
        self.extract(self.calibration, data=(str(first),))

    def _documents(self, number: int, name: str) -> Path:
        """Documents of Python's standard library, each one sample long."""
        size, path = self.geometry.seq_len, self.folder / f"{name}.jsonl"
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        source = "".join(itertools.islice((file.read_text() for file in files), 200)).encode("ascii", "ignore").decode()
        pieces = (source[first : first + size] for first in range(0, number * size, size))
        path.write_text("".join(json.dumps({"text": f"{i:08d}{piece[8:]}"}) + "\n" for i, piece in enumerate(pieces)))
        return path

    def extract(self, out: Path, **more: Any) -> ExtractSummary:
        settings: dict[str, Any] = {
            "teacher": str(self.folder / "teacher"),
            "data": (str(self.text),),
            "out": str(out),
            "seq_len": self.geometry.seq_len,
            "batch_tokens": self.geometry.batch_tokens,
            "device": self.geometry.device,
            "codec": "mix",
            "accept_fidelity": True,
            "gate_tokens": 256,  # it is not timed
            **more,
        }
        config = ExtractConfig.model_validate(settings)
        return extract(config, resolve_model(config.teacher), say=lambda _: None)

    def extraction(self, layers: str = "all", **more: Any) -> tuple[float, ExtractSummary]:
        """Seconds its tasks take, with the store they leave."""
        out = self.folder / "store"
        shutil.rmtree(out, ignore_errors=True)
        calibration = self.calibration
        if layers != "all":
            calibration = self.folder / f"calibration-{layers}"
            if not calibration.exists():
                self.extract(calibration, layers=layers, data=(str(self.folder / "first.jsonl"),))
        summary = self.extract(out, layers=layers, calibration=str(calibration), **more)
        return summary.num_tokens / summary.tokens_per_s, summary

    def busy(self) -> str:
        """The share of its time each stage of the extraction before was at work; they overlap."""
        ((*_, last),) = LogReader(locate(self.folder / "store")).read().values()
        return ", ".join(f"{stage} {share:.0%}" for stage, share in last["shares"].items())

    def batches(self) -> list[torch.Tensor]:
        """What the extraction before ran: the same samples in the same forward passes."""
        store = open_store(self.folder / "store")
        batch_tokens = store.manifest.runs[-1]["settings"]["batch_tokens"]
        found = []
        for shard in np.unique(store.samples.shard):
            members = np.flatnonzero(store.samples.shard == shard)
            ids = store.read(members, layers=()).input_ids.reshape(len(members), self.geometry.seq_len)
            for rows in plan_batches([ids.shape[1]] * len(ids), batch_tokens, 10**6):
                found.append(torch.from_numpy(ids[rows].astype(np.int64)).to(self.geometry.device))
        return found

    def forward(self, num_layers: int) -> float:
        """Seconds of bare forward passes to the end of a layer: no logits, no cache."""
        decoder = self.model.model
        every = decoder.layers
        decoder.layers = every[:num_layers]
        batches = self.batches()
        try:
            with torch.inference_mode():
                begun = time.perf_counter()
                for input_ids in batches:
                    decoder(input_ids=input_ids, use_cache=False)
                _wait(self.geometry)
                return time.perf_counter() - begun
        finally:
            decoder.layers = every

    def usual_loop(self, num_layers: int) -> tuple[float, int]:
        """Seconds and bytes of the loop people write: cache, logits, one file per sample."""
        folder = self.folder / "files"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        batches, number = self.batches(), itertools.count()
        with torch.inference_mode():
            begun = time.perf_counter()
            for input_ids in batches:
                cache = self.model(input_ids=input_ids, use_cache=True).past_key_values
                for row in range(len(input_ids)):
                    kept = [(layer.keys[row].clone(), layer.values[row].clone()) for layer in cache.layers[:num_layers]]
                    torch.save({"input_ids": input_ids[row].clone(), "kv": kept}, folder / f"{next(number)}.pt")
            return time.perf_counter() - begun, sum(file.stat().st_size for file in folder.iterdir())


def _wait(geometry: Geometry) -> None:
    if geometry.device != "cpu":
        torch.cuda.synchronize()


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def median_ratio(rounds: int, above: Callable[[], float], below: Callable[[], float]) -> float:
    """Of two times taken in turn, the first round being a warm-up."""
    ratios = [above() / below() for _ in range(rounds + 1)][1:]
    print(f"\n  ratios {', '.join(f'{ratio:.3f}' for ratio in ratios)}", end="")
    return statistics.median(ratios)


@pytest.fixture(scope="module", params=[DEMO, HALF_B], ids=lambda geometry: geometry.name.replace(" ", "-"))
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with threads(request.param.threads):
        yield Bench(request.param, tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def half_b(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with threads(HALF_B.threads):
        yield Bench(HALF_B, tmp_path_factory.mktemp("half-b"))


def test_extraction_takes_little_more_than_the_forward_pass(bench: Bench, benchmark: Any) -> None:
    layers = bench.geometry.num_layers
    bench.extraction()
    ratio = benchmark.pedantic(median_ratio, args=(5, lambda: bench.extraction()[0], lambda: bench.forward(layers)), rounds=1)
    print(f"\n{bench.geometry.name}: extract (mix) takes {ratio:.3f} times a bare forward pass to the last layer")
    assert ratio <= 1.15


@pytest.mark.parametrize(("num_layers", "faster", "smaller"), [(24, 1.25, 4.0), (12, 2.0, 8.0)])
def test_the_usual_loop_takes_longer_and_more_space(
    num_layers: int, faster: float, smaller: float, half_b: Bench, benchmark: Any
) -> None:
    layers = f"0-{num_layers - 1}"
    half_b.extraction(layers)
    ratio = benchmark.pedantic(
        median_ratio, args=(3, lambda: half_b.usual_loop(24)[0], lambda: half_b.extraction(layers)[0]), rounds=1
    )
    size = half_b.usual_loop(24)[1] / half_b.extraction(layers)[1].stored_bytes
    print(f"\nlayers {layers}: the usual loop over all layers takes {ratio:.2f} times as long and {size:.1f} times the space")
    assert ratio >= faster
    assert size >= smaller


def test_two_workers_do_more_than_one(tmp_path: Path, benchmark: Any) -> None:
    """Ray workers of one CPU, so of one thread, each."""
    import ray

    bench = Bench(DEMO, tmp_path)

    def seconds(workers: int) -> float:
        ray.init(num_cpus=workers, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
        try:
            return bench.extraction(workers=workers)[0]
        finally:
            ray.shutdown()

    ratio = benchmark.pedantic(median_ratio, args=(5, lambda: seconds(1), lambda: seconds(2)), rounds=1)
    print(f"\ntwo workers extract {ratio:.2f} times as fast as one")
    assert ratio >= 1.6


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(SEVEN_B, tmp_path_factory.mktemp("seven-b"))


@pytest.mark.gpu
@pytest.mark.parametrize("num_layers", [28, 7])
def test_a_gpu_stays_busy(num_layers: int, seven_b: Bench, benchmark: Any) -> None:
    bench, layers = seven_b, f"0-{num_layers - 1}"
    summaries = [bench.extraction(layers)[1]]
    torch.cuda.reset_peak_memory_stats()

    def extraction() -> float:
        seconds, summary = bench.extraction(layers)
        summaries.append(summary)
        return seconds

    ratio = benchmark.pedantic(median_ratio, args=(2, lambda: bench.forward(num_layers), extraction), rounds=1)
    own = torch.cuda.max_memory_allocated() / 2**30
    print(
        f"\n{bench.geometry.name}, {num_layers} layers, {torch.cuda.get_device_name()}: {summaries[-1].tokens_per_s:,.0f} tokens/s, "
        f"{ratio:.3f} of the bare forward pass; GPU memory at most {own:.1f} GiB, two models among it; "
        f"{summaries[-1].stored_bytes / summaries[-1].num_tokens:,.0f} bytes per token; busy: {bench.busy()}"
    )
    assert open_store(summaries[-1].out).spec.layer_numbers == tuple(range(num_layers))
    assert ratio >= 0.90
