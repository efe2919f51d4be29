"""Commit records: what makes a shard visible, with its samples, its objects and its measured fidelity (FORMAT.md 5)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import google_crc32c
import numpy as np
from jaxtyping import Integer

from kvstore.errors import ShardNotCommittedError, StoreFormatError
from kvstore.manifest import COMMITS
from kvstore.records import create_sealed, read_sealed, write_sealed
from kvstore.storage import Storage


def sample_id(input_ids: Integer[np.ndarray, "token"]) -> str:
    """sha256 of the token ids as little-endian int32: equal tokens are the same sample."""
    return hashlib.sha256(input_ids.astype("<i4").tobytes()).hexdigest()


def token_crc32c(input_ids: Integer[np.ndarray, "token"]) -> int:
    """crc32c of the token ids as little-endian int32."""
    return int(google_crc32c.value(input_ids.astype("<i4").tobytes()))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One stored sample."""

    id: str
    """sha256 of its token ids as little-endian int32, in hex."""
    source: str
    """Document it was cut from, as the reader of the data named it."""
    shard: int
    token_start: int
    """First row on the token axis."""
    num_tokens: int
    crc32c: int
    """crc32c of its token ids as little-endian int32: tells a swapped shard."""
    count: int
    """How often the data had it; it is stored once."""
    text: str | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """One file of a shard."""

    path: str
    """Relative to the store."""
    size_bytes: int
    sha256: str
    index_sha256: str
    """sha256 of its end, the shard's index and the last chunk's crc32c: tells another shard of equal size without reading it
    whole."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What makes a shard visible: created once, after all its objects."""

    shard: int
    signal: str
    """Signal fingerprint of the store it was written for."""
    objects: tuple[StoredObject, ...]
    samples: tuple[SampleRow, ...]
    fidelity: dict[str, Any]
    """Measured on the values written: {layer: {key|value: {centred_error, max_abs_error, saturation, bits}}}."""

    @property
    def num_tokens(self) -> int:
        return sum(sample.num_tokens for sample in self.samples)

    @property
    def stored_bytes(self) -> int:
        return sum(stored.size_bytes for stored in self.objects)

    @classmethod
    def from_json(cls, record: Mapping[str, Any], where: str) -> Commit:
        try:
            return cls(
                shard=record["shard"],
                signal=record["signal"],
                objects=tuple(StoredObject(**stored) for stored in record["objects"]),
                samples=tuple(SampleRow(**sample) for sample in record["samples"]),
                fidelity=record["fidelity"],
            )
        except (KeyError, TypeError) as error:
            raise StoreFormatError(f"{where}: {error!r}; expected the fields of FORMAT.md 5") from error


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
        commit = Commit.from_json(read_sealed(storage, key), where)
    except FileNotFoundError:
        raise ShardNotCommittedError(f"shard {shard}: no commit record at {where}; run the extraction again") from None
    except StoreFormatError as error:
        raise StoreFormatError(f"shard {shard}: {error}") from error
    if commit.shard != shard:
        raise StoreFormatError(f"shard {shard}: {where} is the record of shard {commit.shard}; restore it, or 'kvpipe repair'")
    return commit


def committed_shards(storage: Storage) -> set[int]:
    """Numbers of all committed shards, from the names of their records."""
    names = (PurePosixPath(entry.key) for entry in storage.entries(COMMITS))
    return {int(name.stem) for name in names if name.suffix == ".json" and name.stem.isdecimal()}


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
