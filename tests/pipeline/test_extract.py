"""Whole extractions with real teachers: what is stored, resuming after SIGKILL, refusing, baking, Ray."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import transformers

from kvstore import FingerprintMismatchError, Store, StoreWriteError, open_store
from kvstore.lease import EXPIRY_S, lease, sweep
from kvstore.storage import locate
from pipeline.align import Alignment
from pipeline.config import ExtractConfig
from pipeline.executors import ExecutorError, RayExecutor
from pipeline.extract import ExtractSummary, extract
from pipeline.models.resolve import resolve_model
from pipeline.tasks import padded_length, plan_batches
from pipeline.worker import TeacherSource
from tests import processes
from tests.checkpoints import save_checkpoint
from tests.processes import Process

STDLIB = Path(json.__file__).parent
BATCH_TOKENS = 1024


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 10,000 characters of real text in documents of uneven length."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    source = "".join(file.read_text() for file in sorted(STDLIB.glob("*.py")))
    cuts = itertools.accumulate(itertools.cycle([700, 90, 333, 1500, 64, 5]))
    starts = [0, *itertools.takewhile(lambda cut: cut < 10_000, cuts)]
    texts = [source[first:last] for first, last in itertools.pairwise(starts)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("teacher") / "qwen2", "qwen2")


def run(teacher: Path, corpus: Path, out: Path, **settings: Any) -> ExtractSummary:
    config = ExtractConfig(
        teacher=str(teacher),
        data=(str(corpus),),
        out=out,
        **{"seq_len": 200, "batch_tokens": BATCH_TOKENS, "accept_fidelity": True, "gate_tokens": 256, **settings},
    )
    return extract(config, resolve_model(config.teacher), say=lambda _: None)


def start(teacher: Path, corpus: Path, out: Path, *more: str) -> Process:
    """The same in a process of its own."""
    return processes.start(
        *("extract", "--teacher", teacher, "--data", corpus, "--out", out),
        *("--seq-len", "200", "--batch-tokens", str(BATCH_TOKENS), "--accept-fidelity", "--set", "gate_tokens=256", *more),
    )


@pytest.fixture(scope="module")
def whole(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the corpus; tests leave it as it is."""
    path = tmp_path_factory.mktemp("whole") / "store"
    run(teacher, corpus, path)
    return path


def test_samples_end_where_the_positions_of_the_teacher_do_and_that_is_said(corpus: Path, tmp_path: Path) -> None:
    teacher = save_checkpoint(tmp_path / "teacher", "gpt2", max_position_embeddings=48)
    said: list[str] = []
    config = ExtractConfig(
        teacher=str(teacher), data=(str(corpus),), out=str(tmp_path / "store"), seq_len=200, limit=4, codec="raw"
    )
    extract(config, resolve_model(config.teacher), say=said.append)
    assert max(open_store(tmp_path / "store").samples.num_tokens) == 48
    assert any(line.startswith("warning: samples are cut to 48 tokens") and line.endswith("not 200") for line in said)


def test_a_tokenizer_of_another_model_is_refused_before_the_teacher_runs(corpus: Path, tmp_path: Path) -> None:
    teacher = save_checkpoint(
        tmp_path / "teacher", "qwen2", vocab_size=64, pad_token_id=None, bos_token_id=None, eos_token_id=None
    )
    with pytest.raises(ValueError, match=r"corpus.jsonl.* expected ids below 64, .* belongs to another model"):
        run(teacher, corpus, tmp_path / "store")
    assert not (tmp_path / "store").exists()


FEW = 20


