"""Stores that grow and change, with real teachers: merging, appending, dropping, several writers at once."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from kvstore import FingerprintMismatchError, LeaseHeldError, open_store
from kvstore.describe import describe
from kvstore.drop import drop_samples
from kvstore.lease import LEASES
from kvstore.rewrite import merge_stores, recode_store
from kvstore.verify import verify_store
from kvstore.writer import ShardWriter
from pipeline import parts
from pipeline.cli import cli
from pipeline.config import ExtractConfig
from pipeline.extract import ExtractSummary, extract
from pipeline.models.resolve import resolve_model
from pipeline.repair import repair_store
from tests.checkpoints import save_checkpoint
from tests.kvstore.test_rewrite import codes_by_id
from tests.processes import Process

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "box"]
DOCUMENTS = [
    " ".join(WORDS[(3 * index + step) % len(WORDS)] for step in range(4 + index % 5)) + f" {index}" for index in range(24)
]
SHARED = [2, 2, 5]
"""The second half has these documents of the first, one of them twice."""

DRIVER = """
import json, os, sys, time
from kvstore.writer import ShardWriter
from pipeline.config import ExtractConfig
from pipeline.extract import extract
from pipeline.models.resolve import resolve_model
settings, kill_after, gate = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
commit, commits = ShardWriter.commit, 0
def counted(self, **options):
    global commits
    if commits == kill_after:
        os.kill(os.getpid(), 9)
    while commits and gate and not os.path.exists(gate):
        time.sleep(0.05)
    commits += 1
    return commit(self, **options)
