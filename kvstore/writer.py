"""Creating and extending a store, and writing shards into it: objects first, the commit record last (FORMAT.md 7).

Several processes may write different shards of one store at once; `lease` keeps them apart. Knows no teacher: it is handed numpy
arrays.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float, Int32, UInt8

from kvstore import codec as codecs
from kvstore.arrays import (
    TOKEN_ARRAYS,
    array_key,
    array_keys,
    chunk_bytes,
    create_arrays,
    fill_value,
    index_bytes,
    metadata_fingerprint,
    open_folder,
    read_metadata,
    resized,
    shard_key,
)
from kvstore.calibration import Calibration, Channel, channels_of
from kvstore.codec import KINDS, Kind, Values
from kvstore.commits import Commit, SampleRow, StoredObject, commit_key, create_commit, read_commit, replace_commit
from kvstore.errors import CodecError, CorruptShardError, StoreFormatError, StoreWriteError
from kvstore.gate import write_gate
from kvstore.manifest import ARRAYS, COMMITS, GATE, MANIFEST, SAMPLES, TOKENIZER, Group, Manifest, write_manifest
from kvstore.records import bytes_sha256
from kvstore.storage import STAGING, Storage

_OWN_ENTRIES = {ARRAYS, COMMITS, SAMPLES, TOKENIZER, STAGING, MANIFEST, GATE}
_CREATING = f"{STAGING}/creating"
_EXACT = {"centred_error": 0.0, "max_abs_error": 0.0}
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
    tokenizer: Path | None = None,
    gate: Mapping[str, Any] | None = None,
) -> Manifest:
    """Lay out an empty store: arrays and tokenizer first, the manifest last, so that a crash leaves no store at all.

    Args:
        manifest: fingerprints of what is laid out here are filled in.
        tokenizer: folder of tokenizer files to keep in the store.
        gate: result of the gate run that this codec passed.

    Raises:
        StoreFormatError: there is something that is not the beginning of a store.
    """
    refuse_strangers(storage)
    storage.write(_CREATING, b"", replace=True)
    for entry in [entry for folder in (ARRAYS, TOKENIZER, SAMPLES) for entry in storage.entries(folder)]:
        storage.delete(entry.key)  # of a creation that died before its manifest
    metadata: dict[str, str] = {}
    with storage.scratch("create") as scratch:
        create_arrays(scratch / ARRAYS, manifest, calibration)
        for file in sorted(path for path in scratch.rglob("*") if path.is_file()):
            if file.name == "zarr.json":
                document = json.loads(file.read_bytes())
                metadata[file.relative_to(scratch / ARRAYS).as_posix()] = metadata_fingerprint(document)
            storage.write(file.relative_to(scratch).as_posix(), file, replace=True)
    kept: dict[str, str] = {}
    for file in sorted(tokenizer.iterdir()) if tokenizer else ():
        content = file.read_bytes()
        kept[file.name] = bytes_sha256(content)
        storage.write(f"{TOKENIZER}/{file.name}", content, replace=True)
    if gate is not None:
        write_gate(storage, "before", gate)
    manifest = dataclasses.replace(manifest, metadata=metadata, tokenizer=kept)
    write_manifest(storage, manifest)
    storage.delete(_CREATING)
    return manifest


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
    write_manifest(storage, manifest)


@dataclasses.dataclass(slots=True)
class _ErrorSums:
    """Running sums from which the fidelity of one layer's keys or values is computed."""

    count: int = 0
    saturated: float = 0
    squared_error: float = 0.0
    max_abs_error: float = 0.0
    squared: float = 0.0

    def adopt(self, fidelity: Mapping[str, float], count: int) -> None:
        """Add what another store measured on so many values."""
        self.count += count
        self.saturated += fidelity["saturation"] * count
        self.squared_error += fidelity["centred_error"] ** 2 * count
        self.max_abs_error = max(self.max_abs_error, fidelity["max_abs_error"])
        self.squared += count


