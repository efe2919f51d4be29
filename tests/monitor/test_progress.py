"""Progress of an extraction: what results say, how it is shown, and what is logged in the store."""

from __future__ import annotations

import io
import itertools
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvstore import open_store
from kvstore.storage import locate
from kvstore.verify import verify_store
from pipeline.monitor.meter import Meter
from pipeline.monitor.plot import plot_readings
from pipeline.monitor.progress import Progress
from pipeline.monitor.reading import Reading, duration, sentence, short
from pipeline.monitor.run_log import LogReader, RunLog
from pipeline.worker import TaskResult
from tests.stores import random_source, small_spec, write_store


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def result(shard: int = 0, tokens: int = 1000, **seconds: float) -> TaskResult:
    stages = {"compute_s": 8.0, "copy_s": 0.5, "encode_s": 1.0, "write_s": 2.0, **seconds}
    return TaskResult(shard=shard, num_samples=1, num_tokens=tokens, stored_bytes=5 * tokens, batch_tokens=1000, **stages)


def test_a_reading_tells_rate_shares_bottleneck_and_end() -> None:
    clock = Clock()
    meter = Meter(workers=1, total_tokens=10_000, done_tokens=1000, clock=clock)
    for shard in range(3):
        clock.now += 10
        meter.add(result(shard))
    reading = meter.read()
    assert (reading.shards, reading.tokens, reading.stored_bytes, reading.left_tokens) == (3, 3000, 15_000, 6000)
    assert reading.tokens_per_s == pytest.approx(100)
    assert reading.eta_s == pytest.approx(60)
    assert reading.shares == pytest.approx({"compute": 0.8, "copy": 0.05, "encode": 0.1, "write": 0.2})
    assert reading.bottleneck == "compute"
    assert sentence(reading, "cuda:0") == ("100 tokens/s  GPU 80% copy 5% encode 10% write 20%  bottleneck: GPU  ETA 0:01:00")
    assert "teacher 80%" in sentence(reading, "cpu")
    assert Reading.from_json(json.loads(json.dumps(reading.to_json()))) == reading


def test_rates_are_those_of_the_last_minute_and_of_the_whole_run_at_the_end() -> None:
    clock = Clock()
    meter = Meter(workers=1, total_tokens=None, clock=clock)
    for shard in range(20):
        clock.now += 10 if shard < 10 else 20
        meter.add(result(shard, write_s=2.0 if shard < 10 else 19.0))
    reading, whole = meter.read(), meter.read_whole()
    assert reading.tokens_per_s == pytest.approx(50)
    assert reading.bottleneck == "write"
    assert (reading.left_tokens, reading.eta_s) == (None, None)
    assert whole.tokens_per_s == pytest.approx(20_000 / 300)
    assert whole.shares["write"] == pytest.approx((10 * 2 + 10 * 19) / 300)


def test_shares_are_of_the_time_of_all_workers() -> None:
    clock = Clock()
    meter = Meter(workers=2, total_tokens=None, clock=clock)
    for shard in range(4):
        clock.now += 5
        meter.add(result(shard))
    assert meter.read().shares["compute"] == pytest.approx(4 * 8 / (2 * 20))


def test_many_writers_at_once_are_no_bottleneck_while_the_teacher_has_no_rest() -> None:
    clock = Clock()
    meter = Meter(workers=1, total_tokens=None, clock=clock)
    for shard in range(3):
        clock.now += 10
        meter.add(result(shard, compute_s=8.5, write_s=25.0))
    assert meter.read().shares["write"] == 1.0
    assert meter.read().bottleneck == "compute"


def test_workers_that_do_nothing_are_waiting() -> None:
    clock = Clock()
    meter = Meter(workers=1, total_tokens=None, clock=clock)
    for shard in range(3):
        clock.now += 100
        meter.add(result(shard))
    assert meter.read().bottleneck == "waiting"


def test_what_calibration_had_computed_before_is_no_speed() -> None:
    clock = Clock()
    meter = Meter(workers=1, total_tokens=10_000, clock=clock)
    clock.now += 1
    meter.add(result(0, compute_s=0.0))
    reading = meter.read()
    assert (reading.tokens, reading.tokens_per_s, reading.eta_s) == (1000, None, None)
    assert sentence(reading, "cpu").startswith("- tokens/s")
    clock.now += 10
    meter.add(result(1))
    assert meter.read().tokens_per_s == pytest.approx(1000 / 11)


