"""Samples that cannot be computed, machines that lack something, and lost workers: real teachers, real Ray."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvstore import open_store
from kvstore.describe import describe
from kvstore.drop import read_dropped, read_quarantined, write_dropped
from kvstore.manifest import read_manifest
from kvstore.storage import Folder, locate
from kvstore.verify import verify_store
from pipeline.config import ExtractConfig
from pipeline.executors import ExecutorError, RayExecutor
from pipeline.executors.on_ray import RayWorker
from pipeline.extract import extract
from pipeline.models.resolve import resolve_model
from pipeline.monitor.status import StatusReader
from pipeline.node import NodeError, NodeInfo, inspect_node, nonce_in, refuse_different
from pipeline.quarantine import BadSampleError
from pipeline.worker import TeacherSource
from tests.checkpoints import VOCAB_SIZE, byte_tokenizer, save_checkpoint
from tests.pipeline.test_extract import by_id
from tests.processes import Process

CRASH = Path(__file__).parent / "crash"
NUM_DOCUMENTS = 60


def bad_character() -> tuple[str, int]:
    """A character the model is not shown when it is loaded, and its token id."""
    shown = {(position * 7919 + 11) % VOCAB_SIZE for position in range(64)}
    ids = {character: byte_tokenizer()(character)["input_ids"][0] for character in "~^|{}#@$%&*+=<>"}
    return next((character, identity) for character, identity in ids.items() if identity not in shown)


BAD, BAD_ID = bad_character()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short documents for some eight shards; number 23 and 41 have the bad character."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    draw = random.Random(1)
    texts = ["".join(draw.choice("abcdefgh ijkl") for _ in range(draw.randint(50, 200))) for _ in range(NUM_DOCUMENTS)]
    for number in (23, 41):
        texts[number] = texts[number][:30] + BAD + texts[number][30:]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def four_documents(corpus: Path) -> Path:
    """The second of them bad."""
    path = corpus.with_name("four.jsonl")
    path.write_text("".join(corpus.read_text().splitlines(keepends=True)[22:26]))
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("teacher") / "whole", num_hidden_layers=2, max_position_embeddings=256)


@pytest.fixture(scope="module")
def broken_teacher(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same teacher, but the embedding of the bad character is NaN, as an overflow in training leaves it."""
    path = Path(shutil.copytree(teacher, tmp_path_factory.mktemp("teacher") / "broken"))
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][BAD_ID] = torch.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def config_of(teacher: Path, corpus: Path, out: Path, **settings: Any) -> ExtractConfig:
    return ExtractConfig(
        teacher=str(teacher),
        data=(str(corpus),),
        out=str(out),
        seq_len=256,
        accept_fidelity=True,
        gate_tokens=256,
        max_kl=100.0,
        **settings,
    )


def run(config: ExtractConfig) -> list[str]:
    told: list[str] = []
    extract(config, resolve_model(config.teacher), say=told.append)
    return told


