"""The command line. Parses first and imports what is heavy inside the commands, so that `kvpipe --help` is instant.

Results go to stdout, progress and messages to stderr. Exit status: 0 fine, 1 failed, 2 wrong usage, 75 stopped by a signal and to
be run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from pipeline import store_commands
from pipeline.terminal import growth_lines, report_lines, say
from pipeline.terminal import print_record as _print_record

_CONFIG_OPTIONS = (
    click.option(
        "--config",
        type=click.Path(dir_okay=False, path_type=Path),
        help="TOML file with a table of settings, or the name of a shipped recipe such as qwen2-7b-to-0.5b.",
    ),
    click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any setting by name; repeat for more."),
)


def _with_options(options: tuple[Callable[..., Any], ...]) -> Callable[..., Any]:
    return lambda function: functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), function)


_NEEDED = {
    "teacher": "a preset (kvpipe extract --list), a Hugging Face id, or a folder",
    "store": "a folder made by kvpipe extract, or s3://bucket/prefix",
    "student": "a preset, a Hugging Face id, a folder, or a TOML file with a fresh config",
    "out": "the folder of the run",
}


@contextlib.contextmanager
def _misuse() -> Iterator[None]:
    """Settings that are needed and missing are a wrong use of the command; each is named with what it takes."""
    from pipeline.config import MissingSettingsError

    try:
        yield
    except MissingSettingsError as error:
        flags = "; ".join(f"--{name} is needed: {_NEEDED[name]}" for name in error.names)
        raise click.UsageError(f"{flags}. A table [{error.section}] in --config FILE can say it too") from error


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="kvpipe")
def cli() -> None:
    """Run a teacher once, keep its attention keys and values, train any student from them.

    \b
    kvpipe demo                                            the whole story on this machine, no download
    kvpipe extract --teacher qwen2-7b                      text -> store (a preset knows data, folder and size)
    kvpipe inspect qwen2-7b-kv                             what is in it; any Zarr tool opens qwen2-7b-kv/kv.zarr
    kvpipe verify qwen2-7b-kv                              is every byte what was committed
    kvpipe train --store qwen2-7b-kv --student qwen2-0.5b  store -> student, no teacher in memory
    """


@cli.command()
@click.option("--teacher", help="Preset (see --list), Hugging Face id, or folder with safetensors.")
@click.option(
    "--data", multiple=True, help="Text files or globs, .jsonl[.gz|.zst], .parquet, datasets folder, or hub id[:config]."
)
@click.option("--out", help="Folder of the store, or s3://bucket/prefix; run again to resume.")
@click.option("--student", help="Bake the alignment to this student: preset, id, folder or config file.")
@click.option("--layers", help="'all' or a list like 0,4,8-11 or -1. Student layers when --student is given.")
@click.option("--codec", help="raw, q8, q8z, mix (default), q4z, q4z-min, fp8; by layer: 'mix,0=raw,24-27=q8'.")
@click.option("--seq-len", type=int, help="Longest sample in tokens [2048].")
@click.option("--batch-tokens", type=int, help="Padded tokens of one forward pass [8192].")
@click.option("--dtype", help="float32, float16, bfloat16 or auto, the checkpoint's own [auto].")
@click.option("--device", help="cpu, cuda, cuda:1 ... or auto [auto].")
@click.option(
    "--workers", type=int, help="Ray workers, one teacher each; 0 runs in this process, on a cluster one per GPU [0]."
)
@click.option("--ray-address", help="A running Ray cluster: 'auto', or host:port.")
@click.option("--gpus-per-worker", type=int, help="Spread each teacher over so many GPUs of a node [1].")
@click.option(
    "--on-bad-sample",
    type=click.Choice(["fail", "quarantine"]),
    help="A sample that crashes its worker, raises or gives NaN: end the run and name it, or leave it out and record it [fail].",
)
@click.option("--text-field", help="Field of a row that holds the text [text].")
@click.option("--split", help="Split of a data set [train].")
@click.option("--limit", type=int, help="Most samples to store.")
@click.option("--max-tokens", type=int, help="Most tokens to store; 0 for no limit [presets: 1,000,000].")
@click.option("--max-bytes", type=int, help="Begin no shard that could take the store beyond this.")
@click.option("--sample-tokens", type=int, help="Store about so many tokens in documents drawn at random from all of the data.")
@click.option("--overlap", type=int, help="Tokens a later sample of a long document repeats as context [0].")
@click.option(
    "--accept-fidelity", is_flag=True, default=None, help="Store even if the codec changes the teacher's predictions."
)
@click.option("--append", is_flag=True, default=None, help="Add this data to the store at --out as a new part.")
@click.option("--task-range", metavar="N/M", help="Do the N-th of M equal parts of the work, for job arrays without a cluster.")
@click.option("--calibration", metavar="STORE", help="Use another store's means and steps, so that the two can be merged.")
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option("--seed", type=int, help="Shuffle the documents before limits apply.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--list", "list_presets", is_flag=True, help="List the teacher presets and exit.")
@_with_options(_CONFIG_OPTIONS)
def extract(config: Path | None, settings: tuple[str, ...], as_json: bool, list_presets: bool, **flags: Any) -> None:
    """Run a teacher over text and store its keys and values.

    The same command again resumes where it was stopped. With other settings on the same --out it refuses and names what differs.

    On SIGTERM or Ctrl-C the tasks in hand are finished, for at most 20 s (--set grace_s=60), and the exit status is 75: run the same
    command again. A second signal ends at once.
    """
    from pipeline.models import presets

    if list_presets:
        click.echo("\n".join(presets.teacher_preset_names()))
        return
    from pipeline.config import ExtractConfig, load_config

    defaults: dict[str, Any] = {}
    preset = presets.teacher_preset(flags["teacher"]) if flags["teacher"] else None
    if preset is not None:
        defaults = {"data": (preset.data,), "out": preset.out, "max_tokens": preset.max_tokens}
    with _misuse():
        chosen = load_config(ExtractConfig, "extract", config, settings, flags)
    missing = {name: value for name, value in defaults.items() if getattr(chosen, name) in (None, ())}
    chosen = ExtractConfig.model_validate({**chosen.model_dump(), **missing})
    if not chosen.data or chosen.out is None:
        raise click.UsageError("--data and --out are needed for a teacher that is not a preset; see kvpipe extract --list")
    if preset is not None and "max_tokens" in missing:
        say(
            f"{preset.name}: at most {preset.max_tokens:,} tokens of {', '.join(chosen.data)} into {chosen.out}; --max-tokens asks for more"
        )

    from pipeline.models.resolve import resolve_model
    from pipeline.stop import Interrupted, stop_on_signals

    try:
        with stop_on_signals(chosen.grace_s, say) as stop:
            resolved = resolve_model(chosen.teacher, chosen.revision)
            from pipeline.executors import ExecutorError
            from pipeline.extract import extract as run_extract

            try:
                summary = run_extract(chosen, resolved, say, stop)
            except ExecutorError as error:
                raise click.ClickException(str(error)) from error
    except Interrupted as error:
        say(f"{error}. The same command goes on from there")
        sys.stdout.flush()
        os._exit(os.EX_TEMPFAIL)  # a thread may still be at a task that was given up
    _print_record(dataclasses.asdict(summary), as_json)


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
@click.option("--store", help="Folder of the store, or s3://bucket/prefix.")
@click.option("--student", help="Preset, Hugging Face id, folder, or a TOML/JSON file with a fresh config.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the run.")
@click.option("--steps", type=int, help="Optimizer steps [1000].")
@click.option("--batch-size", type=int, help="Samples in a step [16].")
@click.option("--lr", type=float, help="Peak learning rate.")
@click.option("--kv-weight", type=float, help="Weight of the KV loss while it is on [1].")
@click.option("--ce-only", is_flag=True, default=None, help="Cross-entropy alone: the same run without the teacher's KV.")
@click.option("--seed", type=int, help="Initialisation and data order [0].")
@click.option("--resume", is_flag=True, default=None, help="Continue the run in --out from its last checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@_with_options(_CONFIG_OPTIONS)
def train(config: Path | None, settings: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Train a student from a store, with no teacher in memory.

    The trained student in OUT/model loads with transformers' AutoModelForCausalLM where kvpipe is not installed.
    """
    from pipeline.config import load_config
    from training.config import TrainConfig

    flags["learning_rate"] = flags.pop("lr")
    with _misuse():
        chosen = load_config(TrainConfig, "train", config, settings, flags)
    from training.trainer import run_training

    summary = run_training(chosen, say)
    _print_record(summary.model_dump(mode="json", exclude=set() if as_json else {"config"}), as_json)


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


