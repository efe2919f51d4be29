"""The command that checks a teacher and a student before anything is run."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pipeline.doctor import Checkup


@click.command()
@click.option("--teacher", required=True, help="Preset, Hugging Face id or folder.")
@click.option("--student", required=True, help="Preset, Hugging Face id, folder, or a TOML file with a fresh config.")
@click.option("--store", help="A store to train from: folder or s3://bucket/prefix.")
@click.option(
    "--layer-map",
    default="last_aligned",
    show_default=True,
    help="last_aligned, uniform, or student=teacher pairs like '0=3,1=9,-1=-1'.",
)
@click.option(
    "--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Text to try tokens on [some of Python's own]."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def doctor(teacher: str, student: str, store: str | None, layer_map: str, text: Path | None, as_json: bool) -> None:
    """Why does training on a teacher's KV fail? Both models side by side, every shape on the way, and what to do.

    Reads configs and tokenizers, no weights of large models; a preset that is not on this machine is known by its published numbers.
    Exit status 1 if training would fail.

    \b
    kvpipe doctor --teacher qwen2-7b --student tinyllama-1.1b
    kvpipe doctor --teacher qwen2-7b --student qwen2-0.5b --store my-store
    """
    from pipeline.doctor import examine
    from pipeline.models.files import read_text

    found = examine(teacher, student, store, layer_map, None if text is None else read_text(text))
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(found), "ok": found.ok}))
    else:
        _print(found)
    sys.exit(0 if found.ok else 1)


def _print(found: Checkup) -> None:
    from rich.table import Table
    from rich.text import Text

    from pipeline.terminal import aligned, console, shown

    screen = console()
    facts = Table("", "teacher", "student")
    for field, sides in found.facts.items():
        facts.add_row(field, *("-" if side is None else f"{side:,}" if isinstance(side, int) else str(side) for side in sides))
    screen.print(facts)
    pairs = ", ".join(f"{student}<-{teacher}" for student, teacher in found.layer_map)
    lines = [(name, f"[{', '.join(map(str, shape))}]") for name, shape in found.shapes.items()]
    lines += [("layers", f"student<-teacher {pairs}"), ("compared in", found.compared), ("time", found.index)]
    if found.coverage is not None:
        lines.append(("coverage", f"{found.coverage:.1%} of the student's tokens have a counterpart"))
    for name, size in found.bytes_per_token.items():
        lines.append(
            (name, f"{size:,.0f} bytes per token in mix: {size / 1e3:,.3g} GB a million tokens, {size / 1e3:,.3g} TB a billion")
        )
    screen.print(aligned(lines))
    for finding in found.findings:
        color, mark = ("red", "FAILS") if finding.fatal else ("yellow", "note ")
        screen.print(Text.assemble((mark, color), shown(f" {finding.what}\n      -> {finding.fix}")), soft_wrap=True)
    screen.print("training would FAIL" if not found.ok else "nothing in the way of training", style="bold")
