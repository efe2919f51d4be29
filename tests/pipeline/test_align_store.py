"""Aligned stores made from raw ones, against the same maps written out densely."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from tokenizers import normalizers

from kvstore import CodecError, FingerprintMismatchError, KVStoreError, StoreFormatError, open_store
from kvstore.arrays import index_bytes
from kvstore.commits import StoredObject, read_commit, replace_commit
from kvstore.describe import describe
from kvstore.errors import FidelityError
from kvstore.manifest import read_manifest
from kvstore.reader import Store
from kvstore.records import bytes_sha256
from kvstore.rewrite import recode_store
from kvstore.storage import locate
from kvstore.verify import verify_store
from pipeline.align import Alignment
from pipeline.align.fit import Fit
from pipeline.align_store import AlignSettings, align_store
from pipeline.cli import cli
from tests.align.test_spans import dense, side
from tests.checkpoints import byte_tokenizer, save_checkpoint
from tests.stores import Source, random_source, small_spec, write_store
from training.config import TrainConfig
from training.trainer import run_training

TEXTS = [
    "def run(self):\n    return self.value + naïve\n",
    "import os, sys\r\n\t日本語 = '🙂'\n",
    "for key, value in sorted(items): print(key, value) # and so on and on\n" * 2,
    "class Größe(Exception): pass\n",
    "x",
    "def run(self):\n    return None\n" * 3,
]
STUDENT = """
[config]
model_type = "qwen2"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = {layers}
num_attention_heads = 4
num_key_value_heads = {heads}
head_dim = 8
max_position_embeddings = {positions}
"""


def student_file(folder: Path, layers: int = 2, heads: int = 1, positions: int = 256) -> str:
    (folder / "student.toml").write_text(STUDENT.format(layers=layers, heads=heads, positions=positions))
    return str(folder / "student.toml")


@pytest.fixture(scope="module")
def source() -> Source:
    drawn = random_source(small_spec(num_layers=4), [len(text.encode()) for text in TEXTS])
    return dataclasses.replace(drawn, input_ids=[np.array(list(_ids(text)), dtype=np.int32) for text in TEXTS])


def _ids(text: str) -> list[int]:
    ids: list[int] = byte_tokenizer()(text)["input_ids"]
    return ids


@pytest.fixture(scope="module")
def raw(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    return write_store(folder / "kv", source, "raw", texts=TEXTS, counts=[3, 1, 1, 2, 1, 1], tokenizer=folder / "tokenizer")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("student-tokenizer")
    side("large").tokenizer.save_pretrained(folder)
    return str(folder)


def expected(store: Store, source: Source, index: int, alignment: Alignment, layer: int) -> tuple[Any, Any, np.ndarray]:
    """Keys, values and mask of one of `source`'s samples in the student's tokens."""
    ours, theirs = side("large"), side("bytes")
    student_ids = ours.tokenizer(TEXTS[index])["input_ids"]
    weights = dense(theirs.write(source.input_ids[index]), ours.write(student_ids))
    kept = (weights[:, :4].sum(axis=1) == 0) & (weights.sum(axis=1) > 0)
    key, value = (
        torch.from_numpy(np.einsum("st,thd->shd", weights, side).astype(np.float32)) for side in source.kv[index][layer]
    )
    return (*alignment.project(layer, key, value), kept)


def test_another_tokenizers_store_holds_the_means_of_the_tokens_under_its_own(
    raw: Path, source: Source, tokenizer: str, tmp_path: Path
) -> None:
    settings = AlignSettings(student=student_file(tmp_path), tokenizer=tokenizer, codec="raw", workers=2)
    summary = align_store(str(raw), str(tmp_path / "out"), settings)
    store = open_store(tmp_path / "out")
    assert (summary.baked, summary.left_out, summary.num_samples) == (True, 0, len(TEXTS))
    assert store.manifest.token_arrays == ("input_ids", "kv_mask")
    assert store.manifest.alignment is not None
    alignment = Alignment.from_json(store.manifest.alignment)
    assert alignment.layer_map == ((0, 2), (1, 3))
    assert verify_store(str(tmp_path / "out"), deep=True).problems == ()
    kept_tokens = 0
    for number, text in enumerate(store.samples.text):
        assert text is not None
        index = TEXTS.index(text)
        batch = store.read([number])
        np.testing.assert_array_equal(batch.input_ids, side("large").tokenizer(text)["input_ids"])
        assert store.samples.count[number] == [3, 1, 1, 2, 1, 1][index]
        for slot, layer in enumerate(store.spec.layer_numbers):
            key, value, kept = expected(store, source, index, alignment, layer)
            np.testing.assert_array_equal(batch.has_kv, kept)
            np.testing.assert_allclose(batch.key[slot][kept], key[kept], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(batch.value[slot][kept], value[kept], rtol=1e-5, atol=1e-5)
            assert not batch.key[slot][~kept].any()
        kept_tokens += int(kept.sum())
    assert summary.coverage == pytest.approx(kept_tokens / summary.num_tokens)
    assert store.count_compared().sum() == kept_tokens
    assert store.count_learnt().sum() == summary.num_tokens
    again = align_store(str(raw), str(tmp_path / "out"), settings)
    assert again.new_shards == 0


def test_the_same_tokens_keep_their_ids_and_take_less_room(raw: Path, source: Source, tmp_path: Path) -> None:
    settings = AlignSettings(student=student_file(tmp_path), layers="-1", codec="raw")
    summary = align_store(str(raw), str(tmp_path / "out"), settings)
    store, before = open_store(tmp_path / "out"), open_store(raw)
    assert sorted(store.samples.ids) == sorted(before.samples.ids)
    assert store.manifest.token_arrays == ("input_ids",)
    assert (summary.coverage, store.spec.layer_numbers) == (1.0, (3,))
    assert store.manifest.alignment is not None
    alignment = Alignment.from_json(store.manifest.alignment)
    for number, identity in enumerate(store.samples.ids):
        whole = before.read([before.samples.ids.index(identity)], [3])
        key, value = alignment.project(3, torch.from_numpy(whole.key[0]), torch.from_numpy(whole.value[0]))
        batch = store.read([number])
        np.testing.assert_array_equal(batch.key[0], key)
        np.testing.assert_array_equal(batch.value[0], value)


def test_a_student_trains_from_a_store_in_its_own_tokens(raw: Path, tokenizer: str, tmp_path: Path) -> None:
    student = student_file(tmp_path)
    align_store(str(raw), str(tmp_path / "out"), AlignSettings(student=student, tokenizer=tokenizer))
    summary = run_training(
        TrainConfig(
            store=str(tmp_path / "out"),
            student=student,
            out=tmp_path / "run",
            steps=2,
            batch_size=2,
            eval_fraction=0.5,
            device="cpu",
            threads=1,
        )
    )
    assert summary.eval_loss > 0


def test_fitted_maps_project_instead_of_the_mean_and_only_on_their_own_store(raw: Path, source: Source, tmp_path: Path) -> None:
    student, maps = student_file(tmp_path), tmp_path / "maps.safetensors"
    fitted = CliRunner().invoke(
        cli, ["fit", "--store", str(raw), "--student", student, "--layers", "all", "--out", str(maps), "--json"]
    )
    assert fitted.exit_code == 0, fitted.output
    align_store(str(raw), str(tmp_path / "out"), AlignSettings(student=student, codec="raw", fit=str(maps)))
    store, before, fit = open_store(tmp_path / "out"), open_store(raw), Fit.load(maps)
    assert store.manifest.signal["fit"] == {"fit_id": fit.fit_id, "method": "complex-pca"}
    assert store.projection_path is not None
    assert Fit.load(store.projection_path / "maps.safetensors").fit_id == fit.fit_id
    assert verify_store(tmp_path / "out").ok
    recode_store(str(tmp_path / "out"), "q8", str(tmp_path / "smaller"))
    recoded = open_store(tmp_path / "smaller")
    assert recoded.manifest.projection == store.manifest.projection
    assert verify_store(tmp_path / "smaller").ok
    (tmp_path / "smaller" / "projection" / "maps.safetensors").write_bytes(b"other maps")
    (problem,) = verify_store(tmp_path / "smaller").problems
    assert problem.part == "projection"
    with pytest.raises(StoreFormatError, match=r"projection/maps\.safetensors: hashes to .*; restore the file"):
        _ = open_store(tmp_path / "smaller").projection_path
    for number, identity in enumerate(store.samples.ids):
        whole = before.read([before.samples.ids.index(identity)], [3])
        key, value = fit.maps[3].project(torch.from_numpy(whole.key[0]), torch.from_numpy(whole.value[0]))
        batch = store.read([number], [3])
        np.testing.assert_array_equal(batch.key[0], key)
        np.testing.assert_array_equal(batch.value[0], value)
    other = write_store(tmp_path / "other", random_source(source.spec, [50]), "raw", tokenizer=raw.parent / "tokenizer")
    with pytest.raises(FingerprintMismatchError, match=r"was fitted on store .*; fit again on this store"):
        align_store(str(other), str(tmp_path / "no"), AlignSettings(student=student, fit=str(maps)))


def test_samples_whose_text_the_students_tokenizer_changes_are_left_out(raw: Path, tmp_path: Path) -> None:
    def normalising(name: str, normalizer: Any) -> str:
        tokenizer = copy.deepcopy(side("large").tokenizer)
        tokenizer.backend_tokenizer.normalizer = normalizer
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    student = student_file(tmp_path)
    some = normalising("some", normalizers.Replace("Größe", "Groesse"))
    summary = align_store(str(raw), str(tmp_path / "out"), AlignSettings(student=student, tokenizer=some))
    assert (summary.left_out, summary.num_samples) == (1, len(TEXTS) - 1)
    assert not any("Größe" in str(text) for text in open_store(tmp_path / "out").samples.text)
    every = normalising("every", normalizers.Prepend("#"))
    with pytest.raises(ValueError, match=r"changes the text from byte 0 on.*so it is with 6 of 6 samples"):
        align_store(str(raw), str(tmp_path / "none"), AlignSettings(student=student, tokenizer=every))


def test_masks_survive_another_codec(raw: Path, tokenizer: str, tmp_path: Path) -> None:
    settings = AlignSettings(student=student_file(tmp_path), tokenizer=tokenizer, codec="raw")
    align_store(str(raw), str(tmp_path / "out"), settings)
    recode_store(str(tmp_path / "out"), "q8", str(tmp_path / "q8"))
    one, other = open_store(tmp_path / "out"), open_store(tmp_path / "q8")
    for number, identity in enumerate(one.samples.ids):
        ours, theirs = one.read([number]), other.read([other.samples.ids.index(identity)])
        np.testing.assert_array_equal(ours.has_kv, theirs.has_kv)
        np.testing.assert_allclose(theirs.key[:, ours.has_kv], ours.key[:, ours.has_kv], atol=0.2)
    assert (describe(other)["aligned_from"] or describe(other)["recoded_from"]) is not None


def test_what_cannot_be_aligned_is_refused_before_anything_is_written(
    raw: Path, source: Source, tokenizer: str, tmp_path: Path
) -> None:
    student, out = student_file(tmp_path), str(tmp_path / "out")

    def refused(match: str, store: Path = raw, kind: type[Exception] = ValueError, **settings: Any) -> None:
        with pytest.raises(kind, match=match):
            align_store(str(store), out, AlignSettings(**{"student": student, **settings}))
        assert not Path(out).exists()

    (tmp_path / "wide").mkdir()
    wide = student_file(tmp_path / "wide", heads=4)
    refused(r"an aligned store would not be smaller; train it from", student=wide)
    (tmp_path / "deep").mkdir()
    refused(
        r"has max_position_embeddings 16, but a sample has \d+",
        student=student_file(tmp_path / "deep", positions=16),
        tokenizer=tokenizer,
    )
    refused(r"student_layers|layers: got|layer", layers="9")
    own = save_checkpoint(tmp_path / "own", "qwen2", num_key_value_heads=1, hidden_size=32)
    refused(r"has a tokenizer of its own; leave --tokenizer out", student=str(own), tokenizer=tokenizer)
    with pytest.raises(KVStoreError, match=r"--out is the store itself"):
        align_store(str(raw), str(raw), AlignSettings(student=student))
    align_store(str(raw), str(tmp_path / "once"), AlignSettings(student=student))
    refused(r"is already aligned to a student; expected a raw store", store=tmp_path / "once", kind=KVStoreError)


def seal(store: Path, shard: int) -> None:
    """Make a shard's record fit its files, whatever they are now."""
    storage = locate(str(store))
    manifest, commit = read_manifest(storage), read_commit(storage, shard)

    def fitted(stored: StoredObject) -> StoredObject:
        content = (store / stored.path).read_bytes()
        end = content[-index_bytes(manifest, stored.path.split("/")[1]) :]
        hashes = {"sha256": bytes_sha256(content), "index_sha256": bytes_sha256(end)}
        return dataclasses.replace(stored, size_bytes=len(content), **hashes)

    replace_commit(storage, dataclasses.replace(commit, objects=tuple(map(fitted, commit.objects))))