ShardWriter.commit = counted
config = ExtractConfig(**settings)
extract(config, resolve_model(config.teacher), say=lambda _: None)
"""


def settings_of(teacher: Path, data: Sequence[Path], out: Path, **more: Any) -> dict[str, Any]:
    common = {
        "seq_len": 64,
        "batch_tokens": 512,
        "accept_fidelity": True,
        "gate_tokens": 256,
        "teacher": str(teacher),
        "out": str(out),
    }
    return {**common, "data": [str(path) for path in data], **more}


def run(teacher: Path, data: Sequence[Path] | Path, out: Path, **more: Any) -> ExtractSummary:
    config = ExtractConfig(**settings_of(teacher, [data] if isinstance(data, Path) else data, out, **more))
    return extract(config, resolve_model(config.teacher), say=lambda _: None)


def start(settings: dict[str, Any], kill_after: int = -1, gate: Path | str = "") -> Process:
    """An extraction in a process of its own.

    Args:
        kill_after: commits after which it kills itself.
        gate: after the first commit it waits for this file.
    """
    return Process(DRIVER, json.dumps(settings), str(kill_after), str(gate))


def corpus(path: Path, indices: Sequence[int]) -> Path:
    path.write_text("".join(json.dumps({"text": DOCUMENTS[index]}) + "\n" for index in indices))
    return path


def state(path: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a store with its time and content; claims come and go."""
    files = (file for file in path.rglob("*") if file.is_file() and ".staging" not in file.parts)
    return {str(file.relative_to(path)): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def counts(path: Path) -> dict[str, int]:
    samples = open_store(path).samples
    return dict(zip(samples.ids, samples.count.tolist(), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("growth")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Path:
    return save_checkpoint(folder / "teacher", "qwen2", num_hidden_layers=2, hidden_size=32)


@pytest.fixture(scope="module")
def first(folder: Path) -> Path:
    return corpus(folder / "first.jsonl", range(12))


@pytest.fixture(scope="module")
def second(folder: Path) -> Path:
    return corpus(folder / "second.jsonl", [*range(12, 20), *SHARED])


@pytest.fixture(scope="module")
def original(teacher: Path, first: Path, folder: Path) -> Path:
    """The store of the first half; tests copy it."""
    run(teacher, first, folder / "original")
    return folder / "original"


@pytest.fixture(scope="module")
def whole(teacher: Path, first: Path, second: Path, original: Path, folder: Path) -> Path:
    """One extraction of both halves, calibrated as the first."""
    run(teacher, [first, second], folder / "whole", calibration=str(original))
    return folder / "whole"


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    subprocess.run(["cp", "-a", str(original), str(tmp_path / "store")], check=True)
    return tmp_path / "store"


@pytest.fixture(scope="module")
def grown(teacher: Path, second: Path, original: Path, folder: Path) -> Path:
    """The store of the first half with the second appended; tests copy it."""
    subprocess.run(["cp", "-a", str(original), str(folder / "grown")], check=True)
    run(teacher, second, folder / "grown", append=True)
    return folder / "grown"


def test_a_merge_equals_one_extraction_of_everything(
    teacher: Path, first: Path, second: Path, original: Path, whole: Path, tmp_path: Path
) -> None:
    run(teacher, second, tmp_path / "second", calibration=str(original))
    merge_stores([str(original), str(tmp_path / "second")], str(tmp_path / "merged"))
    merged, expected = open_store(tmp_path / "merged"), open_store(whole)
    assert codes_by_id(merged) == codes_by_id(expected)
    assert merged.samples.ids == expected.samples.ids
    assert counts(tmp_path / "merged") == counts(whole)
    assert sorted(counts(whole).values())[-2:] == [2, 3]
    assert merged.manifest.fingerprint == expected.manifest.fingerprint
    assert (tmp_path / "merged" / "tokenizer" / "tokenizer.json").is_file()
    assert verify_store(str(tmp_path / "merged"), deep=True).problems == ()
    assert describe(merged)["gate"]["before"]["kl"] == describe(open_store(original))["gate"]["before"]["kl"]
    assert run(teacher, [first, second], tmp_path / "merged").new_shards == 0


def test_recoding_equals_extracting_within_the_errors_of_both(
    teacher: Path, first: Path, original: Path, tmp_path: Path
) -> None:
    run(teacher, first, tmp_path / "raw", codec="raw")
    recode_store(str(tmp_path / "raw"), "mix", str(tmp_path / "mix"))
    recode_store(str(original), "q4z", str(tmp_path / "q4z"))
    exact, extracted, recoded, coarse = (
        open_store(path) for path in (tmp_path / "raw", original, tmp_path / "mix", tmp_path / "q4z")
    )
    assert exact.samples.ids == extracted.samples.ids == recoded.samples.ids
    assert recoded.manifest.data == {**exact.manifest.data}
    for layer, kinds in extracted.samples.fidelity().items():
        for kind, fidelity in kinds.items():
            assert recoded.samples.fidelity()[layer][kind]["centred_error"] == pytest.approx(
                fidelity["centred_error"], rel=0.02
            )
            assert coarse.samples.fidelity()[layer][kind]["centred_error"] > fidelity["centred_error"]
    bits = [describe(found)["bits_per_value"] for found in (exact, recoded, coarse)]
    assert bits == sorted(bits, reverse=True)
    with pytest.raises(FingerprintMismatchError, match="recoded_from"):
        run(teacher, first, tmp_path / "mix")


def test_appending_adds_what_is_new_and_counts_what_is_known(
    teacher: Path, first: Path, second: Path, original: Path, grown: Path, whole: Path
) -> None:
    store = open_store(grown)
    assert codes_by_id(store) == codes_by_id(open_store(whole))
    assert counts(grown) == counts(whole)
    assert [part["num_samples"] for part in store.manifest.data["parts"]] == [12, 10]
    assert store.manifest.layout.num_shards == sum(part["num_shards"] for part in store.manifest.data["parts"])
    assert len(store.manifest.runs) == 2
    assert store.manifest.signal_fingerprint == open_store(original).manifest.signal_fingerprint
    before = state(grown)
    assert run(teacher, first, grown).new_shards == 0
    assert run(teacher, second, grown).new_shards == 0
    assert run(teacher, second, grown, append=True).new_shards == 0
    assert state(grown) == before
    assert verify_store(str(grown), deep=True).problems == ()


def test_other_data_without_append_is_refused_with_the_hint(teacher: Path, second: Path, original: Path) -> None:
    before = state(original)
    with pytest.raises(FingerprintMismatchError, match=r"num_samples: got 10, expected 12(.|\n)*--append adds this data"):
        run(teacher, second, original)
    assert state(original) == before


def test_appending_only_what_is_known_adds_no_shard(teacher: Path, store: Path, tmp_path: Path) -> None:
    before = codes_by_id(open_store(store))
    known = corpus(tmp_path / "known.jsonl", [0, 0, 1])
    assert run(teacher, known, store, append=True).new_shards == 0
    assert sorted(counts(store).values()) == [1] * 10 + [2, 3]
    assert run(teacher, known, store, append=True).new_shards == 0
    assert sorted(counts(store).values()) == [1] * 10 + [2, 3]
    assert codes_by_id(open_store(store)) == before
    assert verify_store(str(store)).problems == ()


def test_samples_longer_than_a_shard_are_not_appended(teacher: Path, store: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("wizards " * 60)
    before = state(store)
    with pytest.raises(ValueError, match=r"--append: a sample has \d+ tokens, the shards of .* hold \d+; use --seq-len"):
        run(teacher, tmp_path / "long.txt", store, append=True, seq_len=480)
    assert state(store) == before


def test_an_append_that_died_before_its_manifest_counts_nothing(
    teacher: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise OSError("power cut")

    before = counts(store)
    with monkeypatch.context() as patch:
        patch.setattr(parts, "extend_store", die)
        with pytest.raises(OSError, match="power cut"):
            run(teacher, corpus(tmp_path / "one.jsonl", [0, 0, 0]), store, append=True)
    assert counts(store) == before
    run(teacher, corpus(tmp_path / "other.jsonl", [1]), store, append=True)
    assert sorted(counts(store).values()) == [1] * 11 + [2]


def test_a_killed_append_goes_on_and_the_dead_ones_claim_does_not_block(
    teacher: Path, first: Path, second: Path, store: Path, whole: Path
) -> None:
    with start(settings_of(teacher, [second], store, append=True), kill_after=3) as process:
        assert process.wait(timeout=120) == -signal.SIGKILL
    assert list((store / LEASES).iterdir()), "the killed process left no claim, so nothing is tested"
    committed = len(open_store(store))
    assert 12 < committed < 20, "it was killed too early or too late"
    assert run(teacher, first, store).new_shards == 0
    with pytest.raises(ValueError, match=rf"--append: .* has {committed} of 20 shards; finish it first"):
        run(teacher, second, store, append=True, limit=2)
    started = time.monotonic()
    assert run(teacher, second, store, append=True).new_shards == 20 - committed
    assert time.monotonic() - started < 60
    assert codes_by_id(open_store(store)) == codes_by_id(open_store(whole))
    assert counts(store) == counts(whole)


def test_nothing_brings_a_dropped_sample_back(teacher: Path, first: Path, second: Path, grown: Path, tmp_path: Path) -> None:
    path = tmp_path / "store"
    subprocess.run(["cp", "-a", str(grown), str(path)], check=True)
    samples = open_store(path).samples
    rows = {
        int(shard): (identity, text) for identity, text, shard in zip(samples.ids, samples.text, samples.shard, strict=True)
    }
    gone = [rows[1], rows[15]]
    drop_samples(str(path), [identity for identity, _ in gone])
    kept = codes_by_id(open_store(path))
    assert kept == {identity: codes for identity, codes in codes_by_id(open_store(grown)).items() if identity not in dict(gone)}
    before = state(path)
    for content in [content for _, content in before.values()]:
        assert not any(str(text).encode() in content for _, text in gone)
    for table in (path / "samples").glob("*.parquet"):
        shown = repr(pq.read_table(table).to_pylist())
        assert not any(str(text) in shown or identity in shown for identity, text in gone)
    assert run(teacher, first, path).new_shards == 0
    assert run(teacher, second, path).new_shards == 0
    assert run(teacher, second, path, append=True).new_shards == 0
    assert state(path) == before
    again = tmp_path / "again.jsonl"
    again.write_text("".join(json.dumps({"text": text}) + "\n" for text in [gone[0][1], gone[1][1], DOCUMENTS[21]]))
    assert run(teacher, again, path, append=True).new_shards == 1
    assert set(codes_by_id(open_store(path))) - set(kept) == {open_store(path).samples.ids[-1]}
    assert run(teacher, again, path, append=True).new_shards == 0
    assert verify_store(str(path), deep=True).problems == ()


def test_repair_finishes_an_interrupted_drop(teacher: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    samples = open_store(store).samples
    gone, before = samples.ids[4], codes_by_id(open_store(store))
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "commit", die)
        with pytest.raises(KeyboardInterrupt):
            drop_samples(str(store), [gone])
    assert gone in open_store(store).samples.ids
    assert repair_store(str(store)).report.problems == ()
    del before[gone]
    assert codes_by_id(open_store(store)) == before


def test_the_order_of_the_documents_makes_no_difference(teacher: Path, original: Path, tmp_path: Path) -> None:
    run(teacher, corpus(tmp_path / "turned.jsonl", range(11, -1, -1)), tmp_path / "turned")
    one, other = open_store(original), open_store(tmp_path / "turned")
    assert codes_by_id(one) == codes_by_id(other)
    assert one.manifest.fingerprint == other.manifest.fingerprint


@pytest.mark.slow
def test_two_ray_workers_on_turned_documents_make_the_same_store(teacher: Path, original: Path, tmp_path: Path) -> None:
    run(teacher, corpus(tmp_path / "turned.jsonl", range(11, -1, -1)), tmp_path / "turned", workers=2)
    one, other = open_store(original), open_store(tmp_path / "turned")
    assert codes_by_id(one) == codes_by_id(other)
    assert one.manifest.fingerprint == other.manifest.fingerprint


def test_two_processes_with_a_half_each_make_the_store_of_one_and_a_third_is_told_who_holds_it(
    teacher: Path, first: Path, original: Path, tmp_path: Path
) -> None:
    store, gate = tmp_path / "store", tmp_path / "gate"
    with start(settings_of(teacher, [first], store, task_range="1/2"), gate=gate) as other:
        try:
            deadline = time.monotonic() + 120
            while not list(store.glob("commits/*.json")):
                assert other.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            holder = rf"kvpipe extract \(host .*, pid {other.pid}\) is writing the same shards"
            with pytest.raises(LeaseHeldError, match=holder):
                run(teacher, first, store)
            with pytest.raises(LeaseHeldError, match=holder):
                drop_samples(str(store), [open_store(store).samples.ids[0]])
            assert run(teacher, first, store, task_range="2/2").new_shards == 6
            assert len(open_store(store)) < 12
        finally:
            gate.touch()
        assert other.wait(timeout=120) == 0
    assert codes_by_id(open_store(store)) == codes_by_id(open_store(original))
    assert open_store(store).manifest.fingerprint == open_store(original).manifest.fingerprint
    assert describe(open_store(store))["gate"].keys() == {"before", "after"}
    assert verify_store(str(store), deep=True).problems == ()


def invoke(*arguments: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(cli, [*arguments], input=stdin, catch_exceptions=False)


def test_the_commands_say_what_they_did(grown: Path, original: Path, tmp_path: Path) -> None:
    assert invoke("merge", str(original), "--out", str(tmp_path / "m")).exit_code == 2
    twin = tmp_path / "twin"
    subprocess.run(["cp", "-a", str(original), str(twin)], check=True)
    merged = json.loads(invoke("merge", str(original), str(twin), "--out", str(tmp_path / "m"), "--json").stdout)
    assert (merged["num_samples"], merged["new_shards"]) == (12, 12)
    recoded = invoke("recode", str(grown), "--codec", "q4z", "--out", str(tmp_path / "q4z"))
    assert "num_samples   20" in recoded.stdout
    ids = open_store(twin).samples.ids
    listed = f"# private\n\n{ids[0]}\n  {ids[3][:12]}  # a name\n"
    (tmp_path / "ids.txt").write_text(listed)
    dropped = invoke("drop", str(twin), "--ids", str(tmp_path / "ids.txt"), "--json")
    assert json.loads(dropped.stdout) == {"store": str(twin), "num_dropped": 2, "num_shards": 2}
    assert json.loads(invoke("drop", str(twin), "--ids", "-", "--json", stdin=listed).stdout)["num_dropped"] == 0
    assert "2 samples" in _line(invoke("inspect", str(twin)).stdout, "dropped")
    assert "12 samples from shard 0; 10 samples from shard 12" in _line(invoke("inspect", str(grown)).stdout, "parts")
    assert "passed" in _line(invoke("inspect", str(grown)).stdout, "gate before")
    assert str(original)[:20] in _line(invoke("inspect", str(tmp_path / "m")).stdout, "merged")
    assert "from mix in" in _line(invoke("inspect", str(tmp_path / "q4z")).stdout, "recoded")


def _line(text: str, name: str) -> str:
    """A line of inspect with what the terminal's width wrapped."""
    lines = text.splitlines()
    (number,) = [number for number, line in enumerate(lines) if line.startswith(f"  {name} ")]
    return " ".join([lines[number], *itertools.takewhile(lambda line: not line.startswith("  "), lines[number + 1 :])])


@pytest.mark.parametrize("command", ["merge", "recode", "drop"])
def test_the_help_of_a_store_command_shows_how_it_is_used(command: str) -> None:
    shown = invoke(command, "--help").stdout
    assert f"kvpipe {command}" in shown
    assert "--json" in shown
