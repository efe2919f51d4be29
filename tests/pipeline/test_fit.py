"""Fitting to a real store of a tiny teacher's keys and values."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from kvstore import KVStoreError, open_store
from kvstore.batches import KVBatch
from kvstore.calibration import calibration_mask
from kvstore.manifest import write_manifest
from kvstore.reader import Store
from kvstore.spec import KVSpec
from kvstore.storage import locate
from pipeline.align import Alignment
from pipeline.align.fit import Fit
from pipeline.align.fitted import Method, attention_cosine, cross_sums, fit_map, retained_variance
from pipeline.align.sums import QuerySums, Sums
from pipeline.cli import cli
from pipeline.fit import fit_store
from pipeline.fit_commands import fit as command
from pipeline.models.attention import CaptureError
from pipeline.models.capture import capture_kv
from pipeline.models.load import load_causal_lm
from pipeline.models.probe import probe_kv_spec
from pipeline.models.queries import capture_queries
from tests.checkpoints import byte_tokenizer, save_checkpoint, tiny_model
from tests.stores import Source, random_source, small_spec, write_store
from tests.training.conftest import make_texts, teacher_source


@pytest.fixture(scope="module")
def source() -> Source:
    return teacher_source(make_texts(12))


@pytest.fixture(scope="module")
def raw(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    return write_store(folder / "kv", source, "raw", tokenizer=folder / "tokenizer")


def narrower(spec: KVSpec) -> KVSpec:
    """A student with half the teacher's kv heads in its first two layers."""
    layers = tuple(dataclasses.replace(layer, num_kv_heads=layer.num_kv_heads // 2) for layer in spec.layers[:2])
    return dataclasses.replace(spec, layers=layers)


@pytest.mark.parametrize("method", ["group-mean", "procrustes", "complex-pca"])
def test_a_streamed_fit_is_the_one_of_all_tokens_at_once(raw: Path, source: Source, method: Method) -> None:
    store = open_store(raw)
    told: list[tuple[int, int]] = []
    found = fit_store(store, narrower(store.spec), method, held_out=0.25, progress=lambda *how_far: told.append(how_far))
    assert list(found.maps) == [2, 3]
    everything = store.read(range(len(store)))
    bounds = everything.cu_seqlens
    counts = calibration_mask(np.diff(bounds).tolist())
    held_out = np.zeros(len(counts), dtype=np.bool_)
    for index in (3, 7, 11):
        held_out[bounds[index] : bounds[index + 1]] = True
    assert (found.num_tokens, found.num_held_out_tokens) == ((counts & ~held_out).sum(), (counts & held_out).sum())
    for layer in (2, 3):
        rope = store.spec.rope_of(layer)
        sums = [Sums(store.spec.layer(layer), rope) for _ in range(2)]
        for each, chosen in zip(sums, (counts & ~held_out, counts & held_out), strict=True):
            each.add(everything.key[layer][chosen], everything.value[layer][chosen])
        expected = fit_map(method, sums[0], narrower(store.spec).layers[0], rope, rope)
        torch.testing.assert_close(found.maps[layer].key, expected.key, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.maps[layer].value, expected.value, rtol=0, atol=1e-4)
        shares = dataclasses.astuple(retained_variance(expected, sums[1]))
        assert dataclasses.astuple(found.retained_held_out[layer]) == pytest.approx(shares, abs=1e-4)
        cosines = []
        for index in (3, 7, 11):
            key, value = (
                torch.from_numpy(x[layer, bounds[index] : bounds[index + 1]]) for x in (everything.key, everything.value)
            )
            cosines.append(attention_cosine(expected, key, value, torch.arange(len(key)), rope))
        assert found.attention_cosine[layer] == pytest.approx(np.mean(cosines), abs=1e-4)
    assert told[-1][0] == told[-1][1]


def test_a_limit_of_tokens_ends_after_the_sample_that_reaches_it(raw: Path) -> None:
    store = open_store(raw)
    lengths = store.samples.num_tokens
    found = fit_store(store, narrower(store.spec), tokens=1, held_out=0.0)
    assert found.num_tokens == calibration_mask([int(lengths[0])]).sum()
    assert found.retained_held_out == found.attention_cosine == {}


def test_tokens_without_keys_do_not_count(tmp_path: Path) -> None:
    source = random_source(small_spec(num_layers=1), [40, 40])
    masks = {index: np.arange(40) >= 30 for index in range(2)}
    root = write_store(
        tmp_path / "kv",
        source,
        "raw",
        signal={"response_only": True},
        loss_masks={index: mask.astype(np.uint8) for index, mask in masks.items()},
    )
    found = fit_store(open_store(root), small_spec(num_layers=1, num_kv_heads=1), held_out=0.0)
    assert found.num_tokens == 20


@pytest.mark.parametrize("change", ["baked", "post_rope", "latent"])
def test_stores_whose_heads_cannot_be_fitted_are_refused(tmp_path: Path, change: str) -> None:
    spec = small_spec(num_layers=1)
    if change == "post_rope":
        spec = dataclasses.replace(spec, key_domain="post_rope")
    if change == "latent":
        spec = dataclasses.replace(spec, layers=(dataclasses.replace(spec.layers[0], latent=True),))
    root = write_store(tmp_path / "kv", random_source(spec, [40]), "raw")
    if change == "baked":
        manifest, alignment = open_store(root).manifest, Alignment.plan(spec, spec)
        write_manifest(
            locate(root), dataclasses.replace(manifest, alignment=dataclasses.replace(alignment, baked=True).to_json())
        )
    said = {"baked": "already aligned to a student", "post_rope": "expected pre_rope", "latent": "hold MLA latents"}
    with pytest.raises((KVStoreError, ValueError), match=said[change]):
        fit_store(open_store(root), small_spec(num_layers=1, num_kv_heads=1))


def test_wrong_limits_missing_layers_and_too_little_text_are_refused(tmp_path: Path) -> None:
    spec = small_spec(num_layers=3)
    source = random_source(spec.select([0]), [40])
    store = open_store(write_store(tmp_path / "kv", source, "raw", teacher=spec))
    with pytest.raises(ValueError, match=r"got held_out 1.0, tokens 5"):
        fit_store(store, spec, held_out=1.0, tokens=5)
    with pytest.raises(KVStoreError, match=r"needs teacher layers 0-2, .* lacks 1-2"):
        fit_store(store, spec)
    silent = write_store(
        tmp_path / "silent", source, "raw", signal={"response_only": True}, loss_masks={0: np.zeros(40, np.uint8)}
    )
    with pytest.raises(KVStoreError, match=r"has no tokens to fit on; got 1 samples"):
        fit_store(open_store(silent), spec, layer_map="0=0")


def test_the_command_writes_a_fit_and_says_what_it_retains(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "student.toml").write_text(
        '[config]\nmodel_type = "qwen2"\nhidden_size = 32\nnum_hidden_layers = 2\nnum_attention_heads = 4\nnum_key_value_heads = 1\n'
    )
    arguments = ["--store", str(raw), "--student", str(tmp_path / "student.toml"), "--out", str(tmp_path / "maps.safetensors")]
    result = CliRunner().invoke(command, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    fit = Fit.load(tmp_path / "maps.safetensors")
    assert record["fit_id"] == fit.fit_id
    assert fit.store == open_store(raw).manifest.fingerprint
    assert [row["teacher_layer"] for row in record["retained"]] == list(fit.maps)
    assert [row["key"] for row in record["retained"]] == [share.key for share in fit.retained.values()]
    table = CliRunner().invoke(command, arguments)
    assert table.exit_code == 0, table.output
    assert "variance retained" in table.output
    assert fit.fit_id in table.output


def test_a_store_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    root = write_store(tmp_path / "kv", random_source(small_spec(num_layers=1), [40]), "raw")
    result = CliRunner().invoke(command, ["--store", str(root), "--student", "x", "--out", str(tmp_path / "f")])
    assert isinstance(result.exception, KVStoreError)
    assert "got no tokenizer" in str(result.exception)


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Teacher, pretrained student with half its kv heads and layers, and a raw store of the teacher, as the commands make them."""
    folder = tmp_path_factory.mktemp("extracted")
    teacher = save_checkpoint(folder / "teacher", "qwen2", num_hidden_layers=4)
    student = save_checkpoint(folder / "student", "qwen2", seed=1, num_hidden_layers=2, num_key_value_heads=1)
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(12)))
    done = CliRunner().invoke(
        cli,
        [
            "extract",
            "--teacher",
            str(teacher),
            "--data",
            str(text),
            "--out",
            str(folder / "kv"),
            "--codec",
            "raw",
            "--device",
            "cpu",
        ],
    )
    assert done.exit_code == 0, done.output
    return teacher, student, folder / "kv"


def fitted_samples(store: Store) -> Iterator[tuple[KVBatch, np.ndarray]]:
    """The last layer of every sample that is not held out, and which of its tokens count."""
    for index in range(len(store)):
        if int((index + 1) * 0.1) == int(index * 0.1):
            batch = store.read([index], [3])
            yield batch, calibration_mask([len(batch.input_ids)])


def test_ridge_fits_every_student_layer_to_the_students_own_numbers(extracted: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, student, raw = extracted
    arguments = [
        "--store",
        str(raw),
        "--student",
        str(student),
        "--layers",
        "all",
        "--method",
        "ridge",
        "--layer-map",
        "0=3,1=3",
    ]
    done = CliRunner().invoke(command, [*arguments, "--out", str(tmp_path / "maps.safetensors"), "--json"])
    assert done.exit_code == 0, done.output
    fit, store = Fit.load(tmp_path / "maps.safetensors"), open_store(raw)
    model = load_causal_lm(student)
    spec, alignment = probe_kv_spec(model), fit.alignment
    side, rope = spec.layer(0), store.spec.rope_of(3)
    sums, cross = Sums(store.spec.layer(3), rope), cross_sums(store.spec.layer(3), side, rope, spec.rope_of(0))
    for batch, counts in fitted_samples(store):
        ours = capture_kv(model, spec, torch.from_numpy(batch.input_ids.astype(np.int64))[None])
        sums.add(batch.key[0][counts], batch.value[0][counts])
        for layer in (0, 1):
            key, value = (side[0].transpose(0, 1).numpy()[counts] for side in ours[layer])
            cross.add((key, value), (batch.key[0][counts], batch.value[0][counts]))
    expected = fit_map("ridge", sums, side, rope, spec.rope_of(0), cross=cross)
    assert alignment.layer_map == ((0, 3), (1, 3))
    torch.testing.assert_close(fit.maps[3].key, expected.key, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fit.maps[3].value, expected.value, rtol=1e-4, atol=1e-6)


def test_query_pca_listens_to_the_teachers_own_queries(extracted: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, student, raw = extracted
    arguments = [
        "--store",
        str(raw),
        "--student",
        str(student),
        "--layers",
        "1",
        "--method",
        "query-pca",
        "--teacher",
        str(teacher),
    ]
    done = CliRunner().invoke(command, [*arguments, "--out", str(tmp_path / "maps.safetensors"), "--json"])
    assert done.exit_code == 0, done.output
    fit, store, model = Fit.load(tmp_path / "maps.safetensors"), open_store(raw), load_causal_lm(teacher)
    rope, theirs = store.spec.rope_of(3), store.spec.layer(3)
    sums, queries = Sums(theirs, rope), QuerySums(theirs, rope)
    attention = model.model.layers[3].self_attn
    seen: list[torch.Tensor] = []
    attention.q_proj.register_forward_hook(lambda _module, _args, out: seen.append(out[0]))
    for batch, counts in fitted_samples(store):
        with torch.no_grad():
            model(input_ids=torch.from_numpy(batch.input_ids.astype(np.int64))[None])
        sums.add(batch.key[0][counts], batch.value[0][counts])
        # Before rotation, which does not change how loud a pair is.
        queries.add(seen.pop().reshape(len(counts), -1, theirs.key_dim).numpy()[counts])
    expected = fit_map(
        "query-pca", sums, fit.alignment.student.layer(1), rope, fit.alignment.student.rope_of(1), queries=queries
    )
    torch.testing.assert_close(fit.maps[3].key, expected.key, rtol=1e-3, atol=1e-5)


def test_models_that_are_not_the_stores_are_refused(extracted: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, student, raw = extracted
    fresh = tmp_path / "fresh.toml"
    fresh.write_text(
        '[config]\nmodel_type = "qwen2"\nhidden_size = 32\nnum_hidden_layers = 2\nnum_attention_heads = 4\nnum_key_value_heads = 1\n'
    )
    base = ["--store", str(raw), "--out", str(tmp_path / "maps.safetensors")]
    for arguments, message in (
        (["--student", str(fresh), "--method", "ridge"], "has fresh weights, expected a pretrained one"),
        (["--student", str(student), "--method", "query-pca"], "--method query-pca needs --teacher"),
        (["--student", str(student), "--out", str(tmp_path / "no" / "maps.safetensors")], "no is no folder; make it first"),
        (["--student", str(student), "--teacher", str(teacher)], "--method complex-pca takes no --teacher"),
        (["--student", str(student), "--method", "query-pca", "--teacher", str(student)], "name the teacher of this store"),
    ):
        done = CliRunner().invoke(command, [*base, *arguments])
        assert done.exit_code != 0
        assert message in f"{done.output}{done.exception}"


def test_a_model_with_attention_of_its_own_hands_no_queries_over() -> None:
    model = tiny_model("bloom")
    with pytest.raises(CaptureError, match=r"BloomForCausalLM: its attention hands no queries over"):
        capture_queries(model, torch.zeros((1, 3), dtype=torch.int64))
