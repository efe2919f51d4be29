"""`kvpipe plan`: how large an extraction will be and how long it will take, without writing anything to its `out`.

Puts together what a trial with the real teacher measures, what is known of the data, and the room there is; where the teacher's
weights are not on this machine, what follows from its preset. Knows no command line.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import transformers

from kvstore.calibration import CALIBRATION_TOKENS
from kvstore.codec import CODECS, Codec, format_codecs, parse_codecs
from kvstore.commits import committed_shards, create_commit
from kvstore.layout import Layout, fill_shards
from kvstore.manifest import MANIFEST, plan_groups, read_manifest
from kvstore.samples import compact
from kvstore.spec import KVSpec, LayerSpec, RopeSpec, format_layers, parse_layers
from kvstore.storage import Folder, Storage, locate
from kvstore.writer import refuse_strangers
from pipeline.align import Alignment
from pipeline.budget import END_BYTES, most_bytes, store_bytes
from pipeline.config import ExtractConfig
from pipeline.data_size import DataSize, measure_data
from pipeline.enter import Run, Say
from pipeline.estimate import Estimate, Hours, Records, Room, Sizing, alternatives, tokens_that_fit
from pipeline.extract import make_executor, signal_of, stored_geometry
from pipeline.models.load import build_student, load_tokenizer
from pipeline.models.presets import Geometry, TeacherPreset, teacher_preset
from pipeline.models.probe import length_dependent_rope, probe_kv_spec
from pipeline.models.resolve import ModelLoadError, ResolvedModel, resolve_model
from pipeline.parts import token_arrays
from pipeline.plan import estimate_bytes, plan_tasks, task_range
from pipeline.preflight import existing_folder, refuse_device
from pipeline.samples import Sample
from pipeline.trial import Batching, Sizes, Speed, Trial, trial_place
from pipeline.windows import Consumed, Window

TRIAL_S = 20.0
"""How long speed is measured; what is computed for sizes takes about as long again."""
STUDENT_TOKENS_PER_S = 10_000
"""For which speed of a student the reading is stated."""
_GUESSED = Records(per_token=8.0, per_shard=20_000, own=12_000_000, own_files=30)
"""Where there is no tokenizer to try: four bytes of text a token, twice, once compressed; a tokenizer of 150,000 tokens."""
_UNREAD = Window(number=0, samples=[], consumed=Consumed(documents=0, sha256="", samples=0, tokens=0), last=False)
_IDS_BYTES = 2.0
"""Of a compressed token id."""


def plan_extraction(
    config: ExtractConfig, say: Say, *, trial_s: float = TRIAL_S, student_tokens_per_s: int = STUDENT_TOKENS_PER_S
) -> Estimate:
    """Say what `extract` with these settings will take.

    Raises:
        ValueError: whatever `extract` would refuse for its settings, data or teacher.
        StoreFormatError: there is something at `out` that is no store.
    """
    assert config.out is not None
    storage = locate(config.out)
    if storage.size(MANIFEST) is None:
        refuse_strangers(storage)
    try:
        resolved = resolve_model(config.teacher, config.revision, download=False)
    except ModelLoadError as error:
        preset = teacher_preset(config.teacher)
        if preset is None:
            raise
        return _from_preset(config, storage, preset, str(error), student_tokens_per_s)
    return _from_trial(config, storage, resolved, say, trial_s, student_tokens_per_s)


def _from_trial(
    config: ExtractConfig, storage: Storage, resolved: ResolvedModel, say: Say, trial_s: float, student_tokens_per_s: int
) -> Estimate:
    refuse_device(config)
    model_config = transformers.AutoConfig.from_pretrained(resolved.path, trust_remote_code=False)
    max_positions = int(model_config.get_text_config().max_position_embeddings)
    tokenizer = load_tokenizer(resolved.path)
    data = measure_data(config, tokenizer, min(config.seq_len, max_positions))
    run = Run(
        config=config,
        resolved=resolved,
        storage=storage,
        tokenizer=tokenizer,
        first=data.window,
        seq_len=config.seq_len,
        say=say,
    )
    with trial_place(config) as place:
        started = time.perf_counter()
        executor = make_executor(config, resolved, locate(place), say)
        try:
            signal = signal_of(run, executor)
            batching = Batching(
                batch_tokens=signal.job.batch_tokens,
                max_positions=max_positions,
                alone=length_dependent_rope(model_config) is not None,
            )
            start_up_s = time.perf_counter() - started
            lengths = [len(sample.input_ids) for sample in data.window.samples]
            sizing = Sizing(
                stored=signal.stored, lengths=lengths, num_tokens=data.num_tokens, window_tokens=config.window_tokens
            )
            layout = sizing.layout(signal.codecs)
            shards = [[data.window.samples[index] for index, _ in placed] for placed in fill_shards(lengths, layout)]
            say(f"{config.teacher}: trying the teacher and every codec on {trial_s:.0f} s worth of its tasks")
            sizes, speed = Trial(run, signal, executor, batching, shards, layout, place).measure(trial_s)
        finally:
            executor.close()
    padded = sum(map(batching.padded_tokens, shards))
    tokens_per_s = speed.padded_per_s * data.known_tokens / padded
    hours = None if data.num_tokens is None else _hours(config, storage, data, start_up_s, tokens_per_s, layout, speed)
    calibrated = 0 if config.calibration or not speed.gate_s_per_token else CALIBRATION_TOKENS
    sizing = dataclasses.replace(
        sizing,
        other_bytes_per_token=sizes.other_bytes_per_token,
        other_arrays=sizes.other_arrays,
        records=_records(data.window.samples, layout, sizes),
        seconds=max(hours.steady - calibrated / tokens_per_s, 0.0) if hours else 0.0,
    )
    return _estimate(
        config,
        storage,
        sizing,
        {name: (rung.codecs, rung.bytes_per_token) for name, rung in sizes.rungs.items()},
        alignment=signal.alignment,
        teacher=signal.info.spec,
        tokens_per_s=tokens_per_s,
        hours=hours,
        data=data,
        note=None,
        student_tokens_per_s=student_tokens_per_s,
    )


def _hours(
    config: ExtractConfig,
    storage: Storage,
    data: DataSize,
    start_up_s: float,
    tokens_per_s: float,
    layout: Layout,
    speed: Speed,
) -> Hours:
    """Seconds of every part of the run."""
    assert data.num_tokens is not None
    first = min(data.num_tokens, config.window_tokens)
    tokenise, later = (data.seconds_per_token * tokens for tokens in (first, data.num_tokens - first))
    steady = max(_share_left(config, storage, layout) * data.num_tokens / tokens_per_s, later)
    gate = 2 * speed.gate_s_per_token * min(config.gate_tokens, data.num_tokens)
    return Hours(
        start_up=start_up_s,
        tokenise=tokenise,
        gate=gate,
        steady=steady,
        total=start_up_s + tokenise + gate + steady,
        measured_tokens=speed.tokens,
        measured_s=speed.seconds,
    )


def _share_left(config: ExtractConfig, storage: Storage, layout: Layout) -> float:
    """The share of the work that is this run's and not done yet.

    Args:
        layout: of all of the data.
    """
    if config.task_range is not None:
        return len(task_range(config.task_range, layout.num_shards)) / layout.num_shards
    if config.append or storage.size(MANIFEST) is None:
        return 1.0
    manifest = read_manifest(storage)
    planned = layout.num_shards if manifest.is_growing else manifest.layout.num_shards
    return max(1 - len(committed_shards(storage)) / planned, 0.0)


def _records(samples: Sequence[Sample], layout: Layout, sizes: Sizes) -> Records:
    """Sizes of what lies beside the arrays: the commit records and tables of all samples that are known, made and measured."""
    tasks = plan_tasks(samples, layout)
    known = sum(task.num_tokens for task in tasks)
    with tempfile.TemporaryDirectory() as folder:
        storage = locate(folder)
        create_commit(storage, dataclasses.replace(sizes.commit, shard=len(tasks), samples=()))
        per_shard = store_bytes(storage)
        for task in tasks:
            rows = tuple(sample.row for sample in task.samples)
            create_commit(storage, dataclasses.replace(sizes.commit, shard=task.shard, samples=rows))
        compact(storage)
        total = store_bytes(storage)
    return Records(
        per_token=(total - (len(tasks) + 1) * per_shard) / known,
        per_shard=per_shard,
        own=sizes.own_bytes,
        own_files=sizes.own_files,
    )


def _from_preset(
    config: ExtractConfig, storage: Storage, preset: TeacherPreset, why: str, student_tokens_per_s: int
) -> Estimate:
    """Sizes without a teacher: its published geometry, and the bits per value of Gaussian channels."""
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    teacher = _published(preset.geometry, dtype)
    alignment, stored = None, teacher.select(parse_layers(config.layers or "all", teacher.layer_numbers))
    if config.student is not None:
        student = teacher_preset(config.student)
        spec = (
            _published(student.geometry, dtype)
            if student is not None
            else probe_kv_spec(build_student(config.student, vocab_size=preset.geometry.vocab_size, seed=0)[0])
        )
        alignment, stored = stored_geometry(config, teacher, spec)
    tokens = config.max_tokens or None
    seq_len = min(config.seq_len, preset.geometry.max_position_embeddings)
    sizing = Sizing(
        stored=stored,
        lengths=[seq_len] * max(min(tokens or 0, config.window_tokens) // seq_len, 1),
        num_tokens=tokens,
        window_tokens=config.window_tokens,
        other_bytes_per_token=_IDS_BYTES,
        other_arrays=1,
        records=_GUESSED,
    )
    rungs = {}
    chosen = parse_codecs(config.codec, stored.layer_numbers)
    for name in dict.fromkeys([format_codecs(chosen), *CODECS]):
        codecs = parse_codecs(name, stored.layer_numbers)
        rungs[name] = codecs, estimate_bytes(stored, codecs, 10**6) / 10**6
    return _estimate(
        config,
        storage,
        sizing,
        rungs,
        alignment=alignment,
        teacher=teacher,
        tokens_per_s=None,
        hours=None,
        data=DataSize(
            window=_UNREAD,
            num_tokens=tokens,
            is_exact=False,
            relative_error=None,
            how="--max-tokens, if the data has as much" if tokens else "no --max-tokens, and no tokenizer here to count with",
            seconds_per_token=0.0,
        ),
        note=f"{why}. Sizes are those of Gaussian channels{'' if config.dtype != 'auto' else ' captured as bfloat16'}; nothing was "
        "tried, so there is no time",
        student_tokens_per_s=student_tokens_per_s,
    )


def _published(geometry: Geometry, dtype: Any) -> KVSpec:
    """The keys and values of a model as published."""
    ropes: tuple[RopeSpec, ...] = ()
    if geometry.rope_theta is not None:
        pairs = geometry.head_dim // 2
        ropes = (RopeSpec(kind="half", inv_freq=tuple(geometry.rope_theta ** (-pair / pairs) for pair in range(pairs))),)
    return KVSpec(
        layers=tuple(
            LayerSpec(
                layer=layer,
                num_kv_heads=geometry.num_kv_heads,
                key_dim=geometry.head_dim,
                value_dim=geometry.head_dim,
                rope=0 if ropes else None,
            )
            for layer in range(geometry.num_layers)
        ),
        ropes=ropes,
        dtype=dtype,
    )


def _estimate(
    config: ExtractConfig,
    storage: Storage,
    sizing: Sizing,
    sizes: Mapping[str, tuple[Mapping[int, Codec], float]],
    *,
    alignment: Alignment | None,
    teacher: KVSpec,
    tokens_per_s: float | None,
    hours: Hours | None,
    data: DataSize,
    note: str | None,
    student_tokens_per_s: int,
) -> Estimate:
    """Put the sizes of every codec beside the room there is.

    Args:
        sizes: codecs by layer, and bytes per token of keys and values; the codec asked for first.
    """
    stored, records, tokens = sizing.stored, sizing.records, data.num_tokens
    rungs = []
    for name, (codecs, kv_bytes_per_token) in sizes.items():
        rungs.append(sizing.rung(name, codecs, kv_bytes_per_token))
    chosen, codecs = rungs[0], next(iter(sizes.values()))[0]
    groups, layout = plan_groups(stored, codecs), sizing.layout(codecs)
    shard_bytes = layout.shard_tokens * (chosen.bytes_per_token + records.per_token) + records.per_shard
    rows_bytes = round(layout.shard_tokens * records.per_token)
    most = most_bytes(groups, layout, layout.shard_tokens // layout.chunk_tokens, rows_bytes, token_arrays(data.window))
    room = Room(
        free_bytes=shutil.disk_usage(existing_folder(storage.root)).free if isinstance(storage, Folder) else None,
        stored_bytes=store_bytes(storage),
        max_bytes=config.max_bytes,
        slack_bytes=max(round(most - shard_bytes), 0) + END_BYTES,
    )
    fits = room.fits(chosen)
    layers = [student for student, _ in alignment.layer_map] if alignment else list(stored.layer_numbers)
    files = None
    if chosen.shards is not None:
        arrays = 2 * len(groups) + sizing.other_arrays
        files = chosen.shards * (arrays + 1) + records.own_files + 5  # gate.json, a part and its summary, a log and its plot
    return Estimate(
        teacher=config.teacher,
        out=storage.location,
        codec=chosen.codec,
        measured=tokens_per_s is not None,
        note=note,
        geometry=_geometry(stored, teacher, alignment),
        num_tokens=tokens,
        is_exact=data.is_exact,
        relative_error=data.relative_error,
        how=data.how,
        chunk_tokens=layout.chunk_tokens,
        shard_tokens=layout.shard_tokens,
        files=files,
        rungs=tuple(rungs),
        tokens_per_s=tokens_per_s,
        hours=hours,
        student_tokens_per_s=student_tokens_per_s,
        read_bytes_per_s=student_tokens_per_s * chosen.bytes_per_token,
        room=room,
        tokens_that_fit=None
        if room.bytes is None
        else tokens_that_fit(chosen, records, room.bytes, tokens, layout.shard_tokens),
        fits=fits,
        alternatives=alternatives(rungs, layers, records, tokens, room.bytes, layout.shard_tokens)
        if fits is False and tokens is not None and room.bytes is not None
        else (),
    )


def _geometry(stored: KVSpec, teacher: KVSpec, alignment: Alignment | None) -> dict[str, Any]:
    """What will be stored, for people and scripts."""
    shapes: dict[tuple[int, int, int, str], list[int]] = {}
    for layer in stored.layers:
        rope = stored.rope_of(layer.layer)
        turned = "none" if rope is None else f"{rope.kind}, {rope.rotary_dim} of {layer.key_dim} channels"
        shapes.setdefault((*layer.geometry, turned), []).append(layer.layer)
    return {
        "teacher_layers": len(teacher.layers),
        "layers": format_layers(stored.layer_numbers),
        "kinds": [
            {"layers": format_layers(layers), "num_kv_heads": heads, "key_dim": key_dim, "value_dim": value_dim, "rope": turned}
            for (heads, key_dim, value_dim, turned), layers in shapes.items()
        ],
        "values_per_token": stored.values_per_token,
        "key_domain": stored.key_domain,
        "dtype": stored.dtype,
        "baked": bool(alignment and alignment.baked),
        "layer_map": None if alignment is None else [list(pair) for pair in alignment.layer_map],
    }