@pytest.fixture(scope="module")
def few_summary(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> ExtractSummary:
    return run(teacher, corpus, tmp_path_factory.mktemp("few") / "store", limit=FEW)


@pytest.fixture(scope="module")
def few(few_summary: ExtractSummary) -> Path:
    """The store of the corpus's first samples; tests leave it as it is."""
    return Path(few_summary.out)


@pytest.fixture(scope="module")
def few_raw(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same samples with codec raw."""
    path = tmp_path_factory.mktemp("few-raw") / "store"
    run(teacher, corpus, path, codec="raw", limit=FEW)
    return path


def copied(store: Path, to: Path) -> Path:
    """A store that a test may change."""
    return Path(shutil.copytree(store, to))


def by_id(store: Store) -> dict[str, tuple[bytes, bytes, bytes]]:
    """Decoded bytes of every sample, by id."""
    batch = store.read(range(len(store)))
    spans = [slice(first, last) for first, last in itertools.pairwise(batch.cu_seqlens)]
    return {
        identity: (batch.key[:, span].tobytes(), batch.value[:, span].tobytes(), batch.input_ids[span].tobytes())
        for identity, span in zip(store.samples.ids, spans, strict=True)
    }


def committed_files(store: Path) -> list[tuple[Path, int]]:
    """Everything a reader sees, with its time of change."""
    return sorted((path, path.stat().st_mtime_ns) for path in store.rglob("*") if ".staging" not in path.parts)


ARCHITECTURES = [
    pytest.param("qwen2", "k_proj", id="qwen2"),
    pytest.param("llama", "k_proj", id="llama"),
    pytest.param("gpt2", None, id="gpt2"),
]


@pytest.mark.parametrize(("model_type", "key_module"), ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_raw_store_holds_what_the_teacher_produces_when_run_again(
    model_type: str, key_module: str | None, dtype: str, corpus: Path, tmp_path: Path
) -> None:
    teacher = save_checkpoint(tmp_path / "teacher", model_type, dtype=getattr(torch, dtype))
    run(teacher, corpus, tmp_path / "store", codec="raw", limit=16)
    store = open_store(tmp_path / "store")
    assert store.spec.dtype == dtype
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher, dtype=getattr(torch, dtype)).eval()
    keys_before_rotation: list[torch.Tensor] = []
    if key_module is not None:
        for layer in model.model.layers:
            getattr(layer.self_attn, key_module).register_forward_hook(lambda *args: keys_before_rotation.append(args[2]))
    tolerance = {"float32": 2e-7, "bfloat16": 5.2e-3}[dtype]  # largest relative error of un-rotation, extraction.md A.4
    compared = 0
    for shard in range(store.manifest.layout.num_shards):
        members = np.flatnonzero(store.samples.shard == shard)
        ids = [store.read([index], layers=()).input_ids for index in members]
        for rows in plan_batches([len(tokens) for tokens in ids], BATCH_TOKENS, 512):
            padded = np.zeros((len(rows), padded_length(len(ids[rows[0]]), 512)), dtype=np.int64)
            for position, row in enumerate(rows):
                padded[position, : len(ids[row])] = ids[row]
            keys_before_rotation.clear()
            with torch.inference_mode():
                cache = model(input_ids=torch.from_numpy(padded), use_cache=True).past_key_values
            for position, row in enumerate(rows):
                stored = store.read([members[row]])
                for layer in range(4):
                    heads = cache.layers[layer].keys.shape[1]
                    value = cache.layers[layer].values[position, :, : len(ids[row])].transpose(0, 1).float().numpy()
                    np.testing.assert_array_equal(stored.value[layer], value)
                    if key_module is None:
                        key = cache.layers[layer].keys[position, :, : len(ids[row])].transpose(0, 1).float().numpy()
                        np.testing.assert_array_equal(stored.key[layer], key)
                    else:
                        key = keys_before_rotation[layer][position, : len(ids[row])].unflatten(-1, (heads, -1)).float().numpy()
                        assert np.abs(stored.key[layer] - key).max() <= tolerance * np.abs(key).max() * 2
                    compared += 1
    assert compared == 4 * len(store)


def test_decoded_values_stay_within_the_fidelity_that_was_recorded(few: Path, few_raw: Path) -> None:
    raw, mix = open_store(few_raw), open_store(few)
    assert raw.samples.ids == mix.samples.ids
    exact, decoded = raw.read(range(len(raw))), mix.read(range(len(mix)))
    recorded = mix.samples.fidelity()
    for layer in range(4):
        for kind in ("key", "value"):
            error = np.abs(getattr(decoded, kind)[layer] - getattr(exact, kind)[layer])
            assert error.max() == pytest.approx(recorded[str(layer)][kind]["max_abs_error"], rel=1e-4)
            assert recorded[str(layer)][kind]["centred_error"] < (0.09 if kind == "key" else 0.18)


def test_an_extraction_killed_half_way_resumes_to_the_same_bits(
    teacher: Path, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    planned = open_store(whole).manifest.layout.num_shards
    with start(teacher, corpus, tmp_path / "cut") as process:
        _wait_for(lambda: len(list((tmp_path / "cut" / "commits").glob("*.json"))) >= planned // 4)
        process.send_signal(signal.SIGKILL)
        process.wait()
    committed = len(list((tmp_path / "cut" / "commits").glob("*.json")))
    assert 0 < committed < planned
    partial = by_id(open_store(tmp_path / "cut"))
    summary = run(teacher, corpus, tmp_path / "cut")
    assert summary.new_shards == planned - committed
    resumed, expected = by_id(open_store(tmp_path / "cut")), by_id(open_store(whole))
    assert resumed == expected
    assert partial.items() <= expected.items()
    assert run(teacher, corpus, tmp_path / "cut").new_shards == 0


def test_killed_before_its_manifest_an_extraction_starts_afresh(teacher: Path, corpus: Path, few: Path, tmp_path: Path) -> None:
    store = copied(few, tmp_path / "store")
    (store / "manifest.json").unlink()
    for folder in ("commits", "samples"):
        shutil.rmtree(store / folder)
    (store / ".staging" / "creating").touch()
    run(teacher, corpus, store, limit=FEW)
    assert by_id(open_store(store)) == by_id(open_store(few))


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        pytest.param({"codec": "q8"}, [r"codec: got \"q8\", expected \"mix\""], id="codec"),
        pytest.param({"layers": "0,2"}, [r"layers: got \"0,2\", expected \"0-3\"", r"spec\.layers"], id="layers"),
        pytest.param({"student": True}, [r"alignment", r"spec\.layers"], id="student"),
        pytest.param({"dtype": "bfloat16"}, [r"dtype: got \"bfloat16\", expected \"float32\""], id="dtype"),
        pytest.param({"seq_len": 100}, [r"seq_len: got 100, expected 200"], id="seq-len"),
        pytest.param({"limit": 3}, [r"num_samples: got 3, expected 20"], id="data"),
    ],
)
def test_other_settings_are_refused_with_the_fields_named(
    change: dict[str, Any], fields: list[str], teacher: Path, corpus: Path, few: Path, tmp_path: Path
) -> None:
    before = committed_files(few)
    if "student" in change:
        change = {"student": str(save_checkpoint(tmp_path / "student", "qwen2", num_key_value_heads=1, num_hidden_layers=2))}
    with pytest.raises(FingerprintMismatchError, match=r"Nothing was written") as refused:
        run(teacher, corpus, few, **{"limit": FEW, **change})
    for field in fields:
        assert refused.match(field)
    assert committed_files(few) == before


def test_another_teacher_of_the_same_name_and_shape_is_refused(corpus: Path, few: Path, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "qwen2", "qwen2", seed=1)
    with pytest.raises(FingerprintMismatchError, match=r"1 field\(s\):\n  weights: got"):
        run(other, corpus, few, limit=FEW)


def test_a_baked_store_holds_the_aligned_keys_and_values(teacher: Path, corpus: Path, few_raw: Path, tmp_path: Path) -> None:
    student = save_checkpoint(tmp_path / "student", "qwen2", num_key_value_heads=1, num_hidden_layers=3)
    run(teacher, corpus, tmp_path / "baked", codec="raw", limit=FEW, student=str(student))
    raw, baked = open_store(few_raw), open_store(tmp_path / "baked")
    assert baked.spec.layer_numbers == (1, 2, 3)
    assert {layer.geometry for layer in baked.spec.layers} == {(1, 16, 16)}
    alignment = Alignment.from_json(baked.manifest.alignment or {})
    assert alignment.layer_map == ((0, 1), (1, 2), (2, 3))
    exact, stored = raw.read(range(FEW)), baked.read(range(FEW))
    for slot, layer in enumerate(baked.spec.layer_numbers):
        key, value = alignment.project(layer, torch.from_numpy(exact.key[layer]), torch.from_numpy(exact.value[layer]))
        np.testing.assert_allclose(stored.key[slot], key.numpy(), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(stored.value[slot], value.numpy(), rtol=1e-6, atol=1e-6)


def test_baking_that_would_not_shrink_the_store_is_recorded_instead(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    student = save_checkpoint(tmp_path / "student", "qwen2", num_key_value_heads=4, num_hidden_layers=2)
    said: list[str] = []
    config = ExtractConfig(
        teacher=str(teacher),
        data=(str(corpus),),
        out=tmp_path / "store",
        student=str(student),
        limit=4,
        seq_len=200,
        accept_fidelity=True,
    )
    extract(config, resolve_model(config.teacher), say=said.append)
    assert any("would not make the store smaller" in text for text in said)
    store = open_store(tmp_path / "store")
    assert store.manifest.alignment is not None
    assert store.manifest.alignment["baked"] is False
    assert {layer.geometry for layer in store.spec.layers} == {(2, 16, 16)}
    assert store.spec.layer_numbers == (2, 3)


def test_no_byte_of_the_store_passes_the_limit_which_can_be_raised(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    store, whole = tmp_path / "store", tmp_path / "whole"
    run(teacher, corpus, whole)

    def bytes_of(path: Path) -> int:
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())

    limit = bytes_of(whole) * 2 // 3
    with pytest.raises(ValueError, match=r"--max-bytes: got 20,000, but a store without a single shard takes about"):
        run(teacher, corpus, store, max_bytes=20_000)
    assert not store.exists()
    summary = run(teacher, corpus, store, max_bytes=limit)
    assert 0.5 * limit < bytes_of(store) <= limit
    assert 0 < summary.new_shards < summary.num_shards
    assert run(teacher, corpus, store, max_bytes=2 * bytes_of(whole)).num_samples == len(open_store(whole))
    assert by_id(open_store(store)) == by_id(open_store(whole))


def test_a_tokenizer_with_more_tokens_than_the_teacher_is_refused(corpus: Path, tmp_path: Path) -> None:
    teacher = save_checkpoint(
        tmp_path / "small", "qwen2", vocab_size=64, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )
    with pytest.raises(ValueError, match=r"corpus\.jsonl:0: got token \d+ \(.*\), expected ids below 64, the teacher's vocab"):
        run(teacher, corpus, tmp_path / "store")


def test_a_store_made_anew_in_the_same_process_has_its_own_calibration(
    teacher: Path, corpus: Path, few: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    other.write_text("".join(json.dumps({"text": text[::-1]}) + "\n" for text in texts))
    run(teacher, other, tmp_path / "store", limit=FEW)
    shutil.rmtree(tmp_path / "store")
    run(teacher, corpus, tmp_path / "store", limit=FEW)
    assert by_id(open_store(tmp_path / "store")) == by_id(open_store(few))


def test_a_folder_of_other_files_is_not_written_into(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"is not empty and is not a store being created \(it holds thesis\.tex"):
        run(teacher, corpus, tmp_path, limit=3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.fixture
def no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing long may happen: no tokenising, no teacher."""
    for name in ("load_tokenizer", "read_documents", "make_executor"):
        monkeypatch.setattr(f"pipeline.extract.{name}", lambda *_, name=name, **__: pytest.fail(f"{name} was called"))


def test_a_place_that_cannot_take_a_store_is_refused_before_anything_long(
    no_teacher: None, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"is not empty and is not a store being created \(it holds thesis\.tex"):
        run(teacher, corpus, tmp_path)
    with pytest.raises(StoreWriteError, match=r"--out: .*thesis\.tex/store cannot be written .*choose another folder"):
        run(teacher, corpus, tmp_path / "thesis.tex" / "store")
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_that_is_not_there_is_refused_before_anything_long(
    no_teacher: None, teacher: Path, corpus: Path, tmp_path: Path, workers: int
) -> None:
    with pytest.raises(ValueError, match=r"^device: got cuda:1, but torch sees no GPU; set device to cpu or auto"):
        run(teacher, corpus, tmp_path / "store", device="cuda:1", workers=workers)
    assert not (tmp_path / "store").exists()


def leave_staging(store: Path) -> tuple[list[Path], list[Path]]:
    """What killed writers leave: what must go, and what may be on its way into place."""
    staging = store / ".staging"
    scratch = [staging / "shard-00003-0123456789abcdef" / "key" / "c" / "0", staging / "create-0123456789abcdef" / "zarr.json"]
    old = [staging / "file-old", staging / "leases" / "of-another-machine.json"]
    young = [staging / "file-young"]
    for path in (*scratch, *old, *young):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}")
    for path in old:
        os.utime(path, (time.time() - 2 * EXPIRY_S,) * 2)
    return [scratch[0].parents[2], scratch[1].parent, *old], young


def test_a_complete_run_removes_what_killed_writers_left(teacher: Path, corpus: Path, few: Path, tmp_path: Path) -> None:
    store = copied(few, tmp_path / "store")
    gone, kept = leave_staging(store)
    run(teacher, corpus, store, limit=FEW)
    assert not [path for path in gone if path.exists()]
    assert all(path.exists() for path in kept)
    assert list((store / ".staging" / "leases").iterdir()) == []
    gone, _ = leave_staging(store)
    with lease(locate(store), 0, 1, "somebody else"):
        sweep(locate(store), "kvpipe extract")
        assert all(path.exists() for path in gone), "another writer lives"
    for commit in list((store / "commits").iterdir())[:1]:
        commit.unlink()
    shutil.rmtree(store / "samples")
    run(teacher, corpus, store, limit=FEW, max_bytes=1)
    assert all(path.exists() for path in gone), "the store is not complete"
    assert open_store(few).manifest.layout.num_shards > 1


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """One local Ray for the tests of this module; executors use a Ray that is running."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def test_two_ray_workers_one_of_which_is_killed_and_replaced_store_the_same_bits_as_one_process(
    ray_cluster: None, teacher: Path, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    killed: list[int] = []

    def say(text: str) -> None:
        if "about" in text and not killed:
            workers = [child for child in psutil.Process().children(recursive=True) if "ray::RayWorker" in _title(child)]
            killed.append(workers[0].pid)
            workers[0].send_signal(signal.SIGKILL)

    config = ExtractConfig(
        teacher=str(teacher),
        data=(str(corpus),),
        out=tmp_path / "ray",
        seq_len=200,
        batch_tokens=BATCH_TOKENS,
        workers=2,
        accept_fidelity=True,
    )
    extract(config, resolve_model(config.teacher), say=say)
    assert killed
    serial, ray_store = open_store(whole), open_store(tmp_path / "ray")
    assert by_id(ray_store) == by_id(serial)
    assert ray_store.manifest.fingerprint == serial.manifest.fingerprint


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_more_workers_than_the_cluster_has_are_refused_at_once(ray_cluster: None, teacher: Path) -> None:
    source = TeacherSource(path=teacher, dtype="auto", device="cpu")
    with pytest.raises(ExecutorError, match="--workers: got 64, but the cluster has 2 CPUs"):
        RayExecutor(source, 64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_the_cluster_does_not_have_is_refused_at_once(ray_cluster: None, teacher: Path) -> None:
    with pytest.raises(ExecutorError, match="device: got cuda, but the Ray cluster has no GPU"):
        RayExecutor(TeacherSource(path=teacher, dtype="auto", device="cuda"), 1)


def test_an_error_in_a_ray_worker_comes_out_as_itself(ray_cluster: None, teacher: Path, corpus: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(teacher, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        run(broken, corpus, tmp_path / "store", workers=1)


def _wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def test_a_summary_says_what_is_stored(few_summary: ExtractSummary, few: Path) -> None:
    summary = few_summary
    store = open_store(few)
    assert (summary.num_samples, summary.new_shards) == (FEW, store.manifest.layout.num_shards)
    on_disk = sum(file.stat().st_size for file in (few / "kv.zarr").rglob("c/**/*") if file.is_file())
    constants = sum(
        file.stat().st_size
        for name in ("key_mean", "key_step", "value_mean", "value_step", "layer")
        for file in (few / "kv.zarr" / name / "c").rglob("*")
        if file.is_file()
    )
    assert summary.stored_bytes == on_disk - constants
    assert json.dumps(dataclasses.asdict(summary), default=str)
    assert (Path(summary.out) / "tokenizer").is_dir()
