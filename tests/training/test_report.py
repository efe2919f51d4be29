"""The picture of runs: that it says what is in the metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from training.report import METRICS, plot_runs, read_metrics


def write_run(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / METRICS).write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return folder


def a_run(folder: Path, final: float, per_byte: bool = True) -> Path:
    records: list[dict[str, Any]] = []
    for step in range(10, 101, 10):
        ce = final + 2 / step
        records.append({"step": step, "ce": ce, "loss": ce, **({"kv_loss": 1.0} if step <= 50 else {})})
        if step % 50 == 0:
            records.append({"step": step, "eval_loss": 4 * ce, **({"eval_nats_per_byte": ce} if per_byte else {})})
    return write_run(folder, records)


def texts(svg: Path) -> str:
    """The words of a picture: matplotlib draws text as outlines and notes it in comments."""
    return svg.read_text(encoding="utf-8")


def test_every_run_is_named_with_its_final_loss_and_axes_have_units(tmp_path: Path) -> None:
    runs = {"CE": a_run(tmp_path / "ce", 1.5), "CE + KV": a_run(tmp_path / "kv", 1.25)}
    plot_runs(runs, tmp_path / "loss.svg")
    said = texts(tmp_path / "loss.svg")
    for words in ("CE: 1.520", "CE + KV: 1.270", "optimizer step", "nats per token", "nats per byte", "KV loss ends"):
        assert words in said, words


def test_where_a_run_has_no_losses_per_byte_all_are_drawn_per_token(tmp_path: Path) -> None:
    runs = {"one": a_run(tmp_path / "one", 1.5), "other": a_run(tmp_path / "other", 1.0, per_byte=False)}
    plot_runs(runs, tmp_path / "loss.svg")
    assert "nats per byte" not in texts(tmp_path / "loss.svg")
    assert "one: 6.080" in texts(tmp_path / "loss.svg")


def test_a_run_without_evaluation_is_drawn_too(tmp_path: Path) -> None:
    plot_runs({"short": write_run(tmp_path / "short", [{"step": 1, "ce": 2.0}])}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_folder_without_metrics_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no metrics\.jsonl with a line in it in .*empty; train there first"):
        plot_runs({"empty": tmp_path / "empty"}, tmp_path / "loss.png")


def test_a_line_cut_short_ends_the_metrics(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [{"step": 1}, {"step": 2}])
    with (folder / METRICS).open("a") as file:
        file.write('{"step": 3, "l')
    assert read_metrics(folder / METRICS) == [{"step": 1}, {"step": 2}]
