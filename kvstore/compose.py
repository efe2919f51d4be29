"""A new store from samples of others: planned afresh in the order of their ids, written shard by shard, resumed by running again.

At most one shard is in memory; what is read is verified as for training. Knows neither teacher nor what is done to the codes.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvstore.arrays import read_calibration
from kvstore.batches import CodeBatch
from kvstore.calibration import Calibration, calibration_fingerprint
from kvstore.commits import Commit, SampleRow, committed_shards, read_commit
from kvstore.compaction import compact
from kvstore.create import create_store
from kvstore.drop import BEFORE, dropped_fingerprint, read_quarantined, write_dropped
from kvstore.errors import KVStoreError, StoreNotFoundError
from kvstore.layout import fill_shards, plan_layout
from kvstore.lease import EVERYTHING, lease, sweep_held
from kvstore.manifest import PROJECTION, TOKENIZER, Manifest, data_record, read_beside, read_manifest, refuse_mismatch
from kvstore.reader import Store
from kvstore.records import plain
from kvstore.storage import Storage
from kvstore.writer import ShardWriter

Progress = Callable[[int, int], object]
"""Told the tokens done and the tokens in all."""
Member = tuple["Origin", int]
"""A sample of a shard to be written and its token offset there."""
Convert = Callable[[ShardWriter, Store, Sequence[Member], Commit], None]
"""Puts tokens, keys and values of samples that lie in one shard of a source, whose commit that is, into a writer."""

_TOKENS_AT_ONCE = 4096
"""Tokens read and decoded at a time."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RewriteSummary:
    """What making a store from stores did."""

    out: str
    num_samples: int
    num_tokens: int
    stored_bytes: int
    new_shards: int
    num_shards: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenIdentity:
    """What a commit says of a sample's tokens."""

    source_id: str
    """Id of the sample that was written again in these tokens."""
    crc32c: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A sample of the new store and where it comes from."""

    id: str
    store: int
    index: int
    """Number of the sample in that store."""
    num_tokens: int
    count: int
    tokens: TokenIdentity | None = None
    """Where its tokens are other ones than those of the sample it comes from."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A store to be made."""

    target: Storage
    stores: list[Store]
    origins: list[Origin]
    manifest: Manifest
    """But for the calibration, if the signal has none yet."""
    dropped: list[str]
    calibrate: Callable[[Progress], Calibration]
    convert: Convert
    gate: Mapping[str, Any] | None
    tokenizer: Mapping[str, bytes] | None = None
    """Tokenizer files of the new store by name; None for those of the first source."""
    projection: Mapping[str, bytes] | None = None
    """Files of its fitted maps by name; None for those of the first source."""
    workers: int = 1
    """Shards written at a time, each in memory meanwhile."""


def origins_of(stores: Sequence[Store]) -> list[Origin]:
    """Every sample once, in order of the ids; of several stores the first that has it gives it."""
    found: dict[str, Origin] = {}
    for number, store in enumerate(stores):
        table = store.samples
        columns = zip(table.ids, table.num_tokens.tolist(), table.count.tolist(), strict=True)
        for index, (identity, num_tokens, count) in enumerate(columns):
            known = found.get(identity)
            if known is None:
                found[identity] = Origin(id=identity, store=number, index=index, num_tokens=num_tokens, count=count)
            else:
                found[identity] = dataclasses.replace(known, count=known.count + count)
    if not found:
        raise KVStoreError(f"no samples are committed in {', '.join(store.location for store in stores)}; finish them first")
    return [found[identity] for identity in sorted(found)]


def planned(
    like: Manifest, stores: Sequence[Store], origins: Sequence[Origin], dropped: Iterable[str], run: dict[str, Any]
) -> Manifest:
    """The manifest of the new store; its data is one part, as if one extraction had planned all samples."""
    layout = plan_layout([origin.num_tokens for origin in origins], like.groups[0].row_bytes)
    longest = max(origin.num_tokens for origin in origins)
    seq_len = max((part["seq_len"] for store in stores for part in store.manifest.data_parts), default=longest)
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
        projection={},
        data={"parts": [plain(part)], "dropped": dropped_fingerprint(dropped)},
        runs=[run],
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        kvpipe_version=importlib.metadata.version("kvpipe"),
    )


