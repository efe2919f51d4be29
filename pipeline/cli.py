"""The command line. Parses first and imports what is heavy inside the commands, so that `kvpipe --help` is instant.

Results go to stdout, progress and messages to stderr. Exit status: 0 fine, 1 failed, 2 wrong usage, 75 stopped by a signal and to
be run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from pipeline import doctor_commands, extract_commands, fit_commands, store_commands, train_commands
from pipeline.failures import in_words
from pipeline.terminal import console, growth_lines, in_line, prepare_streams, report_lines, report_threads, say


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="kvpipe")
def cli() -> None:
    """Run a teacher once, keep its attention keys and values, train any student from them.

    \b
    kvpipe demo                                            the whole story on this machine, no download
    kvpipe plan --teacher qwen2-7b                         size, hours and disk before anything is written
    kvpipe extract --teacher qwen2-7b                      text -> store (a preset knows data, folder and size)
    kvpipe status qwen2-7b-kv                              how far it is, from another terminal
    kvpipe inspect qwen2-7b-kv                             what is in it; any Zarr tool opens qwen2-7b-kv/kv.zarr
    kvpipe verify qwen2-7b-kv                              is every byte what was committed
    kvpipe train --store qwen2-7b-kv --student qwen2-0.5b  store -> student, no teacher in memory
    kvpipe report runs/kv runs/ce                          runs side by side on one page
    """


@cli.command()
@click.argument("store")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(store: str, as_json: bool) -> None:
    """Show what is in a store, in one screen."""
    from kvstore import open_store
    from kvstore.describe import describe

    record = describe(open_store(store))
    if as_json:
        click.echo(json.dumps(record, indent=1))
    else:
        _print_description(record)


@cli.command()
@click.argument("store")
@click.option("--deep", is_flag=True, help="Decode every sample too, and check its tokens against its id.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def verify(store: str, deep: bool, as_json: bool) -> None:
    """Check a store against its own records; exit status 1 when anything is wrong.

    Fast: the seal of every record, size and sha256 of every object, tables against commits. Changes nothing.
    """
    from kvstore.verify import verify_store

    with _bytes_bar("verify") as progress:
        report = verify_store(store, deep=deep, progress=progress)
    click.echo(json.dumps({**dataclasses.asdict(report), "ok": report.ok}) if as_json else "\n".join(report_lines(report)))
    sys.exit(0 if report.ok else 1)


@cli.command()
@click.argument("store")
@click.option("--deep", is_flag=True, help="Look for damage as verify --deep does.")
@click.option("--teacher", help="Where the teacher is now, if not where the store says.")
@click.option("--data", multiple=True, help="Where the data is now; needed only where a commit record is lost.")
@click.option("--device", help="cpu, cuda, cuda:1 ... or auto [auto].")
@click.option("--workers", type=int, help="Ray workers, one teacher each; 0 runs in this process [0].")
@click.option("--batch-tokens", type=int, help="Padded tokens of one forward pass [as the store was made].")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def repair(store: str, deep: bool, as_json: bool, **settings: Any) -> None:
    """Make damaged or missing shards of a store again, and only those; remove what killed writers left behind.

    Runs the teacher the store was made with, and refuses another. Exit status 1 when something stays wrong.
    """
    from pipeline.repair import repair_store

    chosen = {name: value for name, value in settings.items() if value not in (None, ())}
    with _bytes_bar("verify") as progress:
        summary = repair_store(store, deep=deep, settings=chosen, progress=progress, say=say)
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(summary), "ok": summary.report.ok}))
    else:
        shards = ", ".join(map(str, summary.shards)) or "none"
        click.echo(f"shards made again: {shards}; leftovers removed: {len(summary.removed)}")
        click.echo("\n".join(report_lines(summary.report)))
    sys.exit(0 if summary.report.ok else 1)


@contextlib.contextmanager
def _bytes_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for work that says how many bytes of how many are done."""
    import tqdm

    with tqdm.tqdm(desc=name, unit="B", unit_scale=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


@cli.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("kvpipe-demo"), show_default=True)
@click.option("--workers", type=int, default=2, show_default=True, help="Ray workers of the extraction.")
@click.option("--seed", type=int, default=0, show_default=True, help="Initialisation and data order of the students.")
def demo(out: Path, workers: int, seed: int) -> None:
    """The whole story on this machine: teacher, store, and two students, one with the teacher's KV and one without.

    Needs no download: the text is the source of Python's standard library. The trained teacher is kept for the next time.
    """
    from pipeline.demo import run_demo

    run_demo(out, workers=workers, seed=seed, say=say)


