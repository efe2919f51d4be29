"""Taking samples out of a store for good: their shards are written again without them, everything else stays as it is.

Rows of the token axis keep their place, so the remaining codes are copied bit for bit. The commit record of a shard is replaced
last: interrupted in between, the shard reads as damaged, and the same drop again, or any other, finishes it. Knows no teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field

from kvstore.arrays import read_calibration
from kvstore.calibration import Calibration
from kvstore.codec import KINDS
from kvstore.commits import Commit, committed_shards, read_commit
from kvstore.compaction import compact, forget
from kvstore.errors import CorruptShardError, KVStoreError
from kvstore.lease import EVERYTHING, LAYOUT, lease, sweep_held
from kvstore.manifest import SAMPLES, Manifest, read_manifest, write_manifest
from kvstore.reader import Store
from kvstore.records import INT32_MAX, STRICT, Count, Sha256, bytes_sha256, fingerprint, unseal, write_sealed
from kvstore.storage import Storage, locate
from kvstore.writer import ShardWriter

_DROPPED = f"{SAMPLES}/dropped.json"
BEFORE = -1
"""Stands for the shard of a sample that was dropped before this store was made, by merging or recoding."""
_SAMPLES_AT_ONCE = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DropSummary:
    """What a drop did."""

    num_dropped: int
    num_shards: int
    """Shards written again."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """Why a sample was left out."""

    __pydantic_config__ = STRICT

    source: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """The record of all samples taken out of a store (FORMAT.md 10.4)."""

    __pydantic_config__ = STRICT

    shards: dict[Sha256, Annotated[int, Field(ge=BEFORE, le=INT32_MAX)]]
    quarantined: dict[Sha256, Quarantined] = dataclasses.field(default_factory=dict)
    counts: dict[Sha256, Count] = dataclasses.field(default_factory=dict)
    """How often the part of the data that each was dropped from had it: with these the part's digest can still be compared."""


def _read(storage: Storage) -> Dropped:
    try:
        return unseal(storage, _DROPPED).parse(Dropped, "10.4")
    except FileNotFoundError:
        return Dropped(shards={})


def read_dropped(storage: Storage) -> list[str]:
    """Ids of all samples ever dropped from a store, sorted; they are never stored again."""
    return list(dropped_shards(storage))


def dropped_shards(storage: Storage) -> dict[str, int]:
    """For all samples ever dropped the shard they were in, or `BEFORE`: a part planned again must leave their rows free."""
    return dict(sorted(_read(storage).shards.items()))


def read_quarantined(storage: Storage) -> dict[str, dict[str, str]]:
    """By id, `source` and `reason` of the samples that were dropped because their teacher could not compute them."""
    return {identity: dataclasses.asdict(entry) for identity, entry in _read(storage).quarantined.items()}


def dropped_counts(storage: Storage) -> dict[str, int]:
    """How often the data had dropped samples, by id, as far as that was kept."""
    return dict(sorted(_read(storage).counts.items()))


