"""Verifying a store: everything on disk against what its records say. Finds and reports; changes nothing (`pipeline.repair` does).

Fast: every record's seal, every object's size and sha256, tables against commits. Deep: also every chunk's own checksum, every
sample's tokens against its crc32c and id, and every value decoded. Knows no teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

import numpy as np

from kvstore.arrays import array_key, array_keys, index_bytes, read_calibration, read_small_array, shard_key, validate_length
from kvstore.codec import KINDS
from kvstore.commits import Commit, StoredObject, commit_key, committed_shards, read_commit, sample_id
from kvstore.drop import read_dropped
from kvstore.errors import KVStoreError, StoreNotFoundError
from kvstore.gate import read_gate
from kvstore.lease import LEASES, Claim, claims
from kvstore.manifest import ARRAYS, COMMITS, GATE, PROJECTION, SAMPLES, TOKENIZER, Manifest, read_beside, read_manifest
from kvstore.reader import Store
from kvstore.records import bytes_sha256, fingerprint
from kvstore.repeats import read_repeats
from kvstore.samples import part_key, read_parquet, rows_of
from kvstore.spec import KVSpec
from kvstore.storage import STAGING, Storage, locate

Progress = Callable[[int, int], object]
"""Told the bytes done and the bytes in all."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong."""

    part: str
    """What is damaged: `manifest`, `metadata`, `tokenizer`, `projection`, `gate`, `tables`, `commit` or `shard`; decides how it is mended."""
    message: str
    shard: int | None = None
    sample: str | None = None
    """Id of the sample, where the damage is in one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a verification found."""

    location: str
    deep: bool
    num_shards: int
    """Planned."""
    num_committed: int
    num_samples: int
    num_bytes: int
    """Read and hashed."""
    problems: tuple[Problem, ...]
    orphans: tuple[str, ...]
    """Files that belong to nothing committed and nothing at work: leftovers of killed writers. No reader sees them."""
    writers: tuple[str, ...]
    """Who is writing into the store now."""

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def bad_shards(self) -> tuple[int, ...]:
        return tuple(sorted({problem.shard for problem in self.problems if problem.shard is not None}))


def verify_store(location: str, *, deep: bool = False, progress: Progress = lambda *_: None) -> Report:
    """Check everything a store holds.

    Raises:
        StoreNotFoundError: there is no store.
    """
    storage = locate(location)
    return _Verification(storage, deep, progress).run()


