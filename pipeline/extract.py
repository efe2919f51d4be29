"""One extraction from settings to a finished store: resolve, plan, refuse or create, run what is missing, compact.

Running it again with the same settings resumes: planning again finds what is committed. Knows no command line.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import tqdm
import transformers

from kvstore import StoreNotFoundError, open_store
from kvstore.calibration import CALIBRATION_TOKENS, Calibration, calibration_fingerprint, fit_groups
from kvstore.codec import KINDS, Codec, format_codecs, parse_codecs
from kvstore.commits import committed_shards
from kvstore.manifest import Group, Manifest, plan_groups, read_manifest, refuse_mismatch
from kvstore.records import plain
from kvstore.samples import compact
from kvstore.spec import KVSpec, format_layers, parse_layers
from kvstore.writer import create_store
from pipeline.align import Alignment, default_student_layers
from pipeline.config import ExtractConfig
from pipeline.data import Sample, make_samples, read_documents, shuffled
from pipeline.executors import Executor, RayExecutor, SerialExecutor
from pipeline.models.fingerprint import config_fingerprint, tokenizer_fingerprint, weights_fingerprint
from pipeline.models.load import build_student, geometry_mismatch, load_tokenizer
from pipeline.models.probe import probe_kv_spec
from pipeline.models.resolve import ResolvedModel
from pipeline.plan import Task, data_record, estimate_bytes, plan_layout, plan_tasks
from pipeline.worker import Job, Moments, TaskResult, TeacherInfo, TeacherSource, merge_moments

CAPTURE_VERSION = 1
"""Raised whenever the same teacher and text would give other numbers."""

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExtractSummary:
    """What an extraction did."""

    out: Path
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
        CodecError: the teacher gave values that cannot be stored.
    """
    started = time.perf_counter()
    assert config.out is not None
    root = config.out.expanduser()
    model_config = transformers.AutoConfig.from_pretrained(resolved.path, trust_remote_code=False)
    if resolved.preset is not None:
        for problem in geometry_mismatch(resolved.preset, model_config):
            say(f"warning: {problem}")
    tokenizer = load_tokenizer(resolved.path)
    samples = _samples(config, tokenizer, model_config.get_text_config().max_position_embeddings)
    executor = _executor(config, resolved)
    try:
        info = executor.describe()
        _validate_token_ids(samples, info)
        alignment, stored = _stored(config, info, tokenizer, say)
        job = Job(
            root=root,
            layers=stored.layer_numbers,
            alignment=alignment.to_json() if alignment and alignment.baked else None,
            batch_tokens=config.batch_tokens,
        )
        codecs = parse_codecs(config.codec, stored.layer_numbers)
        groups = plan_groups(stored, codecs)
        layout = plan_layout(samples, groups)
        tasks = plan_tasks(samples, layout)
        signal = _signal(resolved, tokenizer, info, stored, alignment, codecs)
        data = data_record(samples, config.seq_len)
        _announce(say, root, samples, stored, codecs, config)
        if not _resumes(root, signal, data):
            calibration = _calibrate(executor, job, groups, tasks)
            manifest = Manifest(
                spec=stored,
                teacher=info.spec,
                layout=layout,
                groups=groups,
                alignment=alignment.to_json() if alignment else None,
                calibration=calibration_fingerprint(calibration),
                signal={**signal, "calibration": calibration_fingerprint(calibration)},
                data=data,
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                kvpipe_version=importlib.metadata.version("kvpipe"),
            )
            with tempfile.TemporaryDirectory() as folder:
                tokenizer.save_pretrained(folder)
                create_store(root, manifest, calibration, Path(folder))
        results, seconds = _run(executor, job, tasks, config.max_bytes, say)
    finally:
        executor.close()
    compact(root)
    return _summary(root, results, seconds, time.perf_counter() - started)


def _executor(config: ExtractConfig, resolved: ResolvedModel) -> Executor:
    source = TeacherSource(path=resolved.path, dtype=config.dtype, device=config.device)
    if config.workers or config.ray_address:
        return RayExecutor(source, max(config.workers, 1), config.ray_address)
    return SerialExecutor(source)


def _samples(config: ExtractConfig, tokenizer: Any, max_positions: int) -> list[Sample]:
    """Read, shuffle, tokenise and cut the data; done before the teacher is loaded, so that bad data is known at once."""
    documents = read_documents(config.data, config.text_field, config.split)
    if config.seed is not None:
        documents = shuffled(documents, config.seed)
    with tqdm.tqdm(desc="tokenise", unit="tok", unit_scale=True, total=config.max_tokens or None) as bar:
        return make_samples(
            documents,
            tokenizer,
            seq_len=min(config.seq_len, max_positions),
            limit=config.limit,
            max_tokens=config.max_tokens,
            keep_text=config.keep_text,
            progress=bar.update,
        )


def _validate_token_ids(samples: list[Sample], info: TeacherInfo) -> None:
    largest = max(int(sample.input_ids.max()) for sample in samples)
    if largest >= info.num_embeddings:
        raise ValueError(
            f"token ids: got {largest}, but the teacher has {info.num_embeddings} embeddings; the tokenizer is not the teacher's"
        )


