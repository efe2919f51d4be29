"""Creating a store and writing shards into it: objects first, staged and renamed; the commit record last (FORMAT.md 7).

Several processes may write different shards of one store at once. Knows no teacher: it is handed numpy arrays.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int32

from kvstore import codec as codecs
from kvstore.arrays import UNWRITTEN_TOKEN, chunk_bytes, create_arrays, fill_value, open_array
from kvstore.calibration import Calibration, Channel, channels_of
from kvstore.codec import KINDS, Kind, Values
from kvstore.commits import Commit, SampleRow, StoredObject, commit_path, read_commit, write_commit
from kvstore.errors import StoreFormatError
from kvstore.manifest import ARRAYS, COMMITS, MANIFEST, SAMPLES, TOKENIZER, Group, Manifest
from kvstore.records import STAGING, file_sha256, fsync_dir, staging_path, write_sealed

_OWN_ENTRIES = {ARRAYS, COMMITS, SAMPLES, TOKENIZER, STAGING, MANIFEST}


def create_store(root: Path, manifest: Manifest, calibration: Calibration, tokenizer: Path | None = None) -> None:
    """Lay out an empty store: arrays and folders first, the manifest last, so that a crash leaves no store at all.

    Args:
        tokenizer: folder of tokenizer files to keep in the store.

    Raises:
        StoreFormatError: `root` holds something that is not the beginning of a store.
    """
    root.mkdir(parents=True, exist_ok=True)
    strangers = sorted(entry.name for entry in root.iterdir() if entry.name not in _OWN_ENTRIES)
    if strangers or (root / MANIFEST).exists() or any((root / COMMITS).glob("*.json")):
        raise StoreFormatError(
            f"--out: {root} is not empty and is not a store being created (it holds {', '.join(strangers[:5]) or MANIFEST}); "
            "choose a new folder"
        )
    arrays = staging_path(root, ARRAYS)
    create_arrays(arrays, manifest, calibration)
    shutil.rmtree(root / ARRAYS, ignore_errors=True)
    arrays.rename(root / ARRAYS)
    if tokenizer is not None:
        shutil.rmtree(root / TOKENIZER, ignore_errors=True)
        shutil.copytree(tokenizer, root / TOKENIZER)
    for folder in (COMMITS, SAMPLES):
        (root / folder).mkdir(exist_ok=True)
    fsync_dir(root)
    write_sealed(root / MANIFEST, manifest.to_json(), staging_path(root, "manifest"))


@dataclasses.dataclass(slots=True)
class _ErrorSums:
    """Running sums from which the fidelity of one layer's keys or values is computed."""

    count: int = 0
    saturated: int = 0
    squared_error: float = 0.0
    max_abs_error: float = 0.0
    total: float = 0.0
    squared: float = 0.0


