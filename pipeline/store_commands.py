"""Commands that change stores or make them from stores, without a teacher: merge, recode, align, drop."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from pipeline.terminal import console, print_record, progress_bar, say

_out = click.option("--out", required=True, help="Folder of the new store, or s3://bucket/prefix; run again to resume.")
_accept = click.option(
    "--accept-fidelity", is_flag=True, help="Store it even if the codec loses most of a layer's typical token."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.command()
@click.argument("stores", nargs=-1, required=True, metavar="STORE STORE ...")
@_out
@_json
def merge(stores: tuple[str, ...], out: str, as_json: bool) -> None:
    """Join stores of one teacher, codec and calibration into one.

    Codes are copied bit for bit; a sample that several stores have is stored once and its counts are summed. Samples that one
    store dropped are kept if another has them. The sources stay as they are.

    Two extractions can be merged if the second took the calibration of the first:

    \b
    kvpipe extract --teacher T --data a.jsonl --out a
    kvpipe extract --teacher T --data b.jsonl --out b --calibration a
    kvpipe merge a b --out both
    """
    if len(stores) < 2:
        raise click.UsageError("merge: expected two stores or more, for instance 'kvpipe merge a b --out both'")
    from kvstore.rewrite import merge_stores

    with progress_bar("merge", "tok") as progress:
        summary = merge_stores(stores, out, progress)
    print_record(dataclasses.asdict(summary), as_json)


@click.command()
@click.argument("store")
@click.option("--codec", required=True, help="raw, q8, q8z, mix, q4z, q4z-min, fp8; by layer: 'mix,0=raw,24-27=q8'.")
@_accept
@_out
@_json
def recode(store: str, codec: str, accept_fidelity: bool, out: str, as_json: bool) -> None:
    """Store the same samples in another codec, without the teacher.

    Calibrated anew on what the store decodes to. The errors of both codecs add up, and 'kvpipe inspect' shows the sum: from raw
    the result is as good as an extraction in that codec, from mix to q4z it is a little worse. A store that was rounded cannot
    become raw. A codec that would lose a layer's typical token, as it does beside enormous values, is refused. The source stays as it
    is.

    \b
    kvpipe recode my-store --codec q4z --out my-store-q4z
    """
    from kvstore.rewrite import recode_store

    with progress_bar("recode", "tok") as progress:
        summary = recode_store(store, codec, out, progress, accept_fidelity=accept_fidelity)
    print_record(dataclasses.asdict(summary), as_json)


@click.command()
@click.argument("store", metavar="RAW")
@click.option("--student", required=True, help="Preset, Hugging Face id, folder, or a TOML file with a fresh config.")
@click.option(
    "--tokenizer", help="Folder or id of the tokenizer of a fresh student [a pretrained student's own, else the store's]."
)
@click.option(
    "--layer-map",
    default="last_aligned",
    show_default=True,
    help="last_aligned, uniform, cka (likeness to a pretrained student), or student=teacher pairs like '0=3,1=9,-1=-1'.",
)
@click.option("--layers", help="Student layers: 'all' or a list like 0,4,8-11 or -1 [eight spread evenly].")
@click.option("--codec", default="mix", show_default=True, help="As for extract.")
@click.option("--fit", help="File of 'kvpipe fit' with fitted maps of heads and dims [the area map].")
@click.option(
    "--time",
    type=click.Choice(["overlap", "last", "linear", "nearest"]),
    default="overlap",
    show_default=True,
    help="With another tokenizer: the mean of the teacher tokens under each student token, the last of them alone, or what lies at "
    "the same share of each text between special tokens, whatever is written there, interpolated or nearest (for comparison).",
)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Shards made at a time.")
@_accept
@_out
@_json
def align(store: str, out: str, as_json: bool, **chosen: Any) -> None:
    """Make a store for one student from a raw store, without the teacher.

    Heads, dims and layers become the student's where that is smaller. A student with another tokenizer gets its own tokens: each
    takes the mean of the teacher tokens whose bytes it holds and that end no later; tokens without any are masked. Run it again to
    resume. The source stays as it is, so one extraction serves many students:

    \b
    kvpipe align raw-store --student qwen2-0.5b --out for-qwen
    kvpipe align raw-store --student tinyllama-1.1b --out for-llama
    kvpipe train --store for-llama --student tinyllama-1.1b --out run
    """
    from pipeline.align_store import AlignSettings, align_store
    from pipeline.match_layers import written_out

    chosen["layer_map"] = written_out(chosen["layer_map"], store, chosen["student"], say)
    with progress_bar("align", "tok") as progress:
        summary = align_store(store, out, AlignSettings(**chosen), progress)
    print_record(dataclasses.asdict(summary), as_json)


@click.command("match-layers")
@click.argument("store", metavar="RAW")
@click.option("--student", required=True, help="A pretrained student: preset, Hugging Face id or folder.")
@click.option("--tokens", type=click.IntRange(1), default=16_384, show_default=True, help="Tokens of the store to compare on.")
@_json
def match_layers(store: str, student: str, tokens: int, as_json: bool) -> None:
    """Find the teacher layer that is most like each layer of a pretrained student.

    The student reads the store's first tokens, and its keys and values are compared with the teacher's by linear CKA; of all maps that
    never go back the one with the largest sum is printed as --layer-map takes it. Neighbouring layers often differ little.

    \b
    kvpipe match-layers raw-store --student qwen2-0.5b
    kvpipe align raw-store --student qwen2-0.5b --layer-map 0=2,1=3,2=5 --out for-qwen
    """
    from pipeline.match_layers import match_layers as find

    with progress_bar("compare", "tok") as progress:
        found = find(store, student, tokens, progress)
    if as_json:
        print_record(dataclasses.asdict(found), as_json)
        return
    from rich.table import Table

    table = Table("student layer", "teacher layer", "CKA", "last_aligned's CKA")
    for row, (layer, pair) in enumerate(zip(found.student_layers, found.layer_map.split(","), strict=True)):
        teacher = int(pair.partition("=")[2])
        usual = max(0, len(found.teacher_layers) - len(found.student_layers) + row)
        cka = found.cka[row]
        table.add_row(str(layer), str(teacher), f"{cka[found.teacher_layers.index(teacher)]:.3f}", f"{cka[usual]:.3f}")
    screen = console()
    screen.print(table)
    screen.print(f"--layer-map {found.layer_map}", soft_wrap=True)


@click.command()
@click.argument("store")
@click.option(
    "--ids",
    required=True,
    type=click.Path(path_type=Path, allow_dash=True),
    help="File of sample ids, '-' for stdin.",
)
@_json
def drop(store: str, ids: Path, as_json: bool) -> None:
    """Take samples out of a store for good, at once and without asking: tokens, text, keys and values.

    The file has one id on a line, whole or its first eight digits and more; blank lines and what follows a # do not count. Only
    the shards those samples are in are written again. Nothing brings a dropped sample back: neither resuming nor --append.

    \b
    kvpipe drop my-store --ids remove.txt
    echo 3f2a9c01 | kvpipe drop my-store --ids -
    """
    from kvstore.drop import drop_samples
    from pipeline.models.files import decoded, read_text

    try:
        text = decoded(sys.stdin.buffer.read(), "--ids -") if str(ids) == "-" else read_text(ids)
    except OSError as error:
        raise ValueError(
            f"--ids: {ids} cannot be read ({error.strerror}); expected a file with one sample id on a line"
        ) from error
    wanted = [line.partition("#")[0].strip() for line in text.splitlines()]
    with progress_bar("drop", "shard") as progress:
        summary = drop_samples(store, [line for line in wanted if line], progress)
    print_record({"store": store, **dataclasses.asdict(summary)}, as_json)
