"""Which layers share their arrays: groups of equal geometry and codec (FORMAT.md 3.9). Pure records and planning; knows no files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import Field, StringConstraints

from kvstore.codec import KINDS, Codec, Kind, Quantizer, code_dim, codec_named, storage_dtype
from kvstore.layout import RowBytes
from kvstore.records import STRICT
from kvstore.spec import MAX_LAYERS, Dim, Dtype, KVSpec, LayerNumber, LayerSpec


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Layers that share their arrays: equal geometry, codec and storage dtype."""

    __pydantic_config__ = STRICT

    path: Annotated[str, StringConstraints(pattern=r"^(group_[1-9][0-9]{0,4})?$")]
    """Zarr group inside kv.zarr: '' for the root, else 'group_1' and so on."""
    layers: Annotated[tuple[LayerNumber, ...], Field(max_length=MAX_LAYERS)]
    """The teacher's layer numbers; the position is the slot."""
    num_kv_heads: Dim
    key_dim: Dim
    value_dim: Dim
    codec: str
    dtype: Dtype

    def quantizer(self, kind: Kind) -> Quantizer | None:
        return codec_named(self.codec).quantizer(kind)

    def array(self, kind: Kind) -> str:
        """Name of the array of codes: `value_byte` where two 4-bit codes share a byte."""
        quantizer = self.quantizer(kind)
        return f"{kind}_byte" if quantizer and quantizer.form == "nibble" else kind

    def dim(self, kind: Kind) -> int:
        return self.key_dim if kind == "key" else self.value_dim

    def code_shape(self, kind: Kind) -> tuple[int, int]:
        """(kv_head, code) axes of the array of codes."""
        return self.num_kv_heads, code_dim(self.quantizer(kind), self.dim(kind))

    def storage_dtype(self, kind: Kind) -> np.dtype[Any]:
        return storage_dtype(self.quantizer(kind), self.dtype)

    @property
    def row_bytes(self) -> RowBytes:
        """Of the larger of the two arrays."""
        layer = max(int(np.prod(self.code_shape(kind))) * self.storage_dtype(kind).itemsize for kind in KINDS)
        return RowBytes(token=len(self.layers) * layer, layer=layer)


def plan_groups(spec: KVSpec, codecs: Mapping[int, Codec]) -> tuple[Group, ...]:
    """Groups of a store: layers of equal geometry and codec together, the largest group at the root.

    Args:
        codecs: by teacher layer, as `parse_codecs` gives them.

    Raises:
        CodecError: the codec cannot hold a layer's dims.
    """
    alike: dict[tuple[tuple[int, int, int], str], list[LayerSpec]] = {}
    for layer in spec.layers:
        alike.setdefault((layer.geometry, codecs[layer.layer].name), []).append(layer)
    groups = [
        Group(
            path="",
            layers=tuple(layer.layer for layer in layers),
            num_kv_heads=heads,
            key_dim=key_dim,
            value_dim=value_dim,
            codec=codec,
            dtype=spec.dtype,
        )
        for ((heads, key_dim, value_dim), codec), layers in alike.items()
    ]
    groups.sort(key=lambda group: (-group.row_bytes.token, group.layers))
    return tuple(dataclasses.replace(group, path=f"group_{index}" if index else "") for index, group in enumerate(groups))
