"""New stores from stores, without the teacher: several joined into one, or one in another codec.

The samples of the new store stand in the order of their ids, planned afresh like those of an extraction. It is written shard by
shard, at most one in memory, and the same call again goes on where it was stopped. What is read is verified as for training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvstore import codec as codecs
from kvstore.arrays import read_calibration
from kvstore.calibration import (
    CALIBRATION_TOKENS,
    Calibration,
    ChannelMoments,
    calibration_fingerprint,
    calibration_mask,
    channels_of,
    fit_groups,
)
from kvstore.codec import KINDS, Codec, Kind
from kvstore.commits import Commit, SampleRow, committed_shards, read_commit
from kvstore.drop import BEFORE, dropped_fingerprint, read_dropped, write_dropped
from kvstore.errors import CodecError, CorruptShardError, KVStoreError, StoreNotFoundError
from kvstore.gate import read_gate
from kvstore.layout import fill_shards, plan_layout
from kvstore.lease import EVERYTHING, lease
from kvstore.manifest import TOKENIZER, Manifest, data_record, plan_groups, read_manifest, refuse_mismatch
from kvstore.reader import CodeBatch, Store, open_store
from kvstore.records import bytes_sha256, differences, plain
from kvstore.samples import compact
from kvstore.storage import Storage, locate
from kvstore.writer import ShardWriter, create_store

Progress = Callable[[int, int], object]
"""Told the tokens done and the tokens in all."""
Convert = Callable[[ShardWriter, Store, CodeBatch, Commit, list[tuple[int, int]]], None]
"""Puts samples of one shard of a source into a writer, at these offsets and of these lengths."""

_TOKENS_AT_ONCE = 4096
"""Tokens read and decoded at a time."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RewriteSummary:
    """What merging or recoding did."""

    out: str
    num_samples: int
    num_tokens: int
    stored_bytes: int
    new_shards: int
    num_shards: int


class _Origin(NamedTuple):
    """A sample of the new store and where it comes from."""

    id: str
    store: int
    index: int
    """Number of the sample in that store."""
    num_tokens: int
    count: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """A store to be made."""

    target: Storage
    stores: list[Store]
    origins: list[_Origin]
    manifest: Manifest
    """But for the calibration, if the signal has none yet."""
    dropped: list[str]
    calibrate: Callable[[Progress], Calibration]
    convert: Convert
    gate: Mapping[str, Any] | None


def merge_stores(sources: Sequence[str], out: str, progress: Progress = lambda *_: None) -> RewriteSummary:
    """Join stores of one signal: codes are copied bit for bit; a sample several of them have is stored once, its counts summed.

    What is committed is taken, so stores whose extraction was stopped can be merged. A sample that one store dropped and another
    has is kept: the one that has it was not told to drop it. Gate results are those of the first store.

    Raises:
        FingerprintMismatchError: the signals differ, or `out` holds another store; nothing was written.
        KVStoreError: fewer than two stores, one named twice, or none with samples.
        LeaseHeldError: somebody is writing into `out`.
    """
    target, stores = locate(out), [open_store(source) for source in sources]
    first, *others = stores
    locations = [store.location for store in stores]
    if not others or len(set(locations)) < len(locations) or target.location in locations:
        raise KVStoreError(
            f"merge: got {', '.join(locations)} into {target.location}, expected two or more stores and a new one"
        )
    for other in others:
        _refuse_other_signal(first, other)
    dropped = {identity for store in stores for identity in read_dropped(store.storage)}
    origins = _origins(stores)
    run = {"merged_from": [_named(store) for store in stores]}
    return _make(
        _Plan(
            target=target,
            stores=stores,
            origins=origins,
            manifest=_planned(first.manifest, stores, origins, dropped - {origin.id for origin in origins}, run),
            dropped=sorted(dropped - {origin.id for origin in origins}),
            calibrate=lambda _: first.calibration,
            convert=_copy,
            gate=read_gate(first.storage).get("before"),
        ),
        f"kvpipe merge --out {out}",
        progress,
    )


