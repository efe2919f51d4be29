"""A worker: one teacher, computing the keys and values of whole tasks and writing their shards itself.

Runs in this process or inside a Ray actor; tensors never leave it, only small records do. Several threads keep it busy: while one
writes its task the other computes the next. Knows no scheduling.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvstore import CodecError, open_store
from kvstore.arrays import read_calibration
from kvstore.calibration import Calibration, ChannelMoments, calibration_mask, power_sums
from kvstore.codec import KINDS, Kind, format_codecs, parse_codecs
from kvstore.manifest import read_manifest
from kvstore.spec import KVSpec
from kvstore.storage import Storage, locate
from kvstore.writer import ShardWriter
from pipeline.align import Alignment
from pipeline.feed import Feed, StoreCodec, as_numpy
from pipeline.gate import GateResult, codec_round_trip, run_gate, run_stored_gate, self_calibrated, stored_calibration
from pipeline.models.load import load_causal_lm
from pipeline.quarantine import BadSample
from pipeline.tasks import Task
from pipeline.teacher import Batch, OnLayer, Teacher

KEPT_BYTES = 256 * 2**20
"""Keys and values that calibration keeps for the tasks it computed; what is beyond is computed again."""

_Captured = tuple[int, Batch, Tensor, Tensor]
"""Layer, batch, keys and values."""
Moments = dict[tuple[int, Kind], ChannelMoments]
"""By teacher layer and kind, of what will be stored: after alignment where it is baked."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSource:
    """Where a worker gets its teacher."""

    path: Path
    """Local folder with config and safetensors."""
    dtype: str
    device: str
    num_gpus: int = 0
    """GPUs of this process to spread it over; 0 leaves that to `device`."""
    last_layer: int | None = None
    """The last layer there is work for; what is above is not loaded unless a gate asks for it. None for all."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TeacherInfo:
    """What a worker found out about its teacher by running it; all workers of a run must agree."""

    spec: KVSpec
    """Every layer that was loaded and has keys and values of its own."""
    is_partial: bool
    """Whether layers above were not loaded."""
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
    """What came of a task. Seconds are those in which a stage was at work on it; stages overlap."""

    shard: int
    num_samples: int
    num_tokens: int
    stored_bytes: int
    batch_tokens: int
    """Most padded tokens of a forward pass: the job's, or less after memory ran out."""
    compute_s: float
    """Time this task had the teacher, encoding and copying left out; what is below can overlap with other tasks."""
    copy_s: float
    encode_s: float
    write_s: float
    """Compressing, hashing, writing and committing."""
    quarantined: tuple[BadSample, ...] = ()
    """Samples that were planned for this shard and could not be computed."""


