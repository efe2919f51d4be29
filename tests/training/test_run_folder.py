"""The folder of a run: what may continue it, and what is left of an interrupted one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from training.report import METRICS, read_metrics
from training.run_folder import RUN, RunFolder

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