for _command in (store_commands.merge, store_commands.recode, store_commands.drop):
    cli.add_command(_command)


def _print_description(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    state = "complete" if record["complete"] else "NOT COMPLETE: run the same extract command again"
    console.print(f"[bold]{record['path']}[/]  {state}", highlight=False)
    size = record["stored_bytes"]
    lines = {
        "samples": f"{record['samples']:,} ({record['tokens']:,} tokens)",
        "size": f"{size / 1e6:,.1f} MB"
        + (
            f", {record['bytes_per_token']:,.0f} bytes per token, {record['bits_per_value']:.2f} bits per value" if size else ""
        ),
        "shards": f"{record['shards']['committed']} of {record['shards']['planned']}, "
        f"{record['shard_tokens']:,} tokens each in chunks of {record['chunk_tokens']}",
        "keys": f"{record['key_domain'].replace('_', '-')}, captured as {record['dtype']}",
        "alignment": _alignment_line(record["alignment"]),
        **growth_lines(record),
        "signal": record["fingerprints"]["signal"][:16],
        "data": record["fingerprints"]["data"][:16],
        "created": f"{record['created']} by kvpipe {record['kvpipe_version']}",
    }
    for name, text in lines.items():
        console.print(f"  {name:11} {text}", highlight=False)
    table = Table("array group", "layers", "kv heads", "key dim", "value dim", "codec")
    for group in record["groups"]:
        table.add_row(*(str(value) for value in group.values()))
    console.print(table)
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
        console.print(fidelity)
        console.print("  error: root mean square, relative to the values without their mean; measured on the data written")


def _alignment_line(alignment: dict[str, Any] | None) -> str:
    if alignment is None:
        return "none: the teacher's own geometry, to be aligned to any student at load"
    pairs = ", ".join(f"{student}<-{teacher}" for student, teacher in alignment["layer_map"])
    return f"{'baked' if alignment['baked'] else 'recorded'}, {alignment['layer_map_name']}, student<-teacher layers {pairs}"


def main() -> None:
    """Entry point of `kvpipe`: quiet where whoever reads our output has had enough, as `head` has."""
    try:
        try:
            _run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter tries again at exit, and tells
        sys.exit(1)


def _run() -> None:
    """Run the command; expected errors become one readable message."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        say("interrupted; what is committed is kept, and the same command goes on from there")
        sys.exit(130)
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
