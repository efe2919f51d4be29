"""Several stores read as one: for runs that draw from all of them. Knows stores; no order, no batches."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int64

from kvstore.batches import KVBatch
from kvstore.errors import FingerprintMismatchError
from kvstore.manifest import Manifest
from kvstore.metadata import TOKEN_ARRAYS
from kvstore.reader import Store, open_store
from kvstore.records import differences, fingerprint
from kvstore.spec import KVSpec
from training.sampler import SampleTable

_ALIKE = ("weights", "tokenizer", "dtype", "layers", "spec", "alignment", "template", "response_only", "fit", "time")
"""Fields of the signal that make numbers comparable; codecs may differ, for what is read is decoded."""


@dataclasses.dataclass(frozen=True, slots=True)
class Samples:
    """The samples of all stores behind each other, columns as those of a store's own table."""

    ids: list[str]
    source: list[str]
    shard: Int64[np.ndarray, "sample"]
    """Shards of a later store count on from those of the one before."""
    num_tokens: Int64[np.ndarray, "sample"]
    count: Int64[np.ndarray, "sample"]
    store: Int64[np.ndarray, "sample"]

    def __len__(self) -> int:
        return len(self.ids)


class Mixture:
    """Stores of one teacher, read like one store whose samples are theirs, one store after the other.

    Pickles as they do.
    """

    def __init__(self, stores: Sequence[str | Store]) -> None:
        """Take them, or open them by their locations.

        Raises:
            FingerprintMismatchError: their keys and values are not of the same teacher, tokens and geometry.
            KVStoreError: a store is missing or damaged.
        """
        self.stores = [store if isinstance(store, Store) else open_store(store) for store in stores]
        first = self.stores[0]
        for other in self.stores[1:]:
            one, two = ({name: store.manifest.signal.get(name) for name in _ALIKE} for store in (first, other))
            for difference in differences(two, one):
                raise FingerprintMismatchError(
                    f"mix: {other.location} differs from {first.location} in {difference}; stores can be mixed that hold the same layers of one "
                    "teacher in the same tokens and geometry"
                )
        self._firsts = np.concatenate([[0], np.cumsum([len(store) for store in self.stores])])

    def __reduce__(self) -> tuple[type[Mixture], tuple[list[Store]]]:
        return Mixture, (self.stores,)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @property
    def location(self) -> str:
        return " + ".join(store.location for store in self.stores)

    @property
    def spec(self) -> KVSpec:
        return self.stores[0].spec

    @property
    def tokenizer_path(self) -> Path | None:
        return self.stores[0].tokenizer_path

    @property
    def manifest(self) -> Manifest:
        """Of the first store, which in all that decides what numbers mean is that of the others."""
        return self.stores[0].manifest

    @cached_property
    def samples(self) -> Samples:
        tables = [store.samples for store in self.stores]
        # A sample that two stores have counts to one document, so that it is not held out here and trained on there.
        document: dict[str, str] = {}
        shards = np.cumsum([0, *(store.manifest.layout.num_shards for store in self.stores)])[:-1]
        return Samples(
            ids=[each for table in tables for each in table.ids],
            source=[
                document.setdefault(each, source)
                for table in tables
                for each, source in zip(table.ids, table.source, strict=True)
            ],
            shard=np.concatenate([table.shard + first for table, first in zip(tables, shards, strict=True)]),
            num_tokens=np.concatenate([table.num_tokens for table in tables]).astype(np.int64),
            count=np.concatenate([table.count for table in tables]).astype(np.int64),
            store=np.repeat(np.arange(len(tables)), [len(table) for table in tables]),
        )

    def count_learnt(self, skip: int = 0) -> Int64[np.ndarray, "sample"]:
        return np.concatenate([store.count_learnt(skip) for store in self.stores])

    def count_compared(self, skip: int = 0) -> Int64[np.ndarray, "sample"]:
        return np.concatenate([store.count_compared(skip) for store in self.stores])

    def read(self, sample_indices: Iterable[SupportsIndex], layers: Sequence[int] | None = None) -> KVBatch:
        """Read samples as `Store.read` does: one read of each store that has any, put in the order asked for."""
        indices = np.array([int(index) for index in sample_indices], dtype=np.int64)
        owner = np.searchsorted(self._firsts, indices, side="right") - 1
        parts: dict[int, KVBatch] = {
            int(number): self.stores[number].read((indices[owner == number] - self._firsts[number]).tolist(), layers)
            for number in np.unique(owner)
        }
        any_part = next(iter(parts.values()))
        if len(parts) == 1:
            return any_part
        lengths = np.zeros(len(indices), dtype=np.int64)
        for number, part in parts.items():
            lengths[owner == number] = np.diff(part.cu_seqlens)
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        num_tokens = int(cu_seqlens[-1])
        out = KVBatch(
            layers=any_part.layers,
            key=np.empty((len(any_part.layers), num_tokens, *any_part.key.shape[2:]), dtype=np.float32),
            value=np.empty((len(any_part.layers), num_tokens, *any_part.value.shape[2:]), dtype=np.float32),
            input_ids=np.empty(num_tokens, dtype=np.int32),
            cu_seqlens=cu_seqlens,
            beside={
                name: np.full(num_tokens, TOKEN_ARRAYS[name].default, dtype=np.uint8)
                for name in sorted({name for part in parts.values() for name in part.beside})
            },
        )
        for number, part in parts.items():
            spans = zip(np.flatnonzero(owner == number).tolist(), itertools.pairwise(part.cu_seqlens.tolist()), strict=True)
            for place, (start, end) in spans:
                target = slice(int(cu_seqlens[place]), int(cu_seqlens[place + 1]))
                out.key[:, target], out.value[:, target] = part.key[:, start:end], part.value[:, start:end]
                out.input_ids[target] = part.input_ids[start:end]
                for name, array in part.beside.items():
                    np.asarray(out.beside[name])[target] = array[start:end]
        return out


Readable = Store | Mixture
"""What a run reads."""


def open_stores(location: str, others: Sequence[str]) -> Readable:
    """A store, or a mixture of it and others.

    Raises:
        FingerprintMismatchError: they do not belong together.
        KVStoreError: a store is missing or damaged.
    """
    return Mixture([location, *others]) if others else open_store(location)


def stores_of(store: Readable) -> Sequence[Store]:
    """The stores there are in it."""
    return store.stores if isinstance(store, Mixture) else [store]


def fingerprint_of(store: Readable) -> str:
    """Of a mixture that of all stores in their order."""
    if isinstance(store, Store):
        return store.manifest.fingerprint
    return fingerprint({"stores": [each.manifest.fingerprint for each in store.stores]})


def sample_table(store: Readable, *, sink_tokens: int = 0) -> SampleTable:
    """All samples of a store as a sampler wants them.

    Args:
        sink_tokens: first positions of each sample that are not compared.
    """
    samples = store.samples
    return SampleTable(
        index=np.arange(len(store), dtype=np.int64),
        shard=samples.shard,
        num_tokens=samples.num_tokens,
        count=samples.count,
        predicted=store.count_learnt(1),
        compared=store.count_compared(sink_tokens),
        store=samples.store if isinstance(samples, Samples) else None,
    )
