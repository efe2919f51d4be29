"""The state of a store as people read it, once or again and again. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
from collections.abc import Callable, Iterator

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from pipeline.monitor.reading import duration, short, size, stage_name
from pipeline.monitor.status import Status, Writer
from pipeline.terminal import aligned, console, in_line


@contextlib.contextmanager
def show_status(*, as_json: bool, live: bool) -> Iterator[Callable[[Status], None]]:
    """Something that prints states, each in place of the one before where a terminal can do that.

    Args:
        live: whether more than one is to come.
    """
    screen = console()
    if as_json:
        yield lambda status: click.echo(json.dumps(dataclasses.asdict(status)))
    elif live and screen.is_terminal:
        with Live(console=screen, auto_refresh=False) as shower:
            yield lambda status: shower.update(_status_screen(status), refresh=True)
    else:
        yield lambda status: screen.print(_status_screen(status))


def _status_screen(status: Status) -> RenderableType:
    title = Text.assemble((in_line(status.location), "bold"), f"  {_STATES[status.state]}")
    return Group(title, aligned(_status_lines(status)))


_STATES = {
    "starting": "STARTING: no store yet",
    "running": "RUNNING",
    "stopped": "STOPPED: not complete, and nobody is writing; the same extract command goes on",
    "complete": "complete",
}


def _status_lines(status: Status) -> Iterator[tuple[str, str]]:
    if status.planned_shards:
        of_all = " planned so far" if status.is_growing else f" ({status.shards / status.planned_shards:.0%})"
        yield "shards", f"{status.shards:,} of {status.planned_shards:,}{of_all}"
    yield "tokens", f"{status.tokens:,}" + ("" if status.left_tokens is None else f", about {status.left_tokens:,} to come")
    yield "size", size(status.stored_bytes)
    if status.state == "running":
        rate = "not known yet" if status.tokens_per_s is None else f"{short(status.tokens_per_s)} tokens/s"
        ending = "" if status.eta_s is None else f", done in {duration(status.eta_s)}"
        last = "" if status.last_commit_s is None else f"; last shard {duration(status.last_commit_s)} ago"
        yield "speed", f"{rate}{ending}{last}"
    if status.shares and status.state != "complete":
        shares = "  ".join(f"{stage_name(stage, status.device)} {share:.0%}" for stage, share in status.shares.items())
        slow = "" if status.bottleneck is None else f"; bottleneck: {stage_name(status.bottleneck, status.device)}"
        yield "stages", f"{shares}{slow}"
    for writer in status.writers:
        yield "writer", _writer_line(writer)
    for writer in status.stale:
        yield "stale", f"{_writer_line(writer)}; it is gone and in nobody's way"
    if status.last_error is not None:
        yield "last error", status.last_error
    for note in status.notes:
        yield note["event"], ", ".join(f"{name} {value}" for name, value in note.items() if name not in ("event", "time_s"))


def _writer_line(writer: Writer) -> str:
    began = datetime.datetime.fromtimestamp(writer.since_s).astimezone().isoformat(sep=" ", timespec="seconds")
    shards = "the whole store" if writer.shards is None else f"shards {writer.shards[0]:,} to {writer.shards[1] - 1:,}"
    return f"{writer.purpose} on {writer.host}, pid {writer.pid}, {shards}, since {began}, seen {duration(writer.silent_s)} ago"
