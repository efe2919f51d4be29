"""A store in a bucket, by the same commands as in a folder: extracted, killed and resumed, read, verified, trained from."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from kvstore import CorruptShardError, Store, StoreNotFoundError, open_store
from kvstore.drop import drop_samples
from kvstore.errors import StoreWriteError
from kvstore.verify import verify_store
from pipeline.cli import cli
from pipeline.config import ExtractConfig
from pipeline.extract import ExtractSummary, extract
from pipeline.models.resolve import resolve_model
from tests.checkpoints import save_checkpoint
from tests.processes import Process, kvpipe, start
from tests.s3 import Proxy, environment, get_raw, keys_of, put_raw, raw_client

STDLIB = Path(json.__file__).parent
SETTINGS = ("--seq-len", "128", "--batch-tokens", "512", "--accept-fidelity", "--set", "gate_tokens=256")


@pytest.fixture(scope="module", autouse=True)
def _environment(s3_server: str) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # more only fight over such small matrices
        for name, value in environment(s3_server).items():
            patch.setenv(name, value)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    text = "".join(file.read_text() for file in sorted(STDLIB.glob("*.py")))
    cuts = [*itertools.takewhile(lambda cut: cut < 1_300, itertools.accumulate(itertools.cycle([400, 90, 333, 64, 5])))]
    path.write_text("".join(json.dumps({"text": text[first:last]}) + "\n" for first, last in itertools.pairwise([0, *cuts])))
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("teacher") / "qwen2", "qwen2", num_hidden_layers=2)


@pytest.fixture(scope="module")
def expected(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, ...]]:
    """Every sample of the same extraction into a folder."""
    folder = str(tmp_path_factory.mktemp("local") / "store")
    run(teacher, corpus, folder)
    return by_id(open_store(folder))


@pytest.fixture(scope="module")
def finished(teacher: Path, corpus: Path) -> tuple[str, subprocess.CompletedProcess[str]]:
    """A store made by the command line in a process of its own; tests leave it as it is."""
    raw_client().create_bucket(Bucket="finished")
    out = "s3://finished/runs/one"
    done = kvpipe(*extract_arguments(teacher, corpus, out), "--json")
    assert done.returncode == 0, done.stderr
    return out, done


def run(teacher: Path, corpus: Path, out: str, **settings: Any) -> ExtractSummary:
    config = ExtractConfig(
        teacher=str(teacher),
        data=(str(corpus),),
        out=out,
        **{"seq_len": 128, "batch_tokens": 512, "accept_fidelity": True, "gate_tokens": 256, **settings},
    )
    return extract(config, resolve_model(config.teacher), say=lambda _: None)


def extract_arguments(teacher: Path, corpus: Path, out: str, *more: str) -> list[str]:
    return ["extract", "--teacher", str(teacher), "--data", str(corpus), "--out", out, *SETTINGS, *more]


def wait_for(condition: Callable[[], bool], process: Process) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert process.poll() is None, "it ended too soon"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def by_id(store: Store) -> dict[str, tuple[bytes, ...]]:
    """Decoded bytes of every sample, by id."""
    batch = store.read(range(len(store)))
    spans = [slice(first, last) for first, last in itertools.pairwise(batch.cu_seqlens)]
    return {
        identity: (batch.key[:, span].tobytes(), batch.value[:, span].tobytes(), batch.input_ids[span].tobytes())
        for identity, span in zip(store.samples.ids, spans, strict=True)
    }


def copied(location: str, bucket: str) -> str:
    """A copy that a test may damage."""
    source, _, prefix = location.removeprefix("s3://").partition("/")
    for key in keys_of(source, f"{prefix}/"):
        put_raw(f"s3://{bucket}/copy/{key.removeprefix(f'{prefix}/')}", get_raw(f"s3://{source}/{key}"))
    return f"s3://{bucket}/copy"


def test_the_command_line_stores_into_a_bucket_what_it_stores_into_a_folder(
    finished: tuple[str, subprocess.CompletedProcess[str]], expected: dict[str, tuple[bytes, ...]]
) -> None:
    out, done = finished
    summary = json.loads(done.stdout)
    assert (summary["out"], summary["num_samples"]) == (out, len(expected))
    noise = [line for line in done.stderr.splitlines() if "aws" in line.lower() or "error" in line.lower()]
    assert not noise
    assert by_id(open_store(out)) == expected
    stored = {key.removeprefix("runs/one/").partition("/")[0] for key in keys_of("finished")}
    assert stored == {"manifest.json", "kv.zarr", "commits", "samples", "tokenizer", "gate.json", "progress"}  # FORMAT.md 1.1
    assert not Path("s3:").exists()


def test_the_same_extraction_again_changes_nothing(
    finished: tuple[str, subprocess.CompletedProcess[str]], teacher: Path, corpus: Path
) -> None:
    out, _ = finished
    before = {key: get_raw(f"s3://finished/{key}") for key in keys_of("finished")}
    assert run(teacher, corpus, out).new_shards == 0
    assert {key: get_raw(f"s3://finished/{key}") for key in keys_of("finished")} == before


def test_killed_half_way_and_resumed_by_two_at_once_a_store_has_the_same_bits(
    bucket: str, teacher: Path, corpus: Path, expected: dict[str, tuple[bytes, ...]], proxy: Proxy
) -> None:
    out = f"s3://{bucket}/cut"
    process = start(*extract_arguments(teacher, corpus, out))
    wait_for(lambda: proxy.count("PUT", "/commits/") >= 4, process)
    process.send_signal(signal.SIGKILL)
    process.finish()
    partial = by_id(open_store(out))
    assert 0 < len(partial) < len(expected)
    assert partial.items() <= expected.items()
    proxy.seen.clear()
    other = start(*extract_arguments(teacher, corpus, out, "--task-range", "1/2"))
    wait_for(lambda: proxy.count("PUT", "/.staging/leases/") > 0, other)
    run(teacher, corpus, out, task_range="2/2")
    done = other.finish()
    assert done.returncode == 0, done.stderr
    assert f"resuming {out}: " in done.stderr
    assert by_id(open_store(out)) == expected
    report = verify_store(out, deep=True)
    assert report.ok, report.problems
    assert (report.num_committed, report.num_samples, report.orphans) == (report.num_shards, len(expected), ())


def test_a_store_in_a_bucket_is_inspected_by_the_command(
    finished: tuple[str, subprocess.CompletedProcess[str]],
) -> None:
    out, _ = finished
    done = kvpipe("inspect", out, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["path"], record["complete"]) == (out, True)
    assert done.stderr == ""


def test_damage_in_a_bucket_is_found_and_never_read(
    finished: tuple[str, subprocess.CompletedProcess[str]], bucket: str
) -> None:
    out = copied(finished[0], bucket)
    assert verify_store(out, deep=True).ok
    flipped, shortened, lost = (f"{out}/kv.zarr/key/c/0/{shard}/0/0" for shard in (0, 1, 2))
    content = bytearray(get_raw(flipped))
    content[10] ^= 1
    put_raw(flipped, bytes(content))
    put_raw(shortened, get_raw(shortened)[:-1])
    raw_client().delete_object(Bucket=bucket, Key=lost.removeprefix(f"s3://{bucket}/"))
    report = verify_store(out)
    assert report.bad_shards == (0, 1, 2)
    store = open_store(out)
    for shard, problem in enumerate(["reading failed", "bytes, expected", "has no file"]):
        with pytest.raises(CorruptShardError, match=rf"shard {shard}\b.*{problem}"):
            store.read(np.flatnonzero(store.samples.shard == shard))
    assert len(store.read(np.flatnonzero(store.samples.shard == 3)).input_ids) > 0


def test_samples_are_dropped_from_a_bucket(
    finished: tuple[str, subprocess.CompletedProcess[str]], bucket: str, expected: dict[str, tuple[bytes, ...]]
) -> None:
    out = copied(finished[0], bucket)
    gone = sorted(expected)[:2]
    assert drop_samples(out, gone).num_dropped == 2
    assert by_id(open_store(out)) == {identity: sample for identity, sample in expected.items() if identity not in gone}
    assert verify_store(out, deep=True).ok


def test_plain_zarr_opens_the_arrays_in_a_bucket(
    finished: tuple[str, subprocess.CompletedProcess[str]], s3_server: str
) -> None:
    import obstore

    place = obstore.store.S3Store(
        "finished", prefix="runs/one/kv.zarr", endpoint=s3_server, client_options={"allow_http": True}
    )
    group = zarr.open_group(zarr.storage.ObjectStore(place, read_only=True), mode="r")
    store = open_store(finished[0])
    sample = store.read([1])
    start_row, length = int(store.samples.token_start[1]), int(store.samples.num_tokens[1])
    rows = slice(start_row, start_row + length)
    np.testing.assert_array_equal(group["input_ids"][rows], sample.input_ids)
    np.testing.assert_array_equal(group["key"][1, rows] * group["key_step"][1] + group["key_mean"][1], sample.key[1])


def test_a_student_is_trained_from_a_bucket(
    finished: tuple[str, subprocess.CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    student = tmp_path / "tiny.toml"
    student.write_text(
        '[config]\nmodel_type = "qwen2"\nhidden_size = 32\nintermediate_size = 64\nnum_hidden_layers = 2\n'
        "num_attention_heads = 4\nnum_key_value_heads = 1\nhead_dim = 8\nmax_position_embeddings = 128\n"
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    arguments = [
        *("train", "--store", finished[0], "--student", str(student), "--out", str(tmp_path / "run"), "--steps", "5"),
        *("--batch-size", "4", "--set", "eval_fraction=0.1", "--json"),
    ]
    cli.main(arguments, standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["steps"] == 5
    assert (tmp_path / "run" / "model" / "tokenizer.json").is_file()
    gc.collect()
    assert list(scratch.glob("kvpipe-*")) == []


def test_the_tokenizer_of_a_bucket_is_a_copy_that_goes_with_the_store(
    finished: tuple[str, subprocess.CompletedProcess[str]],
) -> None:
    store = open_store(finished[0])
    folder = store.tokenizer_path
    assert folder is not None
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        name: get_raw(f"{finished[0]}/tokenizer/{name}") for name in store.manifest.tokenizer
    }
    del store
    assert not folder.exists()


def test_an_extraction_survives_refusals_and_lost_answers(
    bucket: str,
    proxy: Proxy,
    teacher: Path,
    corpus: Path,
    expected: dict[str, tuple[bytes, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvstore.bucket._FIRST_PAUSE_S", 0.03)
    proxy.fail("PUT", "/commits/", "lose", 2)
    proxy.fail("PUT", "/c/0/", "refuse", 3)
    proxy.fail("PUT", "/c/0/", "lose", 2)
    proxy.fail("PUT", "manifest.json", "drop", 2)
    proxy.fail("GET", "key_mean", "refuse", 2)
    proxy.fail("GET", "/key/c/0/", "cut", 2)
    out = f"s3://{bucket}/store"
    summary = run(teacher, corpus, out)
    assert summary.new_shards == summary.num_shards
    assert by_id(open_store(out)) == expected
    assert [fault[3] for fault in proxy.faults] == [0] * 6
    assert verify_store(out).ok


def test_a_bucket_that_fails_for_good_ends_the_run_and_leaves_a_whole_store(
    bucket: str,
    proxy: Proxy,
    teacher: Path,
    corpus: Path,
    expected: dict[str, tuple[bytes, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KVPIPE_RETRY_S", "0.5")
    proxy.fail("PUT", "/value_byte/c/0/3/", "refuse", 10_000)
    out = f"s3://{bucket}/store"
    started = time.monotonic()
    with pytest.raises(StoreWriteError, match=rf"shard 3: writing to {out} failed .*503.* run the same command again"):
        run(teacher, corpus, out)
    assert time.monotonic() - started < 30
    report = verify_store(out, deep=True)
    assert report.ok
    assert 3 <= report.num_committed < report.num_shards, "what was in hand beside shard 3 may be committed too"
    assert by_id(open_store(out)).items() <= expected.items()
    proxy.faults.clear()
    run(teacher, corpus, out)
    assert by_id(open_store(out)) == expected


def test_a_bucket_that_cannot_be_reached_while_reading_is_not_called_damaged(
    finished: tuple[str, subprocess.CompletedProcess[str]], s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVPIPE_RETRY_S", "0.5")
    with contextlib.closing(Proxy(s3_server)) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
        store = open_store(finished[0])
        store.read([0])
        between.fail("GET", "/kv.zarr/", "refuse", 10_000)
        started = time.monotonic()
        with pytest.raises(OSError, match=r"reading failed .*503.*the data may be whole") as error:
            store.read([0])
        assert not isinstance(error.value, ValueError)
        assert time.monotonic() - started < 10


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_what_is_wrong_with_a_bucket_is_said_in_one_line(bucket: str, teacher: Path, corpus: Path, tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{closed_port()}"
    impatient = {"KVPIPE_RETRY_S": "1", "HOME": str(tmp_path)}
    started = time.monotonic()
    no_keys = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "AWS_METADATA_ENDPOINT": nowhere}
    cases: Sequence[tuple[Process, str]] = [
        (start("inspect", f"s3://{bucket}/a", environment={**impatient, **no_keys}), "no credentials; set AWS_ACCESS_KEY_ID"),
        (
            start("inspect", f"s3://{bucket}/a", environment={"AWS_ENDPOINT_URL": nowhere, **impatient}),
            "AWS_ENDPOINT_URL in the environment",
        ),
        (start("verify", "s3://no-such-bucket/a", environment=impatient), "there is no bucket 'no-such-bucket'"),
        (start("inspect", f"s3://{bucket}/a", environment=impatient), f"no store at s3://{bucket}/a"),
    ]
    for process, message in cases:
        done = process.finish()
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        assert (done.returncode, len(lines)) == (1, 1), done.stderr
        assert message in lines[0]
        assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 60
    with pytest.raises(OSError, match="there is no bucket 'no-such-bucket'"):
        run(teacher, corpus, "s3://no-such-bucket/a")


def test_nothing_is_made_in_a_bucket_by_asking(bucket: str) -> None:
    with pytest.raises(StoreNotFoundError, match="no store at"):
        open_store(f"s3://{bucket}/a")
    assert keys_of(bucket) == []


@pytest.mark.slow
def test_ray_workers_started_elsewhere_get_the_drivers_credentials(
    bucket: str, s3_server: str, teacher: Path, corpus: Path, expected: dict[str, tuple[bytes, ...]]
) -> None:
    import ray

    with pytest.MonkeyPatch.context() as elsewhere:
        for name in environment(s3_server):
            elsewhere.delenv(name)
        ray.init(
            num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False, logging_level="error"
        )
    try:
        out = f"s3://{bucket}/ray"
        run(teacher, corpus, out, workers=2)
    finally:
        ray.shutdown()
    assert by_id(open_store(out)) == expected
