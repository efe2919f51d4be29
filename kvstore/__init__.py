"""The store: teacher keys and values in Zarr, with commit records, sample tables and fingerprints. Knows no model."""

from kvstore.batches import KVBatch
from kvstore.errors import (
    CodecError,
    CorruptShardError,
    FingerprintMismatchError,
    KVStoreError,
    LeaseHeldError,
    ShardNotCommittedError,
    StoreFormatError,
    StoreNotFoundError,
    StoreWriteError,
)
from kvstore.reader import Store, open_store
from kvstore.spec import KVSpec, LayerSpec, RopeSpec

__all__ = [
    "CodecError",
    "CorruptShardError",
    "FingerprintMismatchError",
    "KVBatch",
    "KVSpec",
    "KVStoreError",
    "LayerSpec",
    "LeaseHeldError",
    "RopeSpec",
    "ShardNotCommittedError",
    "Store",
    "StoreFormatError",
    "StoreNotFoundError",
    "StoreWriteError",
    "open_store",
]
