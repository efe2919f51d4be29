"""What was found out about an extraction, put together into the one estimate that people and scripts read."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from kvstore.codec import Codec
from kvstore.groups import Group, plan_groups
from kvstore.layout import Layout
from kvstore.spec import KVSpec, format_layers
from kvstore.storage import Folder, Storage
from pipeline.align import Alignment
from pipeline.budget import END_BYTES, most_bytes, store_bytes
from pipeline.config import ExtractConfig
from pipeline.flow import COMPACT_WINDOWS
from pipeline.parts import token_arrays
from pipeline.planning.data_size import DataSize
from pipeline.planning.estimate import Estimate, Hours, Room, Rung, Sizing, alternatives, tokens_that_fit
from pipeline.preflight import existing_folder


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was found out about an extraction, by trying it or from what is published."""

    data: DataSize
    teacher: KVSpec
    alignment: Alignment | None
    sizing: Sizing
    rungs: Mapping[str, tuple[Mapping[int, Codec], float]]
    """By codec: of each layer, and bytes per token of keys and values. The codec asked for comes first."""
    layer_shares: Mapping[int, float]
    """Part of each stored layer in the bytes of keys and values, in the codec asked for."""
    bytes_relative_error: float | None = None
    """Two standard errors of the bytes per token, for the tasks tried differ among themselves; None where there is nothing to tell by."""
    sized_tokens: int = 0
    """Tokens that bytes per token were measured on."""
    tokens_per_s: float | None = None
    """None where nothing was tried."""
    hours: Hours | None = None
    note: str | None = None


def assemble(config: ExtractConfig, storage: Storage, found: Found, student_tokens_per_s: int) -> Estimate:
    """Put the sizes of every codec beside the room there is."""
    sizing, records, tokens = found.sizing, found.sizing.records, found.data.num_tokens
    rungs = [sizing.rung(name, codecs, kv_bytes) for name, (codecs, kv_bytes) in found.rungs.items()]
    chosen, codecs = rungs[0], next(iter(found.rungs.values()))[0]
    groups, layout = plan_groups(sizing.stored, codecs), sizing.layout(codecs)
    room = _room(config, storage, found, chosen, groups, layout)
    fits = room.fits(chosen)
    files = None
    if chosen.shards is not None:
        arrays = 2 * len(groups) + sizing.other_arrays
        files = chosen.shards * (arrays + 1) + records.own_files + 5  # gate.json, a part and its summary, a log and its plot
    return Estimate(
        teacher=config.teacher,
        out=storage.location,
        codec=chosen.codec,
        measured=found.tokens_per_s is not None,
        note=found.note,
        geometry=_geometry(sizing.stored, found.teacher, found.alignment),
        num_tokens=tokens,
        is_exact=found.data.is_exact,
        relative_error=found.data.relative_error,
        how=found.data.how,
        chunk_tokens=layout.chunk_tokens,
        shard_tokens=layout.shard_tokens,
        files=files,
        rungs=tuple(rungs),
        bytes_relative_error=found.bytes_relative_error,
        sized_tokens=found.sized_tokens,
        tokens_per_s=found.tokens_per_s,
        hours=found.hours,
        student_tokens_per_s=student_tokens_per_s,
        read_bytes_per_s=student_tokens_per_s * chosen.bytes_per_token,
        room=room,
        tokens_that_fit=None
        if room.bytes is None
        else tokens_that_fit(chosen, records, room.bytes, tokens, layout.shard_tokens),
        fits=fits,
        alternatives=alternatives(rungs, _shares_to_choose_from(found), records, tokens, room.bytes, layout.shard_tokens)
        if fits is False and tokens is not None and room.bytes is not None
        else (),
    )


def _shares_to_choose_from(found: Found) -> Mapping[int, float]:
    """By the numbers that `--layers` takes: of the student's layers where there is a student."""
    if found.alignment is None:
        return found.layer_shares
    return {student: found.layer_shares[teacher] for student, teacher in found.alignment.layer_map}


def _room(config: ExtractConfig, storage: Storage, found: Found, chosen: Rung, groups: Sequence[Group], layout: Layout) -> Room:
    """What there is at `out`, and by how much a limit must pass the size for the last shard to begin."""
    records = found.sizing.records
    shard_bytes = layout.shard_tokens * (chosen.bytes_per_token + records.per_token) + records.per_shard
    rows_bytes = round(layout.shard_tokens * records.per_token)
    arrays = token_arrays(found.data.window)
    most = most_bytes(groups, layout, layout.shard_tokens // layout.chunk_tokens, rows_bytes, arrays)
    tokens = COMPACT_WINDOWS * config.window_tokens
    if found.data.num_tokens is not None:
        tokens = min(tokens, found.data.num_tokens)
    return Room(
        free_bytes=shutil.disk_usage(existing_folder(storage.root)).free if isinstance(storage, Folder) else None,
        stored_bytes=store_bytes(storage),
        max_bytes=config.max_bytes,
        slack_bytes=max(round(most - shard_bytes + tokens * records.spare_per_token), 0) + END_BYTES,
    )


def _geometry(stored: KVSpec, teacher: KVSpec, alignment: Alignment | None) -> dict[str, Any]:
    """What will be stored, for people and scripts."""
    shapes: dict[tuple[int, int, int, str], list[int]] = {}
    for layer in stored.layers:
        rope = stored.rope_of(layer.layer)
        turned = "none" if rope is None else f"{rope.kind}, {rope.rotary_dim} of {layer.key_dim} channels"
        shapes.setdefault((*layer.geometry, turned), []).append(layer.layer)
    return {
        "teacher_layers": len(teacher.layers),
        "layers": format_layers(stored.layer_numbers),
        "kinds": [
            {"layers": format_layers(layers), "num_kv_heads": heads, "key_dim": key_dim, "value_dim": value_dim, "rope": turned}
            for (heads, key_dim, value_dim, turned), layers in shapes.items()
        ],
        "values_per_token": stored.values_per_token,
        "key_domain": stored.key_domain,
        "dtype": stored.dtype,
        "baked": bool(alignment and alignment.baked),
        "layer_map": None if alignment is None else [list(pair) for pair in alignment.layer_map],
    }
