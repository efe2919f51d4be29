"""Laying out an empty store, and making room in one for more shards: the manifest last, so that a crash changes nothing seen.

Knows no codes and no samples; writing shards is `writer`'s.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvstore.arrays import create_arrays, read_small_array
from kvstore.calibration import Calibration
from kvstore.codec import KINDS, Kind
from kvstore.errors import KVStoreError, StoreFormatError
from kvstore.gate import write_gate
from kvstore.groups import Group
from kvstore.manifest import ARRAYS, COMMITS, GATE, MANIFEST, PROGRESS, PROJECTION, SAMPLES, TOKENIZER, Manifest, write_manifest
from kvstore.metadata import array_key, array_keys, metadata_fingerprint, metadata_problems, read_metadata, resized
from kvstore.records import bytes_sha256
from kvstore.storage import STAGING, Storage

_OWN_ENTRIES = {ARRAYS, COMMITS, SAMPLES, TOKENIZER, PROJECTION, STAGING, MANIFEST, GATE, PROGRESS}
_CREATING = f"{STAGING}/creating"
_MOST_SHOWN = 5


def refuse_strangers(storage: Storage) -> None:
    """Make sure that a store may be created here: there is nothing, or what a creation leaves that died before its manifest.

    Raises:
        StoreFormatError: there is something that is not the beginning of a store.
    """
    # What such a creation leaves lies beside this file.
    ours = _OWN_ENTRIES - {MANIFEST, COMMITS} if storage.size(_CREATING) is not None else {STAGING}
    strangers: set[str] = set()
    for entry in storage.entries(""):
        strangers |= {entry.key.partition("/")[0]} - ours
        if len(strangers) == _MOST_SHOWN:
            break  # it may be somebody's home
    if strangers:
        raise StoreFormatError(
            f"--out: {storage.location} is not empty and is not a store being created (it holds "
            f"{', '.join(sorted(strangers))}); choose a new folder"
        )


def create_store(
    storage: Storage,
    manifest: Manifest,
    calibration: Calibration,
    tokenizer: Mapping[str, bytes] | None = None,
    gate: Mapping[str, Any] | None = None,
    projection: Mapping[str, bytes] | None = None,
) -> Manifest:
    """Lay out an empty store: arrays and tokenizer first, the manifest last, so that a crash leaves no store at all.

    Args:
        manifest: fingerprints of what is laid out here are filled in.
        tokenizer: tokenizer files to keep in the store, by name.
        gate: result of the gate run that this codec passed.
        projection: files of fitted maps to keep in the store, by name.

    Raises:
        StoreFormatError: there is something that is not the beginning of a store.
    """
    refuse_strangers(storage)
    storage.write(_CREATING, b"", replace=True)
    for entry in [entry for folder in (ARRAYS, TOKENIZER, PROJECTION, SAMPLES) for entry in storage.entries(folder)]:
        storage.delete(entry.key)  # of a creation that died before its manifest
    metadata: dict[str, str] = {}
    with storage.scratch("create") as scratch:
        create_arrays(scratch / ARRAYS, manifest, calibration)
        for file in sorted(path for path in scratch.rglob("*") if path.is_file()):
            if file.name == "zarr.json":
                document = json.loads(file.read_bytes())
                metadata[file.relative_to(scratch / ARRAYS).as_posix()] = metadata_fingerprint(document)
            storage.write(file.relative_to(scratch).as_posix(), file, replace=True)
    if gate is not None:
        write_gate(storage, "before", gate)
    manifest = dataclasses.replace(
        manifest,
        metadata=metadata,
        tokenizer=_keep(storage, TOKENIZER, tokenizer),
        projection=_keep(storage, PROJECTION, projection),
    )
    write_manifest(storage, manifest)
    storage.delete(_CREATING)
    return manifest


def _keep(storage: Storage, folder: str, files: Mapping[str, bytes] | None) -> dict[str, str]:
    """Put files into a folder of the store; their sha256 by name."""
    for name, content in (files or {}).items():
        storage.write(f"{folder}/{name}", content, replace=True)
    return {name: bytes_sha256(content) for name, content in sorted((files or {}).items())}


def restore_metadata(storage: Storage, manifest: Manifest) -> tuple[str, ...]:
    """Write every zarr.json that is not what the manifest says again, and the `layer` arrays: all of it follows from the manifest.

    Returns:
        Keys of the files written. A zarr.json that another version of zarr-python wrote in other words cannot be made again and is left.
    """
    written: list[str] = []
    layers = {array_key(group, "layer"): group.layers for group in manifest.groups}
    blank = {
        group.path: {kind: (zeros, zeros) for kind in KINDS if group.quantizer(kind) for zeros in [_zeros(group, kind)]}
        for group in manifest.groups
    }
    with storage.scratch("metadata") as scratch:
        create_arrays(scratch / ARRAYS, manifest, blank)
        for key in manifest.metadata:
            if any(metadata_problems(storage, manifest, key)):
                document = json.loads((scratch / ARRAYS / key).read_bytes())
                if metadata_fingerprint(document) == manifest.metadata[key]:
                    storage.write(f"{ARRAYS}/{key}", json.dumps(document, indent=2).encode(), replace=True)
                    written.append(f"{ARRAYS}/{key}")
        for array, expected in layers.items():
            try:
                if read_small_array(storage, manifest, array).tolist() == list(expected):
                    continue
            except KVStoreError:
                pass
            key = f"{ARRAYS}/{array}/c/0"
            storage.write(key, (scratch / key).read_bytes(), replace=True)
            written.append(key)
    return tuple(written)


def _zeros(group: Group, kind: Kind) -> np.ndarray:
    return np.zeros((len(group.layers), group.num_kv_heads, group.dim(kind)), dtype=np.float32)


def extend_store(storage: Storage, manifest: Manifest) -> None:
    """Make room for more shards: the arrays grow first, then the manifest says so; a crash in between changes nothing seen.

    Args:
        manifest: the store's own with a layout of more shards and one more part of data.
    """
    for array in array_keys(manifest):
        key = f"{array}/zarr.json"
        document = read_metadata(storage, manifest, key)
        grown = json.dumps(resized(document, manifest.layout.num_tokens), indent=2)
        storage.write(f"{ARRAYS}/{key}", grown.encode(), replace=True)
    for key in (f"{group.path}/zarr.json".lstrip("/") for group in manifest.groups):
        document = read_metadata(storage, manifest, key)
        if document.pop("consolidated_metadata", None) is not None:  # whose arrays are shorter than they now are
            storage.write(f"{ARRAYS}/{key}", json.dumps(document, indent=2).encode(), replace=True)
    write_manifest(storage, manifest)
