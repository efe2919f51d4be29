"""The Zarr arrays of a store: their names, shapes, codecs and attributes (FORMAT.md 3), made by zarr-python.

Bulk data goes through tensorstore on the same files. Knows no samples and no commits.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from kvstore.calibration import Calibration, calibration_fingerprint
from kvstore.codec import KINDS, Kind
from kvstore.errors import CorruptShardError
from kvstore.manifest import Group, Manifest

UNWRITTEN_TOKEN = -1
_MISSING_CHUNK = 2**64 - 1


def read_calibration(path: Path, manifest: Manifest) -> Calibration:
    """Mean and step of every quantised array.

    Raises:
        CorruptShardError: they are not those the manifest names.
    """
    root = zarr.open_group(path, mode="r")
    calibration: dict[str, dict[Kind, tuple[np.ndarray, np.ndarray]]] = {}
    for group in manifest.groups:
        for kind in KINDS:
            if group.quantizer(kind) is not None:
                names = (f"{group.path}/{kind}_{statistic}".lstrip("/") for statistic in ("mean", "step"))
                mean, step = (np.asarray(root[name][...]) for name in names)  # type: ignore[index]  # zarr types a member as array or group
                calibration.setdefault(group.path, {})[kind] = (mean, step)
    actual = calibration_fingerprint(calibration)
    if actual != manifest.calibration:
        raise CorruptShardError(
            f"calibration: mean and step arrays hash to {actual}, the manifest says {manifest.calibration} ({path}); "
            "the store is damaged, extract again"
        )
    return calibration


def create_arrays(path: Path, manifest: Manifest, calibration: Calibration) -> None:
    layout = manifest.layout
    zarr.create_group(path, zarr_format=3)
    for group in manifest.groups:
        node = zarr.open_group(path, path=group.path, mode="a")
        node.update_attributes({"kvpipe": _group_attributes(manifest, group)})
        for kind in KINDS:
            shape = (len(group.layers), layout.num_tokens, *group.code_shape(kind))
            name = group.array(kind)
            node.create_array(
                name,
                shape=shape,
                chunks=(1, layout.chunk_tokens, *shape[2:]),
                shards=(shape[0], layout.shard_tokens, *shape[2:]),
                dtype=group.storage_dtype(kind),
                fill_value=fill_value(group, kind),
                compressors=_compressors(group, kind),
                dimension_names=("layer", "token", "kv_head", f"{name}_dim"),
            )
            for statistic, array in zip(("mean", "step"), calibration.get(group.path, {}).get(kind, ()), strict=False):
                node.create_array(
                    f"{kind}_{statistic}",
                    data=np.ascontiguousarray(array, dtype=np.float32),
                    compressors=[Crc32cCodec()],
                    dimension_names=("layer", "kv_head", f"{kind}_dim"),
                )
        node.create_array(
            "layer",
            data=np.array(group.layers, dtype=np.int32),
            compressors=[Crc32cCodec()],
            dimension_names=("layer",),
        )
    zarr.open_group(path, mode="a").create_array(
        "input_ids",
        shape=(layout.num_tokens,),
        chunks=(layout.chunk_tokens,),
        shards=(layout.shard_tokens,),
        dtype=np.int32,
        fill_value=UNWRITTEN_TOKEN,
        compressors=[ZstdCodec(level=1), Crc32cCodec()],
        dimension_names=("token",),
    )


def _group_attributes(manifest: Manifest, group: Group) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "codec": group.codec,
        "logical_dtype": group.dtype,
        "key_domain": manifest.spec.key_domain,
        "decode": {kind: _decode_formula(group, kind) for kind in KINDS},
    }
    if not group.path:
        attributes["groups"] = {
            str(layer): [other.path, slot] for other in manifest.groups for slot, layer in enumerate(other.layers)
        }
        attributes["signal_fingerprint"] = manifest.signal_fingerprint
    return attributes


def _decode_formula(group: Group, kind: Kind) -> str:
    quantizer = group.quantizer(kind)
    if quantizer is None:
        return f"{kind} holds the bits of {group.dtype}"
    if quantizer.form == "int8":
        return f"{kind} * {kind}_step + {kind}_mean"
    if quantizer.form == "e4m3":
        return f"float8_e4m3fn({kind}) * {kind}_step + {kind}_mean"
    return f"(concat([{kind}_byte & 15, {kind}_byte >> 4], axis=-1) - 8) * {kind}_step + {kind}_mean"


def fill_value(group: Group, kind: Kind) -> int:
    quantizer = group.quantizer(kind)
    return 0x88 if quantizer and quantizer.form == "nibble" else 0


def _compressors(group: Group, kind: Kind) -> list[Any]:
    if group.quantizer(kind) is None:
        return [BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"), Crc32cCodec()]
    return [ZstdCodec(level=1), Crc32cCodec()]


def open_array(path: Path, *, context: ts.Context | None = None) -> ts.TensorStore:
    """Open one array by tensorstore so that missing data raises and every written chunk is stored, all-zero ones too."""
    return ts.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{path}/"},
            "fill_missing_data_reads": False,
            "store_data_equal_to_fill_value": True,
        },
        open=True,
        context=context or ts.Context(),
    ).result()


def chunk_bytes(shard: Path, num_layers: int, chunks_per_layer: int) -> list[int]:
    """Stored bytes of each layer, from the index at the end of a Zarr shard (offset and size of every inner chunk)."""
    count = num_layers * chunks_per_layer
    with shard.open("rb") as file:
        file.seek(-(16 * count + 4), os.SEEK_END)
        index = np.frombuffer(file.read(16 * count), dtype="<u8").reshape(num_layers, chunks_per_layer, 2)
    present = index[..., 0] != _MISSING_CHUNK
    return [int(size) for size in np.where(present, index[..., 1], 0).sum(axis=1)]
