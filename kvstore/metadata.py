"""What every zarr.json of a store must say (FORMAT.md 2.6, 3): it follows from the manifest, and a store's author may have lied in it.

Knows names, shapes and codecs of the arrays; `arrays` makes, opens and reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from kvstore.codec import KINDS, Kind
from kvstore.errors import CorruptShardError
from kvstore.groups import Group
from kvstore.manifest import ARRAYS, Manifest
from kvstore.records import differences, fingerprint, parse_json, plain
from kvstore.storage import Storage

_MOST_METADATA_BYTES = 64 * 2**20


class TokenArray(NamedTuple):
    """An array with one number a token."""

    dtype: np.dtype[Any]
    fill: int
    """Where there is no token."""
    default: int
    """For a token of which nothing is said."""


TOKEN_ARRAYS = {
    "input_ids": TokenArray(np.dtype(np.int32), -1, -1),
    "role": TokenArray(np.dtype(np.uint8), 0, 0),
    "loss_mask": TokenArray(np.dtype(np.uint8), 0, 1),
    "kv_mask": TokenArray(np.dtype(np.uint8), 0, 1),
}
"""By name; FORMAT.md 3.6 and 3.12."""


def array_key(group: Group, name: str) -> str:
    """Path of an array inside kv.zarr."""
    return f"{group.path}/{name}".lstrip("/")


def array_keys(manifest: Manifest) -> list[str]:
    """Paths inside kv.zarr of the arrays that shards are written into: codes group by group, then those of one number a token."""
    return [*(array_key(group, group.array(kind)) for group in manifest.groups for kind in KINDS), *manifest.token_arrays]


def group_attributes(manifest: Manifest, group: Group) -> dict[str, Any]:
    """What the attribute `kvpipe` of a group says (FORMAT.md 3.9, 4.2)."""
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
    """The code where nothing is stored."""
    quantizer = group.quantizer(kind)
    return 0x88 if quantizer and quantizer.form == "nibble" else 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """What the manifest says of one array."""

    shape: tuple[int, ...]
    """With the token axis as long as the manifest has it."""
    dtype: np.dtype[Any]
    fill: int
    dimension_names: tuple[str, ...]
    chunk: tuple[int, ...] | None = None
    """Inner chunk of a sharded array; the shard is as long as the array but on its token axis."""
    shard: tuple[int, ...] | None = None


def expected_arrays(manifest: Manifest) -> dict[str, ArraySpec]:
    """Every array of a store by its path inside kv.zarr, as it follows from the manifest (FORMAT.md 3)."""
    layout, found = manifest.layout, dict[str, ArraySpec]()
    for group in manifest.groups:
        layers = len(group.layers)
        for kind in KINDS:
            heads, code = group.code_shape(kind)
            name = group.array(kind)
            found[array_key(group, name)] = ArraySpec(
                shape=(layers, layout.num_tokens, heads, code),
                dtype=group.storage_dtype(kind),
                fill=fill_value(group, kind),
                dimension_names=("layer", "token", "kv_head", f"{name}_dim"),
                chunk=(1, layout.chunk_tokens, heads, code),
                shard=(layers, layout.shard_tokens, heads, code),
            )
            if group.quantizer(kind) is not None:
                statistic = ArraySpec(
                    shape=(layers, group.num_kv_heads, group.dim(kind)),
                    dtype=np.dtype(np.float32),
                    fill=0,
                    dimension_names=("layer", "kv_head", f"{kind}_dim"),
                )
                found |= {array_key(group, f"{kind}_{name}"): statistic for name in ("mean", "step")}
        found[array_key(group, "layer")] = ArraySpec(
            shape=(layers,), dtype=np.dtype(np.int32), fill=0, dimension_names=("layer",)
        )
    for name in manifest.token_arrays:
        found[name] = ArraySpec(
            shape=(layout.num_tokens,),
            dtype=TOKEN_ARRAYS[name].dtype,
            fill=TOKEN_ARRAYS[name].fill,
            dimension_names=("token",),
            chunk=(layout.chunk_tokens,),
            shard=(layout.shard_tokens,),
        )
    return found


def read_metadata(storage: Storage, manifest: Manifest, key: str) -> dict[str, Any]:
    """One zarr.json, by its path inside kv.zarr.

    Raises:
        CorruptShardError: it is missing or not the one the manifest names.
    """
    where = f"{storage.location}/{ARRAYS}/{key}"
    try:
        document: dict[str, Any] = parse_json(storage.read(f"{ARRAYS}/{key}", most_bytes=_MOST_METADATA_BYTES), where)
        actual = metadata_fingerprint(document)
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise CorruptShardError(
            f"{where}: missing or no Zarr metadata ({error!r:.200}); 'kvpipe repair' makes it again"
        ) from error
    if actual != manifest.metadata.get(key):
        raise CorruptShardError(
            f"{where}: its content hashes to {actual}, the manifest says {manifest.metadata.get(key)}; it was changed, 'kvpipe repair' makes "
            "it again"
        )
    return document


def refuse_other_metadata(storage: Storage, manifest: Manifest, array: str) -> None:
    """Raise the first of `metadata_problems` of one array."""
    for problem in metadata_problems(storage, manifest, f"{array}/zarr.json"):
        raise CorruptShardError(problem)


def metadata_problems(storage: Storage, manifest: Manifest, key: str) -> Iterator[str]:
    """What is wrong with one zarr.json, by its path inside kv.zarr.

    Its hash in the manifest tells a change; that it says what the manifest says is compared besides, because a hash proves no more
    than that both are of one writer.
    """
    try:
        document = read_metadata(storage, manifest, key)
    except CorruptShardError as error:
        yield str(error)
        return
    where = f"{storage.location}/{ARRAYS}/{key}"
    expected = expected_arrays(manifest).get(key.removesuffix("/zarr.json"))
    if expected is None:
        yield from (f"{where}: {problem}" for problem in _group_problems(manifest, key, document))
        return
    try:
        yield from (f"{where}: {problem}" for problem in _array_problems(manifest, expected, document))
    except (TypeError, AttributeError, LookupError, ValueError) as error:
        yield f"{where}: no metadata of a Zarr array ({error!r:.200})"


def _array_problems(manifest: Manifest, expected: ArraySpec, document: Mapping[str, Any]) -> Iterator[str]:
    layout, shape = manifest.layout, list(document["shape"])
    if expected.chunk is not None:
        axis = expected.dimension_names.index("token")
        length, shape[axis] = shape[axis], layout.num_tokens
        # Longer arrays are fine: an extension grows them first.
        if type(length) is not int or length < layout.num_tokens or length % layout.shard_tokens:
            yield (
                f"token axis of {length!r:.40}, expected {layout.num_tokens} or more by whole shards of {layout.shard_tokens}; it was "
                "changed, or the manifest is newer than the arrays. 'kvpipe repair' mends it"
            )
    chunk = expected.shape if expected.shard is None else expected.shard
    wanted = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": expected.shape,
        "data_type": expected.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": expected.fill,
        "dimension_names": expected.dimension_names,
        "storage_transformers": [],
    }
    got = {**document, "shape": shape, "storage_transformers": document.get("storage_transformers") or []}
    yield from map(str, differences({name: got.get(name) for name in wanted}, plain(wanted)))
    yield from _codec_problems(expected, document["codecs"])


def _codec_problems(expected: ArraySpec, codecs: list[Mapping[str, Any]]) -> Iterator[str]:
    """What decodes to the same numbers is the same: a compressor describes itself, and its level is nobody's concern."""
    if expected.chunk is not None:
        if [codec["name"] for codec in codecs] != ["sharding_indexed"]:
            yield f"codecs: got {[codec['name'] for codec in codecs]}, expected sharding_indexed alone"
            return
        sharding = codecs[0]["configuration"]
        if list(sharding["chunk_shape"]) != list(expected.chunk):
            yield f"codecs: inner chunks of {sharding['chunk_shape']}, expected {list(expected.chunk)}"
        if sharding.get("index_location", "end") != "end":
            yield f"codecs: index at the {sharding['index_location']!r:.40}, expected at the end"
        if [_order(codec) for codec in sharding["index_codecs"]] != ["bytes little", "crc32c"]:
            yield "codecs: the index is encoded otherwise than as little-endian bytes and a crc32c"
        codecs = sharding["codecs"]
    names = [_order(codec) for codec in codecs]
    plain_bytes = {"bytes little", "bytes"} if expected.dtype.itemsize == 1 else {"bytes little"}
    compressed = len(names) == 3 and names[1] in ("zstd", "blosc", "gzip")
    if names[:1] == [] or names[0] not in plain_bytes or names[-1] != "crc32c" or not (len(names) == 2 or compressed):
        yield f"codecs: got {names}, expected little-endian bytes, a compressor for shards, and crc32c"


