"""Commit records: what makes a shard visible, with its samples, its objects and its measured fidelity (FORMAT.md 5)."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any

import google_crc32c
import numpy as np
from jaxtyping import Integer
from pydantic import Field, StringConstraints, with_config
from typing_extensions import TypedDict

from kvstore.arrays import shard_key
from kvstore.codec import Kind
from kvstore.errors import ShardNotCommittedError, StoreFormatError
from kvstore.manifest import COMMITS, Manifest
from kvstore.metadata import array_keys
from kvstore.records import INT64_MAX, STRICT, Count, Natural, Sha256, Size, StoreKey, create_sealed, unseal, write_sealed
from kvstore.storage import Storage

_NAME = re.compile(r"(?P<shard>[0-9]{5,10})\.json")
Measure = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def sample_id(input_ids: Integer[np.ndarray, "token"]) -> str:
    """sha256 of the token ids as little-endian int32: equal tokens are the same sample."""
    return hashlib.sha256(input_ids.astype("<i4").tobytes()).hexdigest()


def token_crc32c(input_ids: Integer[np.ndarray, "token"]) -> int:
    """crc32c of the token ids as little-endian int32."""
    return int(google_crc32c.value(input_ids.astype("<i4").tobytes()))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One stored sample."""

    __pydantic_config__ = STRICT

    id: Sha256
    """sha256 of its token ids as little-endian int32, in hex."""
    source: str
    """Document it was cut from, as the reader of the data named it."""
    shard: Natural
    token_start: Size
    """First row on the token axis."""
    num_tokens: Count
    crc32c: Annotated[int, Field(ge=0, lt=2**32)]
    """crc32c of its token ids as little-endian int32: tells a swapped shard."""
    count: Count
    """How often the data had it; it is stored once."""
    text: str | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """One file of a shard."""

    __pydantic_config__ = STRICT

    path: StoreKey
    """Relative to the store."""
    size_bytes: Annotated[int, Field(ge=1, le=INT64_MAX)]
    sha256: Sha256
    index_sha256: Sha256
    """sha256 of its end, the shard's index and the last chunk's crc32c: tells another shard of equal size without reading it
    whole."""


@with_config(STRICT)
class Fidelity(TypedDict):
    """What was measured on one layer's keys or values as they were written (FORMAT.md 5.5)."""

    centred_error: Measure
    max_abs_error: Measure
    saturation: Annotated[float, Field(ge=0, le=1)]
    bits: Measure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What makes a shard visible: created once, after all its objects."""

    __pydantic_config__ = STRICT

    shard: Natural
    signal: Sha256
    """Signal fingerprint of the store it was written for."""
    objects: tuple[StoredObject, ...]
    samples: tuple[SampleRow, ...]
    fidelity: dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,5}$")], dict[Kind, Fidelity]]
    """Measured on the values written, by layer and kind."""

    @property
    def num_tokens(self) -> int:
        return sum(sample.num_tokens for sample in self.samples)

    @property
    def stored_bytes(self) -> int:
        return sum(stored.size_bytes for stored in self.objects)


def commit_key(shard: int) -> str:
    return f"{COMMITS}/{shard:05d}.json"


def create_commit(storage: Storage, commit: Commit) -> bool:
    """Create the commit record; False when the shard is committed already."""
    return create_sealed(storage, commit_key(commit.shard), dataclasses.asdict(commit))


def replace_commit(storage: Storage, commit: Commit) -> None:
    """Put another record in place of one: for `drop` and `repair` alone, which hold the whole store."""
    write_sealed(storage, commit_key(commit.shard), dataclasses.asdict(commit))


def read_commit(storage: Storage, shard: int) -> Commit:
    """Read and verify one commit record.

    Raises:
        ShardNotCommittedError: the shard has none.
        StoreFormatError: the record is damaged, or that of another shard.
    """
    key = commit_key(shard)
    where = f"{storage.location}/{key}"
    try:
        commit = unseal(storage, key).parse(Commit, "5")
    except FileNotFoundError:
        raise ShardNotCommittedError(f"shard {shard}: no commit record at {where}; run the extraction again") from None
    except StoreFormatError as error:
        raise StoreFormatError(f"shard {shard}: {error}") from error
    if commit.shard != shard:
        raise StoreFormatError(f"shard {shard}: {where} is the record of shard {commit.shard}; restore it, or 'kvpipe repair'")
    return commit


def committed_shards(storage: Storage) -> set[int]:
    """Numbers of all committed shards, from the names of their records; other files are not ours and say nothing."""
    found = (shard_of(entry.key) for entry in storage.entries(COMMITS))
    return {shard for shard in found if shard is not None}


def shard_of(key: str) -> int | None:
    """The shard whose record has this key; None for any other file."""
    match = _NAME.fullmatch(PurePosixPath(key).name)
    return int(match["shard"]) if match and commit_key(int(match["shard"])) == key else None


def contradictions(manifest: Manifest, commit: Commit) -> Iterator[tuple[str, str | None]]:
    """What a commit record says against its store's manifest or itself: message, and the id of the sample concerned if it is one."""
    named = f"shard {commit.shard}"
    if commit.signal != manifest.signal_fingerprint:
        yield f"{named}: committed for signal {commit.signal[:12]}, the store is {manifest.signal_fingerprint[:12]}", None
    expected = [shard_key(array, commit.shard) for array in array_keys(manifest)] if commit.samples else []
    if [stored.path for stored in commit.objects] != expected:
        listed = [stored.path for stored in commit.objects]
        yield f"{named}: its record lists {listed}, expected {expected}", None
    layers = {str(layer) for layer in manifest.spec.layer_numbers}
    if commit.fidelity.keys() != layers or any(len(kinds) != 2 for kinds in commit.fidelity.values()):
        yield (
            f"{named}: its fidelity is of layers {sorted(commit.fidelity)[:8]}, expected {sorted(layers)[:8]}, keys and values",
            None,
        )
    layout = manifest.layout
    free, end = commit.shard * layout.shard_tokens, (commit.shard + 1) * layout.shard_tokens
    for row in sorted(commit.samples, key=lambda row: row.token_start):
        stop = row.token_start + row.num_tokens
        fits = row.shard == commit.shard and free <= row.token_start and stop <= end
        if not fits or row.token_start % layout.chunk_tokens:
            yield (
                f"{named}, sample {row.id}: rows {row.token_start} to {stop} of shard {row.shard} overlap another sample or leave the "
                "shard",
                row.id,
            )
        free = layout.padded(stop)


def merge_fidelity(commits: Sequence[Commit]) -> dict[str, Any]:
    """Fidelity over several shards: root mean square errors, largest maximum, mean saturation and bits."""
    weights = np.array([commit.num_tokens for commit in commits], dtype=float)
    weights /= max(weights.sum(), 1.0)
    merged: dict[str, Any] = {}
    for layer, kinds in commits[0].fidelity.items():
        merged[layer] = {}
        for kind in kinds:
            rows = [commit.fidelity[layer][kind] for commit in commits]
            merged[layer][kind] = {
                "centred_error": float(
                    np.sqrt(sum(w * row["centred_error"] ** 2 for w, row in zip(weights, rows, strict=True)))
                ),
                "max_abs_error": max(row["max_abs_error"] for row in rows),
                "saturation": float(sum(w * row["saturation"] for w, row in zip(weights, rows, strict=True))),
                "bits": float(sum(w * row["bits"] for w, row in zip(weights, rows, strict=True))),
            }
    return merged
