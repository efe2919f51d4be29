"""SIGTERM and Ctrl-C as Slurm, Kubernetes and people send them: real processes end soon, resumable, with an intact store."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from kvstore import open_store
from kvstore.verify import verify_store
from pipeline.config import ExtractConfig
from pipeline.extract import extract
from pipeline.models.resolve import resolve_model
from pipeline.stop import Interrupted, Stop, stop_on_signals
from tests import processes
from tests.checkpoints import save_checkpoint
from tests.pipeline.test_extract import by_id
from tests.processes import Process


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, tuple[bytes, bytes, bytes]]]:
    """A teacher, data for some thirty shards, and what a run without interruption stores."""
    folder = tmp_path_factory.mktemp("stop")
    teacher = save_checkpoint(folder / "teacher", "qwen2", num_hidden_layers=2, max_position_embeddings=256)
    draw = random.Random(0)
    corpus = folder / "corpus.jsonl"
    texts = ("".join(draw.choice("abcdefgh ijkl") for _ in range(draw.randint(100, 400))) for _ in range(300))
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = ExtractConfig(
        teacher=str(teacher), data=(str(corpus),), out=str(folder / "whole"), seq_len=256, accept_fidelity=True, gate_tokens=256
    )
    extract(config, resolve_model(config.teacher), say=lambda _: None)
    return teacher, corpus, by_id(open_store(folder / "whole"))


def start(teacher: Path, corpus: Path, out: Path, *more: str) -> Process:
    arguments: list[str | Path] = ["extract", "--teacher", teacher, "--data", corpus, "--out", out, "--seq-len", "256"]
    return processes.start(*arguments, "--accept-fidelity", "--set", "gate_tokens=256", *more)


def wait_for(condition: Callable[[], bool], process: Process, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def commits(out: Path) -> int:
    return len(list((out / "commits").glob("*.json")))


def to_driver(process: Process, number: signal.Signals) -> None:
    process.send_signal(number)


def to_everyone(process: Process, number: signal.Signals) -> None:
    """Workers first, as a batch system may."""
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(number)
    process.send_signal(number)


@pytest.mark.parametrize(
    ("workers", "number", "send"),
    [
        pytest.param(0, signal.SIGTERM, to_driver, id="in-process"),
        pytest.param(2, signal.SIGTERM, to_everyone, id="ray-every-process", marks=pytest.mark.slow),
        pytest.param(2, signal.SIGINT, to_driver, id="ray-ctrl-c", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_run_so_that_the_same_command_goes_on(
    workers: int,
    number: signal.Signals,
    send: Callable[[Process, signal.Signals], None],
    setting: tuple[Path, Path, dict[str, tuple[bytes, bytes, bytes]]],
    tmp_path: Path,
) -> None:
    teacher, corpus, expected = setting
    process = start(teacher, corpus, tmp_path / "store", "--workers", str(workers))
    wait_for(lambda: commits(tmp_path / "store") >= 2, process)
    send(process, number)
    done = process.finish(timeout=60)
    messages = done.stderr
    assert done.returncode == os.EX_TEMPFAIL, messages
    assert f"{number.name}: no further task is begun" in messages
    assert f"stopped by {number.name}: " in messages
    assert "The same command goes on from there" in messages
    assert "Traceback" not in messages
    committed = commits(tmp_path / "store")
    assert f"{committed} of 33 shards planned are committed" in messages
    assert committed < 33, "it was stopped too late to show anything"
    assert list((tmp_path / "store" / "samples").glob("summary-*.parquet")), "what is committed was not put into tables"
    report = verify_store(str(tmp_path / "store"))
    assert report.ok
    assert (report.num_committed, report.orphans, report.writers) == (committed, (), ())
    resumed = start(teacher, corpus, tmp_path / "store").finish()
    assert resumed.returncode == 0, resumed.stderr
    assert by_id(open_store(tmp_path / "store")) == expected


def test_tasks_in_hand_are_dropped_when_the_grace_is_over(
    setting: tuple[Path, Path, dict[str, tuple[bytes, bytes, bytes]]], tmp_path: Path
) -> None:
    teacher, corpus, _ = setting
    process = start(teacher, corpus, tmp_path / "store", "--set", "grace_s=0")
    wait_for(lambda: commits(tmp_path / "store") >= 2, process)
    process.send_signal(signal.SIGTERM)
    done = process.finish(timeout=30)
    assert done.returncode == os.EX_TEMPFAIL, done.stderr
    assert "those in hand get 0 s" in done.stderr
    assert verify_store(str(tmp_path / "store")).ok


def test_before_the_first_task_a_signal_ends_a_run_at_once(
    setting: tuple[Path, Path, dict[str, tuple[bytes, bytes, bytes]]], tmp_path: Path
) -> None:
    teacher, corpus, _ = setting
    process = start(teacher, corpus, tmp_path / "store")
    wait_for((tmp_path / "store" / ".staging" / "leases").is_dir, process)  # it calibrates under a lease
    process.send_signal(signal.SIGTERM)
    done = process.finish(timeout=30)
    assert done.returncode == os.EX_TEMPFAIL, done.stderr
    assert "stopped by SIGTERM. The same command goes on from there" in done.stderr
    assert not list((tmp_path / "store" / ".staging").rglob("*.json")), "its lease is still there"


def test_a_second_signal_ends_a_process_at_once_and_an_echo_of_the_first_does_not() -> None:
    script = """
import signal, time
from pipeline.stop import stop_on_signals
with stop_on_signals(60.0, print) as stop, stop.deferred():
    print("listening", flush=True)
    while True:
        time.sleep(0.05)
        if stop.requested:
            print("requested", flush=True)
"""
    with Process(script) as process:
        wait_for(lambda: process.stdout == "listening\n", process)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: process.stdout.endswith("requested\n"), process)
        assert process.poll() is None
        time.sleep(1.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == -signal.SIGTERM


def test_a_signal_is_heard_where_it_finds_us_or_when_we_look() -> None:
    told: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals(5.0, told.append) as stop, stop.deferred():
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        assert not stop.is_over
        with pytest.raises(Interrupted, match="stopped by SIGTERM"), stop.deferred(False):
            raise AssertionError("went on although it was to stop")
    assert signal.getsignal(signal.SIGTERM) is before
    assert told == [
        "SIGTERM: no further task is begun; those in hand get 5 s to finish. The same signal again ends all at once"
    ]
    with pytest.raises(Interrupted, match="stopped by SIGINT"), stop_on_signals(5.0, told.append):
        signal.raise_signal(signal.SIGINT)


def test_grace_ends() -> None:
    stop = Stop(grace_s=0.05)
    with stop.deferred():
        stop.on_signal(signal.SIGTERM)
        assert not stop.is_over
        time.sleep(0.06)
        assert stop.is_over
