"""Counting of a run: means over steps, totals that go on after an interruption, and when lines and checkpoints are due."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerControl, TrainerState

from training.meters import Meter, RunFlow, StepSums
from training.run_folder import RunFolder


def test_sums_are_means_per_step_over_micro_batches_and_kv_only_over_steps_that_had_it() -> None:
    sums = StepSums(1, torch.device("cpu"))
    for step, ce, errors in [(0, 1.0, [[4.0, 6.0]]), (0, 2.0, [[2.0, 0.0]]), (1, 5.0, None)]:
        sums.add(step, torch.tensor(ce), None if errors is None else torch.tensor(errors))
    accelerator = Accelerator(cpu=True)
    ce, errors = sums.take(accelerator)
    assert ce == 4.0
    assert errors is not None
    assert errors.tolist() == [[6.0, 6.0]]
    sums.add(2, torch.tensor(3.0), None)
    assert sums.take(accelerator) == (3.0, None), "nothing is left over from before"


def test_totals_go_on_from_the_last_line_of_an_interrupted_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log({"step": 7, "tokens": 100, "seconds": 50.0, "loader_wait_s": 2.0})
    meter = Meter(folder)
    for micro_batch in range(2):
        with meter.waiting():
            meter.count(7, 10)
        assert meter.read()["tokens"] == 110, f"micro-batch {micro_batch} of the same step"
    meter.count(8, 5)
    read = meter.read()
    assert read["tokens"] == 115
    assert read["seconds"] >= 50.0
    assert read["loader_wait_s"] >= 2.0
    assert read["peak_rss_bytes"] > 10 * 2**20


@pytest.mark.parametrize(
    ("step", "saving", "logged", "saved"),
    [
        pytest.param(4, False, False, False, id="an ordinary step"),
        pytest.param(4, True, True, True, id="a checkpoint ends a line of metrics"),
        pytest.param(9, True, True, False, id="the last step ends one too, and saves the model instead"),
    ],
)
def test_when_a_line_and_a_checkpoint_are_due(step: int, saving: bool, logged: bool, saved: bool) -> None:
    control = TrainerControl(should_save=saving)
    RunFlow().on_step_end(None, TrainerState(global_step=step, max_steps=9), control)
    assert (control.should_log, control.should_save) == (logged, saved)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.slow
def test_the_peak_is_of_this_process_and_not_of_the_one_that_started_it() -> None:
    child = "from training.meters import peak_rss_bytes; print(peak_rss_bytes())"
    parent = f"import subprocess, sys; held = b'x' * (3 * 2**29); subprocess.run([sys.executable, '-c', {child!r}])"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 100 * 2**20 < int(done.stdout) < 2**30