class Worker:
    """Loads a teacher once, then computes and writes tasks.

    `run` may be called by several threads at once, which share the teacher in turn; the other methods wait for it too. Beside the
    teacher and its activations it holds, for each thread in `run`, the codes of one shard (of each array at most 256 MiB, or one
    sample), QUEUE_BYTES of codes coming from a GPU and, on the CPU, KEPT_BYTES.
    """

    def __init__(self, source: TeacherSource, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        """Load the teacher.

        Args:
            environment: variables a process on another machine lacks: a bucket's credentials.
        """
        os.environ.update(environment)
        load = functools.partial(load_causal_lm, source.path, source.dtype, source.device, spare_embedding=True)
        self._teacher = Teacher(load, source.last_layer)
        self._kept: dict[int, list[_Captured]] = {}
        self._codec: tuple[str, StoreCodec] | None = None
        self._codec_lock = threading.Lock()

    def describe(self) -> TeacherInfo:
        model = self._teacher.model
        return TeacherInfo(
            spec=self._teacher.spec,
            is_partial=self._teacher.is_partial,
            attn_implementation=str(model.config.get_text_config()._attn_implementation),
            max_positions=self._teacher.max_positions,
            num_embeddings=int(model.get_input_embeddings().weight.shape[0]),
            device=str(model.device),
        )

    def describe_whole(self) -> TeacherInfo:
        """The same of every layer, loaded for that if need be."""
        with self._teacher.lock:
            self._teacher.require_whole()
        return self.describe()

    def fit_batch_tokens(self, layers: tuple[int, ...], seq_len: int) -> int:
        """Padded tokens of a forward pass that fit this worker's device; see `Teacher`."""
        with self._teacher.lock:
            return self._teacher.fit_batch_tokens(layers, seq_len)

    def calibrate(self, job: Job, task: Task) -> Moments:
        """Compute a task and return the moments of its numbers, sink positions left out.

        On the CPU, where a forward pass is dear, the numbers are kept for `run` as far as KEPT_BYTES go.

        Raises:
            CodecError: a value is not finite; the sample is named.
        """
        # By first token of the batch: what memory ran out for comes again, in parts.
        sums: dict[tuple[int, int], dict[Kind, ChannelMoments]] = {}
        captured: dict[tuple[int, int], _Captured] = {}
        room = KEPT_BYTES - sum(_num_bytes(kept) for kept in self._kept.values())

        def take(layer: int, batch: Batch, key: Tensor, value: Tensor) -> None:
            _refuse_not_finite(task, layer, batch, key, value)
            where, wanted = (batch.samples[0].offset, layer), calibration_mask(batch.lengths)
            sums[where] = {kind: _moments(values, wanted) for kind, values in zip(KINDS, (key, value), strict=True)}
            if key.device.type == "cpu" and _num_bytes(captured.values()) < room:
                captured[where] = (layer, batch, key, value)

        with self._teacher.lock:
            self._compute(job, task, take)
        if len(captured) == len(sums) and _num_bytes(captured.values()) <= room:
            self._kept[task.shard] = list(captured.values())
        moments: Moments = {}
        for (_, layer), found in sorted(sums.items(), key=lambda item: item[0]):
            for kind, part in found.items():
                moments.setdefault((layer, kind), ChannelMoments.zeros(*part.sums.shape[1:])).merge(part)
        return moments

    def probe(self, job: Job, task: Task) -> None:
        """Compute a task and keep nothing: does it go well?

        Raises:
            CodecError: a value is not finite; the sample is named.
        """
        with self._teacher.lock:
            self._compute(job, task, functools.partial(_refuse_not_finite, task))

    def run(self, job: Job, task: Task, replace: bool = False) -> TaskResult:
        """Compute a task and commit its shard; one that is committed already is written again only with `replace`.

        Raises:
            SampleTooLargeError: the device's memory does not suffice for one sample.
            CodecError: the teacher gave values that are not finite.
            StoreWriteError: the disk or bucket refused.
        """
        codec = self._codec_for(job.store, task.shard)
        rows = [sample.row for sample in task.samples]
        writer = ShardWriter(_fenced(job, task), codec.manifest, codec.calibration, task.shard, rows)
        feed = Feed(writer, codec)
        compute_s = 0.0
        kept = self._kept.pop(task.shard, None)
        while kept:
            layer, batch, key, value = kept.pop()
            feed.take(layer, batch.placed, key, value)
        if kept is None:
            with self._teacher.lock:
                self._teacher.drop_above(max(job.layers))  # not in `calibrate`, for the gate comes after it
                begun = time.perf_counter()
                self._compute(job, task, lambda layer, batch, key, value: feed.take(layer, batch.placed, key, value))
                compute_s = time.perf_counter() - begun - feed.encode_s - feed.copy_s
        # The teacher is free for the other thread while the last codes arrive.
        feed.drain()
        for sample in task.samples:
            writer.put_tokens(sample.offset, sample.input_ids, sample.beside)
        begun = time.perf_counter()
        commit = writer.commit(replace=replace)
        return TaskResult(
            shard=task.shard,
            num_samples=len(commit.samples),
            num_tokens=commit.num_tokens,
            stored_bytes=commit.stored_bytes,
            batch_tokens=self._teacher.batch_tokens(job.batch_tokens),
            compute_s=compute_s,
            copy_s=feed.copy_s,
            encode_s=feed.encode_s,
            write_s=time.perf_counter() - begun,
        )

    def gate(self, job: Job, sequences: tuple[np.ndarray, ...], codec: str, calibration: Calibration | None) -> GateResult:
        """Measure how this codec changes what the teacher predicts, before anything is stored.

        Args:
            codec: as `parse_codecs` reads it, over the teacher layers of the job; any, not only the one to be stored.
            calibration: what was fitted for this very codec; None fits on the sequences themselves. Not used where an alignment
                is baked: it then belongs to the student's geometry.
        """
        teacher, codecs = self._teacher, parse_codecs(codec, job.layers)
        with teacher.lock:
            teacher.require_whole()
            if job.alignment is None and calibration is not None:
                fits = stored_calibration(teacher.spec.select(job.layers), codecs, calibration)
            else:
                fits = self_calibrated(teacher.model, teacher.spec, sequences, codecs, job.layers)
            return run_gate(
                teacher.model,
                teacher.spec,
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
        with self._teacher.lock:
            self._teacher.require_whole()
            return run_stored_gate(self._teacher.model, self._teacher.spec, open_store(job.store), sample_indices, job.layers)

    def _codec_for(self, store: str, shard: int) -> StoreCodec:
        """Manifest and calibration of the store in work; read again only for another store or when it has grown."""
        with self._codec_lock:
            if self._codec is None or self._codec[0] != store or shard >= self._codec[1].manifest.layout.num_shards:
                storage = locate(store)
                manifest = read_manifest(storage)
                self._codec = store, StoreCodec(manifest, read_calibration(storage, manifest))
            return self._codec[1]

    def _compute(self, job: Job, task: Task, on_layer: OnLayer) -> None:
        alignment = None if job.alignment is None else Alignment.from_json(job.alignment)
        self._teacher.compute(task.samples, job.layers, alignment, job.batch_tokens, on_layer)


def _fenced(job: Job, task: Task) -> Storage:
    """The store, to be written only as long as the claim on the task's shard holds."""
    storage = locate(job.store)
    return storage if task.claim is None else storage.fenced(task.claim)


def _num_bytes(captured: Iterable[_Captured]) -> int:
    """Memory they hold, which for a slice of a larger tensor is that one's."""
    return sum(tensor.untyped_storage().nbytes() for _, _, *pair in captured for tensor in pair)


def _moments(values_THD: Tensor, wanted: np.ndarray) -> ChannelMoments:
    chosen = values_THD[torch.from_numpy(wanted).to(values_THD.device)]
    if chosen.device.type == "cpu":
        return ChannelMoments(len(chosen), power_sums(as_numpy(chosen.float())))
    return ChannelMoments(len(chosen), power_sums(chosen).cpu().numpy())


def _refuse_not_finite(task: Task, layer: int, batch: Batch, key_THD: Tensor, value_THD: Tensor) -> None:
    for kind, values in zip(KINDS, (key_THD, value_THD), strict=True):
        finite = torch.isfinite(values).flatten(1).all(dim=1)
        if not finite.all():
            ends = np.cumsum(batch.lengths)
            row = batch.samples[int(np.searchsorted(ends, int(finite.int().argmin()), side="right"))].row
            raise CodecError(
                f"shard {task.shard}, sample {row.id[:12]} ({row.source}), layer {layer}, {kind}: got NaN or infinity from the teacher, "
                "expected finite values"
            )


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
