"""New stores from stores, without the teacher: several joined into one, or one in another codec.

The same call again goes on where it was stopped (`compose`). Merging never decodes; recoding measures what it adds to the error.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from kvstore import codec as codecs
from kvstore.batches import CodeBatch
from kvstore.calibration import (
    CALIBRATION_TOKENS,
    Calibration,
    ChannelMoments,
    calibration_mask,
    channels_of,
    fit_groups,
    refuse_broken_sample,
)
from kvstore.codec import KINDS, Codec, Kind
from kvstore.commits import Commit
from kvstore.compose import Member, Origin, Plan, Progress, RewriteSummary, copy_tokens, cut, make, origins_of, planned
from kvstore.drop import read_dropped
from kvstore.errors import CodecError, KVStoreError
from kvstore.fidelity import Trial, refuse_lossy
from kvstore.gate import read_gate
from kvstore.groups import plan_groups
from kvstore.manifest import Manifest, refuse_mismatch
from kvstore.reader import Store, open_store
from kvstore.records import differences
from kvstore.storage import locate
from kvstore.writer import ShardWriter


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
    origins = origins_of(stores)
    run = {"first_part": 0, "complete": True, "merged_from": [_named(store) for store in stores]}
    return make(
        Plan(
            target=target,
            stores=stores,
            origins=origins,
            manifest=planned(first.manifest, stores, origins, dropped - {origin.id for origin in origins}, run),
            dropped=sorted(dropped - {origin.id for origin in origins}),
            calibrate=lambda _: first.calibration,
            convert=_copy,
            gate=read_gate(first.storage).get("before"),
        ),
        f"kvpipe merge --out {out}",
        progress,
    )


def recode_store(
    source: str, codec_text: str, out: str, progress: Progress = lambda *_: None, *, accept_fidelity: bool = False
) -> RewriteSummary:
    """Store the same samples in another codec, calibrated on the first samples by id, from what the store decodes to.

    The errors of both codecs add up, and the recorded fidelity says so. A layer that stays raw is copied bit for bit.

    Args:
        codec_text: as `parse_codecs` reads it.
        accept_fidelity: store it even where typical tokens are lost.

    Raises:
        FidelityError: they are; where the first samples show it, nothing was written.
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
    wanted_shards, committed = store.manifest.layout.num_shards, len(store.samples.summary)
    if committed < wanted_shards or store.manifest.is_growing:
        raise KVStoreError(
            f"recode: {store.location} has {committed} of {wanted_shards} shards{_growing(store)}; finish it first with the command that "
            "began it"
        )
    chosen = codecs.parse_codecs(codec_text, store.spec.layer_numbers)
    _refuse_codec(store, chosen)
    signal = {name: value for name, value in store.manifest.signal.items() if name != "calibration"}
    wanted = dataclasses.replace(
        store.manifest,
        groups=plan_groups(store.spec, chosen),
        signal={**signal, "codec": codecs.format_codecs(chosen), "recoded_from": store.manifest.signal_fingerprint},
    )
    origins, dropped = origins_of([store]), read_dropped(store.storage)
    origin = {**_named(store), "codec": store.manifest.signal["codec"]}
    run = {"first_part": 0, "complete": True, "recoded_from": origin}
    return make(
        Plan(
            target=target,
            stores=[store],
            origins=origins,
            manifest=planned(wanted, [store], origins, dropped, run),
            dropped=dropped,
            calibrate=lambda told: _calibrate(store, wanted, origins, told, accept_fidelity),
            convert=functools.partial(_encode_again, accept_fidelity),
            gate=None,
        ),
        f"kvpipe recode {source}",
        progress,
    )


def _growing(store: Store) -> str:
    return " and its extraction has not planned all of its data" if store.manifest.is_growing else ""


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


def _copy(writer: ShardWriter, store: Store, members: Sequence[Member], commit: Commit) -> None:
    batch = store.read_codes([origin.index for origin, _ in members])
    spans = copy_tokens(writer, members, batch)
    for group in store.manifest.groups:
        for kind in KINDS:
            for slot, layer in enumerate(group.layers):
                writer.put_codes(layer, kind, spans, batch.codes[group.path, kind][slot], commit.fidelity[str(layer)][kind])


def _encode_again(accept_fidelity: bool, writer: ShardWriter, store: Store, members: Sequence[Member], commit: Commit) -> None:
    batch = store.read_codes([origin.index for origin, _ in members])
    spans = copy_tokens(writer, members, batch)
    for layer in store.spec.layer_numbers:
        group, slot = store.manifest.group_of(layer)
        fidelity = commit.fidelity[str(layer)]
        if writer.manifest.group_of(layer)[0].quantizer("key") is None:
            for kind in KINDS:
                writer.put_codes(layer, kind, spans, batch.codes[group.path, kind][slot], fidelity[kind])
        else:
            key, value = (_decoded(store, batch, layer, kind) for kind in KINDS)
            measured = writer.put(layer, spans, key, value, fidelity)
            if not accept_fidelity:
                refuse_lossy(
                    writer.manifest,
                    {(layer, kind): measures for kind, measures in measured.items()},
                    _counted(batch, writer.manifest),
                    [(origin.id, origin.num_tokens) for origin, _ in members],
                )


def _decoded(store: Store, batch: CodeBatch, layer: int, kind: Kind) -> np.ndarray:
    group, slot = store.manifest.group_of(layer)
    mean, step = channels_of(store.calibration, group, kind, slot)
    return np.asarray(codecs.decode(group.quantizer(kind), batch.codes[group.path, kind][slot], mean, step))


def _counted(batch: CodeBatch, manifest: Manifest) -> np.ndarray:
    """Tokens that have keys and values to be kept."""
    return np.asarray(batch.compared if manifest.is_response_only else batch.has_kv)


def _calibrate(
    store: Store, wanted: Manifest, origins: Sequence[Origin], progress: Progress, accept_fidelity: bool
) -> Calibration:
    """Mean and step of every channel from the first samples by id, as many as an extraction takes; tried on the same samples."""
    ends = np.cumsum([origin.num_tokens for origin in origins])
    chosen = origins[: int(np.searchsorted(ends, CALIBRATION_TOKENS)) + 1]
    total, done = sum(origin.num_tokens for origin in chosen), 0
    quantised = [(group, layer) for group in wanted.groups if group.quantizer("key") for layer in group.layers]
    moments = {
        (layer, kind): ChannelMoments.zeros(group.num_kv_heads, group.dim(kind)) for group, layer in quantised for kind in KINDS
    }
    for run in cut(chosen, lambda origin: origin.num_tokens):
        progress(done, total)
        batch = store.read_codes([origin.index for origin in run])
        counted = calibration_mask([origin.num_tokens for origin in run])
        counted &= _counted(batch, wanted)
        samples = [(origin.id, origin.num_tokens) for origin in run]
        for layer, kind in moments:
            values = _decoded(store, batch, layer, kind)
            refuse_broken_sample(values, samples, layer, kind, store.location)
            moments[layer, kind].add(values[counted])
        done += sum(origin.num_tokens for origin in run)
    calibration = fit_groups(wanted.groups, moments)
    if not accept_fidelity:
        trial = Trial(wanted, calibration)
        for run in cut(chosen, lambda origin: origin.num_tokens):
            batch = store.read_codes([origin.index for origin in run])
            for layer, kind in moments:
                trial.add(layer, kind, _decoded(store, batch, layer, kind))
            trial.end(_counted(batch, wanted), [(origin.id, origin.num_tokens) for origin in run])
        trial.refuse_lossy()
    return calibration
