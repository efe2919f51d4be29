"""Where a store stands, read off the store alone: commits, leases, logs. Works from anywhere that sees it, and writes nothing.

What a shard holds is taken from the sample tables or a run's log; only of the few that are in neither the commit record is read,
for with its texts it may be large. Knows neither teacher nor workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from kvstore.commits import read_commit, shard_of
from kvstore.errors import ShardNotCommittedError, StoreFormatError, StoreNotFoundError
from kvstore.lease import Holder, holders
from kvstore.manifest import COMMITS, Manifest, read_manifest
from kvstore.samples import listed_shards
from kvstore.storage import Storage, locate
from pipeline.monitor.reading import LONGEST_S, WINDOW_S, Reading
from pipeline.monitor.run_log import LogReader

State = Literal["starting", "running", "stopped", "complete"]
Log = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """Who holds shards of a store, or died holding them."""

    purpose: str
    host: str
    pid: int
    since_s: float
    """When its process began, in seconds since 1970, by its own clock."""
    shards: tuple[int, int] | None
    """From the first up to but without the last; None for one that creates the store or holds all of it."""
    silent_s: float
    """Since its last sign of life."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The state of a store."""

    location: str
    state: State
    """`starting`: somebody is at work, but there is no store yet. `stopped`: not complete, and nobody is at work."""
    shards: int
    planned_shards: int | None
    is_growing: bool
    """Whether more shards are still to be planned: the data is read as it is stored."""
    tokens: int
    left_tokens: int | None
    stored_bytes: int
    tokens_per_s: float | None
    """Over the last minute, of everybody who is at work."""
    eta_s: float | None
    shares: Mapping[str, float]
    """By stage, over the last minute, of the run that logged last."""
    bottleneck: str | None
    device: str
    last_commit_s: float | None
    """Seconds since a shard was committed."""
    writers: tuple[Writer, ...]
    stale: tuple[Writer, ...]
    """Claims nobody stands behind any more; they are in nobody's way."""
    last_error: str | None
    """What ended the newest run, if an error did."""
    notes: tuple[Mapping[str, Any], ...]
    """What else the newest runs logged, such as samples left out."""


class StatusReader:
    """Reads the state of one store again and again; what cannot have changed is read once."""

    def __init__(self, location: str) -> None:
        self._storage: Storage = locate(location)
        self._logs = LogReader(self._storage)
        self._sizes: dict[int, tuple[int, int]] = {}

    def read(self) -> Status:
        """The present state.

        Raises:
            StoreNotFoundError: there is no store, and nobody is making one.
        """
        found, now = self._holders()
        living = [holder for holder in found if holder.is_living]
        try:
            manifest = read_manifest(self._storage)
        except StoreNotFoundError:
            if not living:
                raise
            manifest = None
        commits = self._commits()
        logs = self._logs.read()
        sizes = self._sizes_of(commits, logs.values())
        planned = None if manifest is None else manifest.layout.num_shards
        at_work = _at_work(logs, living)
        last = max((log for log in at_work or list(logs.values())), key=lambda log: log[-1]["time_s"], default=[])
        reading = _last_reading(last)
        rate = _rate(at_work, commits, sizes, now) if living else None
        left = _left(manifest, at_work, sizes, planned)
        return Status(
            location=self._storage.location,
            state=_state(manifest, len(commits), living),
            shards=len(commits),
            planned_shards=planned,
            is_growing=manifest is not None and manifest.is_growing,
            tokens=sum(tokens for tokens, _ in sizes.values()),
            left_tokens=left,
            stored_bytes=sum(stored for _, stored in sizes.values()),
            tokens_per_s=rate,
            eta_s=left / rate if rate and left is not None and left / rate <= LONGEST_S else None,
            shares=reading.shares if reading else {},
            bottleneck=reading.bottleneck if reading else None,
            device=str(last[0].get("device", "")) if last else "",
            last_commit_s=max(now - max(commits.values()), 0.0) if commits else None,
            writers=tuple(_writer(holder, now) for holder in living),
            stale=tuple(_writer(holder, now) for holder in found if not holder.is_living),
            last_error=_last_error(logs),
            notes=tuple(line for log in logs.values() for line in log if line["event"] not in _OWN_EVENTS),
        )

    def _holders(self) -> tuple[list[Holder], float]:
        """Claims, and the present by our clock or the storage's, whichever is later."""
        now = time.time()
        found = holders(self._storage, now_s=now)
        newest = max((holder.touched_s for holder in found), default=now)
        return (found, now) if newest <= now else (holders(self._storage, now_s=newest), newest)

    def _commits(self) -> dict[int, float]:
        """When each shard was committed."""
        entries = ((shard_of(entry.key), entry.modified_s) for entry in self._storage.entries(COMMITS))
        return {shard: modified for shard, modified in entries if shard is not None}

    def _sizes_of(self, commits: Mapping[int, float], logs: Iterable[Log]) -> dict[int, tuple[int, int]]:
        """Tokens and bytes of every committed shard."""
        if commits.keys() - self._sizes.keys():
            for log in logs:
                for line in log:
                    known = {int(shard): (size[0], size[1]) for shard, size in line.get("committed", {}).items()}
                    self._sizes.update(known)
        if commits.keys() - self._sizes.keys():
            self._sizes.update(listed_shards(self._storage))
        for shard in sorted(commits.keys() - self._sizes.keys()):
            try:
                commit = read_commit(self._storage, shard)
            except ShardNotCommittedError:  # being repaired
                continue
            self._sizes[shard] = (commit.num_tokens, commit.stored_bytes)
        return {shard: self._sizes[shard] for shard in commits if shard in self._sizes}


