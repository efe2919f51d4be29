"""A worker: one teacher, computing the keys and values of whole tasks and writing their shards itself.

Runs in this process or inside a Ray actor; tensors never leave it, only small records do. Knows no scheduling.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import torch

from kvstore import open_store
from kvstore.arrays import read_calibration
from kvstore.calibration import Calibration, ChannelMoments, calibration_mask
from kvstore.codec import KINDS, Kind, format_codecs, parse_codecs
from kvstore.manifest import Manifest, read_manifest
from kvstore.spec import KVSpec
from kvstore.storage import locate
from kvstore.writer import ShardWriter
from pipeline.align import Alignment
from pipeline.gate import GateResult, codec_round_trip, run_gate, run_stored_gate, self_calibrated, stored_calibration
from pipeline.models.capture import capture_kv
from pipeline.models.load import load_causal_lm
from pipeline.models.probe import length_dependent_rope, probe_causal, probe_kv_spec
from pipeline.plan import Task, padded_length, plan_batches

Spans = list[tuple[int, int]]
"""Offset in the shard and length of every sample along a packed token axis."""
OnLayer = Callable[[int, Spans, np.ndarray, np.ndarray], None]
Moments = dict[tuple[int, Kind], ChannelMoments]
"""By teacher layer and kind, of what will be stored: after alignment where it is baked."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSource:
    """Where a worker gets its teacher."""

    path: Path
    """Local folder with config and safetensors."""
    dtype: str
    device: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TeacherInfo:
    """What a worker found out about its teacher by running it; all workers of a run must agree."""

    spec: KVSpec
    """Every layer that has keys and values of its own."""
    attn_implementation: str
    max_positions: int
    num_embeddings: int
    device: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all tasks of a run have in common."""

    store: str
    """Location of the store."""
    layers: tuple[int, ...]
    """Teacher layers to capture."""
    alignment: dict[str, Any] | None
    """Record of the alignment to bake; None stores the teacher's own geometry."""
    batch_tokens: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """What came of a task."""

    shard: int
    num_samples: int
    num_tokens: int
    stored_bytes: int
    compute_s: float
    write_s: float