@pytest.mark.parametrize(("number", "text"), [(0.5, "0.5"), (999, "999"), (999.9, "1k"), (12_345, "12.3k"), (2.5e9, "2.5G")])
def test_numbers_are_short(number: float, text: str) -> None:
    assert short(number) == text


def test_durations_read_as_clocks() -> None:
    assert [duration(seconds) for seconds in (0.4, 65, 90_061)] == ["0:00:00", "0:01:05", "1 day, 1:01:01"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def begin(tmp_path: Path) -> Callable[..., Progress]:
    def make(say: Callable[[str], object], clock: Clock, total_tokens: int | None = 40_000, **over: Any) -> Progress:
        settings = {"workers": 1, "device": "cpu", "total_tokens": total_tokens, **over}
        return Progress(locate(tmp_path), say, clock=clock, **settings)

    return make


def lines_of(store: Path) -> list[list[dict[str, Any]]]:
    return list(LogReader(locate(store)).read().values())


def test_without_a_terminal_there_are_plain_lines_now_and_then(
    begin: Callable[..., Progress], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, said = Clock(), list[str]()
    with begin(said.append, clock) as progress:
        for shard in range(40):
            clock.now += 10
            progress.add(result(shard))
    *lines, summary = said
    assert len(lines) == 40 * 10 // 30
    assert lines[0].startswith("extract: 3k of 40k (8%) tokens  100 tokens/s  teacher 80% copy 5% encode 10% write 20%")
    assert "bottleneck: teacher" in summary
    assert "40 shards, 40,000 tokens, 0.2 MB in 0:06:40" in summary
    assert not any("\r" in line or "\x1b" in line for line in said)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_one_live_line(begin: Callable[..., Progress], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, clock, said = Terminal(), Clock(), list[str]()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    with begin(said.append, clock, device="cuda:0", total_tokens=None) as progress:
        clock.now += 10
        progress.add(result())
        progress.expect(4000)
        clock.now += 10
        progress.add(result(1))
    shown = terminal.getvalue()
    assert "GPU 80% copy 5% encode 10% write 20%  bottleneck: GPU" in shown
    assert "50%" in shown.rpartition("\r")[2]
    assert "ETA 0:00:20" in shown
    assert len(said) == 1, "only the summary"


def test_the_log_holds_every_shard_once_and_ends_with_the_whole_run(begin: Callable[..., Progress], tmp_path: Path) -> None:
    clock = Clock()
    with begin(lambda _: None, clock) as progress:
        for shard in range(40):
            clock.now += 0.3
            progress.add(result(shard))
    ((first, *readings, last),) = lines_of(tmp_path)
    assert (first["event"], last["event"]) == ("start", "end")
    assert first["total_tokens"] == 40_000
    assert {first["host"], first["pid"]} == {socket.gethostname(), os.getpid()}
    logged = [shard for line in readings for shard in line["committed"]]
    assert logged == [str(shard) for shard in range(40)]
    assert readings[0]["committed"]["0"] == [1000, 5000]
    assert 10 <= len(readings) <= 13, "about one a second"
    assert Reading.from_json(last).tokens == 40_000


def test_a_long_run_logs_ever_less_often_down_to_twice_a_minute(begin: Callable[..., Progress], tmp_path: Path) -> None:
    clock = Clock()
    with begin(lambda _: None, clock, total_tokens=None) as progress:
        for shard in range(900):
            clock.now += 1 if shard < 60 else 10
            progress.add(result(shard, tokens=10))
    ((_, *readings, _),) = lines_of(tmp_path)
    gaps = [later["seconds"] - earlier["seconds"] for earlier, later in itertools.pairwise(readings[:-1])]
    assert gaps[:5] == pytest.approx([1] * 5)
    assert max(gaps) == pytest.approx(30)
    assert len(readings) < 400
    assert sum(len(line["committed"]) for line in readings) == 900


def test_full_files_are_left_and_no_line_is_lost(tmp_path: Path) -> None:
    log = RunLog(locate(tmp_path), lambda _: None)
    log.begin()
    for number in range(40):
        log.add("progress", number=number, padding="x" * 20_000)
    files = sorted((tmp_path / log.folder).iterdir())
    assert [file.name for file in files] == ["00000.jsonl", "00001.jsonl", "00002.jsonl", "00003.jsonl"]
    assert max(file.stat().st_size for file in files) < 300_000
    ((_, *lines),) = lines_of(tmp_path)
    assert [line["number"] for line in lines] == list(range(40))


def test_an_error_that_ends_a_run_is_logged_and_a_resumed_run_has_a_log_of_its_own(
    begin: Callable[..., Progress], tmp_path: Path
) -> None:
    clock, said = Clock(), list[str]()

    def run() -> None:
        with begin(said.append, clock) as progress:
            clock.now += 10
            progress.add(result())
            raise ValueError("disk on fire")

    with pytest.raises(ValueError, match="disk on fire"):
        run()
    with begin(said.append, clock) as progress:
        progress.found(1000)
        clock.now += 10
        progress.add(result(1))
    logs = lines_of(tmp_path)
    failed, resumed = sorted(logs, key=lambda log: log[0]["done_tokens"])
    assert failed[-1] == {**failed[-1], "event": "error", "error": "ValueError: disk on fire"}
    assert "0" in failed[-2]["committed"]
    assert resumed[-1]["event"] == "end"
    assert len(said) == 1


def test_a_run_that_begins_no_task_leaves_no_log(begin: Callable[..., Progress], tmp_path: Path) -> None:
    with begin(pytest.fail, Clock()) as progress:
        progress.found(40_000)
    with pytest.raises(ValueError, match="Nothing was written"), begin(pytest.fail, Clock()):
        raise ValueError("other data. Nothing was written")
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_cannot_be_written_is_said_once_and_ends_nothing(begin: Callable[..., Progress], tmp_path: Path) -> None:
    (tmp_path / "progress").write_text("a file where the folder should be")
    clock, said = Clock(), list[str]()
    with begin(said.append, clock) as progress:
        for shard in range(5):
            clock.now += 10
            progress.add(result(shard))
    assert len([text for text in said if "cannot be written" in text and "the run goes on" in text]) == 1
    assert "5 shards" in said[-1]
    assert "plot" not in said[-1]


def test_the_summary_names_a_picture_of_the_run(begin: Callable[..., Progress], tmp_path: Path) -> None:
    clock, said = Clock(), list[str]()
    with begin(said.append, clock) as progress:
        for shard in range(10):
            clock.now += 10
            progress.add(result(shard))
    path = Path(said[-1].partition("plot: ")[2])
    assert path.is_relative_to(tmp_path / "progress")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content == plot_readings(progress.readings, "cpu")


def test_a_short_run_has_no_picture(begin: Callable[..., Progress], tmp_path: Path) -> None:
    clock, said = Clock(), list[str]()
    with begin(said.append, clock) as progress:
        for shard in range(9):
            clock.now += 1.05
            progress.add(result(shard))
    assert "9 shards" in said[-1]
    assert "plot" not in said[-1]
    assert list(tmp_path.rglob("*.png")) == []


def test_a_picture_changes_with_what_it_shows() -> None:
    clock = Clock()
    meter = Meter(workers=1, total_tokens=None, clock=clock)
    readings = [meter.read()]
    for shard in range(3):
        clock.now += 10
        meter.add(result(shard))
        readings.append(meter.read())
    assert plot_readings(readings, "cpu") != plot_readings(readings[:-1], "cpu")
    assert plot_readings(readings, "cpu") != plot_readings(readings, "cuda")


def test_readers_and_verify_leave_the_log_alone(begin: Callable[..., Progress], tmp_path: Path) -> None:
    write_store(tmp_path, random_source(small_spec(), [100, 50]))
    clock = Clock()
    with begin(lambda _: None, clock) as progress:
        clock.now += 10
        progress.add(result())
    for file in (tmp_path / "progress").rglob("*.jsonl"):
        file.write_bytes(b"\xff not json\n")
    assert len(open_store(tmp_path)) == 2
    report = verify_store(str(tmp_path))
    assert (report.ok, report.orphans) == (True, ())
    assert lines_of(tmp_path) == []
