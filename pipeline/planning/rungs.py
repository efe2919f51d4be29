"""The numbers of a trial in other codecs, and what they take on disk. Knows stores; no teacher and no workers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from kvstore import Store
from kvstore.arrays import index_bytes, shard_key
from kvstore.calibration import Calibration
from kvstore.codec import KINDS
from kvstore.commits import Commit, read_commit
from kvstore.layout import fill_shards
from kvstore.manifest import Manifest
from kvstore.metadata import array_key
from kvstore.storage import Storage
from kvstore.writer import ShardWriter


def write_again(raw: Store, storage: Storage, calibration: Calibration) -> Store:
    """Write all of a raw store to an empty one, as a writer would, in that one's codec and layout."""
    manifest, numbers = Store(storage).manifest, itertools.count()
    for commit in commits_of(raw):
        first = int(np.flatnonzero(raw.samples.shard == commit.shard)[0])
        for placed in fill_shards([row.num_tokens for row in commit.samples], manifest.layout):
            shard = next(numbers)
            start = shard * manifest.layout.shard_tokens
            rows = [
                dataclasses.replace(commit.samples[index], shard=shard, token_start=start + offset) for index, offset in placed
            ]
            spans = [(offset, commit.samples[index].num_tokens) for index, offset in placed]
            _fill(ShardWriter(storage, manifest, calibration, shard, rows), raw, [first + index for index, _ in placed], spans)
    return Store(storage)


def _fill(writer: ShardWriter, raw: Store, indices: Sequence[int], spans: Sequence[tuple[int, int]]) -> None:
    """Write samples of a raw store to a shard, and commit it."""
    dtype = np.dtype(raw.spec.dtype)  # a raw layer keeps the captured bits
    for layer in raw.spec.layer_numbers:
        batch = raw.read(indices, [layer])
        group, _ = writer.manifest.group_of(layer)
        key, value = (
            values[0] if group.quantizer(kind) else values[0].astype(dtype)
            for kind, values in zip(KINDS, (batch.key, batch.value), strict=True)
        )
        writer.put(layer, spans, key, value)
    for (offset, _), first, stop in zip(spans, batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
        beside = {name: numbers[first:stop] for name, numbers in batch.beside.items()}
        writer.put_tokens(offset, batch.input_ids[first:stop], beside)
    writer.commit()


def commits_of(store: Store) -> list[Commit]:
    return [read_commit(store.storage, shard) for shard in store.samples.summary["shard"].to_pylist()]


def kv_arrays(manifest: Manifest) -> list[str]:
    return [array_key(group, group.array(kind)) for group in manifest.groups for kind in KINDS]


def payload_per_token(store: Store, arrays: Sequence[str]) -> float:
    """Stored bytes per token of some arrays, without the indices of their shards."""
    payloads, tokens = _payloads(store, arrays)
    return float(payloads.sum() / tokens.sum())


def _payloads(store: Store, arrays: Sequence[str]) -> tuple[Int64[np.ndarray, "shard"], Int64[np.ndarray, "shard"]]:
    """Stored bytes of some arrays in each shard, without its indices, and its tokens."""
    commits, payloads = commits_of(store), []
    for commit in commits:
        sizes = {stored.path: stored.size_bytes for stored in commit.objects}
        payloads.append(
            sum(sizes[shard_key(array, commit.shard)] - _shard_index_bytes(store.manifest, array) for array in arrays)
        )
    return np.array(payloads), np.array([commit.num_tokens for commit in commits])


def relative_error(store: Store) -> float | None:
    """Two standard errors of the bytes per token of keys and values, as a ratio estimated from shards drawn from data without end
    (Cochran, Sampling Techniques, 6.4); None of one shard."""
    payloads, tokens = _payloads(store, kv_arrays(store.manifest))
    number = len(payloads)
    if number < 2:
        return None
    residuals = payloads - tokens * (payloads.sum() / tokens.sum())
    variance = (residuals**2).sum() * number / (number - 1)
    return float(2.0 * np.sqrt(variance) / payloads.sum())


def layer_shares(store: Store) -> dict[int, float]:
    """Part of each layer in the stored bytes of keys and values."""
    bits = {}
    for layer in store.spec.layers:
        measured = store.samples.fidelity()[str(layer.layer)]
        of_head = layer.key_dim * measured["key"]["bits"] + layer.value_dim * measured["value"]["bits"]
        bits[layer.layer] = layer.num_kv_heads * of_head
    return {layer: mine / sum(bits.values()) for layer, mine in bits.items()}


def _shard_index_bytes(manifest: Manifest, array: str) -> int:
    """Bytes at the end of a shard that say where its chunks are: the same for a full shard and for one that is nearly empty."""
    return index_bytes(manifest, array) - 4  # the crc32c of the last chunk is the chunk's
