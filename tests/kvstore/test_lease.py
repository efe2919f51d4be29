"""Leases: who blocks whom, and for how long after a death."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvstore import LeaseHeldError
from kvstore.lease import EVERYTHING, EXPIRY_S, LEASES, Claim, claims, lease
from kvstore.storage import locate

HOLDER = """
import sys, time
from kvstore.lease import lease
from kvstore.storage import locate
with lease(locate(sys.argv[1]), 0, 8, "kvpipe extract"):
    print("held", flush=True)
    time.sleep(60)
"""


def put_claim(root: Path, *, age_s: float, **changes: object) -> Path:
    """A claim as a process of another machine would have left it."""
    claim = Claim(purpose="kvpipe extract", first=0, stop=8, host="far", pid=7, machine="elsewhere", started_s=0.0)
    file = root / LEASES / "0123456789abcdef.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**dataclasses.asdict(claim), **changes}))
    then = time.time() - age_s
    os.utime(file, (then, then))
    return file


@pytest.mark.parametrize("shards", [(0, 8), (7, 9), EVERYTHING])
def test_overlapping_leases_exclude_each_other_and_the_holder_is_named(shards: tuple[int, int], tmp_path: Path) -> None:
    storage = locate(tmp_path)
    with (
        lease(storage, 0, 8, "kvpipe extract"),
        pytest.raises(LeaseHeldError, match=rf"kvpipe drop: kvpipe extract \(host .*, pid {os.getpid()}\) is writing the same"),
        lease(storage, *shards, "kvpipe drop"),
    ):
        pass
    with lease(storage, *shards, "kvpipe drop"):
        assert [claim.purpose for claim in claims(storage).values()] == ["kvpipe drop"]
    assert not claims(storage)


def test_leases_of_other_shards_live_side_by_side(tmp_path: Path) -> None:
    with lease(locate(tmp_path), 0, 8, "one"), lease(locate(tmp_path), 8, 9, "two"), lease(locate(tmp_path), 9, 9, "none"):
        assert len(claims(locate(tmp_path))) == 3


@pytest.mark.parametrize("reap", [True, False], ids=["reaped", "zombie"])
def test_a_killed_process_of_this_machine_does_not_block(reap: bool, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(LeaseHeldError, match=f"pid {process.pid}"), lease(locate(tmp_path), 3, 4, "kvpipe extract"):
            pass
        process.send_signal(signal.SIGKILL)
        if reap:
            process.wait()
        else:
            while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.01)
        assert len(list((tmp_path / LEASES).iterdir())) == 1
        with lease(locate(tmp_path), 3, 4, "kvpipe extract"):
            assert len(claims(locate(tmp_path))) == 1
    assert not list((tmp_path / LEASES).iterdir()), "the dead one's claim was not removed"


def test_a_process_that_got_the_number_of_a_dead_one_does_not_block(tmp_path: Path) -> None:
    with lease(locate(tmp_path), 0, 8, "mine"):
        (own,) = claims(locate(tmp_path)).values()
    put_claim(tmp_path, age_s=0, machine=own.machine, pid=own.pid, started_s=own.started_s - 100)
    with lease(locate(tmp_path), 0, 8, "mine"):
        pass


def test_a_claim_of_another_machine_blocks_until_it_is_old(tmp_path: Path) -> None:
    put_claim(tmp_path, age_s=EXPIRY_S - 60)
    expected = r"kvpipe extract \(host far, pid 7\).*ends 120 s after its last sign of life"
    with pytest.raises(LeaseHeldError, match=expected), lease(locate(tmp_path), 7, 9, "kvpipe extract"):
        pass
    with lease(locate(tmp_path), 8, 9, "kvpipe extract"):
        pass
    put_claim(tmp_path, age_s=EXPIRY_S + 60)
    with lease(locate(tmp_path), 7, 9, "kvpipe extract"):
        pass


def test_who_waits_says_for_whom_and_goes_on_when_that_one_is_old(tmp_path: Path) -> None:
    put_claim(tmp_path, age_s=EXPIRY_S - 2)
    said: list[str] = []
    with lease(locate(tmp_path), 0, 1, "kvpipe extract", wait=said.append):
        pass
    assert said == [f"waiting for kvpipe extract (host far, pid 7), which is at work on {tmp_path}"]


def test_a_holder_shows_signs_of_life(tmp_path: Path) -> None:
    with lease(locate(tmp_path), 0, 1, "x", touch_s=0.05):
        (file,) = (tmp_path / LEASES).iterdir()
        os.utime(file, (1, 1))
        deadline = time.monotonic() + 10
        while file.stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