class _Verification:
    def __init__(self, storage: Storage, deep: bool, progress: Progress) -> None:
        self._storage, self._deep, self._progress = storage, deep, progress
        self._problems: list[Problem] = []
        self._bytes = 0
        self._dropped: list[str] = []

    def run(self) -> Report:
        try:
            manifest = read_manifest(self._storage)
        except StoreNotFoundError:
            raise
        except KVStoreError as error:
            self._add("manifest", str(error))
            return self._report(None, [], (), {})
        entries = {entry.key: entry.size_bytes for entry in self._storage.entries("")}
        living = claims(self._storage)
        self._metadata(manifest)
        self._files(manifest)
        commits = list(self._commits(manifest))
        self._ids(commits)
        self._tables(manifest, commits, entries)
        total = sum(stored.size_bytes for commit in commits for stored in commit.objects)
        for commit in commits:
            good = self._objects(manifest, commit, total)
            if self._deep and commit.samples:
                self._decode(manifest, commit, good)
        return self._report(manifest, commits, self._orphans(manifest, commits, entries, living), living)

    def _add(self, part: str, message: str, shard: int | None = None, sample: str | None = None) -> None:
        self._problems.append(Problem(part=part, message=message, shard=shard, sample=sample))

    def _metadata(self, manifest: Manifest) -> None:
        for key in manifest.metadata:
            try:
                validate_length(self._storage, manifest, key)
            except KVStoreError as error:
                self._add("metadata", str(error))
        try:
            read_calibration(self._storage, manifest)
            for group in manifest.groups:
                layers = read_small_array(self._storage, manifest, array_key(group, "layer")).tolist()
                if layers != list(group.layers):
                    self._add("metadata", f"{ARRAYS}/{array_key(group, 'layer')}: got {layers}, expected {list(group.layers)}")
        except KVStoreError as error:
            self._add("metadata", str(error))

    def _files(self, manifest: Manifest) -> None:
        """What lies beside arrays and commits: tokenizer, fitted maps, gate record, repeats, dropped ids."""
        for folder, files in ((TOKENIZER, manifest.tokenizer), (PROJECTION, manifest.projection)):
            for name, expected in files.items():
                try:
                    read_beside(self._storage, folder, {name: expected})
                except KVStoreError as error:
                    self._add(folder, str(error))
        try:
            self._dropped = dropped = read_dropped(self._storage)
            if (manifest.data.get("dropped") or None) != (fingerprint(dropped) if dropped else None):
                self._add("tables", f"{SAMPLES}/dropped.json: not the list the manifest names; restore it, or drop again")
            read_repeats(self._storage, manifest)
        except KVStoreError as error:
            self._add("tables", str(error))
        try:
            read_gate(self._storage)
        except KVStoreError as error:
            self._add("gate", f"{error}; delete {GATE}, the next extraction makes it again")

    def _commits(self, manifest: Manifest) -> Iterator[Commit]:
        names = {PurePosixPath(entry.key).name for entry in self._storage.entries(COMMITS)}
        for name in sorted(names - {PurePosixPath(commit_key(shard)).name for shard in range(manifest.layout.num_shards)}):
            self._add(
                "commit", f"{COMMITS}/{name}: no shard of this store; the manifest is older than the data, or a file strayed in"
            )
        for shard in sorted(committed_shards(self._storage)):
            if shard >= manifest.layout.num_shards:
                continue
            try:
                commit = read_commit(self._storage, shard)
            except KVStoreError as error:
                self._add("commit", str(error), shard)
                continue
            if commit.signal != manifest.signal_fingerprint:
                self._add(
                    "commit",
                    f"shard {shard}: committed for signal {commit.signal[:12]}, the store is {manifest.signal_fingerprint[:12]}",
                    shard,
                )
            self._placement(manifest, commit)
            yield commit

    def _placement(self, manifest: Manifest, commit: Commit) -> None:
        layout = manifest.layout
        free = commit.shard * layout.shard_tokens
        for row in sorted(commit.samples, key=lambda row: row.token_start):
            stop = row.token_start + row.num_tokens
            fits = row.shard == commit.shard and free <= row.token_start and stop <= (commit.shard + 1) * layout.shard_tokens
            if not fits or row.token_start % layout.chunk_tokens or row.num_tokens < 1:
                self._add(
                    "commit",
                    f"shard {commit.shard}, sample {row.id}: rows {row.token_start} to {stop} of shard {row.shard} overlap another "
                    "sample or leave the shard",
                    commit.shard,
                    row.id,
                )
            free = layout.padded(stop)

    def _ids(self, commits: list[Commit]) -> None:
        seen: dict[str, int] = {}
        dropped = set(self._dropped)
        for commit in commits:
            for row in commit.samples:
                if row.id in dropped:
                    self._add(
                        "shard",
                        f"shard {commit.shard}, sample {row.id}: dropped, but still stored; the drop was interrupted, run it again",
                        commit.shard,
                        row.id,
                    )
                if row.id in seen:
                    self._add(
                        "shard",
                        f"shards {seen[row.id]} and {commit.shard}, sample {row.id}: stored twice, expected once",
                        commit.shard,
                        row.id,
                    )
                seen.setdefault(row.id, commit.shard)

    def _tables(self, manifest: Manifest, commits: list[Commit], entries: dict[str, int]) -> None:
        """Tables may lag behind commits, but what they say must be what the commits say."""
        by_shard = {commit.shard: commit for commit in commits}
        keys = [key for key in entries if key.startswith(f"{SAMPLES}/") and key.endswith(".parquet")]
        for key in keys:
            digits = PurePosixPath(key).stem.rpartition("-")[2]
            if not bytes_sha256(self._storage.read(key)).startswith(digits):
                self._add("tables", f"{key}: its content does not hash to its name")
                continue
            if not PurePosixPath(key).name.startswith("summary-"):
                continue
            try:
                listed = read_parquet(self._storage, key)["shard"].to_pylist()
                for shard in sorted(set(listed) - set(by_shard)):
                    if shard < manifest.layout.num_shards and self._storage.size(commit_key(shard)) is None:
                        self._add("commit", f"shard {shard}: listed in {key}, but its commit record is lost", shard)
                rows = read_parquet(self._storage, part_key(key))
                expected = rows_of(by_shard[shard] for shard in listed if shard in by_shard)
                if set(listed) <= set(by_shard) and not rows.equals(expected):
                    self._add("tables", f"{part_key(key)}: its rows are not those of the commit records")
            except KVStoreError as error:
                self._add("tables", str(error))

    def _objects(self, manifest: Manifest, commit: Commit, total: int) -> bool:
        """Whether every object of a shard is the one that was committed."""
        expected = [shard_key(array, commit.shard) for array in array_keys(manifest)] if commit.samples else []
        if [stored.path for stored in commit.objects] != expected:
            listed = [stored.path for stored in commit.objects]
            self._add("commit", f"shard {commit.shard}: its record lists {listed}, expected {expected}", commit.shard)
            return False
        good = True
        for array, stored in zip(array_keys(manifest), commit.objects, strict=bool(commit.samples)):
            problem = self._object_problem(stored, index_bytes(manifest, array))
            self._progress(self._bytes, total)
            if problem:
                good = False
                samples = ", ".join(row.id[:12] for row in commit.samples[:3])
                self._add("shard", f"shard {commit.shard}: {stored.path}: {problem} (samples {samples} ...)", commit.shard)
        return good

    def _object_problem(self, stored: StoredObject, end_bytes: int) -> str | None:
        """What tells one file of a shard from the one that was committed."""
        try:
            content = self._storage.read(stored.path)
        except FileNotFoundError:
            content = b""
        except OSError as error:
            return f"cannot be read ({error})"
        self._bytes += len(content)
        if len(content) != stored.size_bytes:
            return f"{len(content) or 'no'} bytes, expected {stored.size_bytes}"
        if bytes_sha256(content) != stored.sha256:
            return f"sha256 {bytes_sha256(content)[:12]}, expected {stored.sha256[:12]}"
        if bytes_sha256(content[-end_bytes:]) != stored.index_sha256:
            return "its index does not hash to what the record says"
        return None

    def _decode(self, manifest: Manifest, commit: Commit, good: bool) -> None:
        """Read every sample of a shard through the codecs, all at once, and one by one where that fails.

        Args:
            good: whether its files are those committed; of others the damaged samples are named, where the files are whole.
        """
        try:
            store = Store(self._storage, [commit])
            store.verify_shard(commit.shard)
            blocks = _blocks(manifest.spec)
            for first in range(0, len(store), 16):
                self._decode_samples(store, list(range(first, min(first + 16, len(store)))), blocks)
        except KVStoreError as error:
            if good:
                self._add("shard", f"shard {commit.shard}: {error}", commit.shard)

    def _decode_samples(self, store: Store, indices: list[int], blocks: list[list[int]]) -> None:
        try:
            for block in blocks:
                batch = store.read(indices, block)
                for kind in KINDS:
                    if not np.isfinite(getattr(batch, kind)).all():
                        raise KVStoreError(f"layers {block}, {kind}: NaN or infinity among the decoded values")
            for position, index in enumerate(indices):
                tokens = batch.input_ids[batch.cu_seqlens[position] : batch.cu_seqlens[position + 1]]
                if sample_id(tokens) != store.samples.ids[index]:
                    raise KVStoreError(f"its tokens hash to {sample_id(tokens)}, not to its id")
        except KVStoreError as error:
            if len(indices) > 1:
                for index in indices:
                    self._decode_samples(store, [index], blocks)
                return
            shard, sample = int(store.samples.shard[indices[0]]), store.samples.ids[indices[0]]
            self._add("shard", f"shard {shard}, sample {sample}: {error}", shard, sample)

    def _orphans(
        self, manifest: Manifest, commits: list[Commit], entries: dict[str, int], living: dict[str, Claim]
    ) -> tuple[str, ...]:
        """Files nobody needs; while others write, what they are writing is not counted."""
        arrays = array_keys(manifest)
        ours = {stored.path for commit in commits for stored in commit.objects}
        damaged = set(committed_shards(self._storage)) - {commit.shard for commit in commits}
        writing = {
            shard
            for shard in range(manifest.layout.num_shards)
            if shard in damaged or any(claim.overlaps(shard, shard + 1) for claim in living.values())
        }
        ours |= {shard_key(array, shard) for array in arrays for shard in writing}
        prefixes = tuple(f"{ARRAYS}/{array}/c/" for array in arrays)
        orphans = [key for key in entries if key.startswith(prefixes) and key not in ours]
        if not living:
            orphans += [key for key in entries if key.startswith(f"{STAGING}/")]
        else:
            orphans += [key for key in entries if key.startswith(f"{LEASES}/") and key not in living]
        return tuple(sorted(orphans))

    def _report(
        self, manifest: Manifest | None, commits: list[Commit], orphans: tuple[str, ...], living: dict[str, Claim]
    ) -> Report:
        return Report(
            location=self._storage.location,
            deep=self._deep,
            num_shards=manifest.layout.num_shards if manifest else 0,
            num_committed=len(commits),
            num_samples=sum(len(commit.samples) for commit in commits),
            num_bytes=self._bytes,
            problems=tuple(self._problems),
            orphans=orphans,
            writers=tuple(f"{claim.purpose} on {claim.host}, pid {claim.pid}" for claim in living.values()),
        )


def _blocks(spec: KVSpec) -> list[list[int]]:
    """Layers by geometry: what fits into one array each."""
    blocks: dict[tuple[int, int, int], list[int]] = {}
    for layer in spec.layers:
        blocks.setdefault(layer.geometry, []).append(layer.layer)
    return list(blocks.values())