class ShardWriter:
    """Collects the samples of one shard as codes and commits them.

    Holds the codes of one shard in memory. Not safe between threads; one writer per shard and process.
    """

    def __init__(
        self, storage: Storage, manifest: Manifest, calibration: Calibration, shard: int, samples: Sequence[SampleRow]
    ) -> None:
        self._storage, self.manifest, self._calibration = storage, manifest, calibration
        self.shard, self._samples = shard, tuple(samples)
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
        self._tokens = {
            name: np.full(tokens, TOKEN_ARRAYS[name].fill, dtype=TOKEN_ARRAYS[name].dtype) for name in manifest.token_arrays
        }
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
        inherited: Mapping[Kind, Mapping[str, float]] | None = None,
    ) -> None:
        """Encode one layer's keys and values of some samples, concatenated.

        Args:
            spans: token offset inside the shard and length of each sample, in the order of the token axis.
            inherited: fidelity of these numbers themselves where they were decoded from another store; its centred error is added
                in quadrature, its largest error as it is.

        Raises:
            CodecError: a value is not finite; shard, sample and layer are named.
        """
        group, slot = self.manifest.group_of(layer)
        for kind, values in zip(KINDS, (key, value), strict=True):
            mean, step = channels_of(self._calibration, group, kind, slot)
            try:
                codes = codecs.encode(group.quantizer(kind), values, mean, step)
            except CodecError as error:
                raise self._name_sample(error, layer, kind, spans, values) from None
            self._place(group, kind, slot, spans, codes)
            self._measure(layer, kind, values, codes, mean, step, inherited[kind] if inherited else _EXACT)

    def put_tokens(
        self,
        offset: int,
        input_ids: Int32[np.ndarray, "token"],
        beside: Mapping[str, UInt8[np.ndarray, "token"]] = MappingProxyType({}),
    ) -> None:
        """Token ids of one sample at a token offset inside the shard.

        Args:
            beside: what else is known of each token, by array name; an array of the store that is not here gets its default.

        Raises:
            StoreFormatError: the store has no such array.
        """
        if strangers := beside.keys() - self._tokens.keys():
            raise StoreFormatError(
                f"{', '.join(sorted(strangers))}: the store at {self._storage.location} has no such arrays, only "
                f"{', '.join(self._tokens)}; it was made from data without them. Choose a new store"
            )
        span = slice(offset, offset + len(input_ids))
        for name, array in self._tokens.items():
            array[span] = input_ids if name == "input_ids" else beside.get(name, TOKEN_ARRAYS[name].default)
        self._used_tokens = max(self._used_tokens, span.stop)

    def put_codes(
        self, layer: int, kind: Kind, spans: Sequence[tuple[int, int]], codes: codecs.Codes, fidelity: Mapping[str, float]
    ) -> None:
        """Take codes as another store of the same signal has them, with that store's fidelity in place of a measurement."""
        group, slot = self.manifest.group_of(layer)
        self._place(group, kind, slot, spans, codes)
        quantizer = group.quantizer(kind)
        self._errors[layer, kind].adopt(fidelity, codes.size * (quantizer.values_per_byte if quantizer else 1))

    def commit(self, *, replace: bool = False) -> Commit:
        """Write every object of the shard durably, then its commit record; an existing commit wins.

        Args:
            replace: write over a shard that is committed already; for `drop` and `repair`, which hold the whole store.

        Raises:
            StoreWriteError: the disk or bucket refused; nothing of the shard is visible then.
            CorruptShardError: another writer committed other bits meanwhile.
        """
        if not replace and self._storage.size(commit_key(self.shard)) is not None:
            return read_commit(self._storage, self.shard)
        try:
            with self._storage.scratch(f"shard-{self.shard:05d}") as scratch:
                objects, bits = self._write_objects(scratch, replace)
            commit = Commit(
                shard=self.shard,
                signal=self.manifest.signal_fingerprint,
                objects=tuple(objects),
                samples=self._samples,
                fidelity=self._fidelity(bits),
            )
            if replace:
                replace_commit(self._storage, commit)
                return commit
            if create_commit(self._storage, commit):
                return commit
        except OSError as error:
            raise StoreWriteError(
                f"shard {self.shard}: writing to {self._storage.location} failed ({error}); mend that (space, permissions, "
                "connection) and run the same command again: what is committed is kept, and nothing of this shard is visible"
            ) from error
        theirs = read_commit(self._storage, self.shard)
        if theirs.objects != commit.objects:
            raise CorruptShardError(
                f"shard {self.shard}: another process committed it with other bits while this one wrote it "
                f"({self._storage.location}); run 'kvpipe verify' and 'kvpipe repair'"
            )
        return theirs

    def _place(self, group: Group, kind: Kind, slot: int, spans: Sequence[tuple[int, int]], codes: codecs.Codes) -> None:
        target, position = self._codes[group.path, kind][slot], 0
        for offset, length in spans:
            target[offset : offset + length] = codes[position : position + length]
            position += length

    def _name_sample(
        self, error: CodecError, layer: int, kind: Kind, spans: Sequence[tuple[int, int]], values: Values
    ) -> CodecError:
        token = int(np.argwhere(~np.isfinite(values))[0][0])
        ends = np.cumsum([length for _, length in spans])
        offset = spans[int(np.searchsorted(ends, token, side="right"))][0]
        start = self.shard * self.manifest.layout.shard_tokens + offset
        sample = next((row for row in self._samples if row.token_start == start), None)
        named = f"sample {sample.id[:12]} ({sample.source})" if sample else f"the sample at token {start}"
        return CodecError(f"shard {self.shard}, {named}, layer {layer}, {kind}: {error}")

    def _measure(
        self,
        layer: int,
        kind: Kind,
        values: Values,
        codes: np.ndarray,
        mean: Channel | None,
        step: Channel | None,
        inherited: Mapping[str, float],
    ) -> None:
        quantizer = self.manifest.group_of(layer)[0].quantizer(kind)
        sums = self._errors[layer, kind]
        exact = values.astype(np.float32)
        centred = exact if mean is None else exact - mean
        error = codecs.decode(quantizer, codes, mean, step) - exact
        sums.count += exact.size
        sums.saturated += codecs.saturated(quantizer, codes)
        squared = float(np.vdot(centred, centred))
        sums.squared += squared
        sums.squared_error += float(np.vdot(error, error)) + inherited["centred_error"] ** 2 * squared
        sums.max_abs_error = max(sums.max_abs_error, float(np.abs(error).max(initial=0.0)) + inherited["max_abs_error"])

    def _fidelity(self, bits: Mapping[tuple[int, Kind], float]) -> dict[str, Any]:
        def record(layer: int, kind: Kind) -> dict[str, float]:
            sums = self._errors[layer, kind]
            return {
                "centred_error": float(np.sqrt(sums.squared_error / sums.squared)) if sums.squared else 0.0,
                "max_abs_error": sums.max_abs_error,
                "saturation": sums.saturated / max(sums.count, 1),
                "bits": bits[layer, kind] / max(sums.count, 1),
            }

        return {str(layer): {kind: record(layer, kind) for kind in KINDS} for layer in self.manifest.spec.layer_numbers}

    def _write_objects(self, scratch: Path, replace: bool) -> tuple[list[StoredObject], dict[tuple[int, Kind], float]]:
        chunk = self.manifest.layout.chunk_tokens
        used = self.manifest.layout.padded(self._used_tokens)
        objects: list[StoredObject] = []
        bits: dict[tuple[int, Kind], float] = dict.fromkeys(self._errors, 0.0)
        if not self._samples:  # all were dropped: a shard without objects
            for array in array_keys(self.manifest):
                self._storage.delete(shard_key(array, self.shard))
            return objects, bits
        for group, kind, array, codes in self._arrays():
            staged = self._stage_array(scratch, array, codes, used)
            if group is not None and kind is not None:
                sizes = chunk_bytes(staged, len(group.layers), self.manifest.layout.shard_tokens // chunk)
                bits.update({(layer, kind): 8.0 * size for layer, size in zip(group.layers, sizes, strict=True)})
            content = staged.read_bytes()
            stored = StoredObject(
                path=shard_key(array, self.shard),
                size_bytes=len(content),
                sha256=bytes_sha256(content),
                index_sha256=bytes_sha256(content[-index_bytes(self.manifest, array) :]),
            )
            self._publish(staged, stored, replace)
            objects.append(stored)
        return objects, bits

    def _publish(self, staged: Path, stored: StoredObject, replace: bool) -> None:
        """Put an object in place. One that is there already without a commit is a dead writer's, or our twin's with these bits."""
        if not self._storage.write(stored.path, staged, replace=replace) and (
            bytes_sha256(self._storage.read(stored.path)) != stored.sha256
        ):
            self._storage.write(stored.path, staged, replace=True)

    def _arrays(self) -> Iterator[tuple[Group | None, Kind | None, str, np.ndarray]]:
        for group in self.manifest.groups:
            for kind in KINDS:
                yield group, kind, array_key(group, group.array(kind)), self._codes[group.path, kind]
        yield from ((None, None, name, array) for name, array in self._tokens.items())

    def _stage_array(self, scratch: Path, array: str, codes: np.ndarray, used: int) -> Path:
        """Write one shard object through a copy of its array's metadata, so nothing half-written lies in the store."""
        folder = scratch / array
        folder.mkdir(parents=True)
        document = read_metadata(self._storage, self.manifest, f"{array}/zarr.json")
        num_tokens = (self.shard + 1) * self.manifest.layout.shard_tokens
        (folder / "zarr.json").write_text(json.dumps(resized(document, num_tokens)))
        start = self.shard * self.manifest.layout.shard_tokens
        with_layers = codes.ndim > 1
        region = (slice(None), slice(start, start + used)) if with_layers else (slice(start, start + used),)
        target = open_folder(folder)[region]
        try:
            target.write(codes[:, :used] if with_layers else codes[:used]).result()
        except ValueError as error:  # tensorstore's only class of error, a full disk included
            raise OSError(f"{array}: {error}") from error
        return scratch / shard_key(array, self.shard).removeprefix(f"{ARRAYS}/")