for _command in (
    *(extract_commands.extract, extract_commands.plan, extract_commands.status),
    *(fit_commands.fit, doctor_commands.doctor),
    *(train_commands.train, train_commands.evaluate, train_commands.report),
    *(store_commands.merge, store_commands.recode, store_commands.align, store_commands.match_layers, store_commands.drop),
):
    cli.add_command(_command)


def _print_description(record: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from kvstore.spec import format_layers

    screen = console()
    state = "complete" if record["complete"] else "NOT COMPLETE: run the same extract command again"
    screen.print(Text.assemble((in_line(record["path"]), "bold"), f"  {state}"))
    size = record["stored_bytes"]
    unrotated = format_layers(record["unrotated_layers"]) if record["unrotated_layers"] else ""
    lines = {
        "samples": f"{record['samples']:,} ({record['tokens']:,} tokens"
        + (", keys and values only of those to be learnt from)" if record["response_only"] else ")"),
        "size": f"{size / 1e6:,.1f} MB"
        + (
            f", {record['bytes_per_token']:,.0f} bytes per token, {record['bits_per_value']:.2f} bits per value" if size else ""
        ),
        "shards": f"{record['shards']['committed']} of {record['shards']['planned']}, "
        f"{record['shard_tokens']:,} tokens each in chunks of {record['chunk_tokens']}",
        "keys": f"{record['key_domain'].replace('_', '-')}, captured as {record['dtype']}"
        + (f"; the same before and after rotation in layers {unrotated}, which rotate none" if unrotated else ""),
        "alignment": _alignment_line(record["alignment"]),
        **growth_lines(record),
        "signal": record["fingerprints"]["signal"][:16],
        "data": record["fingerprints"]["data"][:16],
        "created": f"{record['created']} by kvpipe {record['kvpipe_version']}",
    }
    for name, text in lines.items():
        screen.print(f"  {name:11} {in_line(text)}")
    table = Table("array group", "layers", "kv heads", "key dim", "value dim", "codec")
    for group in record["groups"]:
        table.add_row(*(str(value) for value in group.values()))
    screen.print(table)
    if record["fidelity"]:
        fidelity = Table("layer", "key error", "key clipped", "key bits", "value error", "value clipped", "value bits")
        for layer, kinds in record["fidelity"].items():
            cells = [
                text
                for kind in ("key", "value")
                for text in (
                    f"{kinds[kind]['centred_error']:.4f}",
                    f"{kinds[kind]['saturation']:.1e}",
                    f"{kinds[kind]['bits']:.2f}",
                )
            ]
            fidelity.add_row(layer, *cells)
        screen.print(fidelity)
        screen.print("  error: root mean square, relative to the values without their mean; measured on the data written")


def _alignment_line(alignment: dict[str, Any] | None) -> str:
    if alignment is None:
        return "none: the teacher's own geometry, to be aligned to any student at load"
    pairs = ", ".join(f"{student}<-{teacher}" for student, teacher in alignment["layer_map"])
    return f"{'baked' if alignment['baked'] else 'recorded'}, {alignment['layer_map_name']}, student<-teacher layers {pairs}"


def main() -> None:
    """Entry point of `kvpipe`: quiet where whoever reads our output has had enough, as `head` has."""
    prepare_streams()
    report_threads(in_words)
    status = _run()
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter tries again at exit, and tells
        if status == 0 and not isinstance(error, BrokenPipeError):
            say(f"error: the result cannot be printed: {error}")
        status = status or 1
    sys.exit(status)


def _run() -> int:
    """Run the command; whatever ends it becomes a readable message. The exit status."""
    try:
        cli.main(standalone_mode=False)
    except (click.exceptions.Exit, SystemExit) as error:
        code = error.exit_code if isinstance(error, click.exceptions.Exit) else error.code
        return code if isinstance(code, int) else 0 if code is None else 1
    except click.ClickException as error:
        heard = io.StringIO()
        error.show(heard)
        say(heard.getvalue().rstrip())
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        say("interrupted; what is committed or saved is kept, and the same command goes on from there (train with --resume)")
        return 130
    except BrokenPipeError:
        return 1
    except BaseException as error:  # panics of Rust libraries, too
        say(in_words(error))
        return 1
    return 0


if __name__ == "__main__":
    main()
