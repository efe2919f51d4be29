"""Writing shards into a store: objects first, the commit record last (FORMAT.md 7).

Several processes may write different shards of one store at once; `lease` keeps them apart. Knows no teacher: it is handed numpy
arrays.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int32, UInt8

from kvstore import codec as codecs
from kvstore.arrays import chunk_bytes, encode_shard, index_bytes, shard_key
from kvstore.calibration import Calibration, channels_of
from kvstore.codec import KINDS, Encoded, Kind, Values
from kvstore.commits import Commit, Fidelity, SampleRow, StoredObject, commit_key, create_commit, read_commit, replace_commit
from kvstore.errors import CodecError, CorruptShardError, StoreFormatError, StoreWriteError
from kvstore.groups import Group
from kvstore.manifest import Manifest
from kvstore.metadata import TOKEN_ARRAYS, array_key, array_keys, fill_value, read_metadata
from kvstore.records import bytes_sha256
from kvstore.storage import Storage


class Placed(NamedTuple):
    """Where tokens of a shard come from: some in a row, of one sample or of several that follow each other."""

    first: int
    """On the token axis of what is handed over."""
    offset: int
    """On the token axis of the shard."""
    length: int


def end_to_end(spans: Iterable[tuple[int, int]]) -> list[Placed]:
    """Samples of these offsets and lengths, handed over one behind the other."""
    placed, first = [], 0
    for offset, length in spans:
        placed.append(Placed(first, offset, length))
        first += length
    return placed


class ShardWriter:
    """Collects the samples of one shard as codes and commits them.

    Holds the codes of one shard in memory, and while it commits the compressed object of one array on disk. Not safe between threads; one
    writer per shard and process.
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
        # By token, so that putting the same samples again, after half of a batch was lost, counts nothing twice.
        self._measures = {(layer, kind): np.zeros((3, tokens)) for layer in manifest.spec.layer_numbers for kind in KINDS}
        self._used_tokens = 0

    def put(
        self,
        layer: int,
        spans: Sequence[tuple[int, int]],
        key: Float[np.ndarray, "token kv_head key_dim"],
        value: Float[np.ndarray, "token kv_head value_dim"],
        inherited: Mapping[Kind, Fidelity] | None = None,
    ) -> dict[Kind, np.ndarray]:
        """Encode one layer's keys and values of some samples, concatenated; what that alone did to each token (`Encoded`).

        Args:
            spans: token offset inside the shard and length of each sample, in the order of the token axis.
            inherited: fidelity of these numbers themselves where they were decoded from another store; its centred error is added
                in quadrature, its largest error as it is.

        Raises:
            CodecError: a value is not finite; shard, sample and layer are named.
        """
        placed = end_to_end(spans)
        group, slot = self.manifest.group_of(layer)
        measured: dict[Kind, np.ndarray] = {}
        for kind, values in zip(KINDS, (key, value), strict=True):
            mean, step = channels_of(self._calibration, group, kind, slot)
            encoded = codecs.encode_measured(group.quantizer(kind), values, mean, step)
            if not np.isfinite(encoded.measures[0]).all():
                self._refuse(layer, kind, placed, values)
            measured[kind] = encoded.measures.copy()
            if inherited is not None:
                measures = encoded.measures.astype(np.float64)
                measures[1] += inherited[kind]["centred_error"] ** 2 * measures[0]
                measures[2] += inherited[kind]["max_abs_error"]
                encoded = Encoded(encoded.codes, measures)
            self.put_encoded(layer, kind, placed, encoded)
        return measured

    def put_encoded(self, layer: int, kind: Kind, placed: Sequence[Placed], encoded: Encoded) -> None:
        """Take one layer's keys or values as `codec.encode_measured` left them; the same again changes nothing.

        Args:
            encoded: numpy arrays, encoded with this store's quantizer and calibration; tokens that `placed` leaves out are padding.

        Raises:
            CodecError: a value was not finite; shard, sample and layer are named.
        """
        group, slot = self.manifest.group_of(layer)
        codes, measures = self._codes[group.path, kind][slot], self._measures[layer, kind]
        finite = np.isfinite(encoded.measures[0])
        for first, offset, length in placed:
            source, target = slice(first, first + length), slice(offset, offset + length)
            if not finite[source].all():
                raise CodecError(
                    self._where(layer, kind, offset + int(finite[source].argmin())) + "; the teacher's output is broken there"
                )
            codes[target], measures[:, target] = encoded.codes[source], encoded.measures[:, source]

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
        self, layer: int, kind: Kind, spans: Sequence[tuple[int, int]], codes: codecs.Codes, fidelity: Fidelity
    ) -> None:
        """Take codes as another store of the same signal has them, with that store's fidelity in place of a measurement."""
        measures = np.empty((3, len(codes)))
        measures[:] = [[1.0], [fidelity["centred_error"] ** 2], [fidelity["max_abs_error"]]]
        self.put_encoded(layer, kind, end_to_end(spans), Encoded(codes, measures))

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
        masks = (["loss_mask"] if self.manifest.is_response_only else []) + ["kv_mask"]
        for mask in (self._tokens[name] for name in masks if name in self._tokens):
            self._leave_out(mask == 0)
        try:
            objects, bits = self._write_objects(replace)
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

    def _leave_out(self, tokens: Bool[np.ndarray, "token"]) -> None:
        """Forget keys, values and measures of these tokens of the shard: what is the same everywhere compresses to nothing."""
        for group in self.manifest.groups:
            for kind in KINDS:
                self._codes[group.path, kind][:, tokens] = fill_value(group, kind)
        for measures in self._measures.values():
            measures[:, tokens] = 0.0

    def _refuse(self, layer: int, kind: Kind, placed: Sequence[Placed], values: Values) -> None:
        try:
            codecs.refuse_not_finite(values)
        except CodecError as error:
            token = int(np.argwhere(~np.isfinite(values))[0][0])
            span = next(span for span in placed if token < span.first + span.length)
            raise CodecError(f"{self._where(layer, kind, span.offset + token - span.first)}: {error}") from None

    def _where(self, layer: int, kind: Kind, token: int) -> str:
        """Names the sample at a token of the shard."""
        token += self.shard * self.manifest.layout.shard_tokens
        sample = next((row for row in self._samples if row.token_start <= token < row.token_start + row.num_tokens), None)
        named = f"sample {sample.id[:12]} ({sample.source})" if sample else f"the sample at token {token}"
        return f"shard {self.shard}, {named}, layer {layer}, {kind}"

    def _fidelity(self, bits: Mapping[tuple[int, Kind], float]) -> dict[str, Any]:
        def record(layer: int, kind: Kind) -> dict[str, float]:
            group, slot = self.manifest.group_of(layer)
            codes = self._codes[group.path, kind][slot, : self._used_tokens]
            squared, squared_error = (float(measure.sum()) for measure in self._measures[layer, kind][:2])
            count = max(sum(row.num_tokens for row in self._samples) * group.num_kv_heads * group.dim(kind), 1)
            return {
                "centred_error": float(np.sqrt(squared_error / squared)) if squared else 0.0,
                "max_abs_error": float(self._measures[layer, kind][2].max()),
                "saturation": codecs.saturated(group.quantizer(kind), codes) / count,
                "bits": bits[layer, kind] / count,
            }

        return {str(layer): {kind: record(layer, kind) for kind in KINDS} for layer in self.manifest.spec.layer_numbers}

    def _write_objects(self, replace: bool) -> tuple[list[StoredObject], dict[tuple[int, Kind], float]]:
        chunk = self.manifest.layout.chunk_tokens
        used = self.manifest.layout.padded(self._used_tokens)
        objects: list[StoredObject] = []
        bits: dict[tuple[int, Kind], float] = dict.fromkeys(self._measures, 0.0)
        if not self._samples:  # all were dropped: a shard without objects
            for array in array_keys(self.manifest):
                self._storage.delete(shard_key(array, self.shard))
            return objects, bits
        for group, kind, array, codes in self._arrays():
            document = read_metadata(self._storage, self.manifest, f"{array}/zarr.json")
            with self._storage.scratch(f"shard-{self.shard:05d}") as folder:
                file = encode_shard(document, codes[:used] if group is None else codes[:, :used], folder)
                with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    if group is not None and kind is not None:
                        sizes = chunk_bytes(content, len(group.layers), self.manifest.layout.shard_tokens // chunk)
                        bits.update({(layer, kind): 8.0 * size for layer, size in zip(group.layers, sizes, strict=True)})
                    stored = StoredObject(
                        path=shard_key(array, self.shard),
                        size_bytes=len(content),
                        sha256=bytes_sha256(content),
                        index_sha256=bytes_sha256(content[-index_bytes(self.manifest, array) :]),
                    )
                self._publish(file, stored, replace)
            objects.append(stored)
        return objects, bits

    def _publish(self, content: Path, stored: StoredObject, replace: bool) -> None:
        """Put an object in place. One that is there already without a commit is a dead writer's, or our twin's with these bits."""
        if self._storage.write(stored.path, content, replace=replace):
            return
        same_size = self._storage.size(stored.path) == stored.size_bytes
        if not same_size or bytes_sha256(self._storage.read(stored.path)) != stored.sha256:
            self._storage.write(stored.path, content, replace=True)

    def _arrays(self) -> Iterator[tuple[Group | None, Kind | None, str, np.ndarray]]:
        for group in self.manifest.groups:
            for kind in KINDS:
                yield group, kind, array_key(group, group.array(kind)), self._codes[group.path, kind]
        yield from ((None, None, name, array) for name, array in self._tokens.items())
