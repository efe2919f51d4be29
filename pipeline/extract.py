"""One extraction from settings to a finished store: resolve, plan, refuse or create, run what is missing, compact.

Running it again with the same settings resumes: planning again finds what is committed. Knows no command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import tqdm

from kvstore import Store, open_store
from kvstore.codec import format_codecs, parse_codecs
from kvstore.compaction import compact
from kvstore.groups import plan_groups
from kvstore.lease import LAYOUT, lease, sweep
from kvstore.manifest import MANIFEST, read_manifest
from kvstore.spec import KVSpec, format_layers, parse_layers
from kvstore.storage import Folder, Storage, locate
from pipeline.align import Alignment, choose_student_layers
from pipeline.align.same_tokens import tokenizer_differences
from pipeline.budget import ByteBudget, refuse_small_budget
from pipeline.config import ExtractConfig
from pipeline.data.chat import template_fingerprint
from pipeline.data.documents import Document, read_documents, shuffled, subsampled
from pipeline.data.notes import Notes
from pipeline.data.samples import Cutter
from pipeline.data.windows import Limits, Windows
from pipeline.enter import Run, Say, Signal, enter, gate_after
from pipeline.executors import Executor, RayExecutor, SerialExecutor
from pipeline.flow import PURPOSE, TaskFlow, share_size
from pipeline.heap import trim_heap
from pipeline.identity import signal_record
from pipeline.models.load import build_student, geometry_mismatch, load_config, load_tokenizer, tokenizer_code
from pipeline.models.probe import probe_kv_spec
from pipeline.models.resolve import ResolvedModel
from pipeline.monitor.progress import Progress
from pipeline.parts import Part, RunParts
from pipeline.preflight import existing_folder, refuse_device, refuse_out
from pipeline.stop import NEVER, Stop
from pipeline.tasks import estimate_bytes, refuse_tokens
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
    """New tokens over the time the tasks ran; start-up, calibration and gate not counted."""


def extract(
    config: ExtractConfig,
    resolved: ResolvedModel,
    say: Say = lambda text: print(text, file=sys.stderr),
    stop: Stop = NEVER,
) -> ExtractSummary:
    """Run or resume one extraction.

    Args:
        stop: asked whether to go on; when not, the tasks in hand are finished and what is committed is put into tables.

    Raises:
        Interrupted: it was stopped; the same call goes on from there.
        BadSampleError: samples cannot be computed; they are named.
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
    model_config = load_config(resolved.path)
    if resolved.preset is not None:
        for problem in geometry_mismatch(resolved.preset, model_config):
            say(f"warning: {problem}")
    tokenizer = load_tokenizer(resolved.path)
    if code := tokenizer_code(resolved.path):
        say(f"warning: {code}")
    limits = model_config.get_text_config()
    longest = min(config.seq_len, limits.max_position_embeddings)
    if longest < config.seq_len:
        say(f"warning: samples are cut to {longest:,} tokens, all the positions {config.teacher} has, not {config.seq_len:,}")
    notes = Notes(leaves_out=config.on_bad_sample == "quarantine")
    windows = windows_of(config, tokenizer, longest, limits.vocab_size, notes)
    with tqdm.tqdm(desc="tokenise", unit="tok", unit_scale=True, total=_tokens_expected(config)) as bar:
        first = windows.next(bar.update)
    for line in notes.news():
        say(line)
    run = Run(
        config=config,
        resolved=resolved,
        storage=storage,
        tokenizer=tokenizer,
        first=first,
        seq_len=config.seq_len,
        say=say,
        notes=notes,
    )
    refuse_nothing_to_learn(run)
    executor = make_executor(config, resolved, storage, say, stop)
    try:
        signal = signal_of(run, executor)
        _announce(run, signal)
        if storage.size(MANIFEST) is None:
            refuse_small_budget(config.max_bytes, tokenizer, signal.stored)
        with lease(run.storage, LAYOUT, LAYOUT + 1, PURPOSE, wait=say) as held:
            parts, part = enter(dataclasses.replace(run, storage=held), signal, executor)
        first.forget_samples()
        results, seconds = _run_tasks(run, executor, signal, windows, parts, part, stop)
        store = Store(storage)
        if len(store.samples.summary) == store.manifest.layout.num_shards and not store.manifest.is_growing:
            sweep(storage, PURPOSE)
    finally:
        executor.close()
    return _summary(run.storage, results, seconds, time.perf_counter() - started)


def windows_of(config: ExtractConfig, tokenizer: Any, longest: int, vocab_size: int, notes: Notes) -> Windows:
    """The data, to be read as far as is asked for; `notes` are told what is odd in it."""
    cut = functools.partial(Cutter, tokenizer=tokenizer, seq_len=longest, vocab_size=vocab_size)

    def read() -> Iterator[Document]:
        return read_documents(config.data, config.text_field, config.split, as_text=config.as_text, notes=notes)

    def bytes_wanted(documents: Sequence[Document]) -> float:
        assert config.sample_tokens is not None
        size = sum(len(document.content()) for document in documents)
        trial = cut(keep_text=False, notes=Notes(leaves_out=notes.leaves_out))  # these documents are cut once more
        tokens = sum(len(sample.input_ids) for samples in trial.samples(documents) for sample in samples)
        return config.sample_tokens * size / max(tokens, 1)

    documents = read()
    if config.sample_tokens is not None:
        documents = subsampled(read, bytes_wanted, config.seed or 0)
    if config.seed is not None:
        documents = shuffled(documents, config.seed)
    return Windows(
        documents,
        cut(overlap=config.overlap, keep_text=config.keep_text, notes=notes),
        Limits(window_tokens=config.window_tokens, samples=config.limit, tokens=config.max_tokens),
    )


