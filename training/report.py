"""Curves of one or several runs as pictures. Knows metrics.jsonl only."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, FiniteFloat

from training.records import Count, NotJsonError, Number, Record, load_json, parse, read_regular

METRICS = "metrics.jsonl"
MAX_METRICS_BYTES = 2**30
_COLUMNS = 6

_Amount = Annotated[FiniteFloat, Field(ge=0.0)]


class _Line(Record):
    """One line of metrics: where the run was, and losses by name."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", use_attribute_docstrings=True)
    __pydantic_extra__: dict[str, Number] = Field(init=False)

    step: Count
    tokens: Count = 0
    seconds: _Amount = 0.0
    loader_wait_s: _Amount = 0.0
    peak_rss_bytes: Count = 0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file in order; one cut short by a crash, and what follows it, is left out.

    Raises:
        ValueError: it is no regular file, or a line holds something else than numbers.
    """
    records: list[dict[str, Any]] = []
    if not os.path.lexists(path):
        return records
    for number, line in enumerate(read_regular(path, MAX_METRICS_BYTES).splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            record = load_json(line, where)
        except NotJsonError:
            break
        parse(_Line, record, where)
        records.append(record)
    return records


Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""Lines of metrics of each run, by label."""


def read_runs(runs: Mapping[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """The metrics of several runs.

    Args:
        runs: label and folder of each run.

    Raises:
        ValueError: a folder has no metrics.
    """
    metrics = {label: read_metrics(folder / METRICS) for label, folder in runs.items()}
    empty = [str(runs[label]) for label, records in metrics.items() if not records]
    if empty:
        raise ValueError(f"runs: no {METRICS} with a line in it in {', '.join(empty)}; train there first")
    return metrics


def plot_runs(runs: Mapping[str, Path], out: Path) -> None:
    """Draw training cross-entropy and held-out loss against steps, one colour per run.

    Args:
        runs: label and folder of each run.
        out: the picture; its suffix chooses the format, such as .png or .svg.

    Raises:
        ValueError: a folder has no metrics.
    """
    metrics = read_runs(runs)
    figure, (train, held_out) = _figure(1, 2)
    _draw_losses(train, held_out, metrics, "step", "optimizer step")
    for axes in (train, held_out):
        _mark_ends(axes, metrics)
    _save(figure, (train, held_out), out)


def plot_against_cost(metrics: Runs, out: Path) -> None:
    """Draw both losses against tokens read and against seconds."""
    figure, axes = _figure(2, 2)
    for row, (name, label) in zip((axes[:2], axes[2:]), (("tokens", "tokens predicted"), ("seconds", "seconds")), strict=True):
        _draw_losses(row[0], row[1], metrics, name, label)
    _save(figure, axes, out)


def plot_layers(metrics: Runs, out: Path) -> bool:
    """Draw the KV loss of every layer, keys and values apart, one colour per run; False where no run has one."""
    names = sorted(
        {name for records in metrics.values() for record in records for name in record if name.startswith("kv_key_")},
        key=lambda name: int(name.rpartition("_")[2]),
    )
    if not names:
        return False
    columns = min(len(names), _COLUMNS)
    rows = -(-len(names) // columns)
    figure, axes = _figure(2 * rows, columns, width=3.2)
    for kind, panels in (("key", axes[: rows * columns]), ("value", axes[rows * columns :])):
        for panel, name in zip(panels, names, strict=False):
            layer = name.rpartition("_")[2]
            for label, records in metrics.items():
                panel.plot(*_series(records, f"kv_{kind}_{layer}"), label=label, linewidth=1.2)
            panel.set(title=f"layer {layer}, {kind}s", xlabel="optimizer step", ylabel="distance", yscale="log")
        for panel in panels[len(names) :]:
            panel.set_visible(False)
    _save(figure, axes, out)
    return True


def plot_costs(metrics: Runs, out: Path) -> None:
    """Draw memory and the share of time spent waiting for data against steps."""
    figure, (memory, wait) = _figure(1, 2)
    for label, records in metrics.items():
        steps, peaks = _series(records, "peak_rss_bytes")
        memory.plot(steps, [peak / 2**20 for peak in peaks], label=label)
        shares = [
            {"step": record["step"], "share": 100 * record["loader_wait_s"] / record["seconds"]}
            for record in records
            if record.get("seconds")
        ]
        wait.plot(*_series(shares, "share"), label=label)
    memory.set(title="Peak memory", xlabel="optimizer step", ylabel="MiB", ylim=(0, None))
    wait.set(title="Waiting for data", xlabel="optimizer step", ylabel="% of the time so far", ylim=(0, None))
    _save(figure, (memory, wait), out)


def _figure(rows: int, columns: int, width: float = 5.0) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(width * columns, 5.0), 4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _draw_losses(train: Any, held_out: Any, metrics: Runs, against: str, label: str) -> None:
    per_byte = all(_series(records, "eval_nats_per_byte")[0] for records in metrics.values())
    for name, records in metrics.items():
        train.plot(*_series(records, "ce", against), label=name, linewidth=1.5)
        places, losses = _series(records, "eval_nats_per_byte" if per_byte else "eval_loss", against)
        held_out.plot(places, losses, label=f"{name}: {losses[-1]:.3f}" if losses else name, marker="o", markersize=3)
    train.set(title="Training", xlabel=label, ylabel="cross-entropy (nats per token)")
    unit = "byte" if per_byte else "token"
    held_out.set(title="Held-out documents", xlabel=label, ylabel=f"cross-entropy (nats per {unit})")


def _mark_ends(axes: Any, metrics: Runs) -> None:
    ends = {step for records in metrics.values() if (step := _last_kv_step(records)) is not None}
    for number, step in enumerate(sorted(ends)):
        axes.axvline(step, color="grey", linestyle=":", linewidth=1, label="" if number else "KV loss ends")


def _save(figure: Any, axes: Sequence[Any], out: Path) -> None:
    for place in axes:
        place.set_xlim(left=0)
        place.grid(alpha=0.3)
        place.spines[["top", "right"]].set_visible(False)
    for place in axes[:2]:
        place.legend(frameon=False)
    figure.savefig(out, dpi=150)


def _series(records: Sequence[Mapping[str, Any]], name: str, against: str = "step") -> tuple[list[float], list[float]]:
    """Places and values of the records that have a field."""
    chosen = [(record[against], float(record[name])) for record in records if record.get(name) is not None]
    return [place for place, _ in chosen], [value for _, value in chosen]


def _last_kv_step(records: Sequence[Mapping[str, Any]]) -> float | None:
    """The step after which a run used no KV loss, None if it always or never did."""
    steps, _ = _series(records, "kv_loss")
    return steps[-1] if steps and steps[-1] < max(int(record["step"]) for record in records) else None
