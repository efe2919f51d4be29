"""Gate runs with real teachers: the numbers are those of a written-out reference, and they notice what they should."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvstore import CodecError, Store, open_store
from kvstore.arrays import read_calibration
from kvstore.codec import KINDS, Kind, decode, encode, parse_codecs
from kvstore.spec import KVSpec
from pipeline.align import Alignment
from pipeline.config import ExtractConfig
from pipeline.extract import extract
from pipeline.gate import (
    GateResult,
    codec_round_trip,
    gate_sequences,
    run_gate,
    run_stored_gate,
    self_calibrated,
    verdict,
)
from pipeline.models.capture import capture_kv
from pipeline.models.probe import probe_kv_spec
from pipeline.models.resolve import resolve_model
from pipeline.models.substitute import substituted
from pipeline.worker import Job, TeacherSource, Worker
from tests.checkpoints import save_checkpoint, tiny_model

STDLIB = Path(json.__file__).parent
TEXT = "".join(file.read_text() for file in sorted(STDLIB.glob("*.py"))).encode()


def token_ids(start: int, num_tokens: int) -> np.ndarray:
    """Bytes of real text, the ids of the tests' tokenizer up to its order."""
    return np.frombuffer(TEXT[start : start + num_tokens], dtype=np.uint8).astype(np.int32)


SEQUENCES = tuple(token_ids(1500 * index, length) for index, length in enumerate((150, 90, 1, 24, 257)))


@cache
def cached_model(model_type: str, dtype: torch.dtype = torch.float32) -> tuple[Any, KVSpec]:
    model = tiny_model(model_type, dtype=dtype)
    return model, probe_kv_spec(model)


def gate_of(
    codec: str, model_type: str = "qwen2", dtype: torch.dtype = torch.float32, layers: tuple[int, ...] = (0, 1, 2, 3)
) -> GateResult:
    model, spec = cached_model(model_type, dtype)
    codecs = parse_codecs(codec, layers)
    fits = self_calibrated(model, spec, SEQUENCES, codecs, layers)
    replace = codec_round_trip(codecs, lambda layer, kind: fits[layer, kind])
    return run_gate(model, spec, SEQUENCES, replace, layers=layers, codec=codec, geometry="stored")


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "qwen3", "gpt_neox"])
def test_raw_changes_nothing(model_type: str) -> None:
    result = gate_of("raw", model_type)
    assert abs(result.kl) <= 1e-6
    assert abs(result.perplexity_change) <= 1e-4
    assert result.top1_agreement == 1
    assert (result.num_samples, result.num_tokens) == (5, 522)


@pytest.mark.parametrize(
    ("model_type", "bound"),
    [pytest.param("gpt2", 0.0, id="not-rotated"), pytest.param("qwen2", 1e-3, id="rotated-again-and-rounded")],
)
def test_in_bfloat16_raw_costs_what_rounding_keys_before_rope_costs(model_type: str, bound: float) -> None:
    assert abs(gate_of("raw", model_type, torch.bfloat16).kl) <= bound


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [pytest.param("qwen2", torch.float32, id="qwen2-float32"), pytest.param("gpt2", torch.bfloat16, id="gpt2-bfloat16")],
)
def test_kl_grows_down_the_ladder(model_type: str, dtype: torch.dtype) -> None:
    results = [gate_of(codec, model_type, dtype) for codec in ("q8", "q8z", "mix", "q4z", "q4z-min")]
    kls = [result.kl for result in results]
    assert all(finer * 1.3 < coarser for finer, coarser in itertools.pairwise(kls))
    agreements = [result.top1_agreement for result in results]
    assert agreements == sorted(agreements, reverse=True)
    assert 0 < kls[0] < 0.05 * kls[-1]


def test_only_the_layers_of_the_job_go_through_the_codec() -> None:
    one, all_layers = gate_of("q4z", layers=(3,)), gate_of("q4z")
    assert 0 < one.kl < all_layers.kl
    assert gate_of("q4z,0-2=raw").kl == pytest.approx(one.kl, rel=1e-3)


