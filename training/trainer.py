"""One training run in one folder, from settings to a saved student.

Repeats bit by bit for equal settings on CPU, also across interruptions.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from kvstore.errors import ShardNotCommittedError
from kvstore.spec import format_layers
from pipeline.models.load import tokenizer_code
from training.adapters import ADAPTERS, KVAdapters
from training.checkpoint_files import refuse_damaged
from training.config import TrainConfig
from training.distill import KVDistillTrainer, KVObjective, TrainData
from training.handover import quick_handover
from training.mixture import Readable, fingerprint_of, open_stores, sample_table, stores_of
from training.planning import plan_data, plan_objective, rank_of, refuse_nothing_to_learn
from training.rehearsal import negative_tokens, refuse_full_disk, rehearse_checkpoint, rehearse_saving, settle_generation
from training.report import plot_runs
from training.run_folder import FREE_FIELDS, PLOT, RunFolder, TrainSummary, to_plain, writing
from training.student import (
    add_lora,
    compile_around_attention,
    merge_lora,
    prepare_student,
    store_tokenizer,
)
from training.trackers import make_trackers

__all__ = ["KVDistillTrainer", "run_training"]

log = logging.getLogger(__name__)


def run_training(config: TrainConfig, say: Callable[[str], None] = lambda text: print(text, file=sys.stderr)) -> TrainSummary:
    """Train a student as told and leave metrics, checkpoints, a plot, a summary and the model in `config.out`.

    Under torchrun every rank calls this; the main one writes. Sets torch's number of threads while it runs.

    Raises:
        ValueError: settings, store and student do not fit each other; nothing was trained.
        KVStoreError: the store is missing, empty or damaged.
    """
    folder = RunFolder(config.out)
    store = open_stores(config.store, tuple(config.mix))
    if _is_main():
        folder.refuse_unless_resuming(config.resume)
    finished = folder.summary()
    if finished is not None:
        folder.refuse_other(_identity(config, store, None), ("store", "samples", "config"))
        return finished
    for each in stores_of(store):
        committed, planned = len(each.samples.summary), each.manifest.layout.num_shards
        if len(each) == 0:
            raise ShardNotCommittedError(
                f"store: {each.location} has no samples yet, {committed} of {planned} shards are committed; run its 'kvpipe extract' "
                "command again"
            )
        if committed < planned and _is_main():
            say(f"store: {committed} of {planned} shards of {each.location} are committed; training on what is there")
    with _threads(config.threads):
        return _train(config, folder, store, say if _is_main() else _silent)


def _train(config: TrainConfig, folder: RunFolder, store: Readable, say: Callable[[str], None]) -> TrainSummary:
    table = sample_table(store, sink_tokens=config.sink_tokens)
    refuse_nothing_to_learn(store, config, table)
    tokenizer = store_tokenizer(store)
    if store.tokenizer_path is not None and (code := tokenizer_code(store.tokenizer_path)):
        say(f"warning: {code}")
    trackers = make_trackers(config.report_to, say)
    model = _student(config, store, tokenizer, say)
    objective = plan_objective(config, store, model, folder)
    if config.torch_compile:
        compile_around_attention(model)
    if objective is not None and config.adapter != "none":
        model.add_module(ADAPTERS, KVAdapters(objective.targets.alignment, config.adapter))
    if _is_main():
        rehearse_checkpoint(model, config.out)
        refuse_full_disk(config.out, model, steps=config.steps, save_every=config.save_every, sharded=config.fsdp, say=say)
    data = plan_data(config, store, table, tokenizer, objective)
    arguments = _arguments(config, data)
    _refuse_other_samples_on_ranks(store)
    checkpoint = _begin(config, folder, store, objective)
    if checkpoint is not None:
        refuse_damaged(checkpoint, model, sharded=config.fsdp)
    use_cache = model.config.use_cache
    trainer = KVDistillTrainer(
        model=model,
        args=arguments,
        tokenizer=tokenizer,
        data=data,
        objective=objective,
        folder=folder,
        workers=config.workers,
        trackers=trackers,
    )
    try:
        trainer.rehearse_evaluation()
        with quick_handover():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        trainer.close()
    model.config.use_cache = use_cache
    return _finish(config, folder, trainer, _summarise(config, store, data, trainer), tokenizer)


def _student(
    config: TrainConfig, store: Readable, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
) -> PreTrainedModel:
    """The student to train, known to be one that can be saved at the end."""
    model = prepare_student(config.student, store, tokenizer, config.seed, config.lora_rank)
    given = model.generation_config
    dropped = settle_generation(model)
    negative = [name for name in negative_tokens(given) if name in dropped]
    contrary = [name for name in dropped if name not in negative]
    for names, what in ((negative, "are negative, which names no token"), (contrary, "contradict the others")):
        if names:
            say(
                f"student: of its generation settings {', '.join(names)} {what}, and transformers would not save them: they are left out"
            )
    if _is_main():
        rehearse_saving(model, tokenizer, config.out, say)
    if config.lora_rank is not None:
        add_lora(model, config.lora_rank, config.seed)
    return model


def _finish(
    config: TrainConfig,
    folder: RunFolder,
    trainer: KVDistillTrainer,
    summary: TrainSummary,
    tokenizer: PreTrainedTokenizerBase,
) -> TrainSummary:
    """Leave the student alone, without what it was trained with, and the summary; then the picture."""
    model = trainer.model
    if hasattr(model, ADAPTERS):
        delattr(model, ADAPTERS)
    if config.lora_rank is not None:
        merge_lora(model)
    weights = trainer.accelerator.get_state_dict(model) if trainer.is_fsdp_enabled else None
    if _is_main():
        # Saved so that transformers alone loads it; the weights are given where each rank holds a part of them.
        with folder.model() as path:
            model.save_pretrained(path, state_dict=weights)
            tokenizer.save_pretrained(path)
        folder.finish(summary)
        # Last, so that a picture that cannot be drawn costs nothing else.
        with writing(config.out / PLOT):
            plot_runs({config.out.resolve().name: config.out}, config.out / PLOT)
    return summary


def _begin(config: TrainConfig, folder: RunFolder, store: Readable, objective: KVObjective | None) -> Path | None:
    """Start or continue the run's folder: the checkpoint to continue from, None to start at step 0."""
    if not _is_main():
        return folder.last_checkpoint()
    checkpoint = folder.begin(_identity(config, store, objective))
    if config.resume:
        log.info("continuing from %s", checkpoint or "step 0: no complete checkpoint yet")
    return checkpoint