class ShardWriter:
    """Collects the samples of one shard as codes and commits them.

    Holds the codes of one shard in memory. Not safe between threads; one writer per shard and process.
    """

    def __init__(self, root: Path, manifest: Manifest, calibration: Calibration, shard: int) -> None:
        self._root, self._manifest, self._calibration, self.shard = root, manifest, calibration, shard
        tokens = manifest.layout.shard_tokens
        self._codes: dict[tuple[str, Kind], np.ndarray] = {
            (group.path, kind): np.full(
                (len(group.layers), tokens, *group.code_shape(kind)),
                fill_value(group, kind),
                dtype=group.storage_dtype(kind),
            )
            for group in manifest.groups
            for kind in KINDS
        }
        self._input_ids = np.full(tokens, UNWRITTEN_TOKEN, dtype=np.int32)
        self._errors: dict[tuple[int, Kind], _ErrorSums] = {
            (layer, kind): _ErrorSums() for layer in manifest.spec.layer_numbers for kind in KINDS
        }
        self._used_tokens = 0

    def put(
        self,
        layer: int,
        spans: Sequence[tuple[int, int]],
        key: Float[np.ndarray, "token kv_head key_dim"],
        value: Float[np.ndarray, "token kv_head value_dim"],
    ) -> None:
        """Encode one layer's keys and values of some samples, concatenated.

        Args:
            spans: token offset inside the shard and length of each sample, in the order of the token axis.

        Raises:
            CodecError: a value is not finite.
        """
        group, slot = self._manifest.group_of(layer)
        for kind, values in zip(KINDS, (key, value), strict=True):
            mean, step = channels_of(self._calibration, group, kind, slot)
            codes = codecs.encode(group.quantizer(kind), values, mean, step)
            target, position = self._codes[group.path, kind][slot], 0
            for offset, length in spans:
                target[offset : offset + length] = codes[position : position + length]
                position += length
            self._measure(layer, kind, values, codes, mean, step)

    def put_tokens(self, offset: int, input_ids: Int32[np.ndarray, "token"]) -> None:
        """Token ids of one sample at a token offset inside the shard."""
        self._input_ids[offset : offset + len(input_ids)] = input_ids
        self._used_tokens = max(self._used_tokens, offset + len(input_ids))

    def commit(self, samples: Sequence[SampleRow]) -> Commit:
        """Write every object of the shard durably, then its commit record; an existing commit wins.

        Raises:
            OSError: the disk refused; nothing of the shard is visible then.
        """
        if commit_path(self._root, self.shard).exists():
            return read_commit(self._root, self.shard)
        staging = staging_path(self._root, f"shard-{self.shard:05d}")
        try:
            objects, bits = self._write_objects(staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        commit = Commit(
            shard=self.shard,
            signal=self._manifest.signal_fingerprint,
            objects=tuple(objects),
            samples=tuple(samples),
            fidelity=self._fidelity(bits),
        )
        return commit if write_commit(self._root, commit) else read_commit(self._root, self.shard)

    def _measure(
        self, layer: int, kind: Kind, values: Values, codes: np.ndarray, mean: Channel | None, step: Channel | None
    ) -> None:
        quantizer = self._manifest.group_of(layer)[0].quantizer(kind)
        sums = self._errors[layer, kind]
        exact = values.astype(np.float32)
        centred = exact if mean is None else exact - mean
        error = codecs.decode(quantizer, codes, mean, step) - exact
        sums.count += exact.size
        sums.saturated += codecs.saturated(quantizer, codes)
        sums.squared_error += float(np.vdot(error, error))
        sums.max_abs_error = max(sums.max_abs_error, float(np.abs(error).max(initial=0.0)))
        sums.squared += float(np.vdot(centred, centred))

    def _fidelity(self, bits: Mapping[tuple[int, Kind], float]) -> dict[str, Any]:
        def record(layer: int, kind: Kind) -> dict[str, float]:
            sums = self._errors[layer, kind]
            return {
                "centred_error": float(np.sqrt(sums.squared_error / sums.squared)) if sums.squared else 0.0,
                "max_abs_error": sums.max_abs_error,
                "saturation": sums.saturated / max(sums.count, 1),
                "bits": bits[layer, kind] / max(sums.count, 1),
            }

        return {str(layer): {kind: record(layer, kind) for kind in KINDS} for layer in self._manifest.spec.layer_numbers}

    def _write_objects(self, staging: Path) -> tuple[list[StoredObject], dict[tuple[int, Kind], float]]:
        chunk = self._manifest.layout.chunk_tokens
        used = -(-self._used_tokens // chunk) * chunk
        objects: list[StoredObject] = []
        bits: dict[tuple[int, Kind], float] = {}
        for group, name, kind, codes in self._arrays():
            array = f"{group.path}/{name}" if group and group.path else name
            staged = self._stage_array(staging, array, codes, used)
            if group is not None and kind is not None:
                sizes = chunk_bytes(staged, len(group.layers), self._manifest.layout.shard_tokens // chunk)
                bits.update({(layer, kind): 8.0 * size for layer, size in zip(group.layers, sizes, strict=True)})
            target = self._root / ARRAYS / array / staged.relative_to(staging / array)
            record = StoredObject(
                path=str(target.relative_to(self._root)), size_bytes=staged.stat().st_size, sha256=file_sha256(staged)
            )
            target.parent.mkdir(parents=True, exist_ok=True)
            staged.replace(target)
            fsync_dir(target.parent)
            objects.append(record)
        return objects, bits

    def _arrays(self) -> Iterator[tuple[Group | None, str, Kind | None, np.ndarray]]:
        for group in self._manifest.groups:
            for kind in KINDS:
                yield group, group.array(kind), kind, self._codes[group.path, kind]
        yield None, "input_ids", None, self._input_ids

    def _stage_array(self, staging: Path, array: str, codes: np.ndarray, used: int) -> Path:
        """Write one shard object through a copy of its array's metadata, so nothing half-written lies in the store."""
        folder = staging / array
        folder.mkdir(parents=True)
        shutil.copyfile(self._root / ARRAYS / array / "zarr.json", folder / "zarr.json")
        start = self.shard * self._manifest.layout.shard_tokens
        with_layers = codes.ndim > 1
        region = (slice(None), slice(start, start + used)) if with_layers else (slice(start, start + used),)
        target = open_array(folder)[region]
        target.write(codes[:, :used] if with_layers else codes[:used]).result()
        parts = ("c", "0", str(self.shard), "0", "0") if with_layers else ("c", str(self.shard))
        return folder.joinpath(*parts)
