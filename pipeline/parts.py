"""The parts of a store's data: which of them this run's windows are, new ones to add, and the tasks of either.

A part is one window of samples, in order of their ids so that nothing depends on the order they came in, on a run of shards of its
own. A run of `kvpipe extract` makes one part, or many from data larger than a window. Knows samples and manifests; neither teacher nor
text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvstore import FingerprintMismatchError, Store
from kvstore.create import extend_store
from kvstore.drop import dropped_shards
from kvstore.groups import Group
from kvstore.layout import Layout, plan_layout
from kvstore.manifest import Manifest, read_manifest, refuse_mismatch
from kvstore.metadata import TOKEN_ARRAYS
from kvstore.records import plain
from kvstore.repeats import read_part_repeats, write_repeats
from kvstore.storage import Storage
from pipeline.data.samples import Sample
from pipeline.data.windows import Consumed, IdSet, Window
from pipeline.tasks import Task, data_record, plan_tasks


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of a store and what there is to do for it."""

    number: int
    first_shard: int
    tasks: list[Task]
    """Those still held here: who hands them out takes them."""
    num_new: int
    """Samples that no earlier part has."""
    is_new: bool
    """Whether this run has just added it, so that nothing of it can be committed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A window as the store has it."""

    part: int
    shards: range
    num_tokens: int
    consumed: Consumed


def first_part(window: Window, groups: Sequence[Group], seq_len: int) -> tuple[Part, Layout, dict[str, Any]]:
    """Plan the first part: the layout of the whole store, and the part's record in the manifest.

    Args:
        seq_len: longest sample that later windows may have.
    """
    lengths = [len(sample.input_ids) for sample in window.samples]
    layout = plan_layout(lengths, groups[0].row_bytes, None if window.last else seq_len)
    tasks = plan_tasks(window.samples, layout)
    part = Part(number=0, first_shard=0, tasks=tasks, num_new=len(window.samples), is_new=True)
    return part, layout, {**data_record(window.samples, seq_len), "first_shard": 0, "num_shards": layout.num_shards}


def run_of(settings: Mapping[str, Any], first: int, window: Window) -> dict[str, Any]:
    """The record of a run in the manifest, when its first window is entered."""
    run = {"first_part": first, "complete": window.last, "settings": dict(settings)}
    return {**run, "windows": [dataclasses.asdict(window.consumed)]}


def token_arrays(window: Window) -> tuple[str, ...]:
    """The arrays of one number a token that a store of this data has, in their fixed order."""
    known = {name for sample in window.samples for name in sample.beside}
    return ("input_ids", *(name for name in TOKEN_ARRAYS if name in known))


