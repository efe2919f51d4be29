"""Clocks that are set while stores are written: neither two writers at once, nor a claim that never ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore import LeaseHeldError
from kvstore.lease import LEASES, lease
from kvstore.storage import locate
from tests.kvstore.test_lease import HOLDER, put_claim

HOUR_S = 3600.0
YEAR_S = 365 * 24 * HOUR_S


@contextlib.contextmanager
def holder(root: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds shards 0 to 7."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(root)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()


def set_clock(root: Path, by_s: float) -> None:
    """Leave the one claim as the disk has it after the clock was set: its times are those of the clock before."""
    (file,) = (root / LEASES).iterdir()
    claim, then = json.loads(file.read_text()), file.stat().st_mtime - by_s
    file.write_text(json.dumps({**claim, "started_s": claim["started_s"] - by_s}))
    os.utime(file, (then, then))


@pytest.mark.parametrize(
    "by_s",
    [
        pytest.param(-HOUR_S, id="hour-back"),
        pytest.param(HOUR_S, id="hour-on", marks=pytest.mark.slow),
        pytest.param(30.0, id="half-minute-on", marks=pytest.mark.slow),
        pytest.param(-30.0, id="half-minute-back", marks=pytest.mark.slow),
    ],
)
def test_a_clock_that_is_set_lets_nobody_in_beside_a_living_writer(by_s: float, tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        set_clock(tmp_path, by_s)
        with pytest.raises(LeaseHeldError, match=f"pid {process.pid}"), lease(locate(tmp_path), 3, 4, "kvpipe extract"):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with lease(locate(tmp_path), 3, 4, "kvpipe extract"):
            pass


def test_a_process_that_got_the_number_of_a_dead_one_does_not_block_after_the_clock_was_set(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        (file,) = (tmp_path / LEASES).iterdir()
        claim = json.loads(file.read_text())
        file.write_text(json.dumps({**claim, "uptime_s": claim["uptime_s"] - HOUR_S, "started_s": 1.0}))
        with lease(locate(tmp_path), 3, 4, "kvpipe extract"):
            pass
        assert process.poll() is None


@pytest.mark.parametrize("ahead_s", [HOUR_S, 40 * YEAR_S], ids=["an-hour", "forty-years"])
def test_a_claim_of_another_machine_from_before_the_clock_was_set_back_ends(ahead_s: float, tmp_path: Path) -> None:
    put_claim(tmp_path, age_s=-ahead_s)
    begun = time.monotonic()
    with lease(locate(tmp_path), 7, 9, "kvpipe extract"):
        pass
    assert time.monotonic() - begun < 5
