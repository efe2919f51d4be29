"""The parts of a store's data: which one a run is for, a new one to append, and the tasks of either.

A part is what one extraction command planned: its samples in order of their ids, so that nothing depends on the order they came
in, on a run of shards of its own. Knows samples and manifests; neither teacher nor text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from kvstore import FingerprintMismatchError, Store
from kvstore.drop import dropped_shards
from kvstore.layout import Layout, plan_layout
from kvstore.manifest import Group, refuse_mismatch
from kvstore.records import plain
from kvstore.samples import write_repeats
from kvstore.writer import extend_store
from pipeline.data import Sample
from pipeline.plan import Task, data_record, plan_tasks


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of a store and what there is to do for it."""

    number: int
    first_shard: int
    tasks: tuple[Task, ...]

    @property
    def stop_shard(self) -> int:
        return self.first_shard + len(self.tasks)


def first_part(samples: Sequence[Sample], groups: Sequence[Group], seq_len: int) -> tuple[Part, Layout, dict[str, Any]]:
    """Plan the first part: the layout of the whole store, and the part's record in the manifest."""
    layout = plan_layout([len(sample.input_ids) for sample in samples], max(group.token_bytes for group in groups))
    part = Part(number=0, first_shard=0, tasks=tuple(plan_tasks(samples, layout)))
    return part, layout, {**data_record(samples, seq_len), "first_shard": 0, "num_shards": layout.num_shards}


def find_part(store: Store, samples: Sequence[Sample], seq_len: int) -> Part | None:
    """The part of a store that holds exactly this data, None where there is none."""
    wanted = plain(data_record(samples, seq_len))
    for number, record in enumerate(store.manifest.data["parts"]):
        if all(record.get(field) == value for field, value in wanted.items()):
            fresh = _unstored(store, samples, record["first_shard"])
            tasks = _tasks(store, fresh, record["first_shard"])
            if len(tasks) != record["num_shards"]:
                raise FingerprintMismatchError(
                    f"part {number}: this run plans {len(tasks)} shards, the manifest says {record['num_shards']} "
                    f"({store.location}); a shard before shard {record['first_shard']} is missing, 'kvpipe repair' mends that"
                )
            return Part(number=number, first_shard=record["first_shard"], tasks=tuple(tasks))
    return None


def refuse_other_data(store: Store, samples: Sequence[Sample], seq_len: int) -> None:
    """Say in which fields the data differs from the store's.

    Raises:
        FingerprintMismatchError: always; nothing was written.
    """
    wanted = plain(data_record(samples, seq_len))
    last = store.manifest.data["parts"][-1]
    refuse_mismatch(
        store.location,
        stored={field: last.get(field) for field in wanted},
        wanted=wanted,
        what="the data",
        hint="--append adds this data to the store as a new part.",
    )


def append_part(store: Store, samples: Sequence[Sample], seq_len: int, run: dict[str, Any]) -> Part:
    """Make room for data the store does not have; samples it has are counted once more and not stored again.

    Raises:
        ValueError: the store is not complete, or a sample is longer than its shards.
    """
    manifest = store.manifest
    planned, committed = manifest.layout.num_shards, len(store.samples.summary)
    if committed < planned:
        raise ValueError(
            f"--append: {store.location} has {committed} of {planned} shards; finish it first with the command that began it"
        )
    longest = max(len(sample.input_ids) for sample in samples)
    if longest > manifest.layout.shard_tokens:
        raise ValueError(
            f"--append: a sample has {longest} tokens, the shards of {store.location} hold {manifest.layout.shard_tokens}; use "
            f"--seq-len {manifest.layout.shard_tokens} or less"
        )
    number = len(manifest.data["parts"])
    fresh = _unstored(store, samples, planned)
    tasks = _tasks(store, fresh, planned)
    known = set(store.samples.ids)
    repeats = write_repeats(store.storage, number, {sample.id: sample.count for sample in samples if sample.id in known})
    record = {**data_record(samples, seq_len), "first_shard": planned, "num_shards": len(tasks), "repeats": repeats}
    extend_store(
        store.storage,
        dataclasses.replace(
            manifest,
            layout=dataclasses.replace(manifest.layout, num_shards=planned + len(tasks)),
            data={**manifest.data, "parts": [*manifest.data["parts"], plain(record)]},
            runs=[*manifest.runs, run],
        ),
    )
    return Part(number=number, first_shard=planned, tasks=tuple(tasks))


def _unstored(store: Store, samples: Sequence[Sample], first_shard: int) -> list[Sample]:
    """The samples that no earlier part has stored; those dropped from this part since are among them, for they have their rows."""
    if first_shard == 0:
        return list(samples)
    earlier = {
        identity for identity, shard in zip(store.samples.ids, store.samples.shard.tolist(), strict=True) if shard < first_shard
    }
    earlier |= {identity for identity, shard in dropped_shards(store.storage).items() if shard < first_shard}
    return [sample for sample in samples if sample.id not in earlier]


def _tasks(store: Store, samples: Sequence[Sample], first_shard: int) -> list[Task]:
    """Tasks of a part, without samples that were dropped from the store since."""
    dropped = dropped_shards(store.storage)
    return [
        dataclasses.replace(task, samples=tuple(sample for sample in task.samples if sample.row.id not in dropped))
        for task in plan_tasks(samples, store.manifest.layout, first_shard)
    ]
