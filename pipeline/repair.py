"""Repairing a store: what a verification found bad or missing is made again, and nothing else.

Tables are rebuilt from commits, leftovers of killed writers removed, damaged shards extracted again: from the tokens or texts the
store still holds where its commit record is whole, by planning the data again where that is lost. Knows no command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from kvstore import KVStoreError, Store, StoreFormatError
from kvstore.arrays import open_array, shard_key, unreachable
from kvstore.commits import Commit, SampleRow, commit_key, read_commit, sample_id
from kvstore.compaction import compact
from kvstore.create import restore_metadata
from kvstore.drop import read_dropped
from kvstore.lease import EVERYTHING, lease, sweep_held
from kvstore.manifest import GATE, SAMPLES, Manifest, read_manifest, refuse_mismatch
from kvstore.records import bytes_sha256
from kvstore.samples import is_part, is_summary
from kvstore.storage import Storage, locate
from kvstore.verify import Progress, Report, verify_store
from pipeline.align import Alignment
from pipeline.config import ExtractConfig
from pipeline.extract import batch_tokens_of, extract, make_executor
from pipeline.identity import recorded_settings, signal_record
from pipeline.models.load import load_tokenizer
from pipeline.models.resolve import resolve_model
from pipeline.tasks import Task, TaskSample
from pipeline.worker import Job

Say = Callable[[str], None]

_MENDABLE = {"shard", "commit", "tables", "gate", "unlisted"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RepairSummary:
    """What a repair did."""

    shards: tuple[int, ...]
    """Shards written again."""
    removed: tuple[str, ...]
    """Leftovers removed."""
    report: Report
    """Of the verification afterwards."""


def repair_store(
    location: str,
    *,
    deep: bool = False,
    settings: dict[str, Any] | None = None,
    progress: Progress = lambda *_: None,
    say: Say = lambda _: None,
) -> RepairSummary:
    """Verify, mend, and verify again.

    A store may come from anybody: of its recorded settings only those an extraction records are used, and what is read is said before.

    Args:
        settings: of the extraction to run instead of the recorded ones: `teacher`, `data`, `device`, `workers` and so on.

    Raises:
        KVStoreError: something is damaged that extracting again cannot mend, or the store was not extracted but merged.
        FingerprintMismatchError: the teacher or the data is not the store's.
        LeaseHeldError: somebody is writing into the store.
    """
    storage = locate(location)
    with contextlib.suppress(StoreFormatError):  # verification names what is wrong with it
        read_manifest(storage)  # a wrong path is refused before a lease lies there
    with lease(storage, *EVERYTHING, f"kvpipe repair {storage.location}") as held:
        with contextlib.suppress(StoreFormatError):
            for key in restore_metadata(held, read_manifest(held)):
                say(f"made again from the manifest: {key}")
        found = verify_store(storage.location, deep=deep, progress=progress)
        hopeless = [problem.message for problem in found.problems if problem.part not in _MENDABLE]
        if hopeless:
            raise KVStoreError(
                "this cannot be made again by extracting; restore it from a copy, or extract into a new folder:\n  "
                + "\n  ".join(hopeless)
            )
        for shard in found.bad_shards:  # what cannot be made again is said before anything is removed
            _recorded_config(read_manifest(held), held.location, shard, settings or {}, lambda _: None)
        removed = _remove_orphans(held, found)
        for key in found.unlisted:
            held.rename(key, f"{key}.unlisted")
            say(f"put aside, because the manifest does not list it: {key} is now {key}.unlisted")
        known, lost = _sort_bad_shards(held, found)
        if any(problem.part == "tables" for problem in found.problems) or found.bad_shards:
            _delete_tables(held)
        if any(problem.part == "gate" for problem in found.problems):
            held.delete(GATE)
        if known:
            say(f"extracting again: shard {', '.join(str(commit.shard) for commit in known)}")
            lost += _extract_again(held, known, settings or {}, say)
        for shard in lost:
            held.delete(commit_key(shard))
        compact(held)
    if lost:
        say(f"planning the data again for shard {', '.join(map(str, lost))}")
        for config in _configs_of(storage, lost, settings or {}, say):
            extract(config, resolve_model(config.teacher, config.revision), say)
    return RepairSummary(
        shards=tuple(sorted({commit.shard for commit in known} | set(lost))),
        removed=removed,
        report=verify_store(storage.location, deep=deep, progress=progress),
    )


def _remove_orphans(held: Storage, found: Report) -> tuple[str, ...]:
    """Nobody else writes: staging, which is not among the orphans while our own lease lives, goes too."""
    for key in found.orphans:
        held.delete(key)
    return tuple(sorted({*found.orphans, *sweep_held(held, everything=True)}))


def _sort_bad_shards(storage: Storage, found: Report) -> tuple[list[Commit], list[int]]:
    """Bad shards whose commit record still says what belongs there, and those where it does not."""
    misplaced = {problem.shard for problem in found.problems if problem.part == "commit"}
    known: list[Commit] = []
    lost: list[int] = []
    for shard in found.bad_shards:
        if shard in misplaced:
            lost.append(shard)
        else:
            known.append(read_commit(storage, shard))
    return known, lost


def _delete_tables(storage: Storage) -> None:
    for entry in [*storage.entries(SAMPLES)]:
        if is_part(entry.key) or is_summary(entry.key):
            storage.delete(entry.key)


def _extract_again(held: Storage, commits: Sequence[Commit], settings: dict[str, Any], say: Say) -> list[int]:
    """Compute shards from the samples their commits name; returns those whose tokens are lost."""
    store = Store(held, commits)
    config = _recorded_config(store.manifest, store.location, commits[0].shard, settings, say)
    resolved = resolve_model(config.teacher, config.revision)
    tokenizer = load_tokenizer(resolved.path)
    tasks, lost = _tasks_of(store, commits, tokenizer)
    if not tasks:
        return lost
    tasks = [dataclasses.replace(task, claim=held.claim) for task in tasks]
    executor = make_executor(config, resolved, held, say)
    try:
        manifest = store.manifest
        alignment = None if manifest.alignment is None else Alignment.from_json(manifest.alignment)
        codecs = {layer: manifest.codec_of(layer) for layer in manifest.spec.layer_numbers}
        wanted = signal_record(
            resolved,
            tokenizer,
            executor.describe(),
            manifest.spec,
            alignment,
            codecs,
            manifest.signal.get("template"),
            manifest.is_response_only,
        )
        stored = {name: value for name, value in manifest.signal.items() if name != "calibration"}
        refuse_mismatch(held.location, stored=stored, wanted=wanted, what="the signal")
        job = Job(
            store=held.location,
            layers=manifest.spec.layer_numbers,
            alignment=alignment.to_json() if alignment and alignment.baked else None,
            batch_tokens=batch_tokens_of(config, executor, manifest.spec.layer_numbers),
        )
        for _ in executor.run(job, tasks, replace=True):
            pass
    finally:
        executor.close()
    return lost


def _tasks_of(store: Store, commits: Iterable[Commit], tokenizer: Any) -> tuple[list[Task], list[int]]:
    """Tasks from commit records, and the shards whose tokens are lost; an interrupted drop is finished."""
    tasks: list[Task] = []
    lost: list[int] = []
    dropped = set(read_dropped(store.storage))
    for commit in commits:
        start = commit.shard * store.manifest.layout.shard_tokens
        found = [(row, _tokens_of(store, row, tokenizer)) for row in commit.samples if row.id not in dropped]
        beside = _beside_of(store, commit)
        if beside is None or any(tokens is None for _, tokens in found):
            lost.append(commit.shard)
            continue
        samples = tuple(
            TaskSample(
                row=row,
                offset=row.token_start - start,
                input_ids=tokens,
                beside={name: rows[row.token_start - start :][: row.num_tokens] for name, rows in beside.items()},
            )
            for row, tokens in found
            if tokens is not None
        )
        tasks.append(Task(shard=commit.shard, samples=samples))
    return tasks, lost


def _beside_of(store: Store, commit: Commit) -> dict[str, np.ndarray] | None:
    """What else the store has of each row of a shard, None where it is damaged: no id proves it, only the object's own hash."""
    found = {}
    stored = {entry.path: entry for entry in commit.objects}
    for name in store.manifest.token_arrays[1:]:
        key = shard_key(name, commit.shard)
        if key not in stored or store.storage.size(key) != stored[key].size_bytes:
            return None
        if bytes_sha256(store.storage.read(key)) != stored[key].sha256:
            return None
        shard_tokens = store.manifest.layout.shard_tokens
        rows = np.zeros(shard_tokens, dtype=np.uint8)
        array = open_array(store.storage, store.manifest, name)
        for row in commit.samples:
            start = row.token_start - commit.shard * shard_tokens
            rows[start : start + row.num_tokens] = array[row.token_start : row.token_start + row.num_tokens].read().result()
        found[name] = rows
    return found


