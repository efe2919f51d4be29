"""Entering a store: a new one with its calibration and its gate, one to go on with, or one to append to.

Knows settings, manifests and what to ask of workers; neither data nor how tasks are run.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tqdm

from kvstore import Store, StoreNotFoundError
from kvstore.arrays import read_calibration
from kvstore.calibration import CALIBRATION_TOKENS, Calibration, calibration_fingerprint, fit_groups
from kvstore.codec import KINDS, Codec, format_codecs
from kvstore.create import create_store
from kvstore.drop import name_dropped
from kvstore.errors import FidelityError
from kvstore.gate import read_gate, write_gate
from kvstore.groups import Group
from kvstore.manifest import Manifest, read_manifest, refuse_mismatch
from kvstore.spec import KVSpec
from kvstore.storage import Storage, locate
from pipeline.align import Alignment
from pipeline.config import ExtractConfig
from pipeline.data.notes import Notes
from pipeline.data.samples import Sample
from pipeline.data.windows import Window
from pipeline.executors import Executor
from pipeline.gate import BadSequenceError, GateResult, finer_codecs, gate_sequences, verdict
from pipeline.identity import run_record
from pipeline.models.load import tokenizer_files
from pipeline.models.resolve import ResolvedModel
from pipeline.parts import Part, RunParts, first_part, run_of, token_arrays
from pipeline.quarantine import BadSampleError
from pipeline.worker import Job, Moments, TeacherInfo, merge_moments

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What all steps of one extraction know."""

    config: ExtractConfig
    resolved: ResolvedModel
    storage: Storage
    tokenizer: Any
    first: Window
    """The first window of the data; often all of it."""
    seq_len: int
    say: Say
    notes: Notes = dataclasses.field(default_factory=Notes)
    """What is odd in the data, and which rows are left out."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """What will lie on disk, as the loaded teacher has it."""

    info: TeacherInfo
    alignment: Alignment | None
    stored: KVSpec
    codecs: Mapping[int, Codec]
    groups: tuple[Group, ...]
    record: dict[str, Any]
    """The signal of the manifest, but the calibration."""
    job: Job


def enter(run: Run, signal: Signal, executor: Executor) -> tuple[RunParts, Part]:
    """The parts of the store this run is for, and the first: a new store's, one that is there already, or one to append."""
    # What was measured, so that a repair computes in batches of the same size.
    settings = {**run_record(run.config, run.resolved), "batch_tokens": signal.job.batch_tokens}
    parts = RunParts(locate(run.storage.location), settings, run.seq_len, append=run.config.append)
    try:
        store = Store(run.storage)
    except StoreNotFoundError:
        _create(run, signal, executor, settings)
        return parts, parts.begin(run.first, run.storage)
    stored = {name: value for name, value in store.manifest.signal.items() if name != "calibration"}
    refuse_mismatch(run.storage.location, stored=stored, wanted=signal.record, what="the signal")
    name_dropped(run.storage)
    part = parts.begin(run.first, run.storage)
    if part.is_new:
        known = len(run.first.samples) - part.num_new
        more = "" if run.first.last else ", more to come"
        run.say(f"--append: {part.num_new:,} new samples{more}; {known:,} are stored already and count once more")
    return parts, part


def _create(run: Run, signal: Signal, executor: Executor, settings: dict[str, Any]) -> None:
    part, layout, record = first_part(run.first, signal.groups, run.seq_len)
    calibration = _calibration(run, signal, executor, part)
    digest = calibration_fingerprint(calibration)
    manifest = Manifest(
        spec=signal.stored,
        teacher=signal.info.spec,
        layout=layout,
        groups=signal.groups,
        alignment=signal.alignment.to_json() if signal.alignment else None,
        calibration=digest,
        token_arrays=token_arrays(run.first),
        metadata={},
        tokenizer={},
        signal={**signal.record, "calibration": digest},
        data={"parts": [record], "dropped": None},
        runs=[run_of(settings, 0, run.first)],
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        kvpipe_version=importlib.metadata.version("kvpipe"),
    )
    gate = _gate_before(run, signal, executor, calibration)
    create_store(run.storage, manifest, calibration, tokenizer_files(run.tokenizer), gate)


