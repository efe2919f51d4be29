"""Data without end, made while it is read: how soon its first shard is there, and how much memory all of it takes.

Slow: millions of tokens. The text comes through a named pipe from a process that makes it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.checkpoints import save_checkpoint

SAMPLE_TOKENS = 256
SOURCE = """
import json, random, sys
draw, words = random.Random(0), [f"word{number}" for number in range(20_000)]
with open(sys.argv[1], "w") as pipe:
    for _ in range(int(sys.argv[2])):
        print(json.dumps({"text": " ".join(draw.choices(words, k=120))}), file=pipe)
"""
PEAK = """
def peak_kib():  # of this process alone: getrusage begins with the peak of the one that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))
"""
LOADED = (
    PEAK
    + """
import sys
import pipeline.extract
from pathlib import Path
from pipeline.worker import TeacherSource, Worker
worker = Worker(TeacherSource(path=Path(sys.argv[1]), dtype="auto", device="cpu"))
print(peak_kib())
"""
)
EXTRACTED = (
    PEAK
    + """
import json, sys
from pipeline.config import ExtractConfig
from pipeline.extract import extract
from pipeline.models.resolve import resolve_model
config = ExtractConfig(**json.loads(sys.argv[1]))
summary = extract(config, resolve_model(config.teacher), say=lambda _: None)
print(summary.num_tokens, peak_kib())
"""
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("teacher") / "tiny", "llama", num_hidden_layers=1, hidden_size=32)


@contextmanager
def endless(pipe: Path, rows: int) -> Iterator[Path]:
    """A named pipe that gives so many rows of about 1,000 tokens."""
    os.mkfifo(pipe)
    process = subprocess.Popen([sys.executable, "-c", SOURCE, str(pipe), str(rows)], stderr=subprocess.DEVNULL)
    try:
        yield pipe
    finally:
        process.kill()
        process.wait()


def _run(script: str, *arguments: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return [int(number) for number in done.stdout.split()]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_first_shard_of_a_hundred_million_tokens_is_there_within_half_a_minute(teacher: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with endless(tmp_path / "rows.jsonl", 100_000) as pipe:
        started = time.monotonic()
        arguments = ["--teacher", str(teacher), "--data", str(pipe), "--out", str(store), "--seq-len", str(SAMPLE_TOKENS)]
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", "extract", *arguments, "--accept-fidelity"], stderr=subprocess.DEVNULL
        )
        try:
            while not list(store.glob("commits/*.json")):
                assert process.poll() is None
                assert time.monotonic() - started < 120
                time.sleep(0.05)
            seconds = time.monotonic() - started
        finally:
            process.kill()
            process.wait()
    print(f"\nfirst shard after {seconds:.1f} s")
    assert seconds < 30


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_memory_does_not_grow_with_the_data(teacher: Path, tmp_path: Path) -> None:
    (loaded_kib,) = _run(LOADED, str(teacher))
    above = {}
    for millions in (1, 20):
        with endless(tmp_path / f"{millions}.jsonl", 1_100 * millions) as pipe:
            settings = {
                "teacher": str(teacher),
                "data": [str(pipe)],
                "out": str(tmp_path / f"store-{millions}"),
                "seq_len": SAMPLE_TOKENS,
                "max_tokens": millions * 1_000_000,
                "accept_fidelity": True,
            }
            tokens, peak_kib = _run(EXTRACTED, json.dumps(settings))
        assert tokens > 0.99 * millions * 1_000_000
        above[millions] = (peak_kib - loaded_kib) / 1024
        print(f"\n{tokens:,} tokens: {above[millions]:.0f} MiB above {loaded_kib / 1024:.0f} MiB with the teacher loaded")
    assert max(above.values()) <= 600
    assert above[20] - above[1] <= 100
