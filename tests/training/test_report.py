"""The picture of runs: that it says what is in the metrics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline.cli import cli
from training.config import TrainConfig
from training.report import METRICS, plot_layers, plot_runs, read_metrics
from training.report_page import write_report
from training.trainer import run_training


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


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory, store_path: Path, student: str) -> tuple[Path, Path]:
    """With and without the teacher's keys and values, real ones."""
    folder = tmp_path_factory.mktemp("runs")
    for name, ce_only in (("kv", False), ("ce", True)):
        fields: dict[str, Any] = {"steps": 4, "batch_size": 8, "log_every": 1, "eval_every": 2, "device": "cpu", "threads": 1}
        run_training(TrainConfig(store=str(store_path), student=student, out=folder / name, ce_only=ce_only, **fields))
    return folder / "kv", folder / "ce"


def test_a_page_compares_runs_and_needs_nothing_beside_it(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["report", *map(str, two_runs), "--out", str(tmp_path / "report"), "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert [Path(path).name for path in printed["pictures"]] == ["cost.png", "layers.png", "loss.png", "resources.png"]
    page = Path(printed["page"]).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4
    for absent in ("http://", "https://", "<script"):
        assert absent not in page
    assert "<code>ce_only</code></td><td><code>false</code></td><td><code>true</code>" in page
    assert "<code>batch_size</code></td><td><code>8</code></td></tr>" in page
    for run in two_runs:
        summary = json.loads((run / "summary.json").read_text())
        assert f"<td>{summary['eval_loss']:.3f}</td>" in page
        assert summary["store_fingerprint"][:16] in page


def test_a_run_that_goes_on_is_shown_as_far_as_it_is(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    going = tmp_path / "going" / "kv"
    shutil.copytree(two_runs[0], going)
    (going / "summary.json").unlink()
    records = read_metrics(going / METRICS)
    (going / METRICS).write_text("".join(f"{json.dumps(record)}\n" for record in records if record["step"] <= 2))
    page = write_report([going, two_runs[0]], tmp_path / "report").read_text()
    assert "2 of 4, not finished" in page
    assert f"<h1>going/kv, {two_runs[0].parent.name}/kv</h1>" in page, "equal names are told apart by the folders above"


@pytest.mark.slow
def test_without_a_kv_loss_there_is_no_picture_of_layers_and_an_old_one_goes(
    two_runs: tuple[Path, Path], tmp_path: Path
) -> None:
    write_report(two_runs, tmp_path / "report")
    assert (tmp_path / "report" / "layers.png").exists()
    write_report(two_runs[1:], tmp_path / "report")
    assert not (tmp_path / "report" / "layers.png").exists()


@pytest.mark.slow
def test_many_layers_are_drawn_in_rows(tmp_path: Path) -> None:
    kinds = {f"kv_{kind}_{layer}": 1.0 / (layer + 1) for kind in ("key", "value") for layer in range(8)}
    assert plot_layers({"run": [{"step": step, **kinds} for step in (1, 2)]}, tmp_path / "layers.svg")
    said = texts(tmp_path / "layers.svg")
    assert all(f"layer {layer}, {kind}s" in said for layer in range(8) for kind in ("key", "value"))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "strange", 1.0)
    with pytest.raises(ValueError, match=r"strange have no run\.json, expected folders that 'kvpipe train' made"):
        write_report([folder], tmp_path / "report")
