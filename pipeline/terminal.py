"""What commands print: records as lines or JSON on stdout, messages and progress bars on stderr."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvstore.verify import Report


def say(text: str) -> None:
    """Tell the person at the terminal, without spoiling a result on stdout."""
    click.echo(text, err=True)


_NEXT_STEPS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free room there, or choose another place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "mend its permissions, or choose another place"),
    errno.EROFS: "mount it for writing, or choose another place",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or choose another place",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
}
"""What ends an error of the operating system, whichever file it meets."""


def described(error: Exception) -> str:
    """An error as one message that ends with the next step; those of the operating system say only what is wrong."""
    step = _NEXT_STEPS.get(error.errno or 0) if isinstance(error, OSError) else None
    if step is None or not isinstance(error, OSError):
        return str(error)
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror}; {step}, and run the same command again: what is committed or saved is kept"


def print_record(record: dict[str, Any], as_json: bool) -> None:
    """A result, one field on a line."""
    if as_json:
        click.echo(json.dumps(record, default=str))
        return
    width = max(map(len, record))
    for name, value in record.items():
        shown = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        click.echo(f"{name:{width}}  {shown}")


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
            f"from {origin['codec']} in {origin['location']} ({origin['fingerprint'][:8]}); errors are of both codecs"
        )
    if record["aligned_from"]:
        origin = record["aligned_from"]
        lines["aligned"] = f"to {origin['student']} from {origin['location']} ({origin['fingerprint'][:8]})"
    for when, result in record["gate"].items():
        lines[f"gate {when}"] = (
            f"KL {result['kl']:.2g} nats per token, perplexity {100 * result['perplexity_change']:+.2f} %, top-1 agreement "
            f"{result['top1_agreement']:.3f}: {'passed' if result['passed'] else 'NOT passed'} (limit {result['limit']:g})"
        )
    return lines


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
    return lines


def aligned(lines: Iterable[tuple[str, str]]) -> RenderableType:
    """Names and what is said of them, each text under the other however often it is wrapped."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 0, 0, 2))
    table.add_column(no_wrap=True)
    for name, text in lines:
        table.add_row(Text(name), Text(text))
    return table