@pytest.fixture(scope="module")
def expected(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, bytes, bytes]]:
    """What the whole teacher stores, raw, of the good documents."""
    out = tmp_path_factory.mktemp("expected") / "store"
    run(config_of(teacher, corpus, out, codec="raw"))
    store = open_store(out)
    bad = [identity for identity, text in zip(store.samples.ids, store.samples.text, strict=True) if BAD in (text or "")]
    assert len(bad) == 2
    whole = by_id(store)
    return {identity: sample for identity, sample in whole.items() if identity not in bad}


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """One Ray for this module, with the crash on its workers' path; executors use a Ray that is running."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(CRASH), str(Path(__file__).parents[2])]))
        ray.init(
            num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False, logging_level="error"
        )
    yield
    ray.shutdown()


def refuse_bad(out: Path, expected: dict[str, tuple[bytes, bytes, bytes]], reason: str) -> None:
    """The store holds all but the two bad samples, and says why."""
    store = open_store(out)
    assert by_id(store) == expected
    report = verify_store(str(out), deep=True)
    assert report.ok, report.problems
    assert report.num_committed == report.num_shards
    quarantined = read_quarantined(locate(out))
    assert len(quarantined) == 2
    assert sorted(quarantined) == read_dropped(locate(out))
    assert all(reason in entry["reason"] for entry in quarantined.values())
    assert sorted(entry["source"].rpartition(":")[2] for entry in quarantined.values()) == ["23", "41"]
    assert describe(store)["quarantined"] == quarantined


def test_by_default_nan_from_the_teacher_ends_the_run_and_names_the_samples(
    broken_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        BadSampleError, match=r"(?s)cannot be computed:\n  sample \w{12} \(.*corpus\.jsonl:\d+\), shard \d+: .*NaN"
    ):
        run(config_of(broken_teacher, corpus, tmp_path / "store", codec="raw"))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_samples_of_nan_are_left_out_and_accounted_for(
    workers: int,
    broken_teacher: Path,
    corpus: Path,
    expected: dict[str, tuple[bytes, bytes, bytes]],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if workers:
        request.getfixturevalue("ray_cluster")
    config = config_of(broken_teacher, corpus, tmp_path / "store", codec="raw", on_bad_sample="quarantine", workers=workers)
    told = run(config)
    assert sum(text.startswith("left out: sample ") and "NaN" in text for text in told) == 2
    refuse_bad(tmp_path / "store", expected, "got NaN or infinity")
    notes = StatusReader(str(tmp_path / "store")).read().notes
    assert {note["sample"] for note in notes} == read_quarantined(locate(tmp_path / "store")).keys()
    again = config.model_copy(update={"workers": 0})
    assert not any("looking for the samples" in text for text in run(again)), "resuming looked for them again"
    refuse_bad(tmp_path / "store", expected, "got NaN or infinity")


@pytest.mark.slow
def test_a_sample_of_nan_that_only_the_gate_meets_is_named_or_left_out(
    broken_teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.enter.CALIBRATION_TOKENS", 1)  # the first task alone
    config = config_of(broken_teacher, corpus, tmp_path / "store", codec="q8").model_copy(update={"gate_tokens": 10**6})
    with pytest.raises(
        BadSampleError, match=r"sample \w{12} \(.*corpus\.jsonl:(23|41)\) cannot be computed for the gate: .*quarantine"
    ):
        run(config)
    run(config.model_copy(update={"on_bad_sample": "quarantine"}))
    assert verify_store(str(tmp_path / "store"), deep=True).ok
    sources = [entry["source"].rpartition(":")[2] for entry in read_quarantined(locate(tmp_path / "store")).values()]
    assert sorted(sources) == ["23", "41"]


def test_a_sample_found_while_calibrating_is_left_out_before_the_gate_and_recorded_in_the_new_store(
    broken_teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    run(config_of(broken_teacher, corpus, tmp_path / "store", on_bad_sample="quarantine"))
    assert len(read_quarantined(locate(tmp_path / "store"))) == 2
    report = verify_store(str(tmp_path / "store"), deep=True)
    assert report.ok, report.problems
    assert report.num_committed == report.num_shards


@pytest.mark.slow
def test_a_sample_that_crashes_its_worker_is_left_out_and_the_others_stored(
    ray_cluster: None,
    teacher: Path,
    four_documents: Path,
    expected: dict[str, tuple[bytes, bytes, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KVPIPE_TEST_FATAL_TOKEN", str(BAD_ID))
    run(config_of(teacher, four_documents, tmp_path / "store", codec="raw", on_bad_sample="quarantine", workers=2))
    stored = by_id(open_store(tmp_path / "store"))
    assert len(stored) == 3
    assert stored.items() <= expected.items()
    ((bad, entry),) = read_quarantined(locate(tmp_path / "store")).items()
    assert bad not in stored
    assert entry == {"source": f"{four_documents}:1", "reason": "its worker's process died"}
    report = verify_store(str(tmp_path / "store"), deep=True)
    assert report.ok, report.problems
    assert report.num_committed == report.num_shards


@pytest.mark.slow
def test_by_default_samples_that_crash_their_workers_are_named_and_the_run_goes_on_without_the_fault(
    ray_cluster: None, teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVPIPE_TEST_FATAL_TOKEN", str(BAD_ID))
    config = config_of(teacher, corpus, tmp_path / "store", codec="raw", workers=2)
    with pytest.raises(BadSampleError, match=r"corpus\.jsonl:(23|41)\), shard \d+: its worker's process died"):
        run(config)
    monkeypatch.delenv("KVPIPE_TEST_FATAL_TOKEN")
    run(config)
    assert len(open_store(tmp_path / "store")) == NUM_DOCUMENTS


def test_a_quarantine_cut_off_between_its_two_files_is_finished_by_the_next_run(
    teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    config = config_of(teacher, corpus, tmp_path / "store", codec="raw", limit=20)
    run(config)
    store = open_store(tmp_path / "store")
    gone = store.samples.ids[-1]
    shard = int(store.samples.shard[-1])
    storage = locate(tmp_path / "store")
    for path in [tmp_path / "store" / f"commits/{shard:05d}.json", *(tmp_path / "store" / "samples").glob("*.parquet")]:
        path.unlink()
    write_dropped(storage, {gone: shard}, {gone: {"source": "doc", "reason": "NaN"}})
    assert read_manifest(storage).data["dropped"] is None
    run(config)
    assert gone not in open_store(tmp_path / "store").samples.ids
    report = verify_store(str(tmp_path / "store"), deep=True)
    assert report.ok, report.problems


class Elsewhere(Folder):
    """A folder that lies elsewhere than its name says, as on a machine where something else is mounted there."""

    @property
    def location(self) -> str:
        return str(self.root.with_name("mounted-elsewhere"))


@pytest.mark.slow
def test_a_worker_that_does_not_see_the_drivers_storage_is_refused_by_name(
    ray_cluster: None, teacher: Path, tmp_path: Path
) -> None:
    storage = Elsewhere(tmp_path / "store")
    executor = RayExecutor(TeacherSource(path=teacher, dtype="auto", device="cpu"), 1, storage=storage)
    try:
        with pytest.raises(NodeError, match=rf"node {socket.gethostname()}: .*mounted-elsewhere is not what the driver sees"):
            executor.describe()
    finally:
        executor.close()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "the nonce is still there"


def test_a_node_without_the_teacher_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match=rf"node {socket.gethostname()}: the teacher is not in {tmp_path}/teacher"):
        inspect_node(tmp_path / "teacher", None)


@pytest.mark.slow
def test_a_worker_computes_with_as_many_threads_as_it_has_cpus(
    ray_cluster: None, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    import ray

    executor = RayExecutor(TeacherSource(path=teacher, dtype="auto", device="cpu"), 1)
    try:
        executor.describe()
        (actor,) = executor.crew.ready
        assert ray.get(actor.__ray_call__.remote(lambda _: torch.get_num_threads())) == 2, "all CPUs of the cluster"
    finally:
        executor.close()


@pytest.mark.slow
def test_workers_that_get_no_place_end_the_run_after_a_while(ray_cluster: None, teacher: Path) -> None:
    import ray

    hog = ray.remote(num_cpus=2)(RayWorker).remote()
    ray.get(hog.__ray_ready__.remote())
    executor = RayExecutor(TeacherSource(path=teacher, dtype="auto", device="cpu"), 1, ready_timeout_s=1.0)
    try:
        with pytest.raises(ExecutorError, match=r"1 of 1 workers are not ready after \d s: others may hold the cluster's CPUs"):
            executor.describe()
    finally:
        executor.close()
        ray.kill(hog)


def test_a_nonce_is_found_where_it_is_and_nowhere_else(teacher: Path, tmp_path: Path) -> None:
    with nonce_in(Folder(tmp_path)) as nonce:
        assert inspect_node(teacher, nonce).host == socket.gethostname()
        (tmp_path / nonce.key).write_bytes(b"another")
        with pytest.raises(NodeError, match=r"another file is there"):
            inspect_node(teacher, nonce)
    with pytest.raises(NodeError, match=r"it is not there\. Mount the same file system"):
        inspect_node(teacher, nonce)


def test_nodes_that_differ_are_refused_by_name(teacher: Path, broken_teacher: Path, tmp_path: Path) -> None:
    first = inspect_node(teacher, None)
    refuse_different([first, first])
    other = NodeInfo(host="b", files=first.files, versions={**first.versions, "torch": "1.0"})
    with pytest.raises(NodeError, match=r"node b: got torch 1\.0, expected .* as on node "):
        refuse_different([first, other])
    longer = Path(shutil.copytree(teacher, tmp_path / "longer"))
    (longer / "config.json").write_text((longer / "config.json").read_text() + " ")
    with pytest.raises(NodeError, match="files of the teacher are not those of node"):
        refuse_different([first, inspect_node(longer, None)])


def test_what_keeps_ray_from_starting_is_explained(tmp_path: Path) -> None:
    """Each in the same process: none of them gets as far as starting anything."""
    script = """
import os, sys
from pipeline.executors import ExecutorError
from pipeline.executors.cluster import Cluster
for setting in sys.argv[1:]:
    name, _, value = setting.partition("=")
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        Cluster(1, value if name == "ADDRESS" else None)
    except ExecutorError as error:
        print(error)
    os.environ.pop(name)
    if before:
        os.environ[name] = before
"""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    cases = {
        "HOME=/proc/nobody": "Ray keeps its token in /proc/nobody/.ray",
        f"RAY_AUTH_TOKEN_PATH={tmp_path}/none": "Every node of a cluster needs the token of its head node: set RAY_AUTH_TOKEN",
        "RAY_TMPDIR=/proc/nowhere": "its logs and sockets in /proc/nowhere/ray, both must be writable",
        f"RAY_TMPDIR={long}": "whose name is too long: set RAY_TMPDIR to a short one",
        "ADDRESS=127.0.0.1:1": "nothing answers at 127.0.0.1:1",
        "ADDRESS=ray://head:10001": "got ray://head:10001, expected 'auto' or host:port",
    }
    done = Process(script, *cases).finish()
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases), done.stdout + done.stderr
    for line, text in zip(lines, cases.values(), strict=True):
        assert text in line
