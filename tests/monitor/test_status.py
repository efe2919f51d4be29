"""`kvpipe status`: what a store alone tells of who is filling it and how far they are."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvstore import StoreNotFoundError
from kvstore.commits import commit_key, read_commit
from kvstore.compaction import compact
from kvstore.lease import EVERYTHING, EXPIRY_S, LAYOUT, LEASES, lease
from kvstore.storage import Storage, locate
from pipeline.cli import cli
from pipeline.monitor.progress import Progress
from pipeline.monitor.status import Status, StatusReader
from pipeline.worker import TaskResult
from tests.stores import Source, begin_store, random_source, small_spec, write_shard

LENGTHS = [100] * 40


class Filling:
    """A store being filled shard by shard by the real writer."""

    def __init__(self, root: Path) -> None:
        self.root, self.storage = root, locate(root)
        self.source: Source = random_source(small_spec(num_layers=1), LENGTHS)
        self.manifest, self.calibration, self.tasks = begin_store(root, self.source)

    def write(self, shards: Sequence[int]) -> None:
        for shard in shards:
            write_shard(self.root, self.source, self.manifest, self.calibration, shard, self.tasks[shard])

    def tokens(self, shards: Sequence[int]) -> int:
        return 100 * sum(len(self.tasks[shard]) for shard in shards)

    def result(self, shard: int) -> TaskResult:
        return TaskResult(
            shard=shard,
            num_samples=len(self.tasks[shard]),
            num_tokens=self.tokens([shard]),
            stored_bytes=5000,
            batch_tokens=1000,
            compute_s=0.9,
            copy_s=0.0,
            encode_s=0.1,
            write_s=0.2,
        )


@pytest.fixture
def filling(tmp_path: Path) -> Filling:
    return Filling(tmp_path / "store")


def progress_of(filling: Filling, **over: Any) -> Progress:
    settings = {"workers": 1, "device": "cpu", "total_tokens": sum(LENGTHS), **over}
    return Progress(filling.storage, lambda _: None, clock=itertools.count(0.0).__next__, **settings)


def status_of(filling: Filling) -> Status:
    return StatusReader(str(filling.root)).read()


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["status", *map(str, arguments)], terminal_width=160)


def everything(storage: Storage) -> list[tuple[str, int, float]]:
    return sorted(storage.entries(""))


def test_where_there_is_no_store_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match=r"no store at .*nowhere"):
        StatusReader(str(tmp_path / "nowhere")).read()


def test_somebody_at_work_before_there_is_a_store_is_seen(tmp_path: Path) -> None:
    with lease(locate(tmp_path), LAYOUT, LAYOUT + 1, "kvpipe extract"):
        found = StatusReader(str(tmp_path)).read()
        assert invoke(tmp_path).exit_code == 3
    assert (found.state, found.planned_shards, found.left_tokens, found.shards) == ("starting", None, None, 0)
    (writer,) = found.writers
    assert (writer.pid, writer.host, writer.shards) == (os.getpid(), socket.gethostname(), None)


def test_an_unfinished_store_nobody_writes_is_stopped(filling: Filling) -> None:
    filling.write([0, 1, 2])
    found = status_of(filling)
    assert (found.state, found.shards, found.planned_shards) == ("stopped", 3, len(filling.tasks))
    assert found.tokens == filling.tokens([0, 1, 2])
    assert found.left_tokens == pytest.approx(sum(LENGTHS) - found.tokens, rel=0.2)
    assert found.stored_bytes == sum(read_commit(filling.storage, shard).stored_bytes for shard in (0, 1, 2))
    assert (found.tokens_per_s, found.eta_s, found.writers) == (None, None, ())
    shown = invoke(filling.root)
    assert shown.exit_code == 4
    assert "STOPPED" in shown.output
    assert f"3 of {len(filling.tasks)}" in shown.output


def test_a_complete_store_is_complete(filling: Filling) -> None:
    filling.write(range(len(filling.tasks)))
    compact(filling.storage)
    found = status_of(filling)
    assert (found.state, found.tokens, found.left_tokens) == ("complete", sum(LENGTHS), 0)
    shown = invoke(filling.root, "--watch")
    assert (shown.exit_code, "complete" in shown.output) == (0, True)


def test_a_running_extraction_is_seen_with_its_speed_and_what_is_slow(filling: Filling) -> None:
    with lease(filling.storage, 0, len(filling.tasks), "kvpipe extract"), progress_of(filling) as progress:
        for shard in range(4):
            filling.write([shard])
            progress.add(filling.result(shard))
        found = status_of(filling)
        shown = invoke(filling.root)
    assert found.state == "running"
    (writer,) = found.writers
    assert (writer.purpose, writer.host, writer.pid) == ("kvpipe extract", socket.gethostname(), os.getpid())
    assert writer.shards == (0, len(filling.tasks))
    assert writer.since_s < time.time()
    assert writer.silent_s < 10
    assert found.left_tokens == sum(LENGTHS) - filling.tokens(range(4))
    assert found.tokens_per_s is not None
    assert found.eta_s == pytest.approx(found.left_tokens / found.tokens_per_s)
    assert found.bottleneck in ("compute", "waiting")
    assert found.last_commit_s is not None
    assert found.last_commit_s < 10
    assert shown.exit_code == 3
    for text in ("RUNNING", "tokens/s", "done in", "teacher", "bottleneck", f"pid {os.getpid()}", "seen 0:00:0"):
        assert text in shown.output


def test_without_a_log_the_speed_is_told_by_the_commits(filling: Filling) -> None:
    filling.write([0, 1, 2])
    now = time.time()
    for shard, age in enumerate([100, 50, 20]):
        os.utime(filling.root / commit_key(shard), (now - age, now - age))
    with lease(filling.storage, 0, 9, "kvpipe extract"):
        found = status_of(filling)
    assert found.tokens_per_s == pytest.approx(filling.tokens([1, 2]) / 100, rel=0.1)
    assert found.last_commit_s == pytest.approx(20, abs=5)


def test_sizes_come_from_tables_and_logs_and_only_else_from_commit_records(filling: Filling) -> None:
    filling.write([0, 1])
    compact(filling.storage)
    with progress_of(filling) as progress:
        for shard in (2, 3):
            filling.write([shard])
            progress.add(filling.result(shard))
    for shard in range(4):  # large, on a slow bucket perhaps: not to be read for this
        (filling.root / commit_key(shard)).write_text("unreadable")
    filling.write([4])
    assert status_of(filling).tokens == filling.tokens(range(5))


def test_a_second_look_reads_nothing_again(filling: Filling, monkeypatch: pytest.MonkeyPatch) -> None:
    filling.write([0, 1])
    with progress_of(filling) as progress:
        filling.write([2])
        progress.add(filling.result(2))
    reader = StatusReader(str(filling.root))
    first = reader.read()
    monkeypatch.setattr("pipeline.monitor.status.read_commit", lambda *_: pytest.fail("a commit record was read again"))
    monkeypatch.setattr("pipeline.monitor.run_log.LogReader._lines", lambda *_: pytest.fail("a log was read again"))
    assert dataclasses.replace(reader.read(), last_commit_s=first.last_commit_s) == first


def test_looking_writes_nothing(filling: Filling) -> None:
    filling.write([0])
    with lease(filling.storage, 0, 9, "kvpipe extract", touch_s=1000.0):
        before = everything(filling.storage)
        status_of(filling)
        assert invoke(filling.root, "--json").exit_code == 3
        assert everything(filling.storage) == before


def leave_claim(filling: Filling, name: str, age_s: float, **over: Any) -> None:
    claim = {"purpose": "kvpipe extract", "first": 3, "stop": 9, "host": "node7", "pid": 17, "machine": "x", "started_s": 1.0}
    path = filling.root / LEASES / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**claim, **over}))
    os.utime(path, (time.time() - age_s,) * 2)


def test_claims_of_the_dead_are_stale_and_writers_elsewhere_are_not(filling: Filling) -> None:
    leave_claim(filling, "elsewhere", 30)
    leave_claim(filling, "silent", 2 * EXPIRY_S, host="node8")
    found = status_of(filling)
    assert [writer.host for writer in found.writers] == ["node7"]
    assert [writer.host for writer in found.stale] == ["node8"]
    assert found.writers[0].silent_s == pytest.approx(30, abs=5)
    assert found.state == "running"
    assert "it is gone and in nobody's way" in " ".join(invoke(filling.root).output.split())


def test_what_ended_the_newest_run_is_shown_until_another_begins(filling: Filling) -> None:
    def run() -> None:
        with progress_of(filling) as progress:
            progress.add(filling.result(0))
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run()
    assert status_of(filling).last_error == "OSError: disk full"
    assert "disk full" in invoke(filling.root).output
    with progress_of(filling) as progress:
        progress.note("quarantined", sample="3f2a9c01", reason="not finite")
        assert status_of(filling).last_error is None
    assert [(note["event"], note["sample"]) for note in status_of(filling).notes] == [("quarantined", "3f2a9c01")]
    assert "sample 3f2a9c01, reason not finite" in " ".join(invoke(filling.root).output.split())


def test_damaged_logs_are_left_out(filling: Filling) -> None:
    folder = filling.root / "progress" / "20260101T000000Z-00000000"
    folder.mkdir(parents=True)
    (folder / "00000.jsonl").write_bytes(
        b'{"event": "start", "time_s": 1.0}\n\xff\n[1]\n{"event": "progress", "time_s": 2.0}\n{"event"'
    )
    (folder / "plot.png").write_bytes(b"png")
    found = status_of(filling)
    assert (found.state, found.bottleneck) == ("stopped", None)


def test_watching_goes_on_until_the_store_is_complete(filling: Filling) -> None:
    filling.write(range(len(filling.tasks) - 1))

    def finish() -> None:
        time.sleep(1.5)
        filling.write([len(filling.tasks) - 1])

    with lease(filling.storage, 0, 99, "kvpipe extract"):
        thread = threading.Thread(target=finish)
        thread.start()
        shown = invoke(filling.root, "--watch", "--every", "0.5", "--json")
        thread.join()
    states = [json.loads(line)["state"] for line in shown.output.splitlines()]
    assert shown.exit_code == 0
    assert states[-1] == "complete"
    assert len(states) > 1
    assert set(states[:-1]) == {"running"}


def test_one_that_holds_the_whole_store_is_shown_as_such(filling: Filling) -> None:
    with lease(filling.storage, *EVERYTHING, "kvpipe drop"):
        assert "kvpipe drop" in invoke(filling.root).output
        assert status_of(filling).writers[0].shards is None


def test_it_works_on_a_bucket(bucket: str) -> None:
    storage = locate(f"s3://{bucket}/runs/one")
    with pytest.raises(StoreNotFoundError):
        StatusReader(storage.location).read()
    with lease(storage, LAYOUT, LAYOUT + 1, "kvpipe extract"):
        progress = Progress(storage, pytest.fail, workers=1, device="cpu", total_tokens=100)
        found = StatusReader(storage.location).read()
        progress.note("quarantined", sample="3f2a9c01")
    assert (found.state, found.writers[0].pid) == ("starting", os.getpid())
    with lease(storage, LAYOUT, LAYOUT + 1, "kvpipe extract"):
        assert StatusReader(storage.location).read().notes[0]["sample"] == "3f2a9c01"


def test_looking_imports_no_model_library(filling: Filling) -> None:
    script = (
        "import sys; from pipeline.cli import cli\n"
        f"try: cli(['status', {str(filling.root)!r}])\n"
        "except SystemExit as end: assert end.code == 4, end.code\n"
        "heavy = {'torch', 'ray', 'transformers', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