def recode_store(source: str, codec_text: str, out: str, progress: Progress = lambda *_: None) -> RewriteSummary:
    """Store the same samples in another codec, calibrated on the first samples by id, from what the store decodes to.

    The errors of both codecs add up, and the recorded fidelity says so. A layer that stays raw is copied bit for bit.

    Args:
        codec_text: as `parse_codecs` reads it.

    Raises:
        CodecError: no such codec, the one the store has, one its dims cannot hold, or raw for what is no longer exact.
        KVStoreError: `out` is the store itself, or the store is not complete.
        FingerprintMismatchError: `out` holds another store; nothing was written.
        LeaseHeldError: somebody is writing into `out`.
    """
    target, store = locate(out), open_store(source)
    if target.location == store.location:
        raise KVStoreError(
            f"recode: --out is the store itself ({store.location}); choose a new folder, and delete the old one after"
        )
    planned, committed = store.manifest.layout.num_shards, len(store.samples.summary)
    if committed < planned:
        raise KVStoreError(
            f"recode: {store.location} has {committed} of {planned} shards; finish it first with the command that began it"
        )
    chosen = codecs.parse_codecs(codec_text, store.spec.layer_numbers)
    _refuse_codec(store, chosen)
    signal = {name: value for name, value in store.manifest.signal.items() if name != "calibration"}
    wanted = dataclasses.replace(
        store.manifest,
        groups=plan_groups(store.spec, chosen),
        signal={**signal, "codec": codecs.format_codecs(chosen), "recoded_from": store.manifest.signal_fingerprint},
    )
    origins, dropped = _origins([store]), read_dropped(store.storage)
    run = {"recoded_from": {**_named(store), "codec": store.manifest.signal["codec"]}}
    return _make(
        _Plan(
            target=target,
            stores=[store],
            origins=origins,
            manifest=_planned(wanted, [store], origins, dropped, run),
            dropped=dropped,
            calibrate=lambda told: _calibrate(store, wanted, origins, told),
            convert=_encode_again,
            gate=None,
        ),
        f"kvpipe recode {source}",
        progress,
    )


def _refuse_other_signal(first: Store, other: Store) -> None:
    fields = {difference.field for difference in differences(other.manifest.signal, first.manifest.signal)}
    refuse_mismatch(
        first.location,
        stored=first.manifest.signal,
        wanted=other.manifest.signal,
        what="the signal",
        owner=other.location,
        remedy="Only stores of one signal can be merged.",
        hint=f"Extracting with '--calibration {first.location}' makes stores that can be." if fields == {"calibration"} else "",
    )


def _refuse_codec(store: Store, chosen: Mapping[int, Codec]) -> None:
    stored = {layer: codecs.codec_named(store.manifest.group_of(layer)[0].codec) for layer in chosen}
    if stored == chosen:
        raise CodecError(f"--codec: {store.location} is in {codecs.format_codecs(chosen)} already; ask for another")
    inexact = [layer for layer, codec in chosen.items() if codec.key is None and stored[layer].key is not None]
    if inexact:
        raise CodecError(
            f"--codec: got raw for layers {inexact} of {store.location}, which are in {stored[inexact[0]].name}: what was rounded "
            "does not become exact again. Choose another codec, or extract with --codec raw"
        )


def _named(store: Store) -> dict[str, str]:
    return {"location": store.location, "fingerprint": store.manifest.fingerprint}


def _origins(stores: Sequence[Store]) -> list[_Origin]:
    """Every sample once, in order of the ids; of several stores the first that has it gives it."""
    found: dict[str, _Origin] = {}
    for number, store in enumerate(stores):
        table = store.samples
        columns = zip(table.ids, table.num_tokens.tolist(), table.count.tolist(), strict=True)
        for index, (identity, num_tokens, count) in enumerate(columns):
            known = found.get(identity)
            found[identity] = (
                known._replace(count=known.count + count) if known else _Origin(identity, number, index, num_tokens, count)
            )
    if not found:
        raise KVStoreError(f"no samples are committed in {', '.join(store.location for store in stores)}; finish them first")
    return [found[identity] for identity in sorted(found)]


