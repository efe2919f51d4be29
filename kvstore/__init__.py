"""The store: teacher keys and values in Zarr, with commit records, sample tables and fingerprints. Knows no model."""

from kvstore.errors import (
    CodecError,
    CorruptShardError,
    FingerprintMismatchError,
    KVStoreError,
    ShardNotCommittedError,
    StoreFormatError,
    StoreNotFoundError,
)
from kvstore.reader import KVBatch, Store, open_store
from kvstore.spec import KVSpec, LayerSpec, RopeSpec

__all__ = [
    "CodecError",
    "CorruptShardError",
    "FingerprintMismatchError",
    "KVBatch",
    "KVSpec",
    "KVStoreError",
    "LayerSpec",
    "RopeSpec",
    "ShardNotCommittedError",
    "Store",
    "StoreFormatError",
    "StoreNotFoundError",
    "open_store",
]