def _gate_before(run: Run, signal: Signal, executor: Executor, calibration: Calibration) -> dict[str, Any] | None:
    """Try the codec on the teacher itself before anything is stored; None where nothing is quantised.

    Raises:
        FidelityError: its predictions change too much; the message names a codec with which they do not.
    """
    if not calibration:
        return None
    samples = [sample for sample in run.first.samples if sample.id not in executor.bad_ids]
    chosen = gate_sequences([len(sample.input_ids) for sample in samples], run.config.gate_tokens)
    codec = format_codecs(signal.codecs)
    result, sequences = _try_on(run, signal, executor, [samples[index] for index in chosen], codec, calibration)
    alternatives: list[GateResult] = []
    if not result.passes(run.config.max_kl) and not run.config.accept_fidelity:
        for finer in finer_codecs(codec):
            alternatives.append(executor.ask("gate", signal.job, sequences, finer, None))
            if alternatives[-1].passes(run.config.max_kl):
                break
    return _judge(run, "gate", result, alternatives)


def _try_on(
    run: Run, signal: Signal, executor: Executor, samples: list[Sample], codec: str, calibration: Calibration
) -> tuple[GateResult, tuple[np.ndarray, ...]]:
    """What a codec does to these samples, and which were read: samples that cannot be computed are left out if that was asked for.

    Raises:
        BadSampleError: the teacher gives a sample values that are not finite.
    """
    while True:
        sequences = tuple(sample.input_ids for sample in samples)
        try:
            return executor.ask("gate", signal.job, sequences, codec, calibration), sequences
        except BadSequenceError as error:
            bad = samples.pop(error.number)
            if run.config.on_bad_sample != "quarantine" or not samples:
                raise BadSampleError(
                    f"sample {bad.id[:12]} ({bad.source}) cannot be computed for the gate: {error.reason}. Take it out of the data, or leave it "
                    "out with --on-bad-sample quarantine, which records it in the store"
                ) from None


def gate_after(run: Run, signal: Signal, executor: Executor) -> None:
    """When the store is complete, let the teacher read over what lies on disk."""
    store = Store(run.storage)
    recorded = read_gate(run.storage).get("after")
    parts = len(store.manifest.data_parts)
    known = recorded and recorded.get("parts") == parts and (recorded.get("passed") or run.config.accept_fidelity)
    unfinished = store.manifest.is_growing or len(store.samples.summary) < store.manifest.layout.num_shards
    if known or unfinished:
        return
    chosen = tuple(gate_sequences(store.samples.num_tokens.tolist(), run.config.gate_tokens))
    if signal.job.alignment is None:
        result: GateResult = executor.ask("gate_stored", signal.job, chosen)
    else:
        sequences = tuple(store.read([index], layers=()).input_ids for index in chosen)
        result = executor.ask("gate", signal.job, sequences, format_codecs(signal.codecs), None)
    record = {**result.to_json(), "passed": result.passes(run.config.max_kl), "limit": run.config.max_kl, "parts": parts}
    write_gate(run.storage, "after", record)
    _judge(run, "gate after the last shard", result, [])


def _judge(run: Run, what: str, result: GateResult, alternatives: list[GateResult]) -> dict[str, Any]:
    passed = result.passes(run.config.max_kl)
    if not passed and not run.config.accept_fidelity:
        raise FidelityError(f"{what}: {verdict(result, run.config.max_kl, alternatives)}")
    run.say(
        f"{what}: codec {result.codec} changes the teacher's predictions by KL {result.kl:.2g} nats per token, perplexity "
        f"{100 * result.perplexity_change:+.2f} %, top-1 agreement {result.top1_agreement:.3f} ({result.num_tokens:,} tokens)"
        + ("" if passed else f"; more than {run.config.max_kl:g}, accepted by --accept-fidelity")
    )
    return {**result.to_json(), "passed": passed, "limit": run.config.max_kl}


def _calibration(run: Run, signal: Signal, executor: Executor, part: Part) -> Calibration:
    """Mean and step of every channel: those of another store if one was named, else measured on the first tasks."""
    if all(group.quantizer(kind) is None for group in signal.groups for kind in KINDS):
        return {}
    if run.config.calibration is not None:
        other = locate(run.config.calibration)
        manifest = read_manifest(other)
        stored = {name: value for name, value in manifest.signal.items() if name != "calibration"}
        refuse_mismatch(other.location, stored=stored, wanted=signal.record, what="--calibration: the signal")
        return read_calibration(other, manifest)
    chosen, tokens = [], 0
    for task in part.tasks:
        chosen.append(task)
        tokens += task.num_tokens
        if tokens >= CALIBRATION_TOKENS:
            break
    parts: dict[int, Moments] = {}
    with tqdm.tqdm(desc="calibrate", unit="tok", unit_scale=True, total=tokens) as bar:
        sizes = {task.shard: task.num_tokens for task in chosen}
        for shard, moments in executor.calibrate(signal.job, chosen):
            parts[shard] = moments
            bar.update(sizes[shard])
    return fit_groups(signal.groups, merge_moments(parts))
