"""The state of a running extraction as plain numbers, and in words. Imports nothing heavy, for whoever only looks."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from kvstore.records import Size, parse

STAGES = ("compute", "copy", "encode", "write")
"""What happens to a batch, one after another; stages of different batches overlap."""
WAITING = "waiting"
"""The bottleneck of workers that mostly have nothing to do: data comes too slowly, or there are too few tasks."""
WINDOW_S = 60.0
"""Rates and shares are those of the last minute at least."""

LONGEST_S = 2.0**36
"""Two thousand years: more is no time."""
Seconds = Annotated[float, Field(ge=0, le=LONGEST_S)]
Rate = Annotated[float, Field(ge=0, le=1e15)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The state of a run at one moment."""

    __pydantic_config__ = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    time_s: Seconds
    """Seconds since 1970."""
    seconds: Seconds
    """Since its tasks began."""
    shards: Size
    """Committed by this run; tokens and bytes likewise."""
    tokens: Size
    stored_bytes: Size
    left_tokens: Size | None
    """What this run has still to do; None where the end of the data is not known."""
    tokens_per_s: Rate | None
    """None until a task came back that was computed, not only written because calibration had computed it."""
    shares: Mapping[str, Annotated[float, Field(ge=0, le=1e6)]]
    """Of the workers' time, by stage. Stages overlap, so that the sum may pass 1."""
    bottleneck: str | None
    """The busiest stage, or `waiting`."""
    eta_s: Seconds | None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Reading:
        """Parse what `to_json` gave; other fields are left alone.

        Raises:
            StoreFormatError: a field is missing, of another type or out of range.
        """
        return parse(cls, record, "a reading", "12.2")


def sentence(reading: Reading, device: str) -> str:
    """Rate, shares, bottleneck and end of a reading in one line.

    Args:
        device: what the teacher runs on, for its name in the line.
    """
    rate = "- tokens/s" if reading.tokens_per_s is None else f"{short(reading.tokens_per_s)} tokens/s"
    shares = " ".join(f"{stage_name(stage, device)} {share:.0%}" for stage, share in reading.shares.items())
    parts = [rate, shares]
    if reading.bottleneck:
        parts.append(f"bottleneck: {stage_name(reading.bottleneck, device)}")
    if reading.eta_s is not None and reading.left_tokens:
        parts.append(f"ETA {duration(reading.eta_s)}")
    return "  ".join(parts)


def stage_name(stage: str, device: str) -> str:
    """What people call a stage: computing is the GPU's, or else the teacher's."""
    if stage != "compute":
        return stage
    return "GPU" if device.startswith("cuda") else "teacher"


def short(number: float | int) -> str:
    """Three digits and a unit: 12.3k."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:,.0f}T"


def duration(seconds: float | int) -> str:
    """Hours, minutes and seconds, as 2:05:09 or 1 day, 0:00:12."""
    return str(datetime.timedelta(seconds=round(seconds)))


def size(num_bytes: float | int) -> str:
    """Bytes with three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.0f} PB"
