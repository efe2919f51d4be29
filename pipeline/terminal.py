"""What commands print: records as lines or JSON on stdout, messages and progress bars on stderr.

Texts come from stores, data, models and clusters that anybody may have made, so everything goes through `shown` or `in_line`, or to
the `console`: no text of theirs can move the cursor, set a title, hide a link or be taken for markup.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from kvstore.verify import Report


def shown(text: str) -> str:
    """A text as a terminal may have it: what does not print, such as controls and marks of direction, is written out; lines stay."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(char if char == "\n" or char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def in_line(text: object) -> str:
    """The same in one line."""
    return shown(str(text)).replace("\n", "\\n")


def say(text: str) -> None:
    """Tell the person at the terminal, without spoiling a result on stdout."""
    click.echo(shown(text), err=True)


def console() -> Console:
    """Where tables and colours are printed: strings are shown as they are, only `Text` and styles of ours have any effect."""
    import rich.console

    class Plain(rich.console.Console):
        def render_str(self, text: str, **how: Any) -> Text:
            return super().render_str(shown(text), **how)

    return Plain(markup=False, highlight=False, emoji=False)


def prepare_streams() -> None:
    """Have every character printed somehow whatever the terminal's encoding, and what is closed swallow what it is given."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  # for as long as we run
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def report_threads(in_words: Callable[[BaseException], str]) -> None:
    """Have what ends a thread of ours said in a line, too."""

    def hook(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None:
            say(in_words(args.exc_value))

    threading.excepthook = hook


def print_record(record: dict[str, Any], as_json: bool) -> None:
    """A result, one field on a line."""
    if as_json:
        click.echo(json.dumps(record, default=str))
        return
    width = max(map(len, record))
    for name, value in record.items():
        text = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else in_line(value)
        click.echo(f"{name:{width}}  {text}")


@contextlib.contextmanager
def progress_bar(name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for work that tells how much of how much is done."""
    import tqdm

    with tqdm.tqdm(desc=name, unit=unit, unit_scale=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def growth_lines(record: dict[str, Any]) -> dict[str, str]:
    """Lines of `kvpipe inspect` on how a store came about and what the gate said of it."""
    lines = {}
    if len(record["parts"]) > 1:
        lines["parts"] = "; ".join(
            f"{part['num_samples']:,} samples from shard {part['first_shard']}" for part in record["parts"]
        )
    if record["dropped"]:
        lines["dropped"] = f"{record['dropped']:,} samples"
    if quarantined := record["quarantined"]:
        first = next(iter(quarantined.values()))
        more = f"; and {len(quarantined) - 1:,} more, see --json" if len(quarantined) > 1 else ""
        lines["left out"] = f"of the dropped {len(quarantined):,}: {first['source']}: {first['reason']}{more}"
    if record["merged_from"]:
        lines["merged"] = "from " + ", ".join(
            f"{origin['location']} ({origin['fingerprint'][:8]})" for origin in record["merged_from"]
        )
    if record["recoded_from"]:
        origin = record["recoded_from"]
        lines["recoded"] = (
            f"from {origin.get('codec', 'another codec')} in {origin['location']} ({origin['fingerprint'][:8]}); errors are of both codecs"
        )
    if record["aligned_from"]:
        origin = record["aligned_from"]
        lines["aligned"] = f"to {origin.get('student', 'a student')} from {origin['location']} ({origin['fingerprint'][:8]})"
    for when, result in record["gate"].items():
        found = [
            *([f"KL {result['kl']:.2g} nats per token"] if "kl" in result else []),
            *([f"perplexity {100 * result['perplexity_change']:+.2f} %"] if "perplexity_change" in result else []),
            *([f"top-1 agreement {result['top1_agreement']:.3f}"] if "top1_agreement" in result else []),
        ]
        limit = f" (limit {result['limit']:g})" if "limit" in result else ""
        lines[f"gate {when}"] = f"{', '.join(found)}: {'passed' if result.get('passed') else 'NOT passed'}{limit}"
    return {name: in_line(text) for name, text in lines.items()}


def report_lines(report: Report) -> list[str]:
    """What a person wants to know of a verification."""
    depth = "deep" if report.deep else "fast"
    lines = [
        f"{report.location}: {'INTACT' if report.ok else 'DAMAGED'} ({depth}: {report.num_committed} of {report.num_shards} shards, "
        f"{report.num_samples:,} samples, {report.num_bytes / 1e6:,.1f} MB read)"
    ]
    lines += [f"  {problem.part:9} {problem.message}" for problem in report.problems]
    if report.num_committed < report.num_shards and report.ok:
        lines.append(
            f"  {report.num_shards - report.num_committed} shards are not committed yet: the same extract command goes on"
        )
    lines += [f"  in use by  {writer}" for writer in report.writers]
    if report.foreign:
        lines.append(
            f"  not ours  {len(report.foreign)} files that kvpipe did not write and does not read, such as {report.foreign[0]}"
        )
    if report.orphans:
        size = f"{len(report.orphans)} leftover files of killed writers, such as {report.orphans[0]}"
        lines.append(f"  {size}; harmless, 'kvpipe repair' removes them")
    return [in_line(line) for line in lines]


def aligned(lines: Iterable[tuple[str, str]]) -> RenderableType:
    """Names and what is said of them, each text under the other however often it is wrapped."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 0, 0, 2))
    table.add_column(no_wrap=True)
    for name, text in lines:
        table.add_row(Text(in_line(name)), Text(shown(text)))
    return table