@pytest.mark.parametrize("other_tokens", [False, True])
def test_nan_in_the_store_is_named_by_sample_while_calibrating(
    raw: Path, tokenizer: str, tmp_path: Path, other_tokens: bool
) -> None:
    store = Path(shutil.copytree(raw, tmp_path / "broken"))
    array = zarr.open_array(store / "kv.zarr/value", mode="r+")
    samples = open_store(store).samples
    array[3, int(samples.token_start[2]) + int(samples.num_tokens[2]) // 2, 1, 3] = np.nan
    seal(store, int(samples.shard[2]))
    settings = AlignSettings(student=student_file(tmp_path), tokenizer=tokenizer if other_tokens else None, codec="q8")
    with pytest.raises(CodecError, match=rf"sample {samples.ids[2][:12]} of .*, layer 3, value: got NaN or infinity"):
        align_store(str(store), str(tmp_path / "out"), settings)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_larger_student_with_other_tokens_keeps_the_teachers_geometry(raw: Path, tokenizer: str, tmp_path: Path) -> None:
    summary = align_store(
        str(raw), str(tmp_path / "out"), AlignSettings(student=student_file(tmp_path, heads=4), tokenizer=tokenizer)
    )
    store = open_store(tmp_path / "out")
    assert not summary.baked
    assert store.spec.layers[0].geometry == (2, 8, 8)


def test_the_command_says_what_it_made(raw: Path, tokenizer: str, tmp_path: Path) -> None:
    arguments = [
        "align",
        str(raw),
        "--student",
        student_file(tmp_path),
        "--tokenizer",
        tokenizer,
        "--out",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert 0.5 < record["coverage"] < 1.0
    inspected = CliRunner().invoke(cli, ["inspect", str(tmp_path / "out")])
    assert "aligned     to " in inspected.output


def test_one_enormous_value_is_refused_and_stored_only_when_that_is_accepted(
    source: Source, tokenizer: str, tmp_path: Path
) -> None:
    kv = [{layer: (key.copy(), value) for layer, (key, value) in sample.items()} for sample in source.kv]
    longest = max(range(len(kv)), key=lambda index: len(source.input_ids[index]))
    kv[longest][2][0][len(source.input_ids[longest]) // 2, 1, 5] = 1e5
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    raw = write_store(
        tmp_path / "raw", dataclasses.replace(source, kv=kv), "raw", texts=TEXTS, tokenizer=tmp_path / "tokenizer"
    )
    settings = AlignSettings(student=student_file(tmp_path), tokenizer=tokenizer, codec="mix")
    with pytest.raises(FidelityError, match=r"layer 2, key: the codec changes a typical token by \d+%.*--accept-fidelity"):
        align_store(str(raw), str(tmp_path / "out"), settings)
    assert not (tmp_path / "out" / "manifest.json").exists()
    align_store(str(raw), str(tmp_path / "out"), dataclasses.replace(settings, accept_fidelity=True))
