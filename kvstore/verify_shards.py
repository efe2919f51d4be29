"""Verifying one shard: its objects against its commit record, and every value decoded. Part of `verify`, which collects what is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from kvstore.arrays import index_bytes, shard_key
from kvstore.codec import KINDS
from kvstore.commits import Commit, StoredObject, sample_id
from kvstore.errors import KVStoreError
from kvstore.manifest import Manifest
from kvstore.metadata import array_keys
from kvstore.reader import Store
from kvstore.records import bytes_sha256
from kvstore.spec import KVSpec
from kvstore.storage import Storage


class Add(Protocol):
    """Takes a problem; arguments are the fields of `verify.Problem`."""

    def __call__(self, part: str, message: str, shard: int | None = None, sample: str | None = None) -> object: ...


class ShardVerifier:
    """Looks at the shards of one store, one after another."""

    def __init__(self, storage: Storage, manifest: Manifest, add: Add, done: Callable[[int], object]) -> None:
        """Begin.

        Args:
            done: told the bytes read so far.
        """
        self._storage, self._manifest, self._add, self._done = storage, manifest, add, done
        self.num_bytes = 0
        """Read and hashed."""

    def objects(self, commit: Commit) -> bool:
        """Whether every object of a shard is the one that was committed."""
        arrays = {shard_key(array, commit.shard): array for array in array_keys(self._manifest)}
        if not {stored.path for stored in commit.objects} <= arrays.keys():
            return False
        good = True
        for stored in commit.objects:
            problem = self._object_problem(stored, arrays[stored.path])
            self._done(self.num_bytes)
            if problem:
                good = False
                samples = ", ".join(row.id[:12] for row in commit.samples[:3])
                self._add("shard", f"shard {commit.shard}: {stored.path}: {problem} (samples {samples} ...)", commit.shard)
        return good

    def _object_problem(self, stored: StoredObject, array: str) -> str | None:
        """What tells one file of a shard from the one that was committed."""
        try:
            size = self._storage.size(stored.path)
            if size != stored.size_bytes:
                return f"{size or 'no'} bytes, expected {stored.size_bytes}"
            content = self._storage.read(stored.path)
        except FileNotFoundError:
            return f"no bytes, expected {stored.size_bytes}"
        except (OSError, KVStoreError) as error:
            return f"cannot be read ({error})"
        self.num_bytes += len(content)
        if bytes_sha256(content) != stored.sha256:
            return f"sha256 {bytes_sha256(content)[:12]}, expected {stored.sha256[:12]}"
        end_bytes = index_bytes(self._manifest, array)
        if len(content) < end_bytes or bytes_sha256(content[-end_bytes:]) != stored.index_sha256:
            return "its index does not hash to what the record says"
        return None

    def decode(self, commit: Commit, good: bool) -> None:
        """Read every sample of a shard through the codecs, all at once, and one by one where that fails.

        Args:
            good: whether its files are those committed; of others the damaged samples are named, where the files are whole.
        """
        try:
            store = Store(self._storage, [commit])
            store.verify_shard(commit.shard)
            blocks = _blocks(self._manifest.spec)
            for first in range(0, len(store), 16):
                self._decode_samples(store, list(range(first, min(first + 16, len(store)))), blocks)
        except KVStoreError as error:
            if good:
                self._add("shard", f"shard {commit.shard}: {error}", commit.shard)

    def _decode_samples(self, store: Store, indices: list[int], blocks: list[list[int]]) -> None:
        try:
            for block in blocks:
                batch = store.read(indices, block)
                for kind in KINDS:
                    if not np.isfinite(getattr(batch, kind)).all():
                        raise KVStoreError(f"layers {block}, {kind}: NaN or infinity among the decoded values")
            for position, index in enumerate(indices):
                tokens = batch.input_ids[batch.cu_seqlens[position] : batch.cu_seqlens[position + 1]]
                if sample_id(tokens) != store.samples.ids[index]:
                    raise KVStoreError(f"its tokens hash to {sample_id(tokens)}, not to its id")
        except KVStoreError as error:
            if len(indices) > 1:
                for index in indices:
                    self._decode_samples(store, [index], blocks)
                return
            shard, sample = int(store.samples.shard[indices[0]]), store.samples.ids[indices[0]]
            self._add("shard", f"shard {shard}, sample {sample}: {error}", shard, sample)


def _blocks(spec: KVSpec) -> list[list[int]]:
    """Layers by geometry: what fits into one array each."""
    blocks: dict[tuple[int, int, int], list[int]] = {}
    for layer in spec.layers:
        blocks.setdefault(layer.geometry, []).append(layer.layer)
    return list(blocks.values())
