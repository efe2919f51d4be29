"""What a run will do, settled before it does anything: what it learns from, its KV term, its batches and what is held out."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.probe import probe_kv_spec
from training.config import TrainConfig
from training.distill import KVObjective, TrainData
from training.held_out import held_out_batches, split_held_out
from training.loader import KVCollator, KVDataset
from training.mixture import Readable, fingerprint_of
from training.run_folder import RUN, RunFolder, to_plain
from training.sampler import BatchPlan, KVBatchSampler, SampleTable
from training.student import predicted_bytes
from training.targets import KVTargets, measure_variances, plan_alignment

log = logging.getLogger(__name__)

_SAMPLES_PER_READ = 256


def refuse_nothing_to_learn(store: Readable, config: TrainConfig, table: SampleTable) -> None:
    """Refuse a store that teaches nothing, before anything is computed from it.

    Raises:
        ValueError: no token is predicted, or keys and values are to be compared and no token has any.
    """
    _refuse_nothing(
        store, "train on", table.predicted, "extract conversations in which the assistant says something, or plain text"
    )
    if config.kv_steps and not table.compared.any():
        raise ValueError(
            f"store: {store.location} has nothing to learn from but the tokens: got no keys and values of tokens to be learnt from behind the first "
            f"sink_tokens ({config.sink_tokens}) of their samples; lower --set sink_tokens=..., or train with --ce-only"
        )


def _refuse_nothing(store: Readable, what: str, predicted: np.ndarray, advice: str) -> None:
    """Refuse samples of whose tokens none is predicted."""
    if not predicted.any():
        raise ValueError(
            f"store: {store.location} has nothing to learn from: got {len(predicted)} samples to {what} without a token to learn from: of one "
            f"token, or with loss_mask 0 throughout; {advice}"
        )


def plan_objective(config: TrainConfig, store: Readable, model: PreTrainedModel, folder: RunFolder) -> KVObjective | None:
    """The KV term for this student, None where no step of the run has one."""
    if config.kv_steps == 0:
        return None
    spec = probe_kv_spec(model, key_domain=store.spec.key_domain)
    alignment = plan_alignment(store, spec, layer_map=config.layer_map, layers=config.layers)
    targets = KVTargets(alignment, as_they_are=config.adapter != "none" or config.kv_loss == "relation")
    recorded = folder.recorded() or {}
    shape = (len(targets.pairs), 2)
    known = recorded.get("store") == fingerprint_of(store) and recorded.get("alignment") == to_plain(alignment.to_json())
    if known and _shape(recorded) != shape:
        raise ValueError(
            f"{folder.path / RUN}: variances: got shape {_shape(recorded)}, expected {shape} as the layers compared; the run is "
            "damaged, choose another --out"
        )
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


def plan_data(
    config: TrainConfig, store: Readable, table: SampleTable, tokenizer: PreTrainedTokenizerBase, objective: KVObjective | None
) -> TrainData:
    """Split the store and plan this rank's batches.

    Raises:
        ValueError: batches cannot be cut, or a side of the split has nothing to learn from.
    """
    samples = store.samples
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
        if len(part):
            _refuse_nothing(
                store, name, part.predicted, "store more data, or hold out other samples with --set eval_fraction=..."
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
    rank, world_size = rank_of()
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


def _shape(recorded: Mapping[str, Any]) -> tuple[int, ...]:
    return np.shape(recorded.get("variances") or ())


def rank_of() -> tuple[int, int]:
    """(rank, world_size) as torchrun, accelerate and Ray tell their processes."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
