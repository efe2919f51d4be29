"""The commands that train a student, measure a model and compare runs."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.options import CONFIG_OPTIONS, misuse, with_options
from pipeline.terminal import print_record, progress_bar, say

if TYPE_CHECKING:
    from training.config import TrainConfig
    from training.run_folder import TrainSummary


@click.command()
@click.option("--store", help="Folder of the store, or s3://bucket/prefix.")
@click.option("--student", help="Preset, Hugging Face id, folder, or a TOML/JSON file with a fresh config.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the run.")
@click.option("--steps", type=int, help="Optimizer steps [1000].")
@click.option("--batch-size", type=int, help="Samples in a step [16].")
@click.option("--lr", type=float, help="Peak learning rate.")
@click.option("--kv-weight", type=float, help="Weight of the KV loss while it is on [1].")
@click.option("--ce-only", is_flag=True, default=None, help="Cross-entropy alone: the same run without the teacher's KV.")
@click.option("--seed", type=int, help="Initialisation and data order [0].")
@click.option(
    "--ray-workers",
    type=click.IntRange(0),
    help="Train on so many ranks that Ray Train starts, one per GPU; 0 for as many as there are GPUs, or nodes.",
)
@click.option("--ray-address", help="A running Ray cluster for --ray-workers: 'auto', or host:port.")
@click.option("--resume", is_flag=True, default=None, help="Continue the run in --out from its last checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@with_options(CONFIG_OPTIONS)
def train(
    config: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
    ray_workers: int | None,
    ray_address: str | None,
    **flags: Any,
) -> None:
    """Train a student from a store, with no teacher in memory.

    The trained student in OUT/model loads with transformers' AutoModelForCausalLM where kvpipe is not installed.

    Several ranks train as one: the same batches, the same losses. On one machine start them with torchrun, on a cluster with
    --ray-workers, or with whatever sets RANK and WORLD_SIZE; --set fsdp=true shards the student over their GPUs.

    \b
    kvpipe train --store kv --student qwen2-0.5b --out runs/kv
    torchrun --nproc-per-node 8 -m pipeline.cli train --store kv --student qwen2-0.5b --out runs/kv
    kvpipe train --store kv --student qwen2-0.5b --out runs/kv --ray-workers 16 --ray-address auto
    """
    if ray_address and ray_workers is None:
        raise click.UsageError("--ray-address needs --ray-workers: how many ranks, or 0 for one per GPU")
    from pipeline.config import load_config
    from training.config import TrainConfig

    flags["learning_rate"] = flags.pop("lr")
    with misuse():
        chosen = load_config(TrainConfig, "train", config, settings, flags)
    from training.trainer import run_training

    if chosen.layer_map == "cka":
        from pipeline.match_layers import written_out

        chosen = chosen.model_copy(update={"layer_map": written_out("cka", chosen.store, chosen.student, say)})
    summary = run_training(chosen, say) if ray_workers is None else _train_on_ray(chosen, ray_workers, ray_address)
    print_record(summary.model_dump(mode="json", exclude=set() if as_json else {"config"}), as_json)


def _train_on_ray(config: TrainConfig, workers: int, address: str | None) -> TrainSummary:
    """Run on ranks that Ray starts, with a bar here that follows the run's metrics."""
    from pipeline.executors.ray_train import run_ranks
    from training.meters import following
    from training.run_folder import RunFolder
    from training.trainer import run_training

    folder = RunFolder(config.out)
    folder.refuse_unless_resuming(config.resume)
    with following(config.out, config.steps):
        run_ranks(
            functools.partial(run_training, config),
            workers=workers,
            address=address,
            device=config.device,
            shared=config.out.parent,
            name=f".{config.out.name}-ray",
            say=say,
        )
    summary = folder.summary()
    assert summary is not None, "rank 0 has finished"
    return summary


@click.command("eval")
@click.argument("model")
@click.option(
    "--data", multiple=True, required=True, help="As for extract: files, globs, jsonl, parquet, a datasets folder, a hub id."
)
@click.option("--text-field", default="text", show_default=True, help="Column or key with the text.")
@click.option("--as-text", is_flag=True, help="Read every file as plain text, whatever its suffix, such as .html.")
@click.option("--split", default="train", show_default=True, help="Split of a hub or datasets data set.")
@click.option("--seq-len", type=click.IntRange(2), default=2048, show_default=True, help="Tokens of a sample.")
@click.option("--max-tokens", type=click.IntRange(2), help="Stop after so many tokens [all].")
@click.option("--batch-tokens", type=click.IntRange(1), default=8192, show_default=True, help="Padded tokens computed at once.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 ... or auto.")
@click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16, or the checkpoint's own.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def evaluate(data: tuple[str, ...], as_json: bool, **chosen: Any) -> None:
    """Measure how well MODEL predicts text: perplexity per token and nats per byte.

    MODEL is a preset, a hub id or a folder: a teacher, or the model/ of a run. Nats per byte can be compared between models of other
    tokenizers, perplexity cannot. Of conversations only what the assistant says is predicted.

    \b
    kvpipe eval runs/kv/model --data held-out.jsonl
    """
    from pipeline.evaluate import EvalSettings, evaluate

    with progress_bar("evaluate", "tok") as progress:
        summary = evaluate(EvalSettings(data=data, **chosen), progress)
    print_record(dataclasses.asdict(summary), as_json)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("report"),
    show_default=True,
    help="Folder for index.html and its pictures; what an earlier report left there is replaced.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def report(runs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Compare RUNS, folders of kvpipe train: one page that needs no network, and its pictures as PNG.

    Loss against tokens and against seconds, the KV loss of every layer, memory, time spent waiting for data; what each run came to,
    the settings in which they differ and the store each has read. Runs that are still going are shown as far as they are.

    \b
    kvpipe report runs/kv runs/ce --out report
    """
    from training.report_page import write_report

    page = write_report(runs, out)
    print_record({"page": str(page), "pictures": [str(path) for path in sorted(out.glob("*.png"))]}, as_json)
