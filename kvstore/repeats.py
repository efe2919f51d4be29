"""How often parts of the data had samples that an earlier part had stored already (FORMAT.md 10.3): equal samples lie in a store once."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

from kvstore.errors import StoreFormatError
from kvstore.manifest import SAMPLES, Manifest
from kvstore.records import STRICT, Count, Natural, Sha256, fingerprint, unseal, write_sealed
from kvstore.storage import Storage


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """The record of one part."""

    __pydantic_config__ = STRICT

    part: Natural
    counts: dict[Sha256, Count]


def repeats_key(part: int) -> str:
    return f"{SAMPLES}/repeats-{part:05d}.json"


def write_repeats(storage: Storage, part: int, counts: Mapping[str, int]) -> str:
    """Keep how often a later part of the data had samples that an earlier one had stored.

    Returns:
        What the part's record in the manifest must hold as `repeats`; until then no reader counts them.
    """
    body = {"part": part, "counts": dict(counts)}
    write_sealed(storage, repeats_key(part), body)
    return fingerprint(body)


def read_repeats(storage: Storage, manifest: Manifest) -> Counter[str]:
    """Further counts by sample id, over all parts the manifest lists.

    Raises:
        StoreFormatError: a part's counts are missing, damaged or others than the manifest names.
    """
    total: Counter[str] = Counter()
    for part in range(len(manifest.data_parts)):
        total.update(read_part_repeats(storage, manifest, part))
    return total


def read_part_repeats(storage: Storage, manifest: Manifest, part: int) -> dict[str, int]:
    """How often one part of the data had samples of earlier parts, by id; errors as of `read_repeats`."""
    expected = manifest.data_parts[part].get("repeats")
    if expected is None:
        return {}
    try:
        record = unseal(storage, repeats_key(part))
    except FileNotFoundError:
        record = None
    if record is None or record.sha256 != expected:
        raise StoreFormatError(
            f"{storage.location}/{repeats_key(part)}: hashes to {record.sha256 if record else 'nothing'}, the manifest says {expected}; "
            "restore the file"
        )
    repeats = record.parse(Repeats, "10.3")
    if repeats.part != part:
        raise StoreFormatError(f"{record.where}: part: got {repeats.part}, expected {part}; restore the file")
    return repeats.counts