def _planned(
    like: Manifest, stores: Sequence[Store], origins: Sequence[_Origin], dropped: Iterable[str], run: dict[str, Any]
) -> Manifest:
    """The manifest of the new store; its data is one part, as if one extraction had planned all samples."""
    layout = plan_layout([origin.num_tokens for origin in origins], max(group.token_bytes for group in like.groups))
    longest = max(origin.num_tokens for origin in origins)
    seq_len = max((part["seq_len"] for store in stores for part in store.manifest.data.get("parts", ())), default=longest)
    part = {
        **data_record(((origin.id, origin.count, origin.num_tokens) for origin in origins), seq_len),
        "first_shard": 0,
        "num_shards": layout.num_shards,
    }
    return dataclasses.replace(
        like,
        layout=layout,
        metadata={},
        tokenizer={},
        data={"parts": [plain(part)], "dropped": dropped_fingerprint(dropped)},
        runs=[run],
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        kvpipe_version=importlib.metadata.version("kvpipe"),
    )


def _make(plan: _Plan, purpose: str, progress: Progress) -> RewriteSummary:
    """Create the store or go on with it."""
    _refuse_other_store(plan)
    new_shards, done, total = 0, 0, sum(origin.num_tokens for origin in plan.origins)
    with lease(plan.target, *EVERYTHING, purpose):
        manifest, calibration = _begin(plan, lambda told, of: progress(told, total + of))
        if plan.dropped:
            write_dropped(plan.target, dict.fromkeys(plan.dropped, BEFORE))
        committed = committed_shards(plan.target)
        read = functools.lru_cache(maxsize=32)(read_commit)
        for shard, placed in enumerate(fill_shards([origin.num_tokens for origin in plan.origins], manifest.layout)):
            progress(done, total)
            members = [(plan.origins[index], offset) for index, offset in placed]
            if shard not in committed:
                _write_shard(plan, manifest, calibration, shard, members, read)
                new_shards += 1
            done += sum(origin.num_tokens for origin, _ in members)
        compact(plan.target)
    progress(total, total)
    store = Store(plan.target)
    return RewriteSummary(
        out=store.location,
        num_samples=len(store),
        num_tokens=total,
        stored_bytes=sum(store.samples.summary["stored_bytes"].to_pylist()),
        new_shards=new_shards,
        num_shards=manifest.layout.num_shards,
    )


def _refuse_other_store(plan: _Plan) -> Manifest | None:
    """What is at `out` already, if it is the store to be made."""
    try:
        manifest = read_manifest(plan.target)
    except StoreNotFoundError:
        return None
    stored = {name: value for name, value in manifest.signal.items() if name in plan.manifest.signal or name != "calibration"}
    refuse_mismatch(plan.target.location, stored=stored, wanted=plan.manifest.signal, what="the signal")
    refuse_mismatch(plan.target.location, stored=manifest.data, wanted=plan.manifest.data, what="the data")
    return manifest


def _begin(plan: _Plan, progress: Progress) -> tuple[Manifest, Calibration]:
    manifest = _refuse_other_store(plan)
    if manifest is not None:
        return manifest, read_calibration(plan.target, manifest)
    calibration = plan.calibrate(progress)
    digest = calibration_fingerprint(calibration)
    manifest = dataclasses.replace(plan.manifest, calibration=digest, signal={**plan.manifest.signal, "calibration": digest})
    with _tokenizer(plan.stores[0]) as folder:
        return create_store(plan.target, manifest, calibration, folder, plan.gate), calibration


@contextlib.contextmanager
def _tokenizer(store: Store) -> Iterator[Path | None]:
    """A copy of a store's tokenizer files, each compared with the manifest."""
    if not store.manifest.tokenizer:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="kvpipe-tokenizer-") as folder:
        for name, expected in store.manifest.tokenizer.items():
            content = store.storage.read(f"{TOKENIZER}/{name}")
            if bytes_sha256(content) != expected:
                raise CorruptShardError(
                    f"{store.location}/{TOKENIZER}/{name}: hashes to {bytes_sha256(content)}, the manifest says {expected}; "
                    "restore the file"
                )
            Path(folder, name).write_bytes(content)
        yield Path(folder)