class Worker:
    """Loads a teacher once, then computes and writes tasks; used by one thread."""

    def __init__(self, source: TeacherSource, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        """Load the teacher.

        Args:
            environment: variables a process on another machine lacks: a bucket's credentials.
        """
        os.environ.update(environment)
        self._model: Any = load_causal_lm(source.path, dtype=source.dtype, device=source.device)
        probe_causal(self._model)
        self._spec = probe_kv_spec(self._model)
        # What calibration computed and has not written yet: those forward passes are kept, not repeated.
        self._kept: dict[int, list[tuple[int, Spans, np.ndarray, np.ndarray]]] = {}

    def describe(self) -> TeacherInfo:
        config = self._model.config.get_text_config()
        return TeacherInfo(
            spec=self._spec,
            attn_implementation=str(config._attn_implementation),
            max_positions=int(config.max_position_embeddings),
            num_embeddings=int(self._model.get_input_embeddings().weight.shape[0]),
            device=str(self._model.device),
        )

    def calibrate(self, job: Job, task: Task) -> Moments:
        """Compute a task, keep its numbers for `run`, and return their moments without the sink positions."""
        stored = self._stored_spec(job)
        moments: Moments = {}
        kept = self._kept[task.shard] = []

        def keep(layer: int, spans: Spans, key: np.ndarray, value: np.ndarray) -> None:
            kept.append((layer, spans, key, value))
            wanted = calibration_mask([length for _, length in spans])
            for kind, values in zip(KINDS, (key, value), strict=True):
                geometry = stored.layer(layer)
                dim = geometry.key_dim if kind == "key" else geometry.value_dim
                entry = moments.setdefault((layer, kind), ChannelMoments.zeros(geometry.num_kv_heads, dim))
                entry.add(values[wanted])

        self._compute(job, task, keep)
        return moments

    def run(self, job: Job, task: Task, replace: bool = False) -> TaskResult:
        """Compute a task and commit its shard; one that is committed already is written again only with `replace`."""
        manifest, calibration = _open_for_writing(job.store, task.shard)
        rows = [sample.row for sample in task.samples]
        writer = ShardWriter(locate(job.store), manifest, calibration, task.shard, rows)
        started = time.perf_counter()
        if task.shard in self._kept:
            for layer, spans, key, value in self._kept.pop(task.shard):
                writer.put(layer, spans, key, value)
        else:
            self._compute(job, task, writer.put)
        for sample in task.samples:
            writer.put_tokens(sample.offset, sample.input_ids, sample.beside)
        computed = time.perf_counter()
        commit = writer.commit(replace=replace)
        return TaskResult(
            shard=task.shard,
            num_samples=len(commit.samples),
            num_tokens=commit.num_tokens,
            stored_bytes=commit.stored_bytes,
            compute_s=computed - started,
            write_s=time.perf_counter() - computed,
        )

    def gate(self, job: Job, sequences: tuple[np.ndarray, ...], codec: str, calibration: Calibration | None) -> GateResult:
        """Measure how this codec changes what the teacher predicts, before anything is stored.

        Args:
            codec: as `parse_codecs` reads it, over the teacher layers of the job; any, not only the one to be stored.
            calibration: what was fitted for this very codec; None fits on the sequences themselves. Not used where an alignment
                is baked: it then belongs to the student's geometry.
        """
        codecs = parse_codecs(codec, job.layers)
        if job.alignment is None and calibration is not None:
            fits = stored_calibration(self._spec.select(job.layers), codecs, calibration)
        else:
            fits = self_calibrated(self._model, self._spec, sequences, codecs, job.layers)
        return run_gate(
            self._model,
            self._spec,
            sequences,
            codec_round_trip(codecs, lambda layer, kind: fits[layer, kind]),
            layers=job.layers,
            codec=format_codecs(codecs),
            geometry="stored" if job.alignment is None else "teacher's, before projection",
        )

    def gate_stored(self, job: Job, sample_indices: tuple[int, ...]) -> GateResult:
        """Measure the same with what lies on disk: it still is what the teacher produces, up to the codec.

        Raises:
            ValueError: the store is baked, so the teacher cannot read what it holds.
        """
        if job.alignment is not None:
            raise ValueError(
                f"gate: {job.store} holds keys and values in a student's geometry, which the teacher cannot attend over; gate "
                "baked stores before they are written"
            )
        return run_stored_gate(self._model, self._spec, open_store(job.store), sample_indices, job.layers)

    def _stored_spec(self, job: Job) -> KVSpec:
        return self._spec.select(job.layers) if job.alignment is None else Alignment.from_json(job.alignment).stored_spec()

    def _compute(self, job: Job, task: Task, on_layer: OnLayer) -> None:
        """Run the task's batches; `on_layer(layer, spans, key, value)` gets numpy arrays [token, kv_head, dim], packed."""
        alignment = None if job.alignment is None else Alignment.from_json(job.alignment)
        for rows, input_ids in self._batches(job, task):
            spans = [(task.samples[row].offset, len(task.samples[row].input_ids)) for row in rows]
            lengths = torch.tensor([length for _, length in spans], device=input_ids.device)
            valid_BT = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]

            def take(
                layer: int, key: torch.Tensor, value: torch.Tensor, spans: Spans = spans, valid_BT: torch.Tensor = valid_BT
            ) -> None:
                key_THD, value_THD = key.transpose(1, 2)[valid_BT], value.transpose(1, 2)[valid_BT]
                if alignment is not None:
                    aligned = alignment.project(layer, key_THD, value_THD)
                    key_THD, value_THD = (tensor.to(self._model.dtype) for tensor in aligned)
                on_layer(layer, spans, _to_numpy(key_THD), _to_numpy(value_THD))

            capture_kv(self._model, self._spec, input_ids, layers=job.layers, on_layer=take)

    def _batches(self, job: Job, task: Task) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Right-padded token ids of every forward pass; causal models need no mask for padding behind."""
        lengths = [len(sample.input_ids) for sample in task.samples]
        max_positions = int(self._model.config.get_text_config().max_position_embeddings)
        alone = length_dependent_rope(self._model.config) is not None
        for rows in plan_batches(lengths, job.batch_tokens, max_positions, alone=alone):
            width = lengths[rows[0]] if alone else padded_length(lengths[rows[0]], max_positions)
            padded = np.zeros((len(rows), width), dtype=np.int64)
            for position, row in enumerate(rows):
                padded[position, : lengths[row]] = task.samples[row].input_ids
            yield rows, torch.from_numpy(padded).to(self._model.device)


def _open_for_writing(store: str, shard: int) -> tuple[Manifest, Calibration]:
    """Manifest and calibration, read again only when the store has grown."""
    manifest, calibration = _open_at(store)
    if shard >= manifest.layout.num_shards:
        _open_at.cache_clear()
        manifest, calibration = _open_at(store)
    return manifest, calibration


@functools.lru_cache(maxsize=1)
def _open_at(store: str) -> tuple[Manifest, Calibration]:
    storage = locate(store)
    manifest = read_manifest(storage)
    return manifest, read_calibration(storage, manifest)


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.contiguous().cpu()
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(tensor.numpy())


def merge_moments(parts: dict[int, Moments]) -> Moments:
    """Sum the moments of several tasks in task order, so that the sum does not depend on who computed what."""
    merged: Moments = {}
    for shard in sorted(parts):
        for where, moments in parts[shard].items():
            if where in merged:
                merged[where].merge(moments)
            else:
                merged[where] = dataclasses.replace(moments, sums=moments.sums.copy())
    return merged
