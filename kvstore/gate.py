"""The record of a gate run: what storing keys and values in this codec changes in the teacher's own predictions (FORMAT.md 9).

Knows the numbers, not how they were measured (`pipeline.gate`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvstore.manifest import GATE
from kvstore.records import read_sealed, write_sealed
from kvstore.storage import Storage


def read_gate(storage: Storage) -> dict[str, Any]:
    """What is recorded under `before` the first shard and `after` the last; either may be missing.

    Raises:
        StoreFormatError: the record is damaged.
    """
    try:
        return read_sealed(storage, GATE)
    except FileNotFoundError:
        return {}


def write_gate(storage: Storage, when: str, result: Mapping[str, Any]) -> None:
    """Add a result to the record."""
    write_sealed(storage, GATE, {**read_gate(storage), when: dict(result)})
