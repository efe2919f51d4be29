"""One page that compares runs: pictures, what each came to, and in which settings they differ. Knows the folders of runs."""

from __future__ import annotations

import base64
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from training.report import plot_against_cost, plot_costs, plot_layers, plot_runs, read_runs
from training.run_folder import RunFolder, write_text

PAGE = "index.html"
_PICTURES = {
    "loss.png": "Loss against optimizer steps",
    "cost.png": "Loss against tokens and seconds",
    "layers.png": "KV loss of each layer",
    "resources.png": "Memory, and waiting for data",
}
_RESULTS = {
    "steps": "steps",
    "tokens": "tokens predicted",
    "seconds": "seconds",
    "train_ce": "training cross-entropy (nats/token)",
    "eval_loss": "held-out loss (nats/token)",
    "eval_nats_per_byte": "held-out loss (nats/byte)",
    "peak_rss_bytes": "peak memory (MiB)",
    "peak_device_bytes": "peak GPU memory (MiB)",
    "waiting": "waiting for data (% of time)",
    "store_fingerprint": "store",
}


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write `index.html`, which holds its pictures, and the pictures beside it; returns the page.

    Raises:
        ValueError: a folder is not that of a run, or has logged nothing yet.
    """
    folders = _labelled(runs)
    metrics = read_runs(folders)
    records = {label: RunFolder(folder).recorded() or {} for label, folder in folders.items()}
    strangers = [str(folders[label]) for label, record in records.items() if not record]
    if strangers:
        raise ValueError(f"runs: {', '.join(strangers)} have no run.json, expected folders that 'kvpipe train' made")
    out.mkdir(parents=True, exist_ok=True)
    for name in _PICTURES:
        (out / name).unlink(missing_ok=True)
    plot_runs(folders, out / "loss.png")
    plot_against_cost(metrics, out / "cost.png")
    plot_layers(metrics, out / "layers.png")
    plot_costs(metrics, out / "resources.png")
    results = {label: _results(folder, metrics[label], records[label]) for label, folder in folders.items()}
    settings = {label: record["config"] for label, record in records.items()}
    template = importlib.resources.files("training").joinpath("report_page.html.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(template)
    pictures = [
        {"title": title, "data": base64.b64encode((out / name).read_bytes()).decode()}
        for name, title in _PICTURES.items()
        if (out / name).exists()
    ]
    text = page.render(
        labels=list(folders),
        folders={label: str(folder) for label, folder in folders.items()},
        results=[(shown, [results[label][name] for label in folders]) for name, shown in _RESULTS.items()],
        differing=_differing(settings),
        common=_common(settings),
        pictures=pictures,
    )
    write_text(out / PAGE, text)
    return out / PAGE


def _labelled(runs: Sequence[Path]) -> dict[str, Path]:
    """Folder names as labels, with as many folders above them as tell them apart."""
    folders = list(dict.fromkeys(run.resolve() for run in runs))
    parts = 1
    while len({folder.parts[-parts:] for folder in folders}) < len(folders):
        parts += 1
    return {"/".join(folder.parts[-parts:]): folder for folder in folders}


def _results(folder: Path, metrics: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> dict[str, str]:
    """What a run came to, or as far as it is, as text."""
    found: dict[str, Any] = {}
    for line in metrics:
        found |= {name: value for name, value in line.items() if value is not None}
    values = {"steps": found["step"], "train_ce": found.get("ce"), "store_fingerprint": record.get("store"), **found}
    summary = RunFolder(folder).summary()
    if summary is not None:
        values |= summary.model_dump(mode="json")
    else:
        values["steps"] = f"{found['step']:,} of {record['config']['steps']:,}, not finished"
    if found.get("seconds"):
        values["waiting"] = 100 * found.get("loader_wait_s", 0.0) / found["seconds"]
    return {name: _shown(name, values.get(name)) for name in _RESULTS}


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("_bytes"):
        return f"{value / 2**20:,.0f}"
    if name == "store_fingerprint":
        return str(value)[:16]
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3f}" if name != "seconds" else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _differing(settings: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, one value for each run."""
    names = list(dict.fromkeys(name for chosen in settings.values() for name in chosen))
    rows = [(name, [json.dumps(chosen.get(name)) for chosen in settings.values()]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _common(settings: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    differing = {name for name, _ in _differing(settings)}
    first = next(iter(settings.values()))
    return [(name, json.dumps(value)) for name, value in first.items() if name not in differing]
