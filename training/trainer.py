"""One training run in one folder, from settings to a saved student.

Repeats bit by bit for equal settings on CPU, also across interruptions.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from kvstore.errors import ShardNotCommittedError
from kvstore.spec import format_layers
from pipeline.models.probe import probe_kv_spec
from training.adapters import ADAPTERS, KVAdapters
from training.config import TrainConfig
from training.distill import KVDistillTrainer, KVObjective, TrainData
from training.handover import quick_handover
from training.held_out import held_out_batches, split_held_out
from training.loader import KVCollator, KVDataset
from training.mixture import Readable, fingerprint_of, open_stores, sample_table, stores_of
from training.report import plot_runs
from training.run_folder import FREE_FIELDS, PLOT, RunFolder, TrainSummary, to_plain, writing
from training.sampler import BatchPlan, KVBatchSampler, SampleTable
from training.student import compile_around_attention, merge_lora, predicted_bytes, prepare_student, store_tokenizer
from training.targets import KVTargets, measure_variances, plan_alignment

__all__ = ["KVDistillTrainer", "run_training"]

log = logging.getLogger(__name__)

_SAMPLES_PER_READ = 256


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
        return _train(config, folder, store)


def _train(config: TrainConfig, folder: RunFolder, store: Readable) -> TrainSummary:
    tokenizer = store_tokenizer(store)
    model = prepare_student(config.student, store, tokenizer, config.seed, config.lora_rank)
    objective = _plan_objective(config, store, model, folder)
    if config.torch_compile:
        compile_around_attention(model)
    if objective is not None and config.adapter != "none":
        model.add_module(ADAPTERS, KVAdapters(objective.targets.alignment, config.adapter))
    data = _plan_data(config, store, tokenizer, objective)
    arguments = _arguments(config, data)
    _refuse_other_samples_on_ranks(store)
    checkpoint = _begin(config, folder, store, objective)
    use_cache = model.config.use_cache
    trainer = KVDistillTrainer(
        model=model,
        args=arguments,
        tokenizer=tokenizer,
        data=data,
        objective=objective,
        folder=folder,
        workers=config.workers,
    )
    try:
        with quick_handover():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        trainer.close()
    model.config.use_cache = use_cache
    if hasattr(model, ADAPTERS):
        delattr(model, ADAPTERS)
    if config.lora_rank is not None:
        merge_lora(model)
    summary = _summarise(config, store, data, trainer)
    weights = trainer.accelerator.get_state_dict(model) if trainer.is_fsdp_enabled else None
    if _is_main():
        # Saved so that transformers alone loads it; the weights are given where each rank holds a part of them.
        with folder.model() as path:
            model.save_pretrained(path, state_dict=weights)
            tokenizer.save_pretrained(path)
        with writing(config.out / PLOT):
            plot_runs({config.out.resolve().name: config.out}, config.out / PLOT)
        folder.finish(summary)
    return summary


def _plan_objective(config: TrainConfig, store: Readable, model: PreTrainedModel, folder: RunFolder) -> KVObjective | None:
    """The KV term for this student, None where no step of the run has one."""
    if config.kv_steps == 0:
        return None
    spec = probe_kv_spec(model, key_domain=store.spec.key_domain)
    alignment = plan_alignment(store, spec, layer_map=config.layer_map, layers=config.layers)
    targets = KVTargets(alignment, as_they_are=config.adapter != "none" or config.kv_loss == "relation")
    recorded = folder.recorded() or {}
    known = recorded.get("store") == fingerprint_of(store) and recorded.get("alignment") == to_plain(alignment.to_json())
    variances = recorded["variances"] if known else measure_variances(store, targets, sink_tokens=config.sink_tokens).tolist()
    return KVObjective(
        spec=spec,
        targets=targets,
        variances=torch.tensor(variances, dtype=torch.float32),
        weight=config.kv_weight,
        steps=config.kv_steps,
        schedule=config.kv_schedule,
        loss=config.kv_loss,
    )


def _plan_data(
    config: TrainConfig, store: Readable, tokenizer: PreTrainedTokenizerBase, objective: KVObjective | None
) -> TrainData:
    """Split the store and plan this rank's batches."""
    samples, table = store.samples, sample_table(store, sink_tokens=config.sink_tokens)
    train, held_out = (
        table.select(chosen)
        for chosen in split_held_out(
            samples.ids,
            samples.source,
            samples.num_tokens,
            fraction=config.eval_fraction,
            max_tokens=config.eval_max_tokens,
        )
    )
    for name, part in (("train on", train), ("hold out", held_out)):
        if len(part) and not part.predicted.any():
            raise ValueError(
                f"{store.location}: got {len(part)} samples to {name} without a token to learn from: of one token, or with loss_mask 0 "
                "throughout; store more data, or hold out other samples with --set eval_fraction=..."
            )
    plan = BatchPlan(
        batch_size=config.batch_size,
        batch_tokens=config.batch_tokens,
        seed=config.seed,
        window_tokens=max(config.shuffle_window_bytes // (4 * store.spec.values_per_token), 1),
        kv_steps=config.kv_steps,
        shuffle_targets=config.shuffle_targets,
        shuffle=config.shuffle,
        tail=config.tail,
        balance=config.balance_tokens,
        shares=(1.0 - sum(config.mix.values()), *config.mix.values()) if config.mix else (),
    )
    rank, world_size = _rank()
    micro: dict[str, Any] = {"micro_batch_size": config.micro_batch_size, "micro_batch_tokens": config.micro_batch_tokens}
    batches = KVBatchSampler(train, plan, **micro, rank=rank, world_size=world_size)
    if batches.dropped:
        log.info("%d of %d training samples fill no whole batch and are left out of each epoch", batches.dropped, len(train))
    if batches.padded:
        log.info("%d samples of weight 0 fill up batches of an epoch", batches.padded)
    return TrainData(
        dataset=KVDataset(store, () if objective is None else objective.targets.alignment.teacher_layers),
        batches=batches,
        held_out=held_out_batches(held_out, batches.batch_size, rank=rank, world_size=world_size),
        num_train=len(train),
        num_held_out=len(held_out),
        held_out_tokens=int((held_out.count * held_out.predicted).sum()),
        held_out_bytes=predicted_bytes(tokenizer, _predicted_runs(store, held_out)),
        collator=KVCollator(sink_tokens=config.sink_tokens, pad_id=tokenizer.pad_token_id or 0),
    )


def _predicted_runs(store: Readable, table: SampleTable) -> Iterator[tuple[list[int], int]]:
    """Runs of predicted tokens, each after the token before it, with the weights of their samples; a few samples read at a time."""
    for first in range(0, len(table), _SAMPLES_PER_READ):
        rows = slice(first, first + _SAMPLES_PER_READ)
        read = store.read(table.index[rows], layers=())
        for (start, end), weight in zip(itertools.pairwise(read.cu_seqlens.tolist()), table.count[rows].tolist(), strict=True):
            predicted = read.learnt[start:end].astype(np.int8)
            predicted[0] = 0
            edges = np.flatnonzero(np.diff(predicted, append=0)) + 1
            for begin, stop in edges.reshape(-1, 2).tolist():
                yield read.input_ids[start + begin - 1 : start + stop].tolist(), weight


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
    if _rank()[1] == 1:
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
    if config.fsdp and _rank()[1] == 1:
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
        report_to=list(config.report_to) or "none",
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


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rank() -> tuple[int, int]:
    """(rank, world_size) as torchrun, accelerate and Ray tell their processes."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _is_main() -> bool:
    return _rank()[0] == 0
