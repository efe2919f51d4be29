"""What a manifest says of where a store comes from: its signal, the parts of its data, the runs that made them, and its alignment.

These are the shapes in which such records are read (FORMAT.md 2.4, 10.1, 10.6); `manifest` keeps them as plain values, because their
fingerprints are taken over every field, those of later versions included. Knows no files.
"""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, Required

from pydantic import ConfigDict, Field, StringConstraints, with_config
from typing_extensions import TypedDict

from kvstore.records import INT64_MAX, STRICT, Natural, Sha256, Size
from kvstore.spec import KVSpec, LayerNumber

_OPEN = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
Text = Annotated[str, StringConstraints(max_length=100_000)]


@with_config(_OPEN)
class SignalRecord(TypedDict, total=False):
    """Everything that shapes the numbers; further fields are compared, never read."""

    codec: Required[Text]
    """As `codec.parse_codecs` reads it."""
    response_only: bool
    template: Text | None
    tokenizer: Text | None
    weights: Text


@with_config(STRICT)
class PartRecord(TypedDict):
    """One part of the data: a run of shards of its own."""

    samples: Sha256
    """Over one line `{id} {count}` for each sample in order of ids."""
    num_samples: Natural
    num_tokens: Size
    seq_len: Annotated[int, Field(ge=1, le=INT64_MAX)]
    first_shard: Natural
    num_shards: Natural
    repeats: NotRequired[Sha256]


@with_config(_OPEN)
class DataRecord(TypedDict):
    """Which samples the store is for. Only stores that no run made, such as those of tests of a reader, have no parts."""

    parts: NotRequired[list[PartRecord]]
    dropped: NotRequired[Sha256 | None]


@with_config(STRICT)
class WindowRecord(TypedDict):
    """How far into the data one part reaches."""

    documents: Size
    sha256: Sha256
    samples: Size
    tokens: Size


@with_config(_OPEN)
class SourceRecord(TypedDict):
    """A store that this one was made from."""

    location: Text
    fingerprint: Sha256
    codec: NotRequired[Text]
    student: NotRequired[Text]


@with_config(STRICT)
class RunRecord(TypedDict, total=False):
    """How some parts were made."""

    first_part: Required[Natural]
    complete: Required[bool]
    settings: dict[str, Any]
    windows: list[WindowRecord]
    merged_from: list[SourceRecord]
    recoded_from: SourceRecord
    aligned_from: SourceRecord


@with_config(_OPEN)
class AlignmentRecord(TypedDict):
    """The map from the teacher's layers to a student's, as `pipeline.align.Alignment` writes it."""

    teacher: KVSpec
    student: KVSpec
    layer_map: list[tuple[LayerNumber, LayerNumber]]
    layer_map_name: Text
    baked: bool