def _tokens_of(store: Store, row: SampleRow, tokenizer: Any) -> np.ndarray | None:
    """A sample's token ids from the grid, or from its text; what its id does not prove is not used."""
    try:
        if store.storage.size(shard_key("input_ids", row.shard)) is None:  # a pipe would keep its reader waiting
            raise FileNotFoundError
        rows = open_array(store.storage, store.manifest, "input_ids")[row.token_start : row.token_start + row.num_tokens]
        tokens = np.asarray(rows.read().result(), dtype=np.int32)
        if sample_id(tokens) == row.id:
            return tokens
    except (ValueError, FileNotFoundError) as error:
        # Not being able to ask is no loss of data; a commit record would be given up for it.
        if isinstance(error, ValueError) and unreachable(error):
            raise OSError(f"{store.location}: {error}; see to the connection and try again") from error
    if row.text is not None:
        for special in (True, False):  # a chat template writes the special tokens itself
            encoded = tokenizer(row.text, add_special_tokens=special, verbose=False)
            tokens = np.array(encoded["input_ids"], dtype=np.int32)
            if sample_id(tokens) == row.id:
                return tokens
    return None


def _recorded_config(manifest: Manifest, location: str, shard: int, settings: dict[str, Any], say: Say) -> ExtractConfig:
    """The settings of the part a shard belongs to, with what the caller changes; what will be read is said.

    Raises:
        KVStoreError: the part was not extracted, or its settings hold what no extraction records.
    """
    parts = manifest.data_parts
    for run in reversed(manifest.runs):
        if run["first_part"] < len(parts) and parts[run["first_part"]]["first_shard"] <= shard:
            if "settings" not in run:
                raise KVStoreError(
                    f"shard {shard}: it was not extracted but made from other stores ({run}); verify and repair those, and make "
                    "this one again"
                )
            recorded = recorded_settings(run["settings"], location)
            config = ExtractConfig.model_validate({**recorded, "out": location, "accept_fidelity": True, **settings})
            named = {
                "teacher": config.teacher,
                "data": ", ".join(config.data),
                "student": config.student,
                "--calibration": config.calibration,
            }
            reads = "; ".join(f"{name} {value}" for name, value in named.items() if value)
            say(f"as {'these settings say' if settings else 'the store records'}, this reads {reads}")
            return config
    raise KVStoreError(f"shard {shard}: no run of the manifest made it ({location})")


def _configs_of(storage: Storage, shards: Iterable[int], settings: dict[str, Any], say: Say) -> list[ExtractConfig]:
    """The extractions that will fill these shards, one for each part concerned."""
    manifest, configs = read_manifest(storage), dict[str, ExtractConfig]()
    for shard in shards:
        config = _recorded_config(manifest, storage.location, shard, settings, lambda _: None)
        if config.model_dump_json() not in configs:
            configs[config.model_dump_json()] = _recorded_config(manifest, storage.location, shard, settings, say)
    return list(configs.values())
