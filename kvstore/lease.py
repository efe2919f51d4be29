"""Leases: who is writing which shards of a store, so that two writers never damage each other's work.

A claim is a small file that its holder touches again and again. It dies with its holder: at once where the holder was a process
of this machine, after a time without touch anywhere else. Works the same on a disk, a shared file system and a bucket, whose
clock, not ours, says how old a claim is; between processes of one machine its uptime does, because that is never set. Whoever takes
over from a claim revokes it first: a holder that was only frozen then finds every write refused (`Storage.fenced`). Knows shard
numbers, not what is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated

import psutil
import pydantic

from kvstore.errors import LeaseHeldError, LeaseLostError, StoreFormatError
from kvstore.records import INT32_MAX, INT64_MAX, parse
from kvstore.storage import CLAIM, LEASES, SCRATCH, STAGING, Folder, Storage, claim_key

LAYOUT = -1
"""Stands for the right to create a store or to change its manifest, beside shards 0 and up."""
EVERYTHING = (LAYOUT, 2**62)
TOUCH_S, EXPIRY_S = 20.0, 120.0
_TRIES = 4
_MOST_BYTES = 65_536
_SET_S = 10.0
"""A clock that differs by more from a machine's own has been set; whole seconds and slow requests differ by less."""
_UNDER_LEASE = (CLAIM, SCRATCH, "creating", "shard-", "create-")
"""What only a writer with a lease puts into the staging folder."""
Text = Annotated[str, pydantic.StringConstraints(max_length=4096)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One writer's claim."""

    __pydantic_config__ = pydantic.ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    purpose: Text
    """The command, for messages."""
    first: Annotated[int, pydantic.Field(ge=LAYOUT, le=INT64_MAX)]
    stop: Annotated[int, pydantic.Field(ge=LAYOUT, le=INT64_MAX)]
    """Shards from `first` up to but without `stop`."""
    host: Text
    pid: Annotated[int, pydantic.Field(ge=1, le=INT32_MAX)]
    machine: Text
    """Boot and process namespace: within one, a pid means the same process."""
    started_s: Annotated[float, pydantic.Field(ge=0, le=2**36)]
    """When that process started, in seconds since 1970 by a clock that may have been set since."""
    uptime_s: Annotated[float, pydantic.Field(ge=0)] | None = None
    """The machine's monotonic clock when this was written; None of a writer that does not say."""

    def overlaps(self, first: int, stop: int) -> bool:
        return self.first < stop and first < self.stop

    @property
    def is_here(self) -> bool:
        """Whether its holder is a process that this one can see."""
        return self.machine == _machine()

    @property
    def is_dead(self) -> bool:
        """Whether its holder is known to be gone; False where that cannot be known."""
        if not self.is_here:
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
            content = storage.read(entry.key, most_bytes=_MOST_BYTES)
            claim = parse(Claim, content, entry.key, "11.1")
        except (FileNotFoundError, StoreFormatError):
            continue  # released meanwhile, cut short by a crash, or no claim at all: it expires
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
) -> Iterator[Storage]:
    """Hold shards `first` to `stop - 1` while the block runs; gives the storage to write through, which fails once the claim is lost.

    Args:
        wait: told once whom we wait for, then we do; without it somebody else's claim raises.
        tries: how often to look before it raises.

    Raises:
        LeaseHeldError: somebody else is writing some of them.
        LeaseLostError: from writes in the block: this process stood still, its claim ran out and another writer took over.
    """
    claim = secrets.token_hex(8)
    own = Claim(
        purpose=purpose[:4096],
        first=first,
        stop=stop,
        host=socket.gethostname(),
        pid=os.getpid(),
        machine=_machine(),
        started_s=psutil.Process().create_time(),
    )
    done, held = threading.Event(), storage.fenced(claim)

    def touch() -> None:
        while not done.wait(touch_s):
            try:
                held.write(claim_key(claim), _claimed(own), replace=True)
            except LeaseLostError:
                return
            except OSError:
                continue  # the next touch may get through

    thread = threading.Thread(target=touch, name="lease", daemon=True)
    try:
        _acquire(storage, claim, own, wait, tries, expiry_s)
        thread.start()
        yield held
    finally:
        done.set()
        if thread.is_alive():
            thread.join()
        with contextlib.suppress(
            OSError, StoreFormatError
        ):  # what the block raised matters more, and a claim without touch expires
            storage.delete(claim_key(claim))
            storage.revoke_claim(claim)


