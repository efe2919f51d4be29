"""The Zarr arrays of a store, made by zarr-python (FORMAT.md 3); `metadata` knows their names and what each says of itself.

Everything else goes through tensorstore on the same files. Knows no samples and no commits.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import tensorstore as ts
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from kvstore.calibration import Calibration, calibration_fingerprint
from kvstore.codec import KINDS, Kind
from kvstore.errors import CorruptShardError, StoreFormatError
from kvstore.groups import Group
from kvstore.manifest import ARRAYS, Manifest
from kvstore.metadata import (
    TOKEN_ARRAYS,
    array_key,
    expected_arrays,
    fill_value,
    group_attributes,
    refuse_other_metadata,
    resized,
    token_axis,
)
from kvstore.storage import Storage

_MISSING_CHUNK = 2**64 - 1
_STORE_ZEROS: Any = {"write_empty_chunks": True}
"""A mean of nothing but zeros, or layer 0 alone, equals the fill value, and zarr would leave its chunk out."""


def shard_key(array: str, shard: int) -> str:
    """Key in the store of one shard of one array."""
    return f"{ARRAYS}/{array}/c/{shard}" if array in TOKEN_ARRAYS else f"{ARRAYS}/{array}/c/0/{shard}/0/0"


def index_bytes(manifest: Manifest, array: str) -> int:
    """Length of what `StoredObject.index_sha256` covers: the index at the end of a Zarr shard, which is offset and size of every
    inner chunk and a crc32c, and the crc32c of the chunk before it, for two shards may hold chunks of the same sizes."""
    group = next((group for group in manifest.groups for kind in KINDS if array_key(group, group.array(kind)) == array), None)
    chunks = manifest.layout.shard_tokens // manifest.layout.chunk_tokens
    return 16 * chunks * (len(group.layers) if group else 1) + 4 + 4


def read_calibration(storage: Storage, manifest: Manifest) -> Calibration:
    """Mean and step of every quantised array.

    Raises:
        CorruptShardError: they are not those the manifest names.
    """
    calibration: dict[str, dict[Kind, tuple[np.ndarray, np.ndarray]]] = {}
    for group in manifest.groups:
        for kind in KINDS:
            if group.quantizer(kind) is not None:
                keys = (array_key(group, f"{kind}_{statistic}") for statistic in ("mean", "step"))
                mean, step = (read_small_array(storage, manifest, key) for key in keys)
                calibration.setdefault(group.path, {})[kind] = (mean, step)
    actual = calibration_fingerprint(calibration)
    if actual != manifest.calibration:
        raise CorruptShardError(
            f"calibration: mean and step arrays hash to {actual}, the manifest says {manifest.calibration} ({storage.location}); "
            "the store is damaged, restore kv.zarr's *_mean and *_step or extract again"
        )
    return calibration


def read_small_array(storage: Storage, manifest: Manifest, array: str) -> np.ndarray:
    """One of the arrays that are not sharded: a single chunk, whose bytes are read here, so that a foreign one asks for no memory.

    Raises:
        CorruptShardError: it is missing or damaged.
    """
    expected = expected_arrays(manifest)[array]
    refuse_other_metadata(storage, manifest, array)
    where = f"{storage.location}/{ARRAYS}/{array}"
    size = int(np.prod(expected.shape)) * expected.dtype.itemsize
    try:
        content = storage.read(f"{ARRAYS}/{array}/c/{'/'.join('0' * len(expected.shape))}", most_bytes=size + 4)
    except (FileNotFoundError, NotADirectoryError, StoreFormatError) as error:
        raise CorruptShardError(f"{where}: {error}; it is missing or damaged, restore it") from error
    if len(content) != size + 4 or google_crc32c.value(content[:size]) != int.from_bytes(content[size:], "little"):
        raise CorruptShardError(
            f"{where}: {len(content)} bytes, expected {size + 4} with a crc32c that fits; it is missing or damaged, restore it"
        )
    return np.frombuffer(content[:size], dtype=expected.dtype).reshape(expected.shape).copy()


def create_arrays(path: Path, manifest: Manifest, calibration: Calibration) -> None:
    """Lay out the empty arrays of a store in a local folder."""
    layout = manifest.layout
    zarr.create_group(path, zarr_format=3)
    for group in manifest.groups:
        node = zarr.open_group(path, path=group.path, mode="a")
        node.update_attributes({"kvpipe": group_attributes(manifest, group)})
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
                    config=_STORE_ZEROS,
                    dimension_names=("layer", "kv_head", f"{kind}_dim"),
                )
        node.create_array(
            "layer",
            data=np.array(group.layers, dtype=np.int32),
            compressors=[Crc32cCodec()],
            config=_STORE_ZEROS,
            dimension_names=("layer",),
        )
    for name in manifest.token_arrays:
        zarr.open_group(path, mode="a").create_array(
            name,
            shape=(layout.num_tokens,),
            chunks=(layout.chunk_tokens,),
            shards=(layout.shard_tokens,),
            dtype=TOKEN_ARRAYS[name].dtype,
            fill_value=TOKEN_ARRAYS[name].fill,
            compressors=[ZstdCodec(level=1), Crc32cCodec()],
            dimension_names=("token",),
        )


def _compressors(group: Group, kind: Kind) -> list[Any]:
    if group.quantizer(kind) is None:
        return [BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"), Crc32cCodec()]
    return [ZstdCodec(level=1), Crc32cCodec()]


def open_array(storage: Storage, manifest: Manifest, array: str, *, context: ts.Context | None = None) -> ts.TensorStore:
    """Open an array of a store for reading, so that missing data raises.

    Raises:
        CorruptShardError: its zarr.json is missing or not what the manifest says.
    """
    refuse_other_metadata(storage, manifest, array)
    try:
        return _open(storage.tensorstore_spec(f"{ARRAYS}/{array}"), context)
    except ValueError as error:
        if unreachable(error):
            raise OSError(f"{storage.location}/{ARRAYS}/{array}: {error}; see to the connection and try again") from error
        raise CorruptShardError(f"{storage.location}/{ARRAYS}/{array}: cannot be opened ({error})") from error


def unreachable(error: ValueError) -> bool:
    """Whether tensorstore, whose only class of error this is, failed to reach a bucket, which says nothing of the data."""
    text = str(error)
    return "retry attempts failed" in text or text.startswith(("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED"))


def encode_shard(document: Mapping[str, Any], codes: np.ndarray, folder: Path) -> Path:
    """The object of one shard, made in a folder of its own; every chunk that `codes` reach is stored, all-zero ones too.

    In a file and not in memory, for to bring it from there to Python copies it while no other thread can run.

    Args:
        document: zarr.json of the array.
        codes: the shard's numbers, or those of its first tokens.

    Raises:
        OSError: there is no room.
    """
    region = tuple(slice(0, length) for length in codes.shape)
    try:
        array = ts.open(
            {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": f"{folder}/"},
                "metadata": resized(document, _shard_tokens(document)),
                "store_data_equal_to_fill_value": True,
                # Whoever puts the file in place syncs it, and the folder is ours alone.
                "context": {"file_io_sync": False, "file_io_locking": {"mode": "none"}},
            },
            create=True,
            context=ts.Context(),
        ).result()
        array[region].write(codes, can_reference_source_data_indefinitely=True).result()
    except ValueError as error:  # of tensorstore whatever went wrong
        raise OSError(str(error).partition(" [tensorstore_spec=")[0]) from error  # which repeats all metadata
    (shard,) = (path for path in (folder / "c").rglob("*") if path.is_file())
    return shard


def _open(kvstore: dict[str, Any], context: ts.Context | None) -> ts.TensorStore:
    return ts.open(
        {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False},
        open=True,
        context=context or ts.Context(),
    ).result()


def _shard_tokens(document: Mapping[str, Any]) -> int:
    return int(document["chunk_grid"]["configuration"]["chunk_shape"][token_axis(document)])


def chunk_bytes(shard: bytes | mmap.mmap, num_layers: int, chunks_per_layer: int) -> list[int]:
    """Stored bytes of each layer, from the index at the end of a Zarr shard (offset and size of every inner chunk)."""
    count = num_layers * chunks_per_layer
    index = np.frombuffer(shard, dtype="<u8", count=2 * count, offset=len(shard) - (16 * count + 4))
    index = index.reshape(num_layers, chunks_per_layer, 2)
    present = index[..., 0] != _MISSING_CHUNK
    return [int(size) for size in np.where(present, index[..., 1], 0).sum(axis=1)]
