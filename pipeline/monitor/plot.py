"""A run of `kvpipe extract` as a picture: tokens per second over time, and how busy each stage was. Knows readings only."""

from __future__ import annotations

import io
from collections.abc import Sequence

from pipeline.monitor.reading import STAGES, Reading, stage_name

LEAST_S = 10.0
"""A picture of a shorter run shows nothing."""


def plot_readings(readings: Sequence[Reading], device: str) -> bytes:
    """Draw the readings of one run in order of time; a PNG.

    Args:
        device: what the teacher ran on.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    speed, shares = figure.subplots(2, 1, sharex=True)
    seconds = readings[-1].seconds
    unit, scale = next((unit, scale) for unit, scale, most in _UNITS if seconds < most)
    rated = [reading for reading in readings if reading.tokens_per_s is not None]
    speed.plot([reading.seconds / scale for reading in rated], [reading.tokens_per_s for reading in rated], linewidth=1.5)
    speed.set(ylabel="tokens per second", title="Tokens per second")
    seen = [reading for reading in readings if reading.shards]
    for stage in STAGES:
        times, busy = [reading.seconds / scale for reading in seen], [100 * reading.shares[stage] for reading in seen]
        shares.plot(times, busy, label=stage_name(stage, device), linewidth=1.5)
    shares.set(
        xlabel=f"{unit} since the first task began", ylabel="% of the workers' time", title="Stages at work", ylim=(0, 105)
    )
    shares.legend(frameon=False, ncols=len(STAGES))
    for axes in (speed, shares):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    speed.set_ylim(bottom=0)
    file = io.BytesIO()
    figure.savefig(file, dpi=90, format="png")
    return file.getvalue()


_UNITS = (("seconds", 1, 180), ("minutes", 60, 3 * 3600), ("hours", 3600, float("inf")))
"""Name, seconds, and up to how many seconds of a run."""
