"""The record of a gate run: what storing keys and values in this codec changes in the teacher's own predictions (FORMAT.md 9).

Knows the numbers, not how they were measured (`pipeline.gate`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, with_config
from typing_extensions import TypedDict

from kvstore.manifest import GATE
from kvstore.records import STRICT, Size, unseal, write_sealed
from kvstore.storage import Storage

Number = Annotated[float, Field(allow_inf_nan=False)]


@with_config(STRICT)
class GateRecord(TypedDict, total=False):
    """What one gate run measured; later versions may leave fields out."""

    codec: str
    geometry: str
    num_samples: Size
    num_tokens: Size
    kl: Number
    perplexity_change: Number
    top1_agreement: Number
    limit: Number
    passed: bool
    parts: Size


@with_config(STRICT)
class Gates(TypedDict, total=False):
    """The record: a run before the first shard, and one after the last."""

    before: GateRecord
    after: GateRecord


def read_gate(storage: Storage) -> dict[str, Any]:
    """What is recorded under `before` the first shard and `after` the last; either may be missing.

    Raises:
        StoreFormatError: the record is damaged.
    """
    try:
        return dict(unseal(storage, GATE).parse(Gates, "9.1"))
    except FileNotFoundError:
        return {}


def write_gate(storage: Storage, when: str, result: Mapping[str, Any]) -> None:
    """Add a result to the record."""
    write_sealed(storage, GATE, {**read_gate(storage), when: dict(result)})
