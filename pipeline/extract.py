"""One extraction from settings to a finished store: resolve, plan, refuse or create, run what is missing, compact.

Running it again with the same settings resumes: planning again finds what is committed. Knows no command line.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from typing import Any

import numpy as np
import tqdm
import transformers

from kvstore import Store, open_store
from kvstore.codec import KINDS, format_codecs, parse_codecs
from kvstore.commits import committed_shards
from kvstore.lease import LAYOUT, lease, sweep
from kvstore.manifest import Group, plan_groups, read_manifest
from kvstore.samples import compact
from kvstore.spec import KVSpec, format_layers, parse_layers
from kvstore.storage import Folder, Storage, locate
from pipeline.align import Alignment, default_student_layers
from pipeline.config import ExtractConfig
from pipeline.data import Sample, make_samples, read_documents, shuffled
from pipeline.enter import Run, Say, Signal, enter, gate_after
from pipeline.executors import Executor, RayExecutor, SerialExecutor
from pipeline.identity import signal_record
from pipeline.models.fingerprint import tokenizer_fingerprint
from pipeline.models.load import build_student, geometry_mismatch, load_tokenizer
from pipeline.models.probe import probe_kv_spec
from pipeline.models.resolve import ResolvedModel
from pipeline.plan import Task, estimate_bytes, task_range
from pipeline.preflight import existing_folder, refuse_device, refuse_out
from pipeline.worker import Job, TaskResult, TeacherInfo, TeacherSource


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExtractSummary:
    """What an extraction did."""

    out: str
    num_samples: int
    num_tokens: int
    stored_bytes: int
    new_shards: int
    num_shards: int
    seconds: float
    tokens_per_s: float
    """New tokens over the time the tasks ran; start-up not counted."""


def extract(
    config: ExtractConfig, resolved: ResolvedModel, say: Say = lambda text: print(text, file=sys.stderr)
) -> ExtractSummary:
    """Run or resume one extraction.

    Raises:
        ValueError: a setting, the data or the teacher cannot be used; says which and what to do.
        FingerprintMismatchError: the store at `out` was made with other settings; nothing was written.
        LeaseHeldError: another extraction is writing the same shards.
        CodecError: the teacher gave values that cannot be stored.
        FidelityError: the codec changes the teacher's predictions too much.
        StoreWriteError: the disk or bucket refused.
    """
    started = time.perf_counter()
    assert config.out is not None
    storage = locate(config.out)
    refuse_out(storage)
    refuse_device(config)
    model_config = transformers.AutoConfig.from_pretrained(resolved.path, trust_remote_code=False)
    if resolved.preset is not None:
        for problem in geometry_mismatch(resolved.preset, model_config):
            say(f"warning: {problem}")
    tokenizer = load_tokenizer(resolved.path)
    seq_len = min(config.seq_len, model_config.get_text_config().max_position_embeddings)
    run = Run(
        config=config,
        resolved=resolved,
        storage=storage,
        tokenizer=tokenizer,
        samples=_samples(config, tokenizer, seq_len),
        seq_len=config.seq_len,
        say=say,
    )
    executor = make_executor(config, resolved)
    try:
        signal = _signal(run, executor.describe())
        _announce(run, signal)
        with lease(run.storage, LAYOUT, LAYOUT + 1, "kvpipe extract", wait=say):
            part = enter(run, signal, executor)
        chosen = range(len(part.tasks)) if config.task_range is None else task_range(config.task_range, len(part.tasks))
        tasks = [part.tasks[index] for index in chosen]
        with lease(run.storage, part.first_shard + chosen.start, part.first_shard + chosen.stop, "kvpipe extract"):
            results, seconds = _run_tasks(run, executor, signal.job, tasks)
            # Under the lease, for a drop at the same time would find its texts written into a table again.
            compact(run.storage)
            gate_after(run, signal, executor)
        if len(committed_shards(storage)) == read_manifest(storage).layout.num_shards:
            sweep(storage, "kvpipe extract")
    finally:
        executor.close()
    return _summary(run.storage, results, seconds, time.perf_counter() - started)


def make_executor(config: ExtractConfig, resolved: ResolvedModel) -> Executor:
    """Where the tasks will run: Ray if workers were asked for, else this process."""
    source = TeacherSource(path=resolved.path, dtype=config.dtype, device=config.device)
    if config.workers or config.ray_address:
        return RayExecutor(source, max(config.workers, 1), config.ray_address)
    return SerialExecutor(source)


def _samples(config: ExtractConfig, tokenizer: Any, seq_len: int) -> list[Sample]:
    """Read, shuffle, tokenise and cut the data, before the teacher is loaded, so that bad data is known at once.

    Sorted by id, a hash: equal sets of samples make equal stores in whatever order they come, and the first tasks, on which the
    store is calibrated, are a random draw.
    """
    documents = read_documents(config.data, config.text_field, config.split)
    if config.seed is not None:
        documents = shuffled(documents, config.seed)
    with tqdm.tqdm(desc="tokenise", unit="tok", unit_scale=True, total=config.max_tokens or None) as bar:
        samples = make_samples(
            documents,
            tokenizer,
            seq_len=seq_len,
            limit=config.limit,
            max_tokens=config.max_tokens,
            keep_text=config.keep_text,
            progress=bar.update,
        )
    return sorted(samples, key=lambda sample: sample.id)


def _signal(run: Run, info: TeacherInfo) -> Signal:
    """What this teacher and these settings store."""
    largest = max(int(sample.input_ids.max()) for sample in run.samples)
    if largest >= info.num_embeddings:
        raise ValueError(
            f"token ids: got {largest}, but the teacher has {info.num_embeddings} embeddings; the tokenizer is not the teacher's"
        )
    alignment, stored = _stored(run, info)
    codecs = parse_codecs(run.config.codec, stored.layer_numbers)
    return Signal(
        info=info,
        alignment=alignment,
        stored=stored,
        codecs=codecs,
        groups=plan_groups(stored, codecs),
        record=signal_record(run.resolved, run.tokenizer, info, stored, alignment, codecs),
        job=Job(
            store=run.storage.location,
            layers=stored.layer_numbers,
            alignment=alignment.to_json() if alignment and alignment.baked else None,
            batch_tokens=run.config.batch_tokens,
        ),
    )


def _stored(run: Run, info: TeacherInfo) -> tuple[Alignment | None, KVSpec]:
    """The alignment to a named student, and the geometry that will lie on disk."""
    config = run.config
    if config.student is None:
        return None, info.spec.select(parse_layers(config.layers or "all", info.spec.layer_numbers))
    student, student_tokenizer = build_student(config.student, vocab_size=len(run.tokenizer), seed=0)
    if student_tokenizer is not None and tokenizer_fingerprint(student_tokenizer) != tokenizer_fingerprint(run.tokenizer):
        raise ValueError(
            f"--student: {config.student} has another tokenizer than the teacher, so its tokens are not the teacher's tokens; "
            "extract without --student (a raw store keeps the text), or name a student of the teacher's family"
        )
    student_spec = probe_kv_spec(student)
    layers = (
        default_student_layers(len(student_spec.layers))
        if config.layers is None
        else parse_layers(config.layers, student_spec.layer_numbers)
    )
    alignment = Alignment.plan(info.spec, student_spec, layer_map=config.layer_map, student_layers=layers)
    if alignment.is_smaller:
        alignment = dataclasses.replace(alignment, baked=True)
        return alignment, alignment.stored_spec()
    run.say(
        f"--student: {config.student} has no fewer values per layer than the teacher, so baking would not make the store smaller; "
        "the teacher's own keys and values are stored and the alignment is recorded to be applied at load"
    )
    return alignment, info.spec.select(alignment.teacher_layers)


def _announce(run: Run, signal: Signal) -> None:
    config, tokens = run.config, sum(len(sample.input_ids) for sample in run.samples)
    size = estimate_bytes(signal.stored, signal.codecs, tokens)
    free = ""
    if isinstance(run.storage, Folder):
        free = f" ({shutil.disk_usage(existing_folder(run.storage.root)).free / 1e9:.0f} GB free)"
    run.say(
        f"{config.teacher}: {len(run.samples):,} samples, {tokens:,} tokens, {len(signal.stored.layers)} layers "
        f"({format_layers(signal.stored.layer_numbers)}), codec {format_codecs(signal.codecs)}: about {size / 1e9:.3g} GB into "
        f"{run.storage.location}{free}"
    )
    if config.max_tokens and tokens > 0.99 * config.max_tokens:
        run.say(f"stops at --max-tokens {config.max_tokens:,}; ask for more with a larger number, or 0 for all of the data")


def _run_tasks(run: Run, executor: Executor, job: Job, tasks: list[Task]) -> tuple[list[TaskResult], float]:
    """Run the tasks that are not committed, in waves none of which can pass the byte limit."""
    committed = committed_shards(run.storage)
    todo = [task for task in tasks if task.shard not in committed]
    if len(todo) < len(tasks):
        run.say(f"resuming {run.storage.location}: {len(tasks) - len(todo)} of {len(tasks)} shards are committed")
    max_bytes = run.config.max_bytes
    stored_bytes = sum(Store(run.storage).samples.summary["stored_bytes"].to_pylist())
    worst = _worst_case_bytes(read_manifest(run.storage).groups)
    results: list[TaskResult] = []
    started = time.perf_counter()
    with tqdm.tqdm(
        desc="extract",
        unit="tok",
        unit_scale=True,
        total=sum(task.num_tokens for task in tasks),
        initial=sum(task.num_tokens for task in tasks if task.shard in committed),
    ) as bar:
        while wave := _wave(todo, worst, None if max_bytes is None else max_bytes - stored_bytes):
            todo = todo[len(wave) :]
            for result in executor.run(job, wave):
                results.append(result)
                stored_bytes += result.stored_bytes
                bar.set_postfix_str(f"{stored_bytes / 1e6:,.1f} MB", refresh=False)
                bar.update(result.num_tokens)
    if todo:
        run.say(
            f"stopped before --max-bytes {max_bytes:,}: {stored_bytes:,} bytes are stored, {len(todo)} of {len(tasks)} shards are "
            "left; what is committed can be used, and the same command with a larger limit goes on"
        )
    return results, time.perf_counter() - started


def _worst_case_bytes(groups: tuple[Group, ...]) -> int:
    """Bytes of one token if nothing compresses; a little over for chunk headers."""
    values = sum(
        len(group.layers) * int(np.prod(group.code_shape(kind))) * group.storage_dtype(kind).itemsize
        for group in groups
        for kind in KINDS
    )
    return int(1.02 * values) + np.dtype(np.int32).itemsize + 1


def _wave(todo: list[Task], token_bytes: int, budget: int | None) -> list[Task]:
    """The next tasks that fit the budget even if nothing compresses; all when there is none."""
    if budget is None:
        return todo
    wave: list[Task] = []
    for task in todo:
        budget -= task.num_tokens * token_bytes
        if budget < 0:
            break
        wave.append(task)
    return wave


def _summary(storage: Storage, results: list[TaskResult], run_s: float, seconds: float) -> ExtractSummary:
    store = open_store(storage.location)
    summary = store.samples.summary
    new_tokens = sum(result.num_tokens for result in results)
    return ExtractSummary(
        out=storage.location,
        num_samples=len(store),
        num_tokens=sum(summary["num_tokens"].to_pylist()),
        stored_bytes=sum(summary["stored_bytes"].to_pylist()),
        new_shards=len(results),
        num_shards=store.manifest.layout.num_shards,
        seconds=seconds,
        tokens_per_s=new_tokens / run_s if new_tokens else 0.0,
    )
