"""Leases: who is writing which shards of a store, so that two writers never damage each other's work.

A claim is a small file that its holder touches again and again. It dies with its holder: at once where the holder was a process
of this machine, after a time without touch anywhere else. Works the same on a disk, a shared file system and a bucket, whose
clock, not ours, says how old a claim is; between processes of one machine its uptime does, because that is never set. Knows shard
numbers, not what is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import psutil

from kvstore.errors import LeaseHeldError
from kvstore.storage import STAGING, Folder, Storage

LEASES = f"{STAGING}/leases"
LAYOUT = -1
"""Stands for the right to create a store or to change its manifest, beside shards 0 and up."""
EVERYTHING = (LAYOUT, 2**62)
TOUCH_S, EXPIRY_S = 20.0, 120.0
_TRIES = 4
_SET_S = 10.0
"""A clock that differs by more from a machine's own has been set; whole seconds and slow requests differ by less."""
_UNDER_LEASE = ("shard-", "create-", "creating")
"""What only a writer with a lease puts into the staging folder."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One writer's claim."""

    purpose: str
    """The command, for messages."""
    first: int
    stop: int
    """Shards from `first` up to but without `stop`."""
    host: str
    pid: int
    machine: str
    """Boot and process namespace: within one, a pid means the same process."""
    started_s: float
    """When that process started, in seconds since 1970 by a clock that may have been set since."""
    uptime_s: float | None = None
    """The machine's monotonic clock when this was written; None of a writer that does not say."""

    def overlaps(self, first: int, stop: int) -> bool:
        return self.first < stop and first < self.stop

    @property
    def is_dead(self) -> bool:
        """Whether its holder is known to be gone; False where that cannot be known."""
        if self.machine != _machine():
            return False
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            created_s, now_s, age_s = process.create_time(), time.time(), self.age_s
        except psutil.NoSuchProcess:
            return True
        if age_s is None:
            return abs(created_s - self.started_s) > 1
        # A process younger than the claim has got the number of a dead one.
        return now_s - created_s < age_s - 2

    @property
    def age_s(self) -> float | None:
        """Seconds since it was written, whatever was done to the clocks; None where only the storage can tell."""
        if self.machine != _machine() or self.uptime_s is None:
            return None
        return time.monotonic() - self.uptime_s


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A claim as it lies in a store."""

    key: str
    claim: Claim
    touched_s: float
    """Last sign of life, by the clock of whatever holds the files."""
    is_living: bool


def holders(storage: Storage, *, expiry_s: float = EXPIRY_S, now_s: float | None = None) -> list[Holder]:
    """Every claim that can be read, dead ones too; writes nothing.

    Args:
        now_s: the storage's own clock; the newest claim's touch if not given.
    """
    entries = list(storage.entries(LEASES))
    now = now_s if now_s is not None else max((entry.modified_s for entry in entries), default=0.0)
    found = []
    for entry in entries:
        try:
            claim = Claim(**json.loads(storage.read(entry.key)))
        except (FileNotFoundError, ValueError, TypeError):
            continue  # released meanwhile, or cut short by a crash: it expires
        is_living = _age_s(claim, now - entry.modified_s) < expiry_s and not claim.is_dead
        found.append(Holder(key=entry.key, claim=claim, touched_s=entry.modified_s, is_living=is_living))
    return found


def _age_s(claim: Claim, by_storage_s: float) -> float:
    """Seconds since a claim was written, also where the storage's clock was set meanwhile.

    A claim from the future is of before it was set back; its holder, if it lives, writes it again soon.
    """
    by_machine_s = claim.age_s
    if by_machine_s is not None and abs(by_machine_s - by_storage_s) > _SET_S:
        return by_machine_s
    return abs(by_storage_s)


def claims(storage: Storage, *, expiry_s: float = EXPIRY_S, now_s: float | None = None) -> dict[str, Claim]:
    """Living claims by key; `now_s` as for `holders`."""
    return {holder.key: holder.claim for holder in holders(storage, expiry_s=expiry_s, now_s=now_s) if holder.is_living}


@contextlib.contextmanager
def lease(
    storage: Storage,
    first: int,
    stop: int,
    purpose: str,
    *,
    wait: Callable[[str], object] | None = None,
    tries: int = _TRIES,
    touch_s: float = TOUCH_S,
    expiry_s: float = EXPIRY_S,
) -> Iterator[None]:
    """Hold shards `first` to `stop - 1` while the block runs.

    Args:
        wait: told once whom we wait for, then we do; without it somebody else's claim raises.
        tries: how often to look before it raises.

    Raises:
        LeaseHeldError: somebody else is writing some of them.
    """
    key = f"{LEASES}/{secrets.token_hex(8)}.json"
    own = Claim(
        purpose=purpose,
        first=first,
        stop=stop,
        host=socket.gethostname(),
        pid=os.getpid(),
        machine=_machine(),
        started_s=psutil.Process().create_time(),
    )
    done = threading.Event()

    def touch() -> None:
        while not done.wait(touch_s):
            with contextlib.suppress(OSError):  # the next touch may get through
                _put(storage, key, own)

    thread = threading.Thread(target=touch, name="lease", daemon=True)
    try:
        _acquire(storage, key, own, wait, tries, expiry_s)
        thread.start()
        yield
    finally:
        done.set()
        if thread.is_alive():
            thread.join()
        with contextlib.suppress(OSError):  # what the block raised matters more, and a claim without touch expires
            storage.delete(key)


def sweep(storage: Storage, purpose: str) -> None:
    """Remove what killed writers left in the staging folder; does nothing while another writer lives.

    Holds the whole store meanwhile. Shards and stores are written under a lease, so their scratch folders are then nobody's; other
    files may be on their way into place without one, and go when they are as old as a dead claim.
    """
    with contextlib.suppress(LeaseHeldError), lease(storage, *EVERYTHING, purpose, tries=1):
        entries = list(storage.entries(STAGING))
        now = max(entry.modified_s for entry in entries)  # our own claim's
        living = claims(storage, now_s=now)
        for entry in entries:
            name = PurePosixPath(entry.key).relative_to(STAGING).parts[0]
            if name.startswith(_UNDER_LEASE) or (entry.key not in living and now - entry.modified_s > EXPIRY_S):
                storage.delete(entry.key)
        if isinstance(storage, Folder):
            for folder in (storage.root / STAGING).iterdir():
                if folder.is_dir() and folder.name.startswith(_UNDER_LEASE):
                    shutil.rmtree(folder, ignore_errors=True)


def _acquire(
    storage: Storage, key: str, own: Claim, wait: Callable[[str], object] | None, most_tries: int, expiry_s: float
) -> None:
    """Claim first, then look: of two that come at once at least one sees the other and steps back."""
    told, tries = False, 0
    while True:
        _put(storage, key, own)
        now = next((entry.modified_s for entry in storage.entries(LEASES) if entry.key == key), None)
        living = claims(storage, expiry_s=expiry_s, now_s=now)
        others = [claim for other, claim in living.items() if other != key and claim.overlaps(own.first, own.stop)]
        if not others:
            _clean(storage, living, key)
            return
        storage.delete(key)
        tries += 1
        holder = f"{others[0].purpose} (host {others[0].host}, pid {others[0].pid})"
        if wait is not None:
            if not told:
                wait(f"waiting for {holder}, which is at work on {storage.location}")
                told = True
        elif tries >= most_tries:
            raise LeaseHeldError(
                f"{own.purpose}: {holder} is writing the same shards of {storage.location}. Let it finish, or give each its part "
                f"with --task-range; if it was killed on another machine, its claim ends {expiry_s:.0f} s after its last sign of life"
            )
        time.sleep(random.uniform(0.1, 0.5))


def _put(storage: Storage, key: str, claim: Claim) -> None:
    written = dataclasses.replace(claim, uptime_s=time.monotonic())
    storage.write(key, json.dumps(dataclasses.asdict(written)).encode(), replace=True)


def _clean(storage: Storage, living: dict[str, Claim], own: str) -> None:
    for entry in list(storage.entries(LEASES)):
        if entry.key not in living and entry.key != own:
            with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
                if Claim(**json.loads(storage.read(entry.key))).is_dead:
                    storage.delete(entry.key)


def _machine() -> str:
    """Names a set of processes that see each other's pids."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.is_file() and namespace.exists():
        return f"{boot.read_text().strip()}/{namespace.stat().st_ino}"
    return f"{socket.gethostname()}/{psutil.boot_time():.0f}"
