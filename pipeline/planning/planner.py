"""`kvpipe plan`: how large an extraction will be and how long it will take, without writing anything to its `out`.

Puts together what a trial with the real teacher measures, what is known of the data, and the room there is; where the teacher's
weights are not on this machine, what follows from its preset. Knows no command line.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence

from kvstore.calibration import CALIBRATION_TOKENS
from kvstore.commits import committed_shards, create_commit
from kvstore.compaction import compact, loose_table_bytes
from kvstore.create import refuse_strangers
from kvstore.layout import Layout, fill_shards
from kvstore.manifest import MANIFEST, read_manifest
from kvstore.storage import Storage, locate
from kvstore.temporary import temporary_folder
from pipeline.budget import store_bytes
from pipeline.config import ExtractConfig
from pipeline.data.samples import Sample
from pipeline.enter import Run, Say
from pipeline.extract import make_executor, refuse_nothing_to_learn, signal_of
from pipeline.models.load import load_config, load_tokenizer
from pipeline.models.presets import teacher_preset
from pipeline.models.probe import length_dependent_rope
from pipeline.models.resolve import ModelLoadError, ResolvedModel, resolve_model
from pipeline.planning.assembly import Found, assemble
from pipeline.planning.data_size import DataSize, measure_data
from pipeline.planning.draw import Batching
from pipeline.planning.estimate import Estimate, Hours, Records, Sizing
from pipeline.planning.published import find_published
from pipeline.planning.trial import Sizes, Speed, Trial, trial_place
from pipeline.preflight import refuse_device
from pipeline.tasks import plan_tasks, task_range

TRIAL_S = 20.0
"""How long speed is measured; what is computed for sizes takes about as long again."""
STUDENT_TOKENS_PER_S = 10_000
"""For which speed of a student the reading is stated."""


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
        found = find_published(config, preset, str(error))
    else:
        found = _try(config, storage, resolved, say, trial_s)
    return assemble(config, storage, found, student_tokens_per_s)


def _try(config: ExtractConfig, storage: Storage, resolved: ResolvedModel, say: Say, trial_s: float) -> Found:
    """Run a few tasks with the real teacher on the real data."""
    refuse_device(config)
    model_config = load_config(resolved.path)
    limits = model_config.get_text_config()
    max_positions = int(limits.max_position_embeddings)
    tokenizer = load_tokenizer(resolved.path)
    data = measure_data(config, tokenizer, min(config.seq_len, max_positions), limits.vocab_size)
    run = Run(
        config=config,
        resolved=resolved,
        storage=storage,
        tokenizer=tokenizer,
        first=data.window,
        seq_len=config.seq_len,
        say=say,
    )
    refuse_nothing_to_learn(run)
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
            sizes, speed = Trial(run, signal, executor, batching, shards, sizing.layout, place).measure(trial_s)
        finally:
            executor.close()
    tokens_per_s = speed.padded_per_s * data.known_tokens / sum(map(batching.padded_tokens, shards))
    hours = None if data.num_tokens is None else _hours(config, storage, data, start_up_s, tokens_per_s, layout, speed)
    return Found(
        data=data,
        teacher=signal.info.spec,
        alignment=signal.alignment,
        sizing=_measured(config, data, sizing, layout, sizes, hours, tokens_per_s),
        rungs={name: (rung.codecs, rung.bytes_per_token) for name, rung in sizes.rungs.items()},
        bytes_relative_error=_relative_error(sizes, data),
        sized_tokens=sizes.tokens,
        layer_shares=sizes.layer_shares,
        tokens_per_s=tokens_per_s,
        hours=hours,
    )


def _relative_error(sizes: Sizes, data: DataSize) -> float | None:
    """That of the bytes per token of all of the data, of which none is left where all was tried."""
    if sizes.relative_error is None or data.num_tokens is None:
        return sizes.relative_error
    return sizes.relative_error * math.sqrt(max(1.0 - sizes.tokens / data.num_tokens, 0.0))


def _measured(
    config: ExtractConfig,
    data: DataSize,
    sizing: Sizing,
    layout: Layout,
    sizes: Sizes,
    hours: Hours | None,
    tokens_per_s: float,
) -> Sizing:
    """The sizing with what the trial measured beside keys and values."""
    calibrated = 0 if config.calibration or not hours or not hours.gate else CALIBRATION_TOKENS
    return dataclasses.replace(
        sizing,
        other_bytes_per_token=sizes.other_bytes_per_token,
        other_arrays=sizes.other_arrays,
        records=_records(data.window.samples, layout, sizes),
        seconds=max(hours.steady - calibrated / tokens_per_s, 0.0) if hours else 0.0,
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
    with temporary_folder("plan") as folder:
        storage = locate(folder)
        create_commit(storage, dataclasses.replace(sizes.commit, shard=len(tasks), samples=()))
        per_shard = store_bytes(storage)
        for task in tasks:
            rows = tuple(sample.row for sample in task.samples)
            create_commit(storage, dataclasses.replace(sizes.commit, shard=task.shard, samples=rows))
        committed, room = store_bytes(storage), loose_table_bytes(storage)
        compact(storage)
        total = store_bytes(storage)
    return Records(
        per_token=(total - (len(tasks) + 1) * per_shard) / known,
        per_shard=per_shard,
        spare_per_token=(room - (total - committed)) / known,
        own=sizes.own_bytes,
        own_files=sizes.own_files,
    )
