"""Reading a store: samples by index, decoded, verified against what was committed (FORMAT.md 8).

One native read per array and call, whatever the number of samples: a busy main thread then costs little (research/loaders 5.2).
"""

from __future__ import annotations

import contextlib
import errno
import operator
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import pyarrow as pa
import tensorstore as ts
from jaxtyping import Int64

from kvstore import codec as codecs
from kvstore.arrays import index_bytes, open_array, read_calibration, shard_key, unreachable
from kvstore.batches import CodeBatch, KVBatch
from kvstore.calibration import Calibration
from kvstore.codec import KINDS, Kind
from kvstore.commits import Commit, contradictions, read_commit, token_crc32c
from kvstore.errors import CorruptShardError, FingerprintMismatchError, KVStoreError, StoreFormatError
from kvstore.groups import Group
from kvstore.manifest import MANIFEST, PROJECTION, TOKENIZER, Manifest, read_beside, read_manifest
from kvstore.metadata import TOKEN_ARRAYS, array_key, array_keys
from kvstore.records import bytes_sha256
from kvstore.samples import SampleTable
from kvstore.spec import KVSpec
from kvstore.storage import Folder, Storage, locate
from kvstore.temporary import temporary_folder

_SMALL_BYTES = 2**26


class Store:
    """An open store; samples are numbered in order of shard and position.

    Safe for reading from several threads. Pickles as its location and the shards it saw, so that a loader's worker process opens its
    own and numbers the same samples, whatever was committed meanwhile.
    """

    def __init__(self, location: str | Storage, commits: Sequence[Commit] | None = None) -> None:
        """Open a store; with `commits`, see these shards alone and no sample tables."""
        self.storage = locate(location)
        self.location = self.storage.location
        if self.storage.size(MANIFEST) is None:
            read_manifest(self.storage)  # says that there is no store, whatever else lies here
        # Commits first: a manifest read after them knows all their shards, whoever extends the store meanwhile.
        self.samples = SampleTable(self.storage, commits)
        self.manifest: Manifest = read_manifest(self.storage)
        self.samples.refuse_outside(self.manifest.layout)
        self._arrays: dict[str, ts.TensorStore] = {}
        self._verified: set[int] = set()
        self._process = os.getpid()
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})

    def __reduce__(self) -> tuple[Callable[[str, pa.Table], Store], tuple[str, pa.Table]]:
        return _opened_as, (self.location, self.samples.summary.select(_SEEN))

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        return f"<Store {self.location}: {len(self)} samples, {len(self.spec.layers)} layers>"

    @property
    def spec(self) -> KVSpec:
        """Geometry of what is stored."""
        return self.manifest.spec

    @property
    def tokenizer_path(self) -> Path | None:
        """Folder with the tokenizer the token ids belong to, None when it was not kept; of a bucket a copy that goes with this
        object.

        Raises:
            StoreFormatError: a file of it is missing or damaged.
        """
        return self._tokenizer if self.manifest.tokenizer else None

    @property
    def projection_path(self) -> Path | None:
        """Folder with the fitted maps a baked store was made with, None where nothing was fitted; otherwise as `tokenizer_path`."""
        return self._projection if self.manifest.projection else None

    @cached_property
    def _tokenizer(self) -> Path:
        return self._beside(TOKENIZER, self.manifest.tokenizer)

    @cached_property
    def _projection(self) -> Path:
        return self._beside(PROJECTION, self.manifest.projection)

    def _beside(self, name: str, expected: Mapping[str, str]) -> Path:
        """A folder with the files the manifest lists, each compared with it, and no others: a reader would take them for the store's."""
        files = read_beside(self.storage, name, expected)
        if isinstance(self.storage, Folder) and {path.name for path in (self.storage.root / name).iterdir()} == files.keys():
            return self.storage.root / name
        held = contextlib.ExitStack()
        folder = held.enter_context(temporary_folder(name))
        weakref.finalize(self, held.close)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        return folder

    def read(self, sample_indices: Iterable[SupportsIndex], layers: Sequence[int] | None = None) -> KVBatch:
        """Read samples, decoded to float32.

        Args:
            sample_indices: each from 0 to len(store) - 1; order and repeats are kept.
            layers: teacher layer numbers in the order wanted; None for all, () for token ids only.

        Raises:
            IndexError: no such sample.
            ValueError: no such layer, or layers of different head dims, which fit no one array.
            CorruptShardError: a committed shard is missing, damaged or another; shard and sample are named.
            OSError: the bucket cannot be reached.
            RuntimeError: this process was forked after the store was opened.
        """
        wanted = self.spec.layer_numbers if layers is None else tuple(layers)
        return self.decode(self.read_codes(sample_indices, wanted), wanted)

    def decode(self, batch: CodeBatch, layers: Sequence[int]) -> KVBatch:
        """The float32 values of what `read_codes` gave for the same layers.

        Raises:
            ValueError: layers of different head dims, which fit no one array.
        """
        wanted = tuple(layers)
        return KVBatch(
            layers=wanted,
            key=self._assemble("key", wanted, batch.codes, len(batch.input_ids)),
            value=self._assemble("value", wanted, batch.codes, len(batch.input_ids)),
            input_ids=batch.input_ids,
            cu_seqlens=batch.cu_seqlens,
            beside=batch.beside,
        )

    def count_learnt(self, skip: int = 0) -> Int64[np.ndarray, "sample"]:
        """Tokens of each sample to be learnt from (`TokenBatch.learnt`), its first `skip` positions left out.

        Where the store has a mask it is read once, a shard at a time: a byte a token, compressed well.

        Raises:
            CorruptShardError: a committed shard is missing, damaged or another.
            OSError: the bucket cannot be reached.
        """
        return self._count(["loss_mask"], skip)

    def count_compared(self, skip: int = 0) -> Int64[np.ndarray, "sample"]:
        """The same of `TokenBatch.compared`."""
        return self._count(["loss_mask", "kv_mask"], skip)

    def _count(self, masks: Sequence[str], skip: int) -> Int64[np.ndarray, "sample"]:
        num_tokens = self.samples.num_tokens.astype(np.int64)
        masks = [name for name in masks if name in self.manifest.token_arrays]
        if not masks:
            return np.maximum(num_tokens - skip, 0)
        counts = np.zeros(len(self), dtype=np.int64)
        shards, firsts = np.unique(self.samples.shard, return_index=True)
        for shard, members in zip(shards.tolist(), np.split(np.arange(len(self)), firsts[1:]), strict=True):
            self.verify_shard(shard)
            start = shard * self.manifest.layout.shard_tokens
            starts = self.samples.token_start[members] - start
            ends = starts + num_tokens[members]
            try:
                requests = [self._request(name, [(start, int(ends.max()))], None) for name in masks]
                mask = np.logical_and.reduce([np.asarray(request.result()) != 0 for request in requests])
            except ValueError as error:
                raise self._explain(error, members.tolist(), ()) from error
            # Rows between samples, which no chunk need hold, do not count: only differences inside a sample are taken.
            before = np.concatenate([[0], np.cumsum(mask)])
            counts[members] = before[ends] - before[np.minimum(starts + skip, ends)]
        return counts

    def read_codes(
        self, sample_indices: Iterable[SupportsIndex], layers: Sequence[int] | None = None, *, verify_objects: bool = True
    ) -> CodeBatch:
        """Read samples without decoding them, verified like `read`, whose arguments and errors these are.

        Args:
            verify_objects: False for a shard that is being written again, whose objects need not be those committed; the
                checksums of its chunks and its tokens are verified still.
        """
        indices = [operator.index(index) for index in sample_indices]
        total = len(self)
        outside = [index for index in indices if not 0 <= index < total]
        if outside:
            raise IndexError(f"sample_indices: got {outside[:5]}, expected 0 to {total - 1} ({self.location})")
        wanted = self.spec.layer_numbers if layers is None else tuple(layers)
        if verify_objects:
            for shard in sorted({int(self.samples.shard[index]) for index in indices} - self._verified):
                self.verify_shard(shard)
        slots = self.manifest.slots_of(wanted)
        try:
            codes, tokens = self._fetch(indices, slots)
        except ValueError as error:
            raise self._explain(error, indices, slots) from error
        lengths = self.samples.num_tokens[np.array(indices, dtype=np.int64)]
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        input_ids = tokens.pop("input_ids")
        self._verify_tokens(indices, input_ids, cu_seqlens)
        return CodeBatch(codes=codes, input_ids=input_ids, cu_seqlens=cu_seqlens, beside=tokens)

    def _fetch(
        self, indices: Sequence[int], slots: Sequence[tuple[Group, list[int]]]
    ) -> tuple[dict[tuple[str, Kind], np.ndarray], dict[str, np.ndarray]]:
        """Codes by group and kind, and the numbers of each token by array; ValueError is all that tensorstore raises."""
        spans = [(int(self.samples.token_start[i]), int(self.samples.num_tokens[i])) for i in indices]
        self._refuse_too_large(spans, slots)
        with ts.Batch() as batch:  # chunks of one shard are fetched together
            pending = {
                (group.path, kind): self._request(array_key(group, group.array(kind)), spans, rows, batch)
                for group, rows in slots
                for kind in KINDS
            }
            beside = {name: self._request(name, spans, None, batch) for name in self.manifest.token_arrays}
        codes = {where: np.asarray(future.result()) for where, future in pending.items()}
        return codes, {name: np.asarray(future.result(), dtype=TOKEN_ARRAYS[name].dtype) for name, future in beside.items()}

    def _refuse_too_large(self, spans: Sequence[tuple[int, int]], slots: Sequence[tuple[Group, list[int]]]) -> None:
        """Refuse what memory cannot hold before a native library, which would end the process, is asked for it."""
        tokens = sum(length for _, length in spans)
        wanted = tokens * sum(group.row_bytes.layer * 2 * len(rows) for group, rows in slots)
        if wanted < _SMALL_BYTES:
            return
        try:
            np.empty(wanted, dtype=np.uint8)
        except (MemoryError, ValueError) as error:
            raise KVStoreError(
                f"{len(spans)} samples of {tokens:,} tokens: {wanted / 1e9:.3g} GB in {sum(len(rows) for _, rows in slots)} layers, more than "
                f"there is memory ({self.location}); read fewer samples or layers at a time"
            ) from error

    def _request(
        self, array: str, spans: Sequence[tuple[int, int]], slots: list[int] | None, batch: ts.Batch | None = None
    ) -> Any:
        """Start one read of all spans of one array."""
        view = self._open(array)
        axis = 0
        if slots is not None:
            axis = 1
            whole = slots == list(range(view.shape[0]))
            view = view if whole else view[np.array(slots)]
        if not spans:
            return view[(slice(None),) * axis + (slice(0, 0),)].read(batch=batch)
        parts = [view[(slice(None),) * axis + (slice(start, start + length),)] for start, length in spans]
        return (parts[0] if len(parts) == 1 else ts.concat(parts, axis=axis)).read(batch=batch)

    def _open(self, array: str) -> ts.TensorStore:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{self.location}: opened in process {self._process}, which was forked since; tensorstore's threads are not in this one. "
                "Start workers with multiprocessing_context='spawn'"
            )
        if array not in self._arrays:
            self._arrays[array] = open_array(self.storage, self.manifest, array, context=self._context)
        return self._arrays[array]

    def _assemble(
        self, kind: Kind, layers: Sequence[int], codes: Mapping[tuple[str, Kind], np.ndarray], num_tokens: int
    ) -> np.ndarray:
        """Decode, and put the layers of all groups in the order asked for."""
        if not layers:
            return np.zeros((0, num_tokens, 0, 0), dtype=np.float32)
        decoded: dict[int, np.ndarray] = {}
        for group, slots in self.manifest.slots_of(layers):
            mean, step = self.calibration.get(group.path, {}).get(kind, (None, None))
            values = codecs.decode(
                group.quantizer(kind),
                codes[group.path, kind],
                None if mean is None else mean[slots],
                None if step is None else step[slots],
            )
            decoded.update({group.layers[slot]: values[row] for row, slot in enumerate(slots)})
            if tuple(group.layers[slot] for slot in slots) == tuple(layers):
                return np.asarray(values)
        shapes = {layer: decoded[layer].shape[1:] for layer in layers}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"layers: {kind} heads and dims differ {shapes}; read layers of one geometry at a time")
        return np.stack([decoded[layer] for layer in layers])

    @cached_property
    def calibration(self) -> Calibration:
        """Mean and step of every quantised array, by group path and kind; verified against the manifest."""
        return read_calibration(self.storage, self.manifest)

    def verify_shard(self, shard: int) -> None:
        """Compare a shard's files with its commit record without reading them whole; `read` does so when it first touches one.

        Raises:
            CorruptShardError: a file is missing, truncated or foreign.
        """
        commit = read_commit(self.storage, shard)
        for message, _ in contradictions(self.manifest, commit):
            raise CorruptShardError(
                f"{message} ({self.location}); the manifest and the shards are of different stores, or it was changed"
            )
        self._refuse_other_rows(commit)
        expected = {shard_key(array, shard): index_bytes(self.manifest, array) for array in array_keys(self.manifest)}
        listed = {stored.path: stored for stored in commit.objects}
        for path, stored in listed.items():
            size = self.storage.size(path)
            if size != stored.size_bytes:
                raise CorruptShardError(
                    f"shard {shard}: {path} has {'no file' if size is None else f'{size} bytes'}, expected "
                    f"{stored.size_bytes} bytes ({self.location}); the shard is missing or damaged, restore it or 'kvpipe repair'"
                )
            if bytes_sha256(self.storage.read(path, expected[path])) != stored.index_sha256:
                raise CorruptShardError(
                    f"shard {shard}: {path} has another index than the one committed ({self.location}); it is damaged, of another "
                    "shard or of an older run, restore it or 'kvpipe repair'"
                )
        self._verified.add(shard)

    def _refuse_other_rows(self, commit: Commit) -> None:
        """The sample tables are copies; the record is the truth."""
        first, last = self.samples.rows_of_shard(commit.shard)
        rows = sorted(commit.samples, key=lambda row: row.token_start)
        for name in ("token_start", "num_tokens", "crc32c", "stored_count"):
            told = getattr(self.samples, name)[first:last].tolist()
            meant = [getattr(row, name.removeprefix("stored_")) for row in rows]
            if told != meant:
                raise StoreFormatError(
                    f"shard {commit.shard}: {name} of its samples is {told[:4]} in the sample tables and {meant[:4]} in its commit record "
                    f"({self.location}); 'kvpipe repair' rebuilds the tables"
                )

    def _verify_tokens(self, indices: Sequence[int], input_ids: np.ndarray, cu_seqlens: np.ndarray) -> None:
        for position, index in enumerate(indices):
            tokens = input_ids[cu_seqlens[position] : cu_seqlens[position + 1]]
            actual, expected = token_crc32c(tokens), int(self.samples.crc32c[index])
            if actual != expected:
                raise CorruptShardError(
                    f"shard {self.samples.shard[index]}, sample {index} (id {self.samples.ids[index][:12]}): token ids have "
                    f"crc32c {actual:#010x}, expected {expected:#010x} ({self.location}); the shard is not the one committed"
                )

    def _explain(self, error: ValueError, indices: Sequence[int], slots: Sequence[tuple[Group, list[int]]]) -> Exception:
        """Name the shard and sample a native read of several failed on, by reading them one by one."""
        if os.strerror(errno.EMFILE) in str(error):
            return OSError(
                f"{self.location}: reading {len(indices)} samples at once takes more open files than this process may have; the data is "
                "whole, raise the limit (ulimit -n, usually 1,024 or more) and try again"
            )
        if unreachable(error):
            return OSError(
                f"{self.location}: reading failed ({error}); the data may be whole, see to the connection and try again"
            )
        if isinstance(error, KVStoreError):
            return error
        for index in indices:
            try:
                self._fetch([index], slots)
            except ValueError as own:
                if unreachable(own):
                    break
                return CorruptShardError(
                    f"shard {self.samples.shard[index]}, sample {index} (id {self.samples.ids[index][:12]}): reading failed ({own}) "
                    f"({self.location}); the data is damaged, do not train on it"
                )
        shards = sorted({int(self.samples.shard[index]) for index in indices})
        return CorruptShardError(
            f"shard {', '.join(map(str, shards))}, samples {list(indices)[:8]}: reading failed once ({error}) ({self.location}); the "
            "disk or the connection fails now and then, see 'kvpipe verify'"
        )


def open_store(path: str | Path) -> Store:
    """Open a store for reading: a folder, or `s3://bucket/prefix` and the like (`kvstore.storage.locate`).

    Raises:
        StoreNotFoundError: there is none.
        StoreFormatError: its records are damaged or of another schema version.
    """
    return Store(locate(path))


_SEEN = ["shard", "num_samples", "num_tokens"]


def _opened_as(location: str, seen: pa.Table) -> Store:
    """A store as another process saw it, without shards committed since.

    Raises:
        FingerprintMismatchError: one of the shards it saw holds other samples.
    """
    store = Store(location)
    if not store.samples.summary.select(_SEEN).equals(seen):
        store = Store(location, [read_commit(store.storage, shard) for shard in seen["shard"].to_pylist()])
    if not store.samples.summary.select(_SEEN).equals(seen):
        raise FingerprintMismatchError(
            f"{location}: a shard holds other samples than when the store was opened; they were dropped or made again meanwhile. Start "
            "again what reads it"
        )
    return store
