"""Verifying a store: everything on disk against what its records say. Finds and reports; changes nothing (`pipeline.repair` does).

Fast: every record's seal, every object's size and sha256, tables against commits. Deep: also every chunk's own checksum, every
sample's tokens against its crc32c and id, and every value decoded. Knows no teacher.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from kvstore.arrays import read_calibration, read_small_array
from kvstore.commits import Commit, commit_key, committed_shards, contradictions, read_commit
from kvstore.drop import dropped_counts, dropped_shards
from kvstore.errors import KVStoreError, StoreNotFoundError
from kvstore.gate import read_gate
from kvstore.lease import Claim, claims
from kvstore.manifest import ARRAYS, GATE, PROJECTION, SAMPLES, TOKENIZER, Manifest, data_record, read_beside, read_manifest
from kvstore.metadata import array_key, metadata_problems
from kvstore.records import bytes_sha256, fingerprint
from kvstore.repeats import read_part_repeats, read_repeats
from kvstore.samples import (
    HASH_DIGITS,
    Summary,
    column_digest,
    is_part,
    is_summary,
    part_key,
    read_part,
    read_summary,
    rows_of,
    summary_of,
)
from kvstore.storage import MAX_RECORD_BYTES, Storage, locate
from kvstore.strangers import Strangers, find_strangers
from kvstore.verify_shards import ShardVerifier

Progress = Callable[[int, int], object]
"""Told the bytes done and the bytes in all."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong."""

    part: str
    """What is damaged: `manifest`, `metadata`, `tokenizer`, `projection`, `gate`, `tables`, `data`, `commit`,
    `shard` or `unlisted`; decides how it is mended."""
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
    foreign: tuple[str, ...]
    """Files that are not kvpipe's: no damage, and nobody's concern."""
    unlisted: tuple[str, ...]
    """Files in tokenizer/ and projection/ that are not in the manifest and that another program would read: a problem each."""
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
        self._dropped: dict[str, int] = {}

    def run(self) -> Report:
        try:
            manifest = read_manifest(self._storage)
        except StoreNotFoundError:
            raise
        except KVStoreError as error:
            self._add("manifest", str(error))
            return self._report(None, [], Strangers((), (), ()), {})
        entries = [entry.key for entry in self._storage.entries("")]
        living = claims(self._storage)
        self._metadata(manifest)
        self._files(manifest)
        commits = list(self._commits(manifest))
        self._ids(commits)
        self._tables(manifest, commits, entries)
        self._parts(manifest, commits)
        total = sum(stored.size_bytes for commit in commits for stored in commit.objects)
        shards = ShardVerifier(self._storage, manifest, self._add, lambda done: self._progress(done, total))
        for commit in commits:
            good = shards.objects(commit)
            if self._deep and commit.samples:
                shards.decode(commit, good)
        self._bytes = shards.num_bytes
        return self._report(manifest, commits, self._strangers(manifest, commits, entries, living), living)

    def _add(self, part: str, message: str, shard: int | None = None, sample: str | None = None) -> None:
        self._problems.append(Problem(part=part, message=message, shard=shard, sample=sample))

    def _metadata(self, manifest: Manifest) -> None:
        for key in manifest.metadata:
            for problem in metadata_problems(self._storage, manifest, key):
                self._add("metadata", problem)
        if self._problems:
            return
        for group in manifest.groups:
            key = array_key(group, "layer")
            with self._noting("metadata"):
                layers = read_small_array(self._storage, manifest, key).tolist()
                if layers != list(group.layers):
                    self._add("metadata", f"{ARRAYS}/{key}: got {layers}, expected {list(group.layers)}")
        with self._noting("metadata"):
            read_calibration(self._storage, manifest)

    def _files(self, manifest: Manifest) -> None:
        """What lies beside arrays and commits: tokenizer, fitted maps, gate record, repeats, dropped ids."""
        for folder, files in ((TOKENIZER, manifest.tokenizer), (PROJECTION, manifest.projection)):
            for name, expected in files.items():
                with self._noting(folder):
                    read_beside(self._storage, folder, {name: expected})
        with self._noting("tables"):
            self._dropped = dropped_shards(self._storage)
            if (manifest.data.get("dropped") or None) != (fingerprint(list(self._dropped)) if self._dropped else None):
                self._add("tables", f"{SAMPLES}/dropped.json: not the list the manifest names; restore it, or drop again")
        with self._noting("tables"):
            read_repeats(self._storage, manifest)
        with self._noting("gate", f"; delete {GATE}, the next extraction makes it again"):
            read_gate(self._storage)

    @contextlib.contextmanager
    def _noting(self, part: str, remedy: str = "", shard: int | None = None) -> Iterator[None]:
        """Add what the block finds wrong to the problems."""
        try:
            yield
        except KVStoreError as error:
            self._add(part, f"{error}{remedy}", shard)

    def _commits(self, manifest: Manifest) -> Iterator[Commit]:
        for shard in sorted(committed_shards(self._storage)):
            if shard >= manifest.layout.num_shards:
                self._add(
                    "commit",
                    f"{commit_key(shard)}: no shard of this store; the manifest is older than the data, or a file strayed in",
                )
                continue
            with self._noting("commit", shard=shard):
                commit = read_commit(self._storage, shard)
                for message, sample in contradictions(manifest, commit):
                    self._add("commit", message, shard, sample)
                yield commit

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

    def _tables(self, manifest: Manifest, commits: list[Commit], keys: list[str]) -> None:
        """Tables may lag behind commits, but what they say must be what the commits say."""
        by_shard, damaged = {commit.shard: commit for commit in commits}, committed_shards(self._storage)
        for key in filter(is_summary, keys):
            with self._noting("tables"):
                summary = read_summary(self._storage, key)
                listed = summary.shards["shard"].to_pylist()
                for shard in sorted(set(listed) - damaged):
                    if shard < manifest.layout.num_shards:
                        self._add("commit", f"shard {shard}: listed in {key}, but its commit record is lost", shard)
                    else:
                        self._add("tables", f"{key}: lists shard {shard}, which is none of this store")
                self._table(key, summary, by_shard, listed)
        summarised = {part_key(key) for key in filter(is_summary, keys)}
        for key in keys:
            if is_part(key) and key not in summarised:
                with self._noting("tables"):
                    self._part(key)

    def _part(self, key: str) -> pa.Table:
        with contextlib.suppress(FileNotFoundError):
            content = self._storage.read(key, most_bytes=MAX_RECORD_BYTES)
            if not key.endswith(f"-{bytes_sha256(content)[:HASH_DIGITS]}.parquet"):
                raise KVStoreError(f"{key}: its content does not hash to its name")
        return read_part(self._storage, key)

    def _table(self, key: str, summary: Summary, commits: Mapping[int, Commit], listed: list[int]) -> None:
        rows = self._part(part_key(key))
        if strangers := [name for name in rows.column_names if column_digest(rows[name]) != summary.digests[name]]:
            self._add("tables", f"{part_key(key)}: columns {', '.join(strangers)} are not what {key} says")
        if not set(listed) <= commits.keys():
            return
        expected = [commits[shard] for shard in listed]
        if not rows.equals(rows_of(expected)):
            self._add("tables", f"{part_key(key)}: its rows are not those of the commit records")
        if not summary.shards.equals(summary_of(expected)):
            self._add("tables", f"{key}: its numbers are not those of the commit records")

    def _parts(self, manifest: Manifest, commits: list[Commit]) -> None:
        """The samples and counts of each part, as far as all of them are here, must be those the manifest was planned for."""
        by_shard = {commit.shard: commit for commit in commits}
        lengths = {row.id: row.num_tokens for commit in commits for row in commit.samples}
        counts: dict[str, int] = {}
        with contextlib.suppress(KVStoreError):  # a list that cannot be read is a problem already
            counts = dropped_counts(self._storage)
        for number, part in enumerate(manifest.data_parts):
            shards = range(part["first_shard"], part["first_shard"] + part["num_shards"])
            if len(by_shard.keys() & set(shards[: len(by_shard) + 1])) < len(shards):
                continue
            with contextlib.suppress(KVStoreError):  # repeats that cannot be read are a problem already
                found = dict(read_part_repeats(self._storage, manifest, number))
                found |= {row.id: row.count for shard in shards for row in by_shard[shard].samples}
                gone = {identity for identity, shard in self._dropped.items() if shard in shards}
                if wrong := _part_differences(part, found, lengths, gone, counts):
                    self._add(
                        "data",
                        f"part {number} of the data, shards {shards.start} to {shards.stop - 1}: {', '.join(wrong)} of its samples are not what "
                        "the manifest says: ids or counts were changed, or shards are of another store",
                    )
        named = (entry.key.startswith(f"{SAMPLES}/repeats-") for entry in self._storage.entries(SAMPLES))
        if not manifest.data_parts and any(named):
            self._add("tables", f"{SAMPLES}/: counts of repeats are here, but the manifest has no parts of the data")

    def _strangers(self, manifest: Manifest, commits: list[Commit], keys: list[str], living: dict[str, Claim]) -> Strangers:
        """Files nobody needs; while others write, what they are writing is not counted."""
        damaged = committed_shards(self._storage) - {commit.shard for commit in commits}
        end = manifest.layout.num_shards
        writing = [range(max(claim.first, 0), min(max(claim.stop, 0), end)) for claim in living.values()]
        found = find_strangers(manifest, commits, damaged, keys, writing, living)
        for key in found.misleading:
            self._add(
                "unlisted",
                f"{key}: not in the manifest; kvpipe does not read it, but a program that is given the folder would. Take it away, or "
                "'kvpipe repair' puts it aside",
            )
        return found

    def _report(
        self, manifest: Manifest | None, commits: list[Commit], strangers: Strangers, living: dict[str, Claim]
    ) -> Report:
        return Report(
            location=self._storage.location,
            deep=self._deep,
            num_shards=manifest.layout.num_shards if manifest else 0,
            num_committed=len(commits),
            num_samples=sum(len(commit.samples) for commit in commits),
            num_bytes=self._bytes,
            problems=tuple(self._problems),
            orphans=strangers.orphans,
            foreign=strangers.foreign,
            unlisted=strangers.misleading,
            writers=tuple(f"{claim.purpose} on {claim.host}, pid {claim.pid}" for claim in living.values()),
        )


def _part_differences(
    part: Mapping[str, Any], found: dict[str, int], lengths: Mapping[str, int], gone: set[str], counts: Mapping[str, int]
) -> list[str]:
    """Fields of a part that the samples found for it do not make.

    Args:
        found: counts by id, of those stored and those repeated.
        lengths: tokens of every stored sample.
        gone: ids dropped from the part's shards, whose lengths are not known any more.
        counts: of dropped samples, as far as they were kept.
    """
    wrong = [] if len(found.keys() | gone) == part["num_samples"] else ["num_samples"]
    tokens, whole = sum(lengths.get(identity, 0) for identity in found), found.keys() <= lengths.keys() and not gone
    if tokens > part["num_tokens"] or (whole and tokens != part["num_tokens"]):
        wrong.append("num_tokens")
    if counts.keys() >= gone:
        every = {**found, **{identity: counts[identity] for identity in gone}}
        rows = ((identity, every[identity], 1) for identity in sorted(every))
        if data_record(rows, part["seq_len"])["samples"] != part["samples"]:
            wrong.append("samples")
    return wrong