class RunParts:
    """The parts of one run, entered window by window; whoever calls holds the right to change the manifest.

    Several processes may enter the same windows; the first adds a part, the others find it.
    """

    def __init__(self, storage: Storage, settings: Mapping[str, Any], seq_len: int, *, append: bool) -> None:
        self._storage, self._settings, self._seq_len, self._append = storage, settings, seq_len, append
        self._run: int | None = None
        self._known = IdSet()

    def begin(self, window: Window, held: Storage) -> Part:
        """Enter the first window: find the run it begins, or begin a new one.

        Args:
            held: the store, under a lease on its manifest.

        Raises:
            FingerprintMismatchError: the store is for other data; every differing field is named.
            ValueError: the store is not complete, or a sample is longer than its shards.
        """
        store = Store(self._storage)
        runs, parts = store.manifest.runs, store.manifest.data_parts
        wanted = plain(data_record(window.samples, self._seq_len))
        self._run = next((number for number, run in enumerate(runs) if _is_part(parts[run["first_part"]], wanted)), None)
        if self._run is None and not self._append:
            _refuse_other_data(store, parts[runs[-1]["first_part"]] if runs else {}, wanted)
        if self._run is None:
            _refuse_unfinished(store)
        first = (
            parts[runs[self._run]["first_part"]]["first_shard"] if self._run is not None else store.manifest.layout.num_shards
        )
        self._know_earlier(store, first)
        if self._run is not None:
            return self._found(store.manifest, runs[self._run]["first_part"], window)
        self._run = len(runs)
        return self._add(store.manifest, window, [*runs, run_of(self._settings, len(parts), window)], held)

    def recorded(self, number: int) -> Recorded | None:
        """A window of this run as the store has it, if it has one after it too."""
        assert self._run is not None
        manifest = read_manifest(self._storage)
        run = manifest.runs[self._run]
        windows = run.get("windows", ())
        if number + 1 >= len(windows):
            return None
        part = manifest.data_parts[run["first_part"] + number]
        return Recorded(
            part=run["first_part"] + number,
            shards=range(part["first_shard"], part["first_shard"] + part["num_shards"]),
            num_tokens=part["num_tokens"],
            consumed=Consumed(**windows[number]),
        )

    def enter(self, window: Window, held: Storage) -> Part:
        """Enter a later window: find its part, or add it; arguments as of `begin`.

        Raises:
            FingerprintMismatchError: the store's run goes on with other data than this one.
            ValueError: a sample is longer than the store's shards.
        """
        assert self._run is not None
        manifest = read_manifest(self._storage)
        run = manifest.runs[self._run]
        number = run["first_part"] + window.number
        if number < _stop_part(manifest, self._run):
            return self._found(manifest, number, window)
        if run["complete"]:
            raise FingerprintMismatchError(
                f"the data of this run goes on after {window.consumed.samples - len(window.samples):,} samples, where the store at "
                f"{self._storage.location} ends; it has grown, or the limits are others. Nothing was written. Give the new data alone "
                "with --append, or choose another --out"
            )
        runs = [*manifest.runs]
        windows = [*run.get("windows", ()), dataclasses.asdict(window.consumed)]
        runs[self._run] = {**run, "complete": window.last, "windows": windows}
        return self._add(manifest, window, runs, held)

    def ids_of(self, store: Store, number: int) -> list[str]:
        """Ids of all samples of a part whose shards are all committed: stored by it, known before, or dropped since."""
        part = store.manifest.data_parts[number]
        shards = range(part["first_shard"], part["first_shard"] + part["num_shards"])
        rows = zip(store.samples.ids, store.samples.shard.tolist(), strict=True)
        ids = [identity for identity, shard in rows if shard in shards]
        ids += [identity for identity, shard in dropped_shards(self._storage).items() if shard in shards]
        return [*ids, *read_part_repeats(self._storage, store.manifest, number)]

    def know(self, ids: Iterable[str]) -> None:
        """Samples that are stored: they are not stored again."""
        self._known.update(ids)

    def _know_earlier(self, store: Store, first_shard: int) -> None:
        """Samples that earlier parts have stored, or had before they were dropped."""
        if first_shard:
            rows = zip(store.samples.ids, store.samples.shard.tolist(), strict=True)
            self._known.update(identity for identity, shard in rows if shard < first_shard)
        dropped = dropped_shards(self._storage)
        self._known.update(identity for identity, shard in dropped.items() if shard < first_shard)

    def _found(self, manifest: Manifest, number: int, window: Window) -> Part:
        """The part the store has for a window, if it is the same."""
        assert self._run is not None
        record = manifest.data_parts[number]
        last = manifest.runs[self._run]["complete"] and number + 1 == _stop_part(manifest, self._run)
        refuse_mismatch(
            self._storage.location,
            stored={**{field: record.get(field) for field in _FIELDS}, "complete": last},
            wanted={**plain(data_record(window.samples, self._seq_len)), "complete": window.last},
            what=f"part {number} of the data",
            remedy="It has changed since, or its limits have. Run with the store's own settings to resume it, or choose another --out.",
        )
        fresh, tasks = self._plan(manifest, window, record["first_shard"])
        if len(tasks) != record["num_shards"]:
            raise FingerprintMismatchError(
                f"part {number}: this run plans {len(tasks)} shards, the manifest says {record['num_shards']} "
                f"({self._storage.location}); a shard before shard {record['first_shard']} is missing, 'kvpipe repair' mends that"
            )
        return Part(number=number, first_shard=record["first_shard"], tasks=tasks, num_new=len(fresh), is_new=False)

    def _add(self, manifest: Manifest, window: Window, runs: list[dict[str, Any]], held: Storage) -> Part:
        """Make room for samples the store does not have; those it has are counted once more and not stored again."""
        planned, number = manifest.layout.num_shards, len(manifest.data_parts)
        longest = max((len(sample.input_ids) for sample in window.samples), default=0)
        if longest > manifest.layout.shard_tokens:
            raise ValueError(
                f"--append: a sample has {longest} tokens, the shards of {self._storage.location} hold "
                f"{manifest.layout.shard_tokens}; use --seq-len {manifest.layout.shard_tokens} or less"
            )
        counts = {sample.id: sample.count for sample in window.samples if sample.id in self._known}
        fresh, tasks = self._plan(manifest, window, planned)
        record = {**data_record(window.samples, self._seq_len), "first_shard": planned, "num_shards": len(tasks)}
        if counts:
            record["repeats"] = write_repeats(held, number, counts)
        extend_store(
            held,
            dataclasses.replace(
                manifest,
                layout=dataclasses.replace(manifest.layout, num_shards=planned + len(tasks)),
                data={**manifest.data, "parts": [*manifest.data_parts, plain(record)]},
                runs=[plain(run) for run in runs],
            ),
        )
        return Part(number=number, first_shard=planned, tasks=tasks, num_new=len(fresh), is_new=True)

    def _plan(self, manifest: Manifest, window: Window, first_shard: int) -> tuple[list[Sample], list[Task]]:
        """What a window adds, and its tasks without samples that were dropped since: their rows stay free."""
        if missing := [name for name in token_arrays(window) if name not in manifest.token_arrays]:
            raise ValueError(
                f"--data: got conversations or overlapping samples, which need the arrays {', '.join(missing)}; the store at "
                f"{self._storage.location} was made from data without them and has {', '.join(manifest.token_arrays)}. Put such documents "
                "first, or extract them into a store of their own"
            )
        fresh = [sample for sample in window.samples if sample.id not in self._known]
        self._known.update(sample.id for sample in fresh)
        dropped = dropped_shards(self._storage)
        tasks = plan_tasks(fresh, manifest.layout, first_shard)
        left = (tuple(sample for sample in task.samples if sample.row.id not in dropped) for task in tasks)
        return fresh, [dataclasses.replace(task, samples=samples) for task, samples in zip(tasks, left, strict=True)]


_FIELDS = ("samples", "num_samples", "num_tokens", "seq_len")


def _is_part(record: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(record.get(field) == wanted[field] for field in _FIELDS)


def _stop_part(manifest: Manifest, run: int) -> int:
    """The number after a run's last part."""
    if run + 1 < len(manifest.runs):
        return int(manifest.runs[run + 1]["first_part"])
    return len(manifest.data_parts)


def _refuse_other_data(store: Store, record: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    refuse_mismatch(
        store.location,
        stored={field: record.get(field) for field in wanted},
        wanted=wanted,
        what="the data",
        hint="--append adds this data to the store as a new part.",
    )


def _refuse_unfinished(store: Store) -> None:
    planned, committed = store.manifest.layout.num_shards, len(store.samples.summary)
    if committed < planned or store.manifest.is_growing:
        growing = ", and not all of its data is planned" if store.manifest.is_growing else ""
        raise ValueError(
            f"--append: {store.location} has {committed} of {planned} shards{growing}; finish it first with the command that began it"
        )