def _order(codec: Mapping[str, Any]) -> str:
    """A codec's name, with the byte order of `bytes`."""
    endian = codec.get("configuration", {}).get("endian") if codec["name"] == "bytes" else None
    return f"{codec['name']} {endian}" if endian else str(codec["name"])


def _group_problems(manifest: Manifest, key: str, document: Mapping[str, Any]) -> Iterator[str]:
    path = key.removesuffix("zarr.json").rstrip("/")
    group = next((group for group in manifest.groups if group.path == path), None)
    if document.get("zarr_format") != 3 or document.get("node_type") != "group" or group is None:
        yield "no Zarr v3 group of this store"
        return
    yield from map(str, differences((document.get("attributes") or {}).get("kvpipe"), plain(group_attributes(manifest, group))))
    if "consolidated_metadata" in document:
        try:
            yield from _consolidated_problems(manifest, path, document["consolidated_metadata"])
        except (TypeError, AttributeError, LookupError, ValueError) as error:
            yield f"consolidated_metadata is malformed ({error!r:.200})"


def _consolidated_problems(manifest: Manifest, group: str, consolidated: Mapping[str, Any] | None) -> Iterator[str]:
    """Others may consolidate metadata, and their readers then believe the copy: it must say what the arrays say."""
    for name, child in (consolidated or {}).get("metadata", {}).items():
        key = f"{group}/{name}/zarr.json".lstrip("/")
        if key not in manifest.metadata:
            continue  # an array somebody added
        names = child.get("dimension_names") or ()
        is_short = "token" in names and child["shape"][list(names).index("token")] < manifest.layout.num_tokens
        if is_short or metadata_fingerprint(child) != manifest.metadata[key]:
            yield f"consolidated_metadata of {name} is not that of the array; consolidate again, or 'kvpipe repair' takes it out"


def metadata_fingerprint(document: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of a zarr.json, without what changes or what others may add to it: the length of the token axis, which
    grows with the data, consolidated metadata, and attributes that are not ours."""
    ours = {name: value for name, value in document.items() if name != "consolidated_metadata"}
    if document.get("attributes"):
        ours["attributes"] = {name: value for name, value in document["attributes"].items() if name == "kvpipe"}
    if "token" in (document.get("dimension_names") or ()):
        shape: list[int | None] = list(document["shape"])
        shape[token_axis(document)] = None
        ours["shape"] = shape
    return fingerprint(ours)


def resized(document: Mapping[str, Any], num_tokens: int) -> dict[str, Any]:
    """The zarr.json of an array with another length of its token axis."""
    shape = list(document["shape"])
    shape[token_axis(document)] = num_tokens
    return {**document, "shape": shape}


def token_axis(document: Mapping[str, Any]) -> int:
    """Number of the axis that grows with the data."""
    return list(document["dimension_names"]).index("token")