@pytest.mark.parametrize("slice_tokens", [7, 256])
def test_the_numbers_are_those_of_the_definitions_written_out(slice_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.gate.SLICE_TOKENS", slice_tokens)
    model, spec = cached_model("gpt2")
    codecs = parse_codecs("q4z,1=q8", spec.layer_numbers)
    fits = self_calibrated(model, spec, SEQUENCES, codecs, spec.layer_numbers)
    result = run_gate(
        model,
        spec,
        SEQUENCES,
        codec_round_trip(codecs, lambda layer, kind: fits[layer, kind]),
        layers=spec.layer_numbers,
        codec="q4z,1=q8",
        geometry="stored",
    )
    kls, agreements, base_nlls, coded_nlls = [], [], [], []
    for ids in SEQUENCES:
        batch = torch.from_numpy(ids.astype(np.int64))[None]
        with torch.inference_mode():
            base = _log_softmax(model(input_ids=batch, use_cache=False).logits[0])
            decoded: dict[int, list[Tensor]] = {}
            for layer, kv in capture_kv(model, spec, batch).items():
                decoded[layer] = []
                for kind, values in zip(KINDS, kv, strict=True):
                    mean, step = fits[layer, kind]
                    assert mean is not None
                    assert step is not None
                    code = encode(codecs[layer].quantizer(kind), values[0].transpose(0, 1).numpy(), mean, step)
                    value_THD = decode(codecs[layer].quantizer(kind), code, mean, step)
                    decoded[layer].append(torch.from_numpy(value_THD).transpose(0, 1)[None])
            with substituted(model, spec, lambda layer, *_, decoded=decoded: tuple(decoded[layer])):
                coded = _log_softmax(model(input_ids=batch, use_cache=False).logits[0])
        kls.append((np.exp(base) * (base - coded)).sum(-1))
        agreements.append(base.argmax(-1) == coded.argmax(-1))
        here = np.arange(len(ids) - 1)
        base_nlls.append(-base[here, ids[1:]])
        coded_nlls.append(-coded[here, ids[1:]])
    assert result.kl == pytest.approx(np.concatenate(kls).mean(), rel=1e-4)
    assert result.top1_agreement == np.concatenate(agreements).mean()
    perplexities = [np.exp(np.concatenate(nlls).mean()) for nlls in (base_nlls, coded_nlls)]
    assert result.perplexity_change == pytest.approx(perplexities[1] / perplexities[0] - 1, rel=1e-3)
    assert result.kl > 1e-3
    assert abs(result.perplexity_change) > 1e-4


def _log_softmax(logits: Tensor) -> np.ndarray:
    x = logits.double().numpy()
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


@pytest.mark.parametrize("codec", ["raw", "q8", "fp8", "q4z"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_round_trip_on_tensors_gives_the_bits_a_store_would(codec: str, dtype: torch.dtype) -> None:
    values = torch.randn(2, 3, 50, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    codecs = parse_codecs(codec, [5])
    mean, step = np.full((3, 8), 0.1, np.float32), np.full((3, 8), 0.07, np.float32)

    def fits(_layer: int, kind: Kind) -> Any:
        return (None, None) if codecs[5].quantizer(kind) is None else (mean, step)

    for kind, got in zip(KINDS, codec_round_trip(codecs, fits)(5, values, values), strict=True):
        assert (got.dtype, got.shape) == (dtype, values.shape)
        quantizer = codecs[5].quantizer(kind)
        for row in range(2):
            host_THD = values[row].transpose(0, 1).float().numpy()
            there = host_THD if quantizer is None else decode(quantizer, encode(quantizer, host_THD, mean, step), mean, step)
            assert torch.equal(got[row].transpose(0, 1), torch.from_numpy(there).to(dtype))


def test_a_teacher_that_gives_infinity_is_named_by_layer() -> None:
    replace = codec_round_trip(parse_codecs("raw", [2]), lambda *_: (None, None))
    bad = torch.zeros(1, 1, 4, 2)
    bad[0, 0, 3, 1] = torch.inf
    with pytest.raises(CodecError, match=r"layer 2, value: NaN or infinity at \[token, kv_head, dim\] \[3, 0, 1\]"):
        replace(2, torch.zeros(1, 1, 4, 2), bad)


def test_sequences_of_one_token_predict_nothing() -> None:
    model, spec = cached_model("gpt2")
    with pytest.raises(ValueError, match="got 2 samples of 2 tokens, expected one of two tokens or more"):
        run_gate(
            model,
            spec,
            [token_ids(0, 1), token_ids(5, 1)],
            lambda _, key, value: (key, value),
            layers=(0,),
            codec="raw",
            geometry="stored",
        )


def test_a_model_in_training_is_gated_without_dropout_and_left_in_training() -> None:
    model = tiny_model("gpt2", embd_pdrop=0.5, attn_pdrop=0.5).train()
    spec = probe_kv_spec(model)
    result = run_gate(
        model, spec, SEQUENCES[:1], lambda _, key, value: (key, value), layers=(0, 1), codec="raw", geometry="stored"
    )
    assert (result.kl, result.top1_agreement) == (0, 1)
    assert model.training


# Whole stores.


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("teacher") / "qwen2", "qwen2")


@pytest.fixture(scope="module")
def worker(teacher: Path) -> Worker:
    return Worker(TeacherSource(path=teacher, dtype="auto", device="cpu"))


@pytest.fixture(scope="module")
def make_store(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Store, Job]]:
    """Extract 12 samples of uneven length with other settings each time; the same store for the same settings."""
    root = tmp_path_factory.mktemp("stores")
    cuts = [0, *itertools.accumulate([180, 70, 333, 150, 64, 5] * 2)]
    (root / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": TEXT[a:b].decode(errors="replace")}) + "\n" for a, b in itertools.pairwise(cuts))
    )

    @cache
    def make(codec: str, layers: str = "all", student: str | None = None) -> tuple[Store, Job]:
        out = root / f"{codec}-{layers}-{student is not None}".replace(",", "_")
        settings: dict[str, Any] = {"layers": None if student else layers, "student": student}
        config = ExtractConfig(
            teacher=str(teacher),
            data=(str(root / "corpus.jsonl"),),
            out=out,
            seq_len=200,
            codec=codec,
            accept_fidelity=True,
            **settings,
        )
        extract(config, resolve_model(config.teacher), say=lambda _: None)
        store = open_store(out)
        alignment = store.manifest.alignment
        baked = alignment if alignment and alignment["baked"] else None
        return store, Job(store=str(out), layers=store.spec.layer_numbers, alignment=baked, batch_tokens=1024)

    return make


@pytest.mark.parametrize(
    ("codec", "layers"),
    [
        pytest.param("raw", "all", id="raw", marks=pytest.mark.slow),
        pytest.param("q8", "all", id="q8"),
        pytest.param("mix", "1,3", id="mix-some-layers", marks=pytest.mark.slow),
        pytest.param("mix,0=raw,3=q8", "all", id="three-groups"),
    ],
)
def test_the_gate_after_agrees_with_the_gate_before(
    codec: str, layers: str, worker: Worker, make_store: Callable[..., tuple[Store, Job]]
) -> None:
    store, job = make_store(codec, layers)
    chosen = tuple(gate_sequences(store.samples.num_tokens.tolist(), 600))
    assert len(chosen) > 2
    sequences = tuple(store.read([index], layers=()).input_ids for index in chosen)
    calibration = read_calibration(store.storage, store.manifest)
    before, after = worker.gate(job, sequences, codec, calibration), worker.gate_stored(job, chosen)
    assert (after.codec, after.geometry) == (before.codec, before.geometry) == (codec, "stored")
    assert (after.num_samples, after.num_tokens) == (before.num_samples, before.num_tokens)
    assert after.kl == pytest.approx(before.kl, rel=0.02, abs=1e-6)
    assert after.perplexity_change == pytest.approx(before.perplexity_change, abs=1e-3)
    assert after.top1_agreement == pytest.approx(before.top1_agreement, abs=0.01)
    assert (after.kl > 1e-4) == (codec != "raw")


def test_keys_and_values_of_another_sample_are_noticed(make_store: Callable[..., tuple[Store, Job]]) -> None:
    store, job = make_store("raw")
    model, spec = cached_model("qwen2")
    right = run_stored_gate(model, spec, store, [0], job.layers)
    ids = store.read([0], layers=()).input_ids
    other = next(i for i in range(1, len(store)) if store.samples.num_tokens[i] >= len(ids))
    foreign = store.read([other])

    def replace(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        key_THD, value_THD = (torch.from_numpy(array[layer, : len(ids)]) for array in (foreign.key, foreign.value))
        return key_THD.transpose(0, 1)[None], value_THD.transpose(0, 1)[None]

    wrong = run_gate(model, spec, [ids], replace, layers=job.layers, codec="raw", geometry="stored")
    assert abs(right.kl) <= 1e-6
    assert wrong.kl > 0.1


def test_a_store_of_another_teacher_is_noticed(make_store: Callable[..., tuple[Store, Job]]) -> None:
    store, job = make_store("raw")
    other = tiny_model("qwen2", seed=1)
    assert run_stored_gate(other, probe_kv_spec(other), store, [0, 5], job.layers).kl > 0.1
    with pytest.raises(ValueError, match=r"layers: got 3, but the store holds layers \[1\]"):
        run_stored_gate(other, probe_kv_spec(other), make_store("raw", "1")[0], [0], (1, 3))


def test_other_rungs_can_be_tried_without_their_calibration(
    worker: Worker, make_store: Callable[..., tuple[Store, Job]]
) -> None:
    store, job = make_store("mix", "1,3")
    sequences = tuple(store.read([index], layers=()).input_ids for index in range(6))
    calibration = read_calibration(store.storage, store.manifest)
    fitted, own = worker.gate(job, sequences, "mix", calibration), worker.gate(job, sequences, "mix", None)
    assert own.kl == pytest.approx(fitted.kl, rel=0.5)
    assert worker.gate(job, sequences, "q8", None).kl < 0.2 * own.kl
    with pytest.raises(CodecError, match="layer"):
        worker.gate(job, sequences, "mix,0=q8", None)


def test_a_baked_store_is_gated_before_projection_and_not_after(
    worker: Worker, make_store: Callable[..., tuple[Store, Job]], tmp_path: Path
) -> None:
    student = save_checkpoint(tmp_path / "student", "qwen2", num_key_value_heads=1, num_hidden_layers=2)
    store, job = make_store("mix", student=str(student))
    assert job.alignment is not None
    assert Alignment.from_json(job.alignment).stored_spec() == store.spec
    sequences = tuple(store.read([index], layers=()).input_ids for index in range(6))
    result = worker.gate(job, sequences, "mix", read_calibration(store.storage, store.manifest))
    raw_job = dataclasses.replace(job, alignment=None)
    assert result == dataclasses.replace(worker.gate(raw_job, sequences, "mix", None), geometry="teacher's, before projection")
    assert result.kl > 1e-3
    with pytest.raises(ValueError, match="holds keys and values in a student's geometry"):
        worker.gate_stored(job, (0,))


# Which samples, and what is said.


@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=300), max_tokens=st.integers(1, 5000))
def test_samples_to_gate_are_few_enough_spread_evenly_and_the_same_every_time(lengths: list[int], max_tokens: int) -> None:
    chosen = gate_sequences(lengths, max_tokens)
    assert chosen == gate_sequences(lengths, max_tokens) == sorted(set(chosen))
    assert set(chosen) <= set(range(len(lengths)))
    assert len(chosen) == 1 or sum(lengths[index] for index in chosen) <= max_tokens
    useful = [index for index, length in enumerate(lengths) if length > 1]
    if useful:
        assert set(chosen) <= set(useful)
        gaps = np.diff([useful.index(index) for index in chosen])
        assert not len(gaps) or gaps.max() - gaps.min() <= 1
    if sum(lengths) <= max_tokens:
        assert chosen == (useful or list(range(len(lengths))))


def test_the_samples_to_gate_are_pinned() -> None:
    assert gate_sequences([512] * 1000) == [62, 187, 312, 437, 562, 687, 812, 937]
    assert gate_sequences([10_000, 10_000]) == [1]
    with pytest.raises(ValueError, match="got no samples"):
        gate_sequences([])


RESULT = GateResult(
    codec="q4z",
    geometry="stored",
    num_samples=8,
    num_tokens=4096,
    kl=0.031,
    perplexity_change=0.032,
    top1_agreement=0.91,
)


def test_a_result_survives_json_and_pickle() -> None:
    assert GateResult.from_json(json.loads(json.dumps(RESULT.to_json()))) == RESULT
    assert pickle.loads(pickle.dumps(RESULT)) == RESULT
    with pytest.raises(ValueError, match=r"gate: .*'kl'.*; expected codec, geometry, num_samples"):
        GateResult.from_json({name: value for name, value in RESULT.to_json().items() if name != "kl"})


def test_a_limit_is_passed_at_most_and_never_by_nan() -> None:
    assert RESULT.passes(0.031)
    assert not RESULT.passes(0.0309)
    assert not dataclasses.replace(RESULT, kl=float("nan")).passes(1.0)


START = (
    "codec q4z: the teacher's predictions change by KL 0.031 nats per token, expected at most 0.01 (perplexity +3.2 %, top-1 "
    "agreement 0.91, 4,096 tokens"
)


@pytest.mark.parametrize(
    ("change", "alternatives", "expected"),
    [
        pytest.param(
            {},
            {"mix": 0.012, "q8z": 0.0021, "q8": 0.0004},
            "); q8z passes with 0.0021: use --codec q8z, or --accept-fidelity to store it all the same",
            id="one-passes",
        ),
        pytest.param(
            {"geometry": "teacher's, before projection"},
            {"q8z": 0.02, "q8": 0.011},
            ", in the teacher's geometry, before projection); q8z (0.02) and q8 (0.011) do not pass either; use a more faithful "
            "--codec, raw at the last, or --accept-fidelity to store it all the same",
            id="none-passes",
        ),
        pytest.param(
            {},
            {},
            "); use a more faithful --codec, raw at the last, or --accept-fidelity to store it all the same",
            id="none-tried",
        ),
    ],
)
def test_a_failed_gate_says_what_to_do(change: dict[str, Any], alternatives: dict[str, float], expected: str) -> None:
    others = [dataclasses.replace(RESULT, codec=codec, kl=kl) for codec, kl in alternatives.items()]
    assert verdict(dataclasses.replace(RESULT, **change), 0.01, others) == START + expected
