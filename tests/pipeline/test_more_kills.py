"""SIGKILLs at moments spread over an append, an aligning and an upload, and as many resumes: the result is that of an undisturbed one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore import open_store
from kvstore.lease import EXPIRY_S
from kvstore.storage import STAGING, locate
from kvstore.verify import verify_store
from tests.pipeline.conftest import Bench, content
from tests.pipeline.test_extract import by_id
from tests.processes import KVPIPE, Process
from tests.s3 import keys_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
KILLS = 10
_WITH_OWN_TMPDIR = "import tempfile; tempfile.tempdir = None; "
"""What these processes are forked from has looked for the folder already."""


def killed(arguments: list[str], num_committed: Callable[[], int], kills: int, seed: int, temporary: Path) -> list[int]:
    """Start a command and kill it, again and again; the number of commits after each kill.

    One in three is killed some time after its start, the others shortly after one more commit.
    """
    draw, seen = random.Random(seed), list[int]()
    for number in range(kills):
        with Process(_WITH_OWN_TMPDIR + KVPIPE, *arguments, environment={"TMPDIR": str(temporary)}) as process:
            target = num_committed() + 1
            deadline = time.monotonic() + (draw.uniform(0.3, 4) if number % 3 == 2 else 60)
            while time.monotonic() < deadline and process.poll() is None and num_committed() < target:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.1))
            assert process.poll() is None, f"it ended before kill {number + 1}: {process.stderr}"
            process.send_signal(signal.SIGKILL)
            process.wait()
        seen.append(num_committed())
    return seen


def finish(arguments: list[str], out: str, temporary: Path) -> None:
    """Run a command to its end; nothing of what killed ones left may stay.

    Single files may be somebody's who writes a log at this moment: they stay until they are old.
    """
    run(arguments, temporary)
    left = staging(out)
    assert all(name.startswith("file-") for name in left), left
    for name in left:
        os.utime(Path(out, STAGING, name), (time.time() - 2 * EXPIRY_S,) * 2)
    if left:
        run(arguments, temporary)
    assert not staging(out)
    report = verify_store(out, deep=True)
    assert report.ok, report.problems
    assert (report.orphans, report.writers, report.num_committed) == ((), (), report.num_shards)


def run(arguments: list[str], temporary: Path) -> None:
    done = Process(_WITH_OWN_TMPDIR + KVPIPE, *arguments, environment={"TMPDIR": str(temporary)}).finish()
    assert done.returncode == 0, done.stderr


def staging(out: str) -> list[str]:
    return [entry.key.removeprefix(f"{STAGING}/") for entry in locate(out).entries(STAGING)]


def told(what: str, kills: int, seen: list[int], left: int, temporary: Path) -> None:
    forgotten = len(list(temporary.iterdir()))
    print(f"\n{what} killed {kills} times, commits after each {seen}: equal; {left} leftovers in staging, all swept at the end")
    print(f"  {forgotten} folders left in the temporary folder")


def commits(out: Path) -> int:
    return len(list((out / "commits").glob("*.json")))


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


def test_a_killed_append_goes_on_to_the_store_of_an_undisturbed_one(bench: Bench, tmp_path: Path, temporary: Path) -> None:
    whole, cut = (Path(shutil.copytree(bench.store, tmp_path / name)) for name in ("whole", "cut"))
    finish(bench.append(whole), str(whole), temporary)
    seen = killed(bench.append(cut), lambda: commits(cut), KILLS, 30, temporary)
    assert any(commits(bench.store) < number < commits(whole) for number in seen)
    left = len(staging(str(cut)))
    finish(bench.append(cut), str(cut), temporary)
    assert content(cut) == content(whole)
    told("append", KILLS, seen, left, temporary)


def test_a_killed_aligning_goes_on_to_the_store_of_an_undisturbed_one(bench: Bench, tmp_path: Path, temporary: Path) -> None:
    finish(bench.align(tmp_path / "whole"), str(tmp_path / "whole"), temporary)
    out = tmp_path / "cut"
    seen = killed(bench.align(out), lambda: commits(out), KILLS, 31, temporary)
    left = len(staging(str(out)))
    finish(bench.align(out), str(out), temporary)
    assert content(out) == content(tmp_path / "whole")
    told("align", KILLS, seen, left, temporary)


def test_a_killed_upload_goes_on_to_the_store_of_an_undisturbed_one(
    bench: Bench, tmp_path: Path, temporary: Path, bucket: str
) -> None:
    """Two stores joined in a bucket, bit for bit."""
    finish(
        bench.extract(tmp_path / "more", "--calibration", str(bench.store), data=bench.more), str(tmp_path / "more"), temporary
    )
    join = ["merge", str(bench.store), str(tmp_path / "more"), "--out"]
    finish([*join, str(tmp_path / "whole")], str(tmp_path / "whole"), temporary)
    out = f"s3://{bucket}/cut"
    seen = killed([*join, out], lambda: len(keys_of(bucket, "cut/commits/")), KILLS, 32, temporary)
    left = len(staging(out))
    finish([*join, out], out, temporary)
    assert by_id(open_store(out)) == by_id(open_store(tmp_path / "whole"))
    told("upload", KILLS, seen, left, temporary)
