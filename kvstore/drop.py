"""Taking samples out of a store for good: their shards are written again without them, everything else stays as it is.

Rows of the token axis keep their place, so the remaining codes are copied bit for bit. The commit record of a shard is replaced
last: interrupted in between, the shard reads as damaged, and the same drop again finishes it. Knows no teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable

import numpy as np

from kvstore.arrays import array_key, open_array, read_calibration
from kvstore.codec import KINDS
from kvstore.commits import Commit, committed_shards, read_commit
from kvstore.errors import KVStoreError
from kvstore.lease import EVERYTHING, lease
from kvstore.manifest import SAMPLES, Manifest, read_manifest, write_manifest
from kvstore.records import fingerprint, read_sealed, write_sealed
from kvstore.samples import compact, forget
from kvstore.storage import Storage, locate
from kvstore.writer import ShardWriter

_DROPPED = f"{SAMPLES}/dropped.json"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DropSummary:
    """What a drop did."""

    num_dropped: int
    num_shards: int
    """Shards written again."""


def read_dropped(storage: Storage) -> list[str]:
    """Ids of all samples ever dropped from a store; they are never stored again."""
    try:
        return list(read_sealed(storage, _DROPPED)["ids"])
    except FileNotFoundError:
        return []


def drop_samples(location: str, ids: Collection[str], progress: Callable[[int, int], object] = lambda *_: None) -> DropSummary:
    """Remove samples by id (or the beginning of one, at least eight digits).

    Args:
        progress: told how many of how many shards are done.

    Raises:
        KVStoreError: an id is unknown or stands for several samples; nothing was changed.
        LeaseHeldError: somebody is writing into the store.
    """
    storage = locate(location)
    with lease(storage, *EVERYTHING, f"kvpipe drop {location}"):
        manifest = read_manifest(storage)
        commits = [read_commit(storage, shard) for shard in sorted(committed_shards(storage))]
        before = read_dropped(storage)
        gone = set(_resolve(ids, commits, before, storage.location))
        touched = [commit for commit in commits if any(row.id in gone for row in commit.samples)]
        # What is dropped is written down first: a resumed extraction must not bring it back.
        dropped = sorted({*before, *gone})
        write_sealed(storage, _DROPPED, {"ids": dropped})
        write_manifest(storage, dataclasses.replace(manifest, data={**manifest.data, "dropped": fingerprint(dropped)}))
        forget(storage, [commit.shard for commit in touched])
        for number, commit in enumerate(touched):
            progress(number, len(touched))
            _rewrite(storage, manifest, commit, gone)
        compact(storage)
        progress(len(touched), len(touched))
    return DropSummary(num_dropped=len(gone - set(before)), num_shards=len(touched))


def _resolve(ids: Collection[str], commits: Iterable[Commit], dropped: Collection[str], where: str) -> list[str]:
    known = sorted({row.id for commit in commits for row in commit.samples} | set(dropped))
    found = []
    for wanted in ids:
        matches = [identity for identity in known if identity.startswith(wanted)] if len(wanted) >= 8 else []
        if len(matches) != 1:
            raise KVStoreError(
                f"--ids: {wanted!r} stands for {len(matches)} samples of {where}, expected one; give sample ids (sha256 in hex, or "
                "their first eight digits and more), one on a line. Nothing was changed"
            )
        found += matches
    return found


def _rewrite(storage: Storage, manifest: Manifest, commit: Commit, gone: Collection[str]) -> None:
    kept = [row for row in commit.samples if row.id not in gone]
    calibration = read_calibration(storage, manifest)
    writer = ShardWriter(storage, manifest, calibration, commit.shard, kept)
    start = commit.shard * manifest.layout.shard_tokens
    tokens = open_array(storage, manifest, "input_ids")
    for row in kept:
        rows = slice(row.token_start, row.token_start + row.num_tokens)
        writer.put_tokens(row.token_start - start, np.asarray(tokens[rows].read().result()))
        for group in manifest.groups:
            for kind in KINDS:
                codes = np.asarray(open_array(storage, manifest, array_key(group, group.array(kind)))[:, rows].read().result())
                for slot, layer in enumerate(group.layers):
                    span = [(row.token_start - start, row.num_tokens)]
                    writer.put_codes(layer, kind, span, codes[slot], commit.fidelity[str(layer)][kind])
    writer.commit(replace=True)