def write_dropped(
    storage: Storage,
    shards: Mapping[str, int],
    quarantined: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    counts: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Keep the ids of dropped samples; the manifest has their `dropped_fingerprint`.

    Args:
        quarantined: what `read_quarantined` gives, of some of them.
        counts: what `dropped_counts` gives, of some of them.
    """
    body: dict[str, Any] = {"shards": dict(sorted(shards.items()))}
    if quarantined:
        body["quarantined"] = {identity: dict(entry) for identity, entry in sorted(quarantined.items())}
    if counts:
        body["counts"] = dict(sorted(counts.items()))
    write_sealed(storage, _DROPPED, body)


def dropped_fingerprint(ids: Iterable[str]) -> str | None:
    """What the manifest says under `data.dropped`; None where nothing is."""
    dropped = sorted(ids)
    return fingerprint(dropped) if dropped else None


def quarantine_samples(
    storage: Storage,
    shard: int,
    bad: Mapping[str, Mapping[str, str]],
    purpose: str,
    counts: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Drop samples of a shard that is not committed yet, so that it can be committed without them and they never come back.

    Args:
        bad: by id, `source` and `reason`; neither may hold the sample's text.
        counts: how often the part of the data has them, by id.
        purpose: of the caller, who holds the shard; waits for the right to change the manifest.
    """
    with lease(storage, LAYOUT, LAYOUT + 1, purpose, wait=lambda _: None) as held:
        dropped = {**dict.fromkeys(bad, shard), **dropped_shards(held)}
        write_dropped(held, dropped, {**read_quarantined(held), **bad}, {**counts, **dropped_counts(held)})
        name_dropped(held)


def name_dropped(storage: Storage) -> Manifest:
    """Make the manifest name all dropped samples, also those of somebody who was killed before; returns it.

    Whoever calls holds the right to change it.
    """
    manifest, digest = read_manifest(storage), dropped_fingerprint(dropped_shards(storage))
    if manifest.data.get("dropped") != digest:
        manifest = dataclasses.replace(manifest, data={**manifest.data, "dropped": digest})
        write_manifest(storage, manifest)
    return manifest


def drop_samples(location: str, ids: Collection[str], progress: Callable[[int, int], object] = lambda *_: None) -> DropSummary:
    """Remove samples by id (or the beginning of one, at least eight digits).

    Args:
        progress: told how many of how many shards are done.

    Raises:
        KVStoreError: an id is unknown or stands for several samples, or there is none; nothing was changed.
        CorruptShardError: a shard to be written again is damaged, and must not be made good; nothing was changed.
        LeaseHeldError: somebody is writing into the store.
    """
    storage = locate(location)
    if not ids:
        raise KVStoreError(f"--ids: got none, expected at least one sample id of {storage.location}; nothing was changed")
    read_manifest(storage)  # so that a wrong path is refused before a lease lies there
    with lease(storage, *EVERYTHING, f"kvpipe drop {location}") as held:
        manifest = read_manifest(held)
        commits = [read_commit(held, shard) for shard in sorted(committed_shards(held))]
        before = dropped_shards(held)
        gone = _resolve(ids, commits, before, held.location)
        dropped = {**gone, **before}
        touched = [commit for commit in commits if any(row.id in dropped for row in commit.samples)]
        interrupted = {commit.shard for commit in touched if any(row.id in before for row in commit.samples)}
        for commit in touched:
            if commit.shard not in interrupted:
                _refuse_damaged(held, commit)
        # What is dropped is written down first: a resumed extraction must not bring it back.
        if dropped != before:
            counts = {row.id: row.count for commit in commits for row in commit.samples if row.id in gone}
            write_dropped(held, dropped, read_quarantined(held), {**counts, **dropped_counts(held)})
        manifest = name_dropped(held)
        if touched:
            forget(held, [commit.shard for commit in touched])
            sweep_held(held)  # what killed writers left may hold the dropped texts
        calibration = read_calibration(held, manifest)
        for number, commit in enumerate(touched):
            progress(number, len(touched))
            _rewrite(held, manifest, calibration, commit, dropped, verify_objects=commit.shard not in interrupted)
        compact(held)
        progress(len(touched), len(touched))
    return DropSummary(num_dropped=len(gone.keys() - before.keys()), num_shards=len(touched))


def _resolve(ids: Collection[str], commits: Iterable[Commit], dropped: Mapping[str, int], where: str) -> dict[str, int]:
    """The ids meant, and their shards."""
    known = {**dropped, **{row.id: commit.shard for commit in commits for row in commit.samples}}
    found = {}
    for wanted in ids:
        whole = [wanted] if wanted in known else []
        matches = whole or [identity for identity in known if len(wanted) >= 8 and identity.startswith(wanted)]
        if len(matches) != 1:
            raise KVStoreError(
                f"--ids: {wanted!r} stands for {len(matches)} samples of {where}, expected one; give sample ids (sha256 in hex, or "
                "their first eight digits and more), one on a line. Nothing was changed"
            )
        found[matches[0]] = known[matches[0]]
    return found


def _refuse_damaged(storage: Storage, commit: Commit) -> None:
    for stored in commit.objects:
        size = storage.size(stored.path)
        whole = size == stored.size_bytes
        actual = bytes_sha256(storage.read(stored.path)) if whole else "nothing" if size is None else f"{size} bytes"
        if actual != stored.sha256:
            raise CorruptShardError(
                f"shard {commit.shard}: {stored.path} hashes to {actual}, its record says {stored.sha256} ({storage.location}); "
                "'kvpipe repair' makes it again, then drop. Nothing was changed"
            )


def _rewrite(
    storage: Storage,
    manifest: Manifest,
    calibration: Calibration,
    commit: Commit,
    gone: Mapping[str, int],
    *,
    verify_objects: bool,
) -> None:
    """Write a shard again without some samples. Of an interrupted drop some of its objects are new; what stays is in both."""
    store = Store(storage, [commit])
    kept = [row for row in commit.samples if row.id not in gone]
    writer = ShardWriter(storage, manifest, calibration, commit.shard, kept)
    start = commit.shard * manifest.layout.shard_tokens
    indices = {identity: index for index, identity in enumerate(store.samples.ids)}
    for first in range(0, len(kept), _SAMPLES_AT_ONCE):
        rows = kept[first : first + _SAMPLES_AT_ONCE]
        batch = store.read_codes([indices[row.id] for row in rows], verify_objects=verify_objects)
        spans = [(row.token_start - start, row.num_tokens) for row in rows]
        for (offset, num_tokens), position in zip(spans, batch.cu_seqlens.tolist(), strict=False):
            span = slice(position, position + num_tokens)
            writer.put_tokens(offset, batch.input_ids[span], {name: array[span] for name, array in batch.beside.items()})
        for group in manifest.groups:
            for kind in KINDS:
                for slot, layer in enumerate(group.layers):
                    writer.put_codes(layer, kind, spans, batch.codes[group.path, kind][slot], commit.fidelity[str(layer)][kind])
    writer.commit(replace=True)
