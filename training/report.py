"""Curves of one or several runs as a picture. Knows metrics.jsonl only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file in order; one cut short by a crash, and what follows it, is left out."""
    records: list[dict[str, Any]] = []
    if not path.is_file():
        return records
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def plot_runs(runs: Mapping[str, Path], out: Path) -> None:
    """Draw training cross-entropy and held-out loss against steps, one colour per run.

    Args:
        runs: label and folder of each run.
        out: the picture; its suffix chooses the format, such as .png or .svg.

    Raises:
        ValueError: a folder has no metrics.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    train, held_out = figure.subplots(1, 2)
    metrics = {label: read_metrics(folder / METRICS) for label, folder in runs.items()}
    empty = [str(runs[label]) for label, records in metrics.items() if not records]
    if empty:
        raise ValueError(f"runs: no {METRICS} with a line in it in {', '.join(empty)}; train there first")
    per_byte = all(_series(records, "eval_nats_per_byte")[0] for records in metrics.values())
    for label, records in metrics.items():
        train.plot(*_series(records, "ce"), label=label, linewidth=1.5)
        steps, losses = _series(records, "eval_nats_per_byte" if per_byte else "eval_loss")
        held_out.plot(steps, losses, label=f"{label}: {losses[-1]:.3f}" if losses else label, marker="o", markersize=3)
    train.set(title="Training", xlabel="optimizer step", ylabel="cross-entropy (nats per token)")
    unit = "byte" if per_byte else "token"
    held_out.set(title="Held-out documents", xlabel="optimizer step", ylabel=f"cross-entropy (nats per {unit})")
    ends = {step for records in metrics.values() if (step := _last_kv_step(records)) is not None}
    for axes in (train, held_out):
        for number, step in enumerate(sorted(ends)):
            axes.axvline(step, color="grey", linestyle=":", linewidth=1, label="" if number else "KV loss ends")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(out, dpi=150)


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have a field."""
    chosen = [(int(record["step"]), float(record[name])) for record in records if record.get(name) is not None]
    return [step for step, _ in chosen], [value for _, value in chosen]


def _last_kv_step(records: Sequence[Mapping[str, Any]]) -> int | None:
    """The step after which a run used no KV loss, None if it always or never did."""
    steps, _ = _series(records, "kv_loss")
    return steps[-1] if steps and steps[-1] < max(int(record["step"]) for record in records) else None