_OWN_EVENTS = {"start", "progress", "error", "end"}


def _state(manifest: Manifest | None, committed: int, living: Sequence[Holder]) -> State:
    if manifest is None:
        return "starting"
    if committed >= manifest.layout.num_shards and not manifest.is_growing:
        return "complete"
    return "running" if living else "stopped"


def _at_work(logs: Mapping[str, Log], living: Sequence[Holder]) -> list[Log]:
    """Logs of runs whose process holds a living claim."""
    processes = {(holder.claim.host, holder.claim.pid) for holder in living}
    return [
        log
        for log in logs.values()
        if log[-1]["event"] not in ("end", "error") and (log[0].get("host"), log[0].get("pid")) in processes
    ]


def _last_reading(log: Log) -> Reading | None:
    for line in reversed(log):
        if line["event"] in ("progress", "end"):
            with contextlib.suppress(StoreFormatError):  # of another version, or no reading at all
                return Reading.from_json(line)
    return None


def _rate(
    at_work: Sequence[Log], commits: Mapping[int, float], sizes: Mapping[int, tuple[int, int]], now: float
) -> float | None:
    """Tokens per second as the runs themselves say; where none does, from when shards were committed."""
    readings = [reading for log in at_work if (reading := _last_reading(log)) is not None]
    if readings:
        rates = [reading.tokens_per_s for reading in readings if reading.tokens_per_s is not None]
        return sum(rates) if rates else None
    times = sorted((modified, shard) for shard, modified in commits.items())
    before = [modified for modified, _ in times if modified < now - WINDOW_S]
    began = before[-1] if before else times[0][0] if times else now
    tokens = sum(sizes[shard][0] for modified, shard in times if modified > began and shard in sizes)
    return tokens / (now - began) if tokens and now > began else None


def _left(
    manifest: Manifest | None, at_work: Sequence[Log], sizes: Mapping[int, tuple[int, int]], planned: int | None
) -> int | None:
    """Tokens still to come: what the runs at work say, else by the mean of the shards there are, once all are planned."""
    readings = [reading for log in at_work if (reading := _last_reading(log)) is not None]
    known = [reading.left_tokens for reading in readings if reading.left_tokens is not None]
    if known and len(known) == len(readings):
        return sum(known)
    if manifest is None or planned is None or manifest.is_growing or not sizes:
        return None
    return round((planned - len(sizes)) * sum(tokens for tokens, _ in sizes.values()) / len(sizes))


def _writer(holder: Holder, now: float) -> Writer:
    claim = holder.claim
    whole = claim.first < 0
    return Writer(
        purpose=claim.purpose,
        host=claim.host,
        pid=claim.pid,
        since_s=claim.started_s,
        shards=None if whole else (claim.first, claim.stop),
        silent_s=max(now - holder.touched_s, 0.0),
    )


def _last_error(logs: Mapping[str, Log]) -> str | None:
    """The error of the run that began last; an older one was made good or tried again."""
    newest = max(logs.values(), key=lambda log: log[0]["time_s"], default=None)
    if newest is None or newest[-1]["event"] != "error":
        return None
    return str(newest[-1].get("error"))
