"""SIGTERM and Ctrl-C as Slurm, Kubernetes and people send them: real processes end soon, resumable, with an intact store."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
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
from tests.checkpoints import save_checkpoint
from tests.pipeline.test_extract import by_id

ROOT = Path(__file__).parents[2]


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


def start(teacher: Path, corpus: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    arguments = ["extract", "--teacher", str(teacher), "--data", str(corpus), "--out", str(out), "--seq-len", "256"]
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *arguments, "--accept-fidelity", "--set", "gate_tokens=256", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def commits(out: Path) -> int:
    return len(list((out / "commits").glob("*.json")))


def to_driver(process: subprocess.Popen[str], number: signal.Signals) -> None:
    process.send_signal(number)


def to_everyone(process: subprocess.Popen[str], number: signal.Signals) -> None:
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
    send: Callable[[subprocess.Popen[str], signal.Signals], None],
    setting: tuple[Path, Path, dict[str, tuple[bytes, bytes, bytes]]],
    tmp_path: Path,
) -> None:
    teacher, corpus, expected = setting
    process = start(teacher, corpus, tmp_path / "store", "--workers", str(workers))
    wait_for(lambda: commits(tmp_path / "store") >= 2, process)
    send(process, number)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == os.EX_TEMPFAIL, messages
    assert f"{number.name}: no further task is begun" in messages
    assert f"stopped by {number.name}: " in messages
    assert "The same command goes on from there" in messages
    assert "Traceback" not in messages
    done = commits(tmp_path / "store")
    assert f"{done} of 33 shards planned are committed" in messages
    assert done < 33, "it was stopped too late to show anything"
    assert list((tmp_path / "store" / "samples").glob("summary-*.parquet")), "what is committed was not put into tables"
    report = verify_store(str(tmp_path / "store"))
    assert report.ok
    assert (report.num_committed, report.orphans, report.writers) == (done, (), ())
    resumed = start(teacher, corpus, tmp_path / "store")
    _, messages = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, messages
    assert by_id(open_store(tmp_path / "store")) == expected


def test_tasks_in_hand_are_dropped_when_the_grace_is_over(
    setting: tuple[Path, Path, dict[str, tuple[bytes, bytes, bytes]]], tmp_path: Path
) -> None:
    teacher, corpus, _ = setting
    process = start(teacher, corpus, tmp_path / "store", "--set", "grace_s=0")
    wait_for(lambda: commits(tmp_path / "store") >= 2, process)
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=30)
    assert process.returncode == os.EX_TEMPFAIL, messages
    assert "those in hand get 0 s" in messages
    assert verify_store(str(tmp_path / "store")).ok


def test_before_the_first_task_a_signal_ends_a_run_at_once(
    setting: tuple[Path, Path, dict[str, tuple[bytes, bytes, bytes]]], tmp_path: Path
) -> None:
    teacher, corpus, _ = setting
    process = start(teacher, corpus, tmp_path / "store")
    wait_for((tmp_path / "store" / ".staging" / "leases").is_dir, process)  # it calibrates under a lease
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=30)
    assert process.returncode == os.EX_TEMPFAIL, messages
    assert "stopped by SIGTERM. The same command goes on from there" in messages
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
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    while process.stdout.readline() != "requested\n":
        pass
    assert process.poll() is None
    time.sleep(1.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM


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
