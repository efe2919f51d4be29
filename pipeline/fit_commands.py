"""The command that fits projections to a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.terminal import console, print_record, progress_bar, say

if TYPE_CHECKING:
    from pipeline.align.fit import Fit


@click.command()
@click.option("--store", required=True, metavar="RAW", help="A raw store: folder or s3://bucket/prefix.")
@click.option("--student", required=True, help="Preset, Hugging Face id, folder, or a TOML file with a fresh config.")
@click.option(
    "--method",
    type=click.Choice(["group-mean", "procrustes", "complex-pca", "query-pca", "ridge"]),
    default="complex-pca",
    show_default=True,
    help="group-mean pools heads as they are, for comparison; procrustes turns the heads of a group towards each other first; "
    "complex-pca takes the principal components over heads; query-pca those that the teacher's queries read, and needs --teacher; "
    "ridge predicts a pretrained student's own keys and values.",
)
@click.option("--teacher", help="For query-pca: the store's teacher. Preset, Hugging Face id or folder.")
@click.option("--device", default="cpu", show_default=True, help="Where ridge runs the student and query-pca the teacher.")
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="File to write, FILE.safetensors.")
@click.option(
    "--layer-map",
    default="last_aligned",
    show_default=True,
    help="last_aligned, uniform, cka (likeness to a pretrained student), or student=teacher pairs like '0=3,1=9,-1=-1'.",
)
@click.option("--layers", help="Student layers: 'all' or a list like 0,4,8-11 or -1 [eight spread evenly].")
@click.option("--tokens", type=click.IntRange(1), default=262_144, show_default=True, help="Tokens of the store to fit on.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def fit(
    store: str,
    student: str,
    method: Any,
    teacher: str | None,
    device: str,
    out: Path,
    layer_map: str,
    layers: str | None,
    tokens: int,
    as_json: bool,
) -> None:
    """Fit maps from a teacher's heads and dims to a student's on a raw store; all but query-pca without the teacher.

    Keys are mapped so that the map commutes with rotary positions: heads are mixed within one rotary pair only. A tenth of the
    samples is held out; how much of the variance a map retains is said of both parts. If they differ much, take more --tokens.
    Attention is compared on held-out samples, under random queries, with what the map keeps of the teacher's keys and values.
    Retained variance compares methods, it does not foretell how well a student learns: plain group-mean is hard to beat.

    Fit on training data, never on the text you evaluate on. The store stays as it is.

    \b
    kvpipe fit --store raw-store --student qwen2-0.5b --out maps.safetensors
    kvpipe fit --store raw-store --student qwen2-0.5b --method procrustes --layers all --out turned.safetensors
    kvpipe fit --store raw-store --student qwen2-0.5b --method query-pca --teacher qwen2-7b --out read.safetensors
    """
    from kvstore import KVStoreError, open_store
    from pipeline.align.layers import choose_student_layers
    from pipeline.fit import fit_store
    from pipeline.fit_models import pretrained_student, teacher_queries
    from pipeline.match_layers import written_out
    from pipeline.models.load import build_student, load_tokenizer
    from pipeline.models.probe import probe_kv_spec

    if not out.parent.is_dir():
        raise click.UsageError(f"--out: {out.parent} is no folder; make it first, or choose another file")
    opened = open_store(store)
    if opened.tokenizer_path is None:
        raise KVStoreError(f"{opened.location}: got no tokenizer, expected the one 'kvpipe extract' keeps in a store")
    if (method == "query-pca") != (teacher is not None):
        raise click.UsageError(f"--method {method} {'needs' if teacher is None else 'takes no'} --teacher")
    model, own_tokenizer = build_student(student, vocab_size=len(load_tokenizer(opened.tokenizer_path)), seed=0)
    spec = probe_kv_spec(model.eval(), key_domain=opened.spec.key_domain)
    layer_map = written_out(layer_map, store, student, say)
    beside: dict[str, Any] = {}
    if method == "ridge":
        beside["student_kv"] = pretrained_student(student, model, own_tokenizer, spec, opened, device)
    if teacher is not None:
        beside["teacher_queries"] = teacher_queries(teacher, opened, device)
    chosen = choose_student_layers(layers, layer_map, spec.layer_numbers)
    with progress_bar("fit", "tok") as progress:
        made = fit_store(
            opened, spec, method, layer_map=layer_map, student_layers=chosen, tokens=tokens, progress=progress, **beside
        )
    made.save(out)
    _print_fit(made, out, as_json)


def _print_fit(made: Fit, out: Path, as_json: bool) -> None:
    """What was fitted, and what of the variance each layer keeps."""
    rows = [
        {
            "teacher_layer": layer,
            "key": share.key,
            "value": share.value,
            "key_held_out": unseen.key if unseen else None,
            "value_held_out": unseen.value if unseen else None,
            "attention_cosine": made.attention_cosine.get(layer),
        }
        for layer, share in made.retained.items()
        for unseen in [made.retained_held_out.get(layer)]
    ]
    record = {
        "out": str(out),
        "fit_id": made.fit_id,
        "method": made.method,
        "num_tokens": made.num_tokens,
        "num_held_out_tokens": made.num_held_out_tokens,
    }
    if as_json:
        print_record({**record, "retained": rows}, as_json)
        return
    from rich.table import Table

    names = ("teacher layer", "keys", "values", "keys, held out", "values, held out", "attention, held out")
    table = Table(*names, title="variance retained, and cosine of attention outputs")
    for row in rows:
        table.add_row(
            *("-" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row.values())
        )
    console().print(table)
    print_record(record, as_json)