def make(plan: Plan, purpose: str, progress: Progress) -> RewriteSummary:
    """Create the store or go on with it."""
    _refuse_other_store(plan)
    new_shards, done, total = 0, 0, sum(origin.num_tokens for origin in plan.origins)
    with lease(plan.target, *EVERYTHING, purpose) as held:
        plan = dataclasses.replace(plan, target=held)
        manifest, calibration = _begin(plan, lambda told, of: progress(told, total + of))
        if plan.dropped:
            reasons = {identity: why for store in plan.stores for identity, why in read_quarantined(store.storage).items()}
            kept = {identity: reasons[identity] for identity in plan.dropped if identity in reasons}
            write_dropped(plan.target, dict.fromkeys(plan.dropped, BEFORE), kept)
        committed = committed_shards(plan.target)
        read = functools.lru_cache(maxsize=32)(lambda number, shard: read_commit(plan.stores[number].storage, shard))
        shards = [
            [(plan.origins[index], offset) for index, offset in placed]
            for placed in fill_shards([origin.num_tokens for origin in plan.origins], manifest.layout)
        ]

        def write(shard: int) -> int:
            if shard not in committed:
                _write_shard(plan, manifest, calibration, shard, shards[shard], read)
            return shard

        progress(done, total)
        with ThreadPoolExecutor(plan.workers) as pool:
            try:
                for shard in pool.map(write, range(len(shards))):
                    done += sum(origin.num_tokens for origin, _ in shards[shard])
                    new_shards += shard not in committed
                    progress(done, total)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        compact(plan.target)
        sweep_held(held)
    progress(total, total)
    store = Store(plan.target.location)
    return RewriteSummary(
        out=store.location,
        num_samples=len(store),
        num_tokens=total,
        stored_bytes=sum(store.samples.summary["stored_bytes"].to_pylist()),
        new_shards=new_shards,
        num_shards=manifest.layout.num_shards,
    )


def _refuse_other_store(plan: Plan) -> Manifest | None:
    """What is at `out` already, if it is the store to be made."""
    try:
        manifest = read_manifest(plan.target)
    except StoreNotFoundError:
        return None
    stored = {name: value for name, value in manifest.signal.items() if name in plan.manifest.signal or name != "calibration"}
    refuse_mismatch(plan.target.location, stored=stored, wanted=plan.manifest.signal, what="the signal")
    refuse_mismatch(plan.target.location, stored=manifest.data, wanted=plan.manifest.data, what="the data")
    return manifest


def _begin(plan: Plan, progress: Progress) -> tuple[Manifest, Calibration]:
    manifest = _refuse_other_store(plan)
    if manifest is not None:
        return manifest, read_calibration(plan.target, manifest)
    calibration = plan.calibrate(progress)
    digest = calibration_fingerprint(calibration)
    manifest = dataclasses.replace(plan.manifest, calibration=digest, signal={**plan.manifest.signal, "calibration": digest})
    tokenizer = _files(plan.tokenizer, plan.stores[0], TOKENIZER)
    projection = _files(plan.projection, plan.stores[0], PROJECTION)
    return create_store(plan.target, manifest, calibration, tokenizer, plan.gate, projection), calibration


def _files(own: Mapping[str, bytes] | None, store: Store, folder: str) -> Mapping[str, bytes]:
    """The files of the new store, or what a source has, each compared with the manifest."""
    expected = store.manifest.tokenizer if folder == TOKENIZER else store.manifest.projection
    return read_beside(store.storage, folder, expected) if own is None else own


def _write_shard(
    plan: Plan,
    manifest: Manifest,
    calibration: Calibration,
    shard: int,
    members: Sequence[Member],
    read: Callable[[int, int], Commit],
) -> None:
    """Write one shard of the new store from the shards its samples lie in.

    Args:
        members: samples with their token offset inside the shard.
        read: the commit of a source by its number and the shard's.
    """
    by_shard: dict[tuple[int, int], list[Member]] = {}
    for origin, offset in members:
        source = int(plan.stores[origin.store].samples.shard[origin.index])
        by_shard.setdefault((origin.store, source), []).append((origin, offset))
    start = shard * manifest.layout.shard_tokens
    rows: dict[str, SampleRow] = {}
    for (number, source), part in by_shard.items():
        stored = {row.id: row for row in read(number, source).samples}
        for origin, offset in part:
            row = stored[origin.id if origin.tokens is None else origin.tokens.source_id]
            if origin.tokens is not None:
                row = dataclasses.replace(row, id=origin.id, num_tokens=origin.num_tokens, crc32c=origin.tokens.crc32c)
            rows[origin.id] = dataclasses.replace(row, shard=shard, token_start=start + offset, count=origin.count)
    writer = ShardWriter(plan.target, manifest, calibration, shard, [rows[origin.id] for origin, _ in members])
    for (number, source), part in by_shard.items():
        for group in cut(part, lambda member: member[0].num_tokens):
            plan.convert(writer, plan.stores[number], group, read(number, source))
    writer.commit()


def copy_tokens(writer: ShardWriter, members: Sequence[Member], batch: CodeBatch) -> list[tuple[int, int]]:
    """Put the tokens of these samples as they are; returns their offsets and lengths."""
    for (_, offset), first, last in zip(members, batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
        beside = {name: array[first:last] for name, array in batch.beside.items()}
        writer.put_tokens(offset, batch.input_ids[first:last], beside)
    return [(offset, origin.num_tokens) for origin, offset in members]


def cut(members: Sequence[Any], num_tokens: Callable[[Any], int]) -> Iterator[list[Any]]:
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