def _write_shard(
    plan: _Plan,
    manifest: Manifest,
    calibration: Calibration,
    shard: int,
    members: Sequence[tuple[_Origin, int]],
    read: Callable[[Storage, int], Commit],
) -> None:
    """Write one shard of the new store from the shards its samples lie in.

    Args:
        members: samples with their token offset inside the shard.
    """
    by_shard: dict[tuple[int, int], list[tuple[_Origin, int]]] = {}
    for origin, offset in members:
        source = int(plan.stores[origin.store].samples.shard[origin.index])
        by_shard.setdefault((origin.store, source), []).append((origin, offset))
    start = shard * manifest.layout.shard_tokens
    rows: dict[str, SampleRow] = {}
    for (number, source), part in by_shard.items():
        stored = {row.id: row for row in read(plan.stores[number].storage, source).samples}
        for origin, offset in part:
            rows[origin.id] = dataclasses.replace(
                stored[origin.id], shard=shard, token_start=start + offset, count=origin.count
            )
    writer = ShardWriter(plan.target, manifest, calibration, shard, [rows[origin.id] for origin, _ in members])
    for (number, source), part in by_shard.items():
        store = plan.stores[number]
        for group in _cut(part, lambda member: member[0].num_tokens):
            batch = store.read_codes([origin.index for origin, _ in group])
            for (_, offset), first, last in zip(group, batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
                writer.put_tokens(offset, batch.input_ids[first:last])
            spans = [(offset, origin.num_tokens) for origin, offset in group]
            plan.convert(writer, store, batch, read(store.storage, source), spans)
    writer.commit()


def _cut(members: Sequence[Any], num_tokens: Callable[[Any], int]) -> Iterator[list[Any]]:
    """Runs of samples that are read at once."""
    run: list[Any] = []
    tokens = 0
    for member in members:
        if run and tokens + num_tokens(member) > _TOKENS_AT_ONCE:
            yield run
            run, tokens = [], 0
        run.append(member)
        tokens += num_tokens(member)
    if run:
        yield run


def _copy(writer: ShardWriter, store: Store, batch: CodeBatch, commit: Commit, spans: list[tuple[int, int]]) -> None:
    for group in store.manifest.groups:
        for kind in KINDS:
            for slot, layer in enumerate(group.layers):
                writer.put_codes(layer, kind, spans, batch.codes[group.path, kind][slot], commit.fidelity[str(layer)][kind])


def _encode_again(writer: ShardWriter, store: Store, batch: CodeBatch, commit: Commit, spans: list[tuple[int, int]]) -> None:
    for layer in store.spec.layer_numbers:
        group, slot = store.manifest.group_of(layer)
        fidelity = commit.fidelity[str(layer)]
        if writer.manifest.group_of(layer)[0].quantizer("key") is None:
            for kind in KINDS:
                writer.put_codes(layer, kind, spans, batch.codes[group.path, kind][slot], fidelity[kind])
        else:
            key, value = (_decoded(store, batch, layer, kind) for kind in KINDS)
            writer.put(layer, spans, key, value, fidelity)


def _decoded(store: Store, batch: CodeBatch, layer: int, kind: Kind) -> np.ndarray:
    group, slot = store.manifest.group_of(layer)
    mean, step = channels_of(store.calibration, group, kind, slot)
    return np.asarray(codecs.decode(group.quantizer(kind), batch.codes[group.path, kind][slot], mean, step))


def _calibrate(store: Store, wanted: Manifest, origins: Sequence[_Origin], progress: Progress) -> Calibration:
    """Mean and step of every channel from the first samples by id, as many as an extraction takes."""
    ends = np.cumsum([origin.num_tokens for origin in origins])
    chosen = origins[: int(np.searchsorted(ends, CALIBRATION_TOKENS)) + 1]
    total, done = sum(origin.num_tokens for origin in chosen), 0
    quantised = [(group, layer) for group in wanted.groups if group.quantizer("key") for layer in group.layers]
    moments = {
        (layer, kind): ChannelMoments.zeros(group.num_kv_heads, group.dim(kind)) for group, layer in quantised for kind in KINDS
    }
    for run in _cut(chosen, lambda origin: origin.num_tokens):
        progress(done, total)
        batch = store.read_codes([origin.index for origin in run])
        counted = calibration_mask([origin.num_tokens for origin in run])
        for layer, kind in moments:
            moments[layer, kind].add(_decoded(store, batch, layer, kind)[counted])
        done += sum(origin.num_tokens for origin in run)
    return fit_groups(wanted.groups, moments)