def _identity(config: TrainConfig, store: Readable, objective: KVObjective | None) -> dict[str, Any]:
    """Everything the numbers of a run follow from, as JSON."""
    return to_plain(
        {
            "store": fingerprint_of(store),
            "samples": _samples_identity(store),
            "config": config.model_dump(mode="json", exclude=set(FREE_FIELDS)),
            "alignment": None if objective is None else objective.targets.alignment.to_json(),
            "variances": None if objective is None else objective.variances.tolist(),
        }
    )


def _refuse_other_samples_on_ranks(store: Readable) -> None:
    """Each rank opens the store by itself, and others may be writing it: what one numbers 5 must be no other's 6."""
    if rank_of()[1] == 1:
        return
    found: list[dict[str, Any]] = gather_object([_samples_identity(store)])
    if any(each != found[0] for each in found):
        counts = ", ".join(f"{each['num_samples']:,}" for each in found)
        raise ValueError(
            f"store: {store.location} grew while the ranks opened it: they see {counts} samples; finish its extraction first, or start "
            "again when nothing is being committed"
        )


def _samples_identity(store: Readable) -> dict[str, Any]:
    """What of the store's plan is there to train on: a store may grow while it is extracted."""
    digest = hashlib.sha256(store.samples.count.astype("<i8").tobytes())
    for identity in store.samples.ids:
        digest.update(identity.encode())
    return {
        "shards": "; ".join(format_layers(each.samples.summary["shard"].to_pylist()) for each in stores_of(store)),
        "num_samples": len(store),
        "sha256": digest.hexdigest(),
    }


def _arguments(config: TrainConfig, data: TrainData) -> TrainingArguments:
    if config.fsdp and rank_of()[1] == 1:
        raise ValueError("fsdp: got one rank, expected several to shard over: start them with torchrun, or with --ray-workers")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got cuda, but torch sees no GPU; set device to cpu or auto, or install a CUDA build of torch")
    arguments = TrainingArguments(
        output_dir=str(config.out),
        max_steps=config.steps,
        per_device_train_batch_size=data.batches.batch_size,
        per_device_eval_batch_size=data.batches.batch_size,
        gradient_accumulation_steps=data.batches.micro_batches_per_step,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup * config.steps),
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        max_grad_norm=config.max_grad_norm,
        bf16=config.dtype == "bfloat16",
        use_cpu=config.device == "cpu",
        fsdp=config.fsdp,
        activation_checkpointing=config.activation_checkpointing,
        seed=config.seed,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if data.num_held_out else "no",
        eval_steps=config.eval_every,
        save_steps=config.save_every,
        report_to="none",  # `trackers` has them
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
    if config.fsdp and arguments.distributed_state.distributed_type is DistributedType.MULTI_CPU:
        raise ValueError(
            "fsdp: got ranks on CPUs, expected one GPU for each: accelerate shards weights there only; leave fsdp out"
        )
    if arguments.n_gpu > 1:
        raise ValueError(
            f"device: {arguments.n_gpu} GPUs are visible to one process, expected one; start one process per GPU with "
            "'torchrun --nproc-per-node', or set CUDA_VISIBLE_DEVICES"
        )
    return arguments


def _summarise(config: TrainConfig, store: Readable, data: TrainData, trainer: KVDistillTrainer) -> TrainSummary:
    history = trainer.state.log_history
    held_out: dict[str, Any] = next((record for record in reversed(history) if "eval_loss" in record), {})
    meter = trainer.meter.read()
    return TrainSummary(
        out=config.out,
        steps=trainer.state.global_step,
        tokens=int(meter["tokens"]),
        seconds=meter["seconds"],
        train_ce=next(record["ce"] for record in reversed(history) if "ce" in record),
        eval_loss=held_out.get("eval_loss"),
        eval_nats_per_byte=held_out.get("eval_nats_per_byte"),
        num_train_samples=data.num_train,
        num_dropped_samples=data.batches.dropped,
        num_padded_samples=data.batches.padded,
        num_held_out_samples=data.num_held_out,
        peak_rss_bytes=int(meter["peak_rss_bytes"]),
        peak_device_bytes=torch.cuda.max_memory_allocated() if trainer.args.device.type == "cuda" else None,
        store_fingerprint=fingerprint_of(store),
        config=config,
    )


def _silent(_text: str) -> None:
    """What ranks beside the main one have to say."""


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_main() -> bool:
    return rank_of()[0] == 0
