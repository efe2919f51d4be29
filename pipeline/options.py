"""Options that several commands share: settings from a file or by name, and everything an extraction takes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.terminal import say

if TYPE_CHECKING:
    from pipeline.config import ExtractConfig

Decorator = Callable[..., Any]

CONFIG_OPTIONS: tuple[Decorator, ...] = (
    click.option(
        "--config",
        type=click.Path(dir_okay=False, path_type=Path),
        help="TOML file with a table of settings, or the name of a shipped recipe such as qwen2-7b-to-0.5b.",
    ),
    click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any setting by name; repeat for more."),
)

EXTRACT_OPTIONS: tuple[Decorator, ...] = (
    click.option("--teacher", help="Preset (kvpipe extract --list), Hugging Face id, or folder with safetensors."),
    click.option(
        "--data",
        multiple=True,
        help="Text files or globs, .jsonl|.json|.csv|.tsv[.gz|.zst], .parquet, datasets folder, or hub id[:config].",
    ),
    click.option("--out", help="Folder of the store, or s3://bucket/prefix; run again to resume."),
    click.option("--student", help="Bake the alignment to this student: preset, id, folder or config file."),
    click.option("--layers", help="'all' or a list like 0,4,8-11 or -1. Student layers when --student is given."),
    click.option("--codec", help="raw, q8, q8z, mix (default), q4z, q4z-min, fp8; by layer: 'mix,0=raw,24-27=q8'."),
    click.option("--seq-len", type=int, help="Longest sample in tokens [2048]."),
    click.option("--batch-tokens", type=int, help="Padded tokens of one forward pass [what fits the GPU; 8192 on a CPU]."),
    click.option("--dtype", help="float32, float16, bfloat16 or auto, the checkpoint's own [auto]."),
    click.option("--device", help="cpu, cuda, cuda:1 ... or auto [auto]."),
    click.option(
        "--workers", type=int, help="Ray workers, one teacher each; 0 runs in this process, on a cluster one per GPU [0]."
    ),
    click.option("--ray-address", help="A running Ray cluster: 'auto', or host:port."),
    click.option("--gpus-per-worker", type=int, help="Spread each teacher over so many GPUs of a node [1]."),
    click.option(
        "--on-bad-sample",
        type=click.Choice(["fail", "quarantine"]),
        help="A row that cannot be read, or a sample that crashes its worker, raises or gives NaN: end the run and name it, or leave it out and record it [fail].",
    ),
    click.option("--text-field", help="Field of a row that holds the text [text]."),
    click.option(
        "--as-text", is_flag=True, default=None, help="Read every file as plain text, whatever its suffix, such as .html."
    ),
    click.option("--split", help="Split of a data set [train]."),
    click.option("--limit", type=int, help="Most samples to store."),
    click.option("--max-tokens", type=int, help="Most tokens to store; 0 for no limit [presets: 1,000,000]."),
    click.option(
        "--max-bytes",
        metavar="SIZE",
        help="Most bytes of the whole store, records and texts included, like 500GB; no shard begins that could pass it.",
    ),
    click.option(
        "--sample-tokens", type=int, help="Store about so many tokens in documents drawn at random from all of the data."
    ),
    click.option("--overlap", type=int, help="Tokens a later sample of a long document repeats as context [0]."),
    click.option(
        "--response-only",
        is_flag=True,
        default=None,
        help="Of conversations store keys and values of the assistant's tokens alone; of --overlap those not repeated.",
    ),
    click.option(
        "--accept-fidelity", is_flag=True, default=None, help="Store even if the codec changes the teacher's predictions."
    ),
    click.option("--append", is_flag=True, default=None, help="Add this data to the store at --out as a new part."),
    click.option(
        "--task-range", metavar="N/M", help="Do the N-th of M equal parts of the work, for job arrays without a cluster."
    ),
    click.option("--calibration", metavar="STORE", help="Use another store's means and steps, so that the two can be merged."),
    click.option("--revision", help="Branch, tag or commit on the hub."),
    click.option("--seed", type=int, help="Shuffle the documents before limits apply."),
    *CONFIG_OPTIONS,
)
"""Of `extract` and of `plan`, so that a command can be tried by another verb."""


def with_options(options: tuple[Decorator, ...]) -> Decorator:
    """Decorate a command with several options in this order."""
    return lambda function: functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), function)


_NEEDED = {
    "teacher": "a preset (kvpipe extract --list), a Hugging Face id, or a folder",
    "store": "a folder made by kvpipe extract, or s3://bucket/prefix",
    "student": "a preset, a Hugging Face id, a folder, or a TOML file with a fresh config",
    "out": "the folder of the run",
}


@contextlib.contextmanager
def misuse() -> Iterator[None]:
    """Settings that are needed and missing are a wrong use of the command; each is named with what it takes."""
    from pipeline.config import MissingSettingsError

    try:
        yield
    except MissingSettingsError as error:
        flags = "; ".join(f"--{name} is needed: {_NEEDED[name]}" for name in error.names)
        raise click.UsageError(f"{flags}. A table [{error.section}] in --config FILE can say it too") from error


def extract_config(config: Path | None, settings: tuple[str, ...], flags: dict[str, Any]) -> ExtractConfig:
    """The settings of an extraction, where nothing is said those of the teacher's preset."""
    from pipeline.config import ExtractConfig, load_config
    from pipeline.models import presets

    with misuse():
        chosen = load_config(ExtractConfig, "extract", config, settings, flags)
    preset = presets.teacher_preset(flags["teacher"]) if flags["teacher"] else None
    defaults: dict[str, Any] = {}
    if preset is not None:
        defaults = {"data": (preset.data,), "out": preset.out, "max_tokens": preset.max_tokens}
    missing = {name: value for name, value in defaults.items() if getattr(chosen, name) in (None, ())}
    chosen = ExtractConfig.model_validate({**chosen.model_dump(), **missing})
    if not chosen.data or chosen.out is None:
        raise click.UsageError("--data and --out are needed for a teacher that is not a preset; see kvpipe extract --list")
    if preset is not None and "max_tokens" in missing:
        say(
            f"{preset.name}: at most {preset.max_tokens:,} tokens of {', '.join(chosen.data)} into {chosen.out}; --max-tokens asks for more"
        )
    return chosen
