"""Two extractions, a verification and a training at once on one store: real processes that see it grow under their hands."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore import open_store
from kvstore.verify import verify_store
from tests.pipeline.conftest import Bench, content
from tests.processes import Process, kvpipe, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CLOCKS = {"seconds", "loader_wait_s", "peak_rss_bytes"}


def wait_for(condition: Callable[[], bool], process: Process) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def metrics(run: Path) -> list[dict[str, object]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def commits(store: Path) -> int:
    return len(list((store / "commits").glob("*.json")))


@pytest.mark.parametrize("shares", [("1/2", "2/2"), (None, None)], ids=["shares", "the same shards"])
def test_two_extractions_a_verify_and_a_training_do_not_disturb_each_other(
    shares: tuple[str | None, str | None], bench: Bench, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    begun = [start(*bench.extract(store, *(["--task-range", share] if share else []))) for share in shares]
    wait_for(lambda: commits(store) >= 3, begun[0])
    verify = start("verify", str(store), "--json")
    train = start(*bench.train(tmp_path / "early", store, "--set", "workers=2"))
    found, trained = verify.finish(), train.finish()
    first, second = (process.finish() for process in begun)
    assert first.returncode == 0, first.stderr
    if shares[1] is not None:
        assert second.returncode == 0, second.stderr
    elif second.returncode:  # it came while the first held the shards
        assert "is writing the same shards" in second.stderr
    assert "Traceback" not in first.stderr + second.stderr
    assert "Traceback" not in found.stderr + trained.stderr
    assert found.returncode == 0, found.stdout
    report = json.loads(found.stdout)
    assert report["problems"] == []
    assert 3 <= report["num_committed"] <= 33
    assert content(store) == content(bench.store)
    assert verify_store(str(store), deep=True).ok

    undisturbed = kvpipe(*bench.train(tmp_path / "late", bench.store))
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert trained.returncode == 0, trained.stderr
    seen = int(json.loads((tmp_path / "early" / "summary.json").read_bytes())["num_train_samples"])
    whole = int(json.loads((tmp_path / "late" / "summary.json").read_bytes())["num_train_samples"])
    if seen == whole:
        assert metrics(tmp_path / "early") == metrics(tmp_path / "late")
    else:
        assert "shards of" in trained.stderr
        assert "are committed; training on what is there" in trained.stderr
        again = kvpipe(*bench.train(tmp_path / "early", store, "--resume"))
        assert again.returncode == 1
        assert "this run differs from the one in" in again.stderr
    print(
        f"\nverify saw {report['num_committed']} of 33 shards, the training {seen} of {whole} samples of {len(open_store(store))}"
    )


def test_a_training_that_begins_before_the_first_shard_says_what_to_run(bench: Bench, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with start(*bench.extract(store)) as extraction:
        wait_for((store / "manifest.json").is_file, extraction)
        extraction.send_signal(9)
        extraction.wait()
    if commits(store):
        pytest.skip("a shard was committed at once")
    done = kvpipe(*bench.train(tmp_path / "run", store))
    assert done.returncode == 1
    assert "has no samples yet, 0 of 33 shards are committed; run its 'kvpipe extract' command again" in done.stderr
    assert "Traceback" not in done.stderr