def _tokens_expected(config: ExtractConfig) -> int | None:
    """Tokens this run will plan, as far as the settings tell."""
    return min((number for number in (config.max_tokens, config.sample_tokens) if number), default=None)


def make_executor(config: ExtractConfig, resolved: ResolvedModel, storage: Storage, say: Say, stop: Stop = NEVER) -> Executor:
    """Where the tasks will run: Ray if workers were asked for, else this process.

    Args:
        storage: where the store is or will be: every worker must see it.
    """
    source = TeacherSource(path=resolved.path, dtype=config.dtype, device=config.device, num_gpus=config.gpus_per_worker)
    if config.workers or config.ray_address:
        return RayExecutor(
            dataclasses.replace(source, last_layer=_last_layer_wanted(config)),
            config.workers,
            config.ray_address,
            gpus_per_worker=config.gpus_per_worker,
            storage=storage,
            on_bad_sample=config.on_bad_sample,
            stop=stop,
            say=say,
        )
    return SerialExecutor(source, on_bad_sample=config.on_bad_sample, stop=stop, say=say)


def _last_layer_wanted(config: ExtractConfig) -> int | None:
    """Where the settings alone tell: a student's teacher layers, and what is counted from the last, are known with the teacher."""
    if config.student is None and re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", config.layers or ""):
        return max(map(int, re.findall(r"\d+", str(config.layers))))
    return None


def batch_tokens_of(config: ExtractConfig, executor: Executor, layers: tuple[int, ...]) -> int:
    """Padded tokens of a forward pass: those asked for, or what one worker measures; all have the same kind of device."""
    measured: int = config.batch_tokens or executor.ask("fit_batch_tokens", layers, config.seq_len)
    return measured


def signal_of(run: Run, executor: Executor) -> Signal:
    """What the workers' teacher and these settings store."""
    info = executor.describe()
    refuse_tokens(run.first, info.num_embeddings)
    alignment, stored = _stored(run, info)
    is_chat = any(sample.role is not None for sample in run.first.samples)
    template = template_fingerprint(run.tokenizer) if is_chat else None
    codecs = parse_codecs(run.config.codec, stored.layer_numbers)
    return Signal(
        info=info,
        alignment=alignment,
        stored=stored,
        codecs=codecs,
        groups=plan_groups(stored, codecs),
        record=signal_record(run.resolved, run.tokenizer, info, stored, alignment, codecs, template, run.config.response_only),
        job=Job(
            store=run.storage.location,
            layers=stored.layer_numbers,
            alignment=alignment.to_json() if alignment and alignment.baked else None,
            batch_tokens=batch_tokens_of(run.config, executor, stored.layer_numbers),
        ),
    )


def refuse_nothing_to_learn(run: Run) -> None:
    """Refuse data in whose first window there is no token to learn from.

    Raises:
        ValueError: so a student could not be trained, and nothing has been stored.
    """
    samples = run.first.samples
    masks = [sample.loss_mask for sample in samples if sample.loss_mask is not None]
    wants_mask = run.config.response_only
    if any(mask.any() for mask in masks) or not (wants_mask or len(masks) == len(samples)):
        return
    found = "conversations in which no assistant speaks" if masks else "plain text"
    more = "leave it out to store every token" if wants_mask else "see which roles the turns have, and mend them"
    raise ValueError(
        f"{'--response-only' if wants_mask else '--data'}: got {found} ({', '.join(run.config.data)}), expected conversations with the "
        f"assistant's turns{', or --overlap' if wants_mask else ''}; {more}"
    )


def _stored(run: Run, info: TeacherInfo) -> tuple[Alignment | None, KVSpec]:
    """The alignment to a named student, and the geometry that will lie on disk."""
    config = run.config
    if config.student is None:
        return None, info.spec.select(parse_layers(config.layers or "all", info.spec.layer_numbers))
    student, student_tokenizer = build_student(config.student, vocab_size=len(run.tokenizer), seed=0)
    if student_tokenizer is not None and (differences := tokenizer_differences(student_tokenizer, run.tokenizer)):
        raise ValueError(
            f"--student: {config.student} has another tokenizer than the teacher, so its tokens are not the teacher's tokens (student against "
            f"teacher: {'; '.join(differences)}); extract without --student (a raw store keeps the text), or name a student of the teacher's "
            "family"
        )
    alignment, stored = stored_geometry(config, info.spec, probe_kv_spec(student))
    if not alignment.baked:
        run.say(
            f"--student: {config.student} has no fewer values per layer than the teacher, so baking would not make the store "
            "smaller; the teacher's own keys and values are stored and the alignment is recorded to be applied at load"
        )
    return alignment, stored