def _stored(config: ExtractConfig, info: TeacherInfo, tokenizer: Any, say: Say) -> tuple[Alignment | None, KVSpec]:
    """The alignment to a named student, and the geometry that will lie on disk."""
    if config.student is None:
        return None, info.spec.select(parse_layers(config.layers or "all", info.spec.layer_numbers))
    student, student_tokenizer = build_student(config.student, vocab_size=len(tokenizer), seed=0)
    if student_tokenizer is not None and tokenizer_fingerprint(student_tokenizer) != tokenizer_fingerprint(tokenizer):
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
    say(
        f"--student: {config.student} has no fewer values per layer than the teacher, so baking would not make the store smaller; "
        "the teacher's own keys and values are stored and the alignment is recorded to be applied at load"
    )
    return alignment, info.spec.select(alignment.teacher_layers)


def _signal(
    resolved: ResolvedModel,
    tokenizer: Any,
    info: TeacherInfo,
    stored: KVSpec,
    alignment: Alignment | None,
    codecs: Mapping[int, Codec],
) -> dict[str, Any]:
    """Everything that shapes the numbers, but the calibration."""
    signal = {
        "capture_version": CAPTURE_VERSION,
        "transformers": transformers.__version__.split(".")[0],
        "weights": weights_fingerprint(resolved.path),
        "config": config_fingerprint(resolved.path),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "dtype": info.spec.dtype,
        "attn_implementation": info.attn_implementation,
        "layers": format_layers(stored.layer_numbers),
        "spec": stored.to_json(),
        "alignment": alignment.to_json() if alignment else None,
        "codec": format_codecs(codecs),
    }
    return cast(dict[str, Any], plain(signal))


def _resumes(root: Path, signal: dict[str, Any], data: dict[str, Any]) -> bool:
    """Whether a store is there to be continued; refuses one made with other settings, calibration aside."""
    try:
        manifest = read_manifest(root)
    except StoreNotFoundError:
        return False
    stored = {name: value for name, value in manifest.signal.items() if name != "calibration"}
    refuse_mismatch(root, stored=stored, wanted=signal, what="the signal")
    refuse_mismatch(root, stored=manifest.data, wanted=data, what="the data")
    return True


def _announce(
    say: Say, root: Path, samples: list[Sample], stored: KVSpec, codecs: Mapping[int, Codec], config: ExtractConfig
) -> None:
    tokens = sum(len(sample.input_ids) for sample in samples)
    size = estimate_bytes(stored, codecs, tokens)
    existing = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    say(
        f"{config.teacher}: {len(samples):,} samples, {tokens:,} tokens, {len(stored.layers)} layers "
        f"({format_layers(stored.layer_numbers)}), codec {format_codecs(codecs)}: about {size / 1e9:.3g} GB into {root} ({free / 1e9:.0f} GB free)"
    )
    if config.max_tokens and tokens > 0.99 * config.max_tokens:
        say(f"stops at --max-tokens {config.max_tokens:,}; ask for more with a larger number, or 0 for all of the data")


def _calibrate(executor: Executor, job: Job, groups: tuple[Group, ...], tasks: list[Task]) -> Calibration:
    """Mean and step of every channel from the first tasks in task order, at least 65,536 tokens or all."""
    if all(group.quantizer(kind) is None for group in groups for kind in KINDS):
        return {}
    chosen, tokens = [], 0
    for task in tasks:
        chosen.append(task)
        tokens += task.num_tokens
        if tokens >= CALIBRATION_TOKENS:
            break
    parts: dict[int, Moments] = {}
    with tqdm.tqdm(desc="calibrate", unit="tok", unit_scale=True, total=tokens) as bar:
        sizes = {task.shard: task.num_tokens for task in chosen}
        for shard, moments in executor.calibrate(job, chosen):
            parts[shard] = moments
            bar.update(sizes[shard])
    return fit_groups(groups, merge_moments(parts))


def _run(executor: Executor, job: Job, tasks: list[Task], max_bytes: int | None, say: Say) -> tuple[list[TaskResult], float]:
    """Run the tasks that are not committed, in waves none of which can pass the byte limit."""
    committed = committed_shards(job.root)
    todo = [task for task in tasks if task.shard not in committed]
    if committed:
        say(f"resuming {job.root}: {len(committed)} of {len(tasks)} shards are committed")
    stored_bytes = sum(open_store(job.root).samples.summary["stored_bytes"].to_pylist())
    worst = _worst_case_bytes(read_manifest(job.root).groups)
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
        say(
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


def _summary(root: Path, results: list[TaskResult], run_s: float, seconds: float) -> ExtractSummary:
    store = open_store(root)
    summary = store.samples.summary
    new_tokens = sum(result.num_tokens for result in results)
    return ExtractSummary(
        out=root,
        num_samples=len(store),
        num_tokens=sum(summary["num_tokens"].to_pylist()),
        stored_bytes=sum(summary["stored_bytes"].to_pylist()),
        new_shards=len(results),
        num_shards=store.manifest.layout.num_shards,
        seconds=seconds,
        tokens_per_s=new_tokens / run_s if new_tokens else 0.0,
    )
