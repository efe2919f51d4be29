"""The folder of a run: what may continue it, and what is left of an interrupted one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training.report import METRICS, read_metrics
from training.run_folder import RUN, SUMMARY, RunFolder

IDENTITY: dict[str, Any] = {"store": "abc", "config": {"seed": 0, "steps": 10}, "alignment": {"layer_map": [[0, 2]]}}


def add_checkpoint(folder: RunFolder, step: int, complete: bool = True) -> Path:
    path = folder.path / f"checkpoint-{step}"
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}) if complete else '{"global_')
    return path


@pytest.fixture
def begun(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    assert folder.begin(IDENTITY) is None
    return folder


def test_a_folder_with_a_run_is_refused_unless_resuming(begun: RunFolder) -> None:
    with pytest.raises(ValueError, match=r"already holds a run; continue it with --resume"):
        begun.refuse_unless_resuming(resume=False)
    begun.refuse_unless_resuming(resume=True)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        pytest.param(["checkpoint-5/"], "checkpoint-5/", id="checkpoints"),
        pytest.param(["model/"], "model/", id="a model"),
        pytest.param(["manifest.json", "kv.zarr/"], "kv.zarr/, manifest.json", id="a store"),
        pytest.param([f"{letter}.tex" for letter in "abcdefg"], "a.tex, b.tex, c.tex, d.tex, e.tex and 2 more", id="many"),
    ],
)
def test_a_folder_of_other_files_is_refused_and_left_alone(names: list[str], shown: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    for resume in (False, True):
        with pytest.raises(ValueError, match=rf"holds {re.escape(shown)} but no {RUN}.*choose a new --out"):
            RunFolder(tmp_path).refuse_unless_resuming(resume)
    assert len(list(tmp_path.iterdir())) == len(names)


def test_a_file_is_refused_and_a_run_that_died_at_its_first_write_is_not(tmp_path: Path) -> None:
    (tmp_path / f".{RUN}.partial").touch()
    RunFolder(tmp_path).refuse_unless_resuming(False)
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        RunFolder(tmp_path / f".{RUN}.partial").refuse_unless_resuming(False)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param({"store": "other"}, 'store: got "other", expected "abc"', id="store"),
        pytest.param({"config": {"seed": 1, "steps": 10}}, "config.seed: got 1, expected 0", id="setting"),
        pytest.param({"alignment": {"layer_map": [[0, 1]]}}, "alignment.layer_map", id="alignment"),
        pytest.param({"alignment": None}, "alignment: got null", id="no alignment any more"),
    ],
)
def test_another_run_cannot_continue_this_one_and_the_field_is_named(
    begun: RunFolder, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        begun.begin({**IDENTITY, **changed})
    assert begun.recorded() == IDENTITY


def test_the_newest_complete_checkpoint_is_continued_and_later_metrics_are_forgotten(begun: RunFolder) -> None:
    for step in (2, 9):
        add_checkpoint(begun, step)
    newest = add_checkpoint(begun, 10)
    add_checkpoint(begun, 12, complete=False)
    for step in (5, 10, 11):
        begun.log({"step": step, "loss": 1.0})
    assert begun.begin(IDENTITY) == newest
    assert [record["step"] for record in read_metrics(begun.path / METRICS)] == [5, 10]


def test_without_a_checkpoint_a_resumed_run_starts_again(begun: RunFolder) -> None:
    begun.log({"step": 1, "loss": 1.0})
    assert begun.begin(IDENTITY) is None
    assert read_metrics(begun.path / METRICS) == []


def test_a_line_cut_short_by_a_crash_is_dropped(begun: RunFolder) -> None:
    add_checkpoint(begun, 8)
    begun.log({"step": 4, "loss": 1.0})
    with (begun.path / METRICS).open("a") as file:
        file.write('{"step": 8, "lo')
    begun.begin(IDENTITY)
    begun.log({"step": 9, "loss": 0.5})
    assert [record["step"] for record in read_metrics(begun.path / METRICS)] == [4, 9]


def test_a_damaged_record_of_the_run_is_refused(begun: RunFolder) -> None:
    (begun.path / RUN).write_text('{"store": ')
    with pytest.raises(ValueError, match=r"run\.json: not JSON"):
        begun.begin(IDENTITY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"store": 7}, "store: got 7, expected a valid string", id="a number for a text"),
        pytest.param({"config": [1]}, r"config: got \[1\], expected a valid dictionary", id="a list of settings"),
        pytest.param({"config": {"steps": "10"}}, "config.steps: got '10', expected a valid integer", id="a text of steps"),
        pytest.param({"config": {"steps": -1}}, "config.steps: got -1, expected greater than or equal to 0", id="negative"),
        pytest.param({"variances": [[1.0]]}, r"variances.0: got \[1.0\], expected .*at least 2", id="one variance"),
        pytest.param({"variances": [[1.0, 0.0]]}, "variances.0.1: got 0.0, expected greater than 0", id="no variance"),
        pytest.param({"variances": [[1.0, float("nan")]]}, "variances.0.1: got nan, expected a finite number", id="no number"),
        pytest.param(
            {"samples": {"shards": "0", "num_samples": 2**60, "sha256": ""}}, "num_samples: got 1152921504606846976", id="huge"
        ),
        pytest.param({"surprise": 1}, "surprise: got 1, expected", id="an unknown field"),
    ],
)
def test_a_record_of_a_run_with_other_values_names_the_file_and_the_field(
    begun: RunFolder, change: dict[str, Any], message: str
) -> None:
    (begun.path / RUN).write_text(json.dumps({**IDENTITY, **change}))
    with pytest.raises(ValueError, match=rf"run/run\.json: .*{message}.*; the run is damaged, choose another --out"):
        begun.recorded()


NO_RECORDS: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "nested": lambda path: path.write_text('{"a":' * 100_000),
    "nested, and complete": lambda path: path.write_text('{"a":' * 100 + "1" + "}" * 100),
    "a list": lambda path: path.write_text("[1]"),
    "a number": lambda path: path.write_text("1e999"),
    "larger than memory": lambda path: (path.touch(), os.truncate(path, 2**40)),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("damage", NO_RECORDS.values(), ids=NO_RECORDS)
@pytest.mark.parametrize("name", [RUN, SUMMARY, METRICS])
def test_what_is_no_record_is_refused_by_name_and_neither_read_nor_waited_for(
    name: str, damage: Callable[[Path], object], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    damage(tmp_path / name)
    read = {RUN: folder.recorded, SUMMARY: folder.summary, METRICS: lambda: read_metrics(tmp_path / METRICS)}
    with pytest.raises(ValueError, match=rf"{re.escape(name)}.*: got .*, expected"):
        read[name]()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        pytest.param('{"step": "2", "loss": 1.0}', "step: got '2', expected a valid integer", id="a text for a step"),
        pytest.param('{"loss": 1.0}', "step: got nothing, expected this field", id="no step"),
        pytest.param('{"step": 2, "loss": [1]}', r"loss: got \[1\], expected a valid number", id="a list for a loss"),
        pytest.param(
            '{"step": 2, "loss": 1%s}' % ("0" * 400), r"loss: got 1000.*\.\.\., expected a valid number", id="too large to draw"
        ),
        pytest.param('{"step": 2, "tokens": -3}', "tokens: got -3, expected greater than or equal to 0", id="negative"),
        pytest.param('{"step": 2, "seconds": NaN}', "seconds: got nan, expected a finite number", id="no number"),
    ],
)
def test_a_line_of_metrics_with_other_values_names_the_line_and_the_field(begun: RunFolder, line: str, message: str) -> None:
    (begun.path / METRICS).write_text(f'{{"step": 1, "loss": NaN, "grad_norm": null}}\n{line}\n')
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, line 2: {message}"):
        read_metrics(begun.path / METRICS)


def test_a_damaged_summary_names_the_field(begun: RunFolder) -> None:
    (begun.path / SUMMARY).write_text('{"steps": "many"}')
    with pytest.raises(ValueError, match=r"summary\.json: .*got .*, expected .* \(and \d+ more\)"):
        begun.summary()
