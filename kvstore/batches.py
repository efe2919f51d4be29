"""What a read of a store brings: samples laid end to end, with token ids alone, with codes, or with keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Shaped, UInt8

from kvstore.codec import Kind


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Some samples, concatenated in the order asked for; verified."""

    input_ids: Int32[np.ndarray, "token"]
    cu_seqlens: Int64[np.ndarray, "boundary"]
    """Sample i has tokens cu_seqlens[i]:cu_seqlens[i + 1]."""
    beside: Mapping[str, UInt8[np.ndarray, "token"]]
    """What else the store has of each token, by array name: `role` and masks (FORMAT.md 3.12 to 3.14)."""

    @property
    def learnt(self) -> Bool[np.ndarray, "token"]:
        """Which tokens are to be learnt from: the loss mask, all where there is none. In a response-only store no other token has
        keys and values (FORMAT.md 3.13)."""
        return self._mask("loss_mask")

    @property
    def has_kv(self) -> Bool[np.ndarray, "token"]:
        """Which tokens the KV mask says have keys and values, all where there is none (FORMAT.md 3.14)."""
        return self._mask("kv_mask")

    @property
    def compared(self) -> Bool[np.ndarray, "token"]:
        """Which tokens are to be learnt from and have keys and values (FORMAT.md 3.14)."""
        return self._mask("loss_mask", "kv_mask")

    def _mask(self, *names: str) -> Bool[np.ndarray, "token"]:
        found = np.ones(len(self.input_ids), dtype=np.bool_)
        for name in names:
            if name in self.beside:
                found &= self.beside[name] != 0
        return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KVBatch(TokenBatch):
    """The same with keys and values, decoded."""

    layers: tuple[int, ...]
    """Teacher layer numbers, in the order of the arrays."""
    key: Float32[np.ndarray, "layer token kv_head key_dim"]
    value: Float32[np.ndarray, "layer token kv_head value_dim"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CodeBatch(TokenBatch):
    """The same with codes as they lie on disk."""

    codes: Mapping[tuple[str, Kind], Shaped[np.ndarray, "slot token kv_head code"]]
    """By group path and kind; the slots of the layers asked for, in increasing order."""