def sweep(storage: Storage, purpose: str) -> None:
    """Remove what killed writers left in the staging folder; does nothing while another writer lives."""
    with contextlib.suppress(LeaseHeldError), lease(storage, *EVERYTHING, purpose, tries=1) as held:
        sweep_held(held)


def sweep_held(held: Storage, *, everything: bool = False) -> tuple[str, ...]:
    """The same for who holds the whole store; returns what was removed.

    Shards and stores are written under a lease, so what other claims left is nobody's; other files may be on their way into place
    without one, and go when they are as old as a dead claim.

    Args:
        everything: remove files of any age.
    """
    own = f"{CLAIM}{held.claim}", f"{SCRATCH}{held.claim}", PurePosixPath(claim_key(str(held.claim))).name
    entries = list(held.entries(STAGING))
    now = max((entry.modified_s for entry in entries), default=0.0)  # our own claim's
    removed = []
    for entry in entries:
        parts = PurePosixPath(entry.key).relative_to(STAGING).parts
        if any(part.startswith(own) for part in parts):
            continue
        if everything or parts[0].startswith(_UNDER_LEASE) or abs(now - entry.modified_s) > EXPIRY_S:
            held.delete(entry.key)
            removed.append(entry.key)
    if isinstance(held, Folder):
        for folder in (held.root / STAGING).iterdir():
            if folder.is_dir() and folder.name.startswith(_UNDER_LEASE) and not folder.name.startswith(own):
                held.delete_folder(f"{STAGING}/{folder.name}")
    return tuple(removed)


def _acquire(
    storage: Storage, claim: str, own: Claim, wait: Callable[[str], object] | None, most_tries: int, expiry_s: float
) -> None:
    """Claim first, then look: of two that come at once at least one sees the other and steps back."""
    told, tries, key = False, 0, claim_key(claim)
    while True:
        storage.write(key, _claimed(own), replace=True)
        now = next((entry.modified_s for entry in storage.entries(LEASES) if entry.key == key), None)
        found = [holder for holder in holders(storage, expiry_s=expiry_s, now_s=now) if holder.key != key]
        others = [holder.claim for holder in found if holder.is_living and holder.claim.overlaps(own.first, own.stop)]
        if not others:
            for holder in found:
                if not holder.is_living and (holder.claim.is_dead or holder.claim.overlaps(own.first, own.stop)):
                    storage.revoke_claim(PurePosixPath(holder.key).stem)
                    storage.delete(holder.key)
            storage.open_claim(claim)
            return
        storage.delete(key)
        tries += 1
        who = f"{others[0].purpose} (host {others[0].host}, pid {others[0].pid})"
        if wait is not None:
            if not told:
                wait(f"waiting for {who}, which is at work on {storage.location}")
                told = True
        elif tries >= most_tries:
            raise LeaseHeldError(
                f"{own.purpose}: {who} is writing the same shards of {storage.location}. Let it finish, or give each its part "
                f"with --task-range; if it was killed on another machine, its claim ends {expiry_s:.0f} s after its last sign of life"
            )
        time.sleep(random.uniform(0.1, 0.5))


def _claimed(claim: Claim) -> bytes:
    """What lies in the file of a claim that is written now."""
    return json.dumps(dataclasses.asdict(dataclasses.replace(claim, uptime_s=time.monotonic()))).encode()


def _machine() -> str:
    """Names a set of processes that see each other's pids."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.is_file() and namespace.exists():
        return f"{boot.read_text().strip()}/{namespace.stat().st_ino}"
    return f"{socket.gethostname()}/{psutil.boot_time():.0f}"