def stored_geometry(config: ExtractConfig, teacher: KVSpec, student: KVSpec) -> tuple[Alignment, KVSpec]:
    """The alignment of the layers asked for, baked where that makes the store smaller, and the geometry that will lie on disk."""
    layers = choose_student_layers(config.layers, config.layer_map, student.layer_numbers)
    alignment = Alignment.plan(teacher, student, layer_map=config.layer_map, student_layers=layers)
    if alignment.is_smaller:
        alignment = dataclasses.replace(alignment, baked=True)
        return alignment, alignment.stored_spec()
    return alignment, teacher.select(alignment.teacher_layers)


def _announce(run: Run, signal: Signal) -> None:
    """Say what will be written before anything is."""
    config, first = run.config, run.first
    tokens = first.num_tokens if first.last else _tokens_expected(config)
    size = estimate_bytes(signal.stored, signal.codecs, tokens or 1_000_000) / 1e9
    if tokens is None:
        what, about = "data of a size not known yet", f"about {size:.3g} GB for every million tokens"
    elif first.last:
        what, about = f"{len(first.samples):,} samples, {tokens:,} tokens", f"about {size:.3g} GB"
    else:
        what, about = f"up to {tokens:,} tokens", f"up to about {size:.3g} GB"
    free = ""
    if isinstance(run.storage, Folder):
        free = f" ({shutil.disk_usage(existing_folder(run.storage.root)).free / 1e9:.0f} GB free)"
    run.say(
        f"{config.teacher}: {what}, {len(signal.stored.layers)} layers ({format_layers(signal.stored.layer_numbers)}), codec "
        f"{format_codecs(signal.codecs)}: {about} into {run.storage.location}{free}; {signal.job.batch_tokens:,} "
        f"padded tokens at once on {signal.info.device}"
    )
    if config.response_only:
        learnt = sum(
            len(sample.input_ids) if sample.loss_mask is None else int(sample.loss_mask.sum()) for sample in first.samples
        )
        run.say(
            f"--response-only: {learnt:,} of the first {first.num_tokens:,} tokens get keys and values, so it will be smaller"
        )
    if unrotated := signal.stored.unrotated_layers:
        run.say(f"layers {format_layers(unrotated)} rotate no keys: those before and after rotation are the same")
    if config.max_tokens and (not first.last or first.num_tokens > 0.99 * config.max_tokens):
        run.say(f"stops at --max-tokens {config.max_tokens:,}; ask for more with a larger number, or 0 for all of the data")


def _run_tasks(
    run: Run, executor: Executor, signal: Signal, windows: Windows, parts: RunParts, first: Part, stop: Stop
) -> tuple[list[TaskResult], float]:
    """Run the tasks that are not committed, in waves none of which can pass the byte limit."""
    budget = ByteBudget(run.storage, read_manifest(run.storage), run.config.max_bytes)
    results: list[TaskResult] = []
    started = time.perf_counter()
    total = sum(task.num_tokens for task in first.tasks) if run.first.last else _tokens_expected(run.config)
    if total is not None:
        total = round(total * share_size(run.config))
    with Progress(
        run.storage, run.say, workers=executor.num_workers, device=signal.info.device, total_tokens=total
    ) as progress:
        flow = TaskFlow(run, windows, parts, first, num_embeddings=signal.info.num_embeddings, stored=progress.found)
        with contextlib.closing(flow):
            more = True
            while more:
                before = len(results)
                for result in executor.run(signal.job, progress.begun(flow.wave(budget.admits))):
                    results.append(result)
                    flow.done(result.shard)
                    progress.expect(flow.total_tokens or total)
                    progress.add(result)
                    for bad in result.quarantined:
                        run.say(f"left out: {bad}")
                        progress.note("quarantined", sample=bad.id, source=bad.source, reason=bad.reason)
                    if rows := run.notes.take_left_out():
                        progress.note("unreadable", num_rows=len(rows), rows=rows)
                budget.recount()
                more = flow.is_stopped and len(results) > before and not stop.requested
    if flow.is_stopped and not stop.requested:
        run.say(
            f"stopped before --max-bytes {run.config.max_bytes:,}: {budget.used_bytes:,} bytes are in the store with its tables, and the next shard or window "
            "could pass the limit; what is committed can be used, and the same command with a larger limit goes on"
        )
    for line in run.notes.news():
        run.say(line)
    with lease(run.storage, flow.range.start, flow.range.stop, PURPOSE, wait=run.say) as held:
        compact(held)
        trim_heap()
        seconds = time.perf_counter() - started
        if stop.requested:
            raise stop.interrupted(_how_far(run.storage))
        gate_after(dataclasses.replace(run, storage=held), signal, executor)
    return results, seconds


def _how_far(storage: Storage) -> str:
    store = Store(storage)
    more = " so far" if store.manifest.is_growing else ""
    return f"{len(store.samples.summary)} of {store.manifest.layout.num_shards} shards planned{more} are committed to {storage.location}"


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
