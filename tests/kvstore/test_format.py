"""One test for every numbered sentence of FORMAT.md, with raw access to the files beside the reader."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from kvstore import (
    CodecError,
    CorruptShardError,
    KVStoreError,
    LayerSpec,
    LeaseHeldError,
    StoreFormatError,
    StoreNotFoundError,
    open_store,
)
from kvstore.codec import CODECS
from kvstore.commits import sample_id
from kvstore.compaction import compact
from kvstore.create import extend_store
from kvstore.describe import describe
from kvstore.drop import drop_samples
from kvstore.errors import LeaseLostError
from kvstore.gate import read_gate, write_gate
from kvstore.lease import EVERYTHING, LEASES, lease
from kvstore.records import canonical_json
from kvstore.repeats import write_repeats
from kvstore.rewrite import merge_stores, recode_store
from kvstore.storage import locate
from kvstore.verify import verify_store
from pipeline.monitor.progress import Progress
from pipeline.worker import TaskResult
from tests.stores import Source, begin_store, random_source, small_spec, write_shard, write_store

FORMAT = Path(__file__).parents[2] / "FORMAT.md"
LENGTHS = [100, 128, 70, 300, 64, 5] * 4
TESTED: dict[str, str] = {}


def rule(*numbers: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        TESTED.update(dict.fromkeys(numbers, function.__name__))
        return function

    return register


@pytest.fixture(scope="module")
def source() -> Source:
    return random_source(small_spec(), LENGTHS)


@pytest.fixture(scope="module")
def written(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("format") / "store", source)


@pytest.fixture
def store_path(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "store"))


def manifest_of(path: Path) -> dict[str, object]:
    record: dict[str, object] = json.loads((path / "manifest.json").read_text())
    return record


def commit_of(path: Path, shard: int) -> dict[str, object]:
    record: dict[str, object] = json.loads((path / f"commits/{shard:05d}.json").read_text())
    return record


def reseal(path: Path, **changes: object) -> None:
    """Change a record and give it a seal that fits, as a writer with a bug would."""
    record = json.loads(path.read_text())
    record.pop("sha256")
    record.update(changes)
    record["sha256"] = hashlib.sha256(canonical_json(record).encode()).hexdigest()
    path.write_text(json.dumps(record))


def _delete_tables(path: Path) -> None:
    for file in (path / "samples").glob("*.parquet"):
        file.unlink()


def largest_shard_file(path: Path, array: str) -> Path:
    return max((path / "kv.zarr" / array / "c").rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)


def flip_bit(file: Path, position: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


def test_every_numbered_sentence_of_the_format_has_a_test() -> None:
    numbered = set(re.findall(r"^- \*\*(\d+\.\d+)\*\*", FORMAT.read_text(), flags=re.MULTILINE))
    assert numbered == set(TESTED)


@rule("1.1")
def test_a_store_has_its_four_parts(written: Path) -> None:
    assert {entry.name for entry in written.iterdir()} >= {"manifest.json", "kv.zarr", "commits", "samples"}


@rule("1.2")
def test_without_a_manifest_there_is_no_store(store_path: Path) -> None:
    (store_path / "manifest.json").unlink()
    with pytest.raises(StoreNotFoundError, match=r"manifest\.json is missing"):
        open_store(store_path)


@rule("1.2")
def test_a_creation_that_died_before_its_manifest_can_be_repeated(store_path: Path, source: Source) -> None:
    for part in ("manifest.json", "commits", "samples"):
        shutil.rmtree(store_path / part) if (store_path / part).is_dir() else (store_path / part).unlink()
    with pytest.raises(StoreFormatError, match=r"is not empty and is not a store being created \(it holds kv\.zarr\)"):
        begin_store(store_path, source)
    (store_path / ".staging" / "creating").touch()
    begin_store(store_path, source)
    assert len(open_store(store_path)) == 0


@rule("1.3")
def test_the_tokenizer_is_kept_when_given_and_not_needed(written: Path, source: Source, tmp_path: Path) -> None:
    assert open_store(written).tokenizer_path is None
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    path = write_store(tmp_path / "store", source, tokenizer=tmp_path / "tokenizer")
    kept = open_store(path).tokenizer_path
    assert kept is not None
    assert (kept / "tokenizer.json").read_text() == "{}"


@rule("1.4")
def test_staging_is_invisible_to_readers(store_path: Path) -> None:
    before = len(open_store(store_path))
    staged = store_path / ".staging" / "shard-00099-x" / "key"
    staged.mkdir(parents=True)
    (staged / "zarr.json").write_text("half a rec")
    (store_path / ".staging" / "commit-1").write_text('{"shard": 99}')
    assert len(open_store(store_path)) == before


@rule("2.1")
@pytest.mark.parametrize("name", ["manifest.json", "commits/00000.json"])
def test_a_changed_record_is_refused(store_path: Path, name: str) -> None:
    file = store_path / name
    record = json.loads(file.read_text())
    body = {key: value for key, value in record.items() if key != "sha256"}
    assert record["sha256"] == hashlib.sha256(canonical_json(body).encode()).hexdigest()
    file.write_text(file.read_text().replace("test", "tesu").replace("document-0", "document-9"))
    with pytest.raises(StoreFormatError, match="changed or damaged"):
        open_store(store_path).read([0])


@rule("2.2")
def test_another_schema_version_is_refused(store_path: Path) -> None:
    reseal(store_path / "manifest.json", schema_version=2)
    with pytest.raises(StoreFormatError, match="schema_version: got 2, expected 1"):
        open_store(store_path)


@rule("2.3")
def test_the_manifest_has_its_fields_and_a_missing_one_is_named(store_path: Path) -> None:
    fields = {
        "spec",
        "teacher",
        "layout",
        "groups",
        "alignment",
        "calibration",
        "signal",
        "data",
        "fingerprints",
        "created",
    } | {"metadata", "tokenizer", "runs", "token_arrays"}
    assert set(manifest_of(store_path)) == fields | {"kvpipe_version", "schema_version", "sha256"}
    reseal(store_path / "manifest.json", layout={"chunk_tokens": 64})
    with pytest.raises(StoreFormatError, match="shard_tokens"):
        open_store(store_path)


@rule("2.4")
def test_fingerprints_are_hashes_of_their_fields(store_path: Path) -> None:
    record = manifest_of(store_path)
    for name in ("signal", "data"):
        expected = hashlib.sha256(canonical_json(record[name]).encode()).hexdigest()
        assert record["fingerprints"][name] == expected
    reseal(store_path / "manifest.json", signal={"weights": "others"})
    with pytest.raises(StoreFormatError, match="fingerprints: got"):
        open_store(store_path)


@rule("2.5")
def test_calibration_arrays_that_do_not_fit_the_manifest_are_refused(store_path: Path) -> None:
    digest = hashlib.sha256()
    group = zarr.open_group(store_path / "kv.zarr", mode="r")
    for name in ("key_mean", "key_step", "value_mean", "value_step"):
        array = np.asarray(group[name][...])
        digest.update(f"/{name}{array.shape}".encode() + array.astype("<f4").tobytes())
    assert manifest_of(store_path)["calibration"] == digest.hexdigest()
    steps = zarr.open_array(store_path / "kv.zarr" / "key_step", mode="r+")
    steps[0, 0, 0] = 1.0
    with pytest.raises(CorruptShardError, match="calibration: mean and step arrays hash to"):
        open_store(store_path).read([0])


@rule("3.1")
@pytest.mark.parametrize("codec", ["raw", "q8", "mix"])
def test_plain_zarr_opens_a_store_without_a_warning_and_without_kvpipe(source: Source, tmp_path: Path, codec: str) -> None:
    path = write_store(tmp_path / "store", source, codec)
    script = (
        f"import zarr, sys; g = zarr.open({str(path / 'kv.zarr')!r}, mode='r'); g.tree(); print(g['key'][0, :4].shape);"
        "assert not [m for m in sys.modules if m.startswith(('kvstore', 'pipeline', 'tensorstore'))]"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "(4, 2, 8)"), done.stderr


@rule("3.2")
def test_keys_and_values_have_named_axes(source: Source, tmp_path: Path) -> None:
    group = zarr.open_group(write_store(tmp_path / "store", source, "q8") / "kv.zarr", mode="r")
    for kind in ("key", "value"):
        array = group[kind]
        assert isinstance(array, zarr.Array)
        assert array.metadata.dimension_names == ("layer", "token", "kv_head", f"{kind}_dim")
        assert (array.shape[0], *array.shape[2:]) == (3, 2, 8)


@rule("3.3")
def test_four_bit_codes_lie_in_byte_arrays_of_half_the_dim(written: Path) -> None:
    group = zarr.open_group(written / "kv.zarr", mode="r")
    array = group["value_byte"]
    assert isinstance(array, zarr.Array)
    assert "value" not in group
    assert (array.dtype, array.shape[-1]) == (np.uint8, 4)
    assert array.metadata.dimension_names[-1] == "value_byte_dim"


@rule("3.4")
def test_quantised_groups_hold_mean_and_step_per_channel(written: Path, source: Source) -> None:
    group = zarr.open_group(written / "kv.zarr", mode="r")
    for name in ("key_mean", "key_step", "value_mean", "value_step"):
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert (array.dtype, array.shape) == (np.float32, (3, 2, 8))
    keys = np.concatenate([sample[1][0] for sample in source.kv])
    np.testing.assert_allclose(np.asarray(group["key_mean"])[1], keys.mean(axis=0), rtol=1e-5)


@rule("3.5")
def test_layer_numbers_are_the_teachers(tmp_path: Path) -> None:
    spec = small_spec(num_layers=8).select([2, 5, 7])
    path = write_store(tmp_path / "store", random_source(spec, [80, 90]))
    assert np.asarray(zarr.open_group(path / "kv.zarr", mode="r")["layer"]).tolist() == [2, 5, 7]
    assert open_store(path).read([0], layers=[7]).layers == (7,)


@rule("3.6")
def test_token_ids_lie_on_the_grid_with_fill_minus_one(written: Path, source: Source) -> None:
    array = zarr.open_array(written / "kv.zarr" / "input_ids", mode="r")
    assert (array.dtype, array.fill_value) == (np.int32, -1)
    samples = open_store(written).samples
    for index in (0, 3, 23):
        start, length = samples.token_start[index], samples.num_tokens[index]
        np.testing.assert_array_equal(array[start : start + length], source.input_ids[index])


@rule("3.7", "3.10")
def test_chunks_and_shards_have_the_stated_shapes(written: Path) -> None:
    layout = open_store(written).manifest.layout
    chunk, shard = layout.chunk_tokens, layout.shard_tokens
    assert chunk in {64, 128, 256, 512, 1024}
    assert shard % chunk == 0
    group = zarr.open_group(written / "kv.zarr", mode="r")
    shapes = {name: (group[name].chunks, group[name].shards) for name in ("key", "value_byte", "input_ids")}
    assert shapes == {
        "key": ((1, chunk, 2, 8), (3, shard, 2, 8)),
        "value_byte": ((1, chunk, 2, 4), (3, shard, 2, 4)),
        "input_ids": ((chunk,), (shard,)),
    }


@rule("3.8")
@pytest.mark.parametrize("codec", ["raw", "q8", "mix"])
def test_crc32c_is_the_last_codec_everywhere(source: Source, tmp_path: Path, codec: str) -> None:
    path = write_store(tmp_path / "store", source, codec)
    for file in (path / "kv.zarr").glob("*/zarr.json"):
        codecs = json.loads(file.read_text())["codecs"]
        inner = codecs[0]["configuration"]["codecs"] if codecs[0]["name"] == "sharding_indexed" else codecs
        assert inner[-1]["name"] == "crc32c", file


@rule("3.9")
def test_layers_of_another_geometry_form_a_group_of_their_own(tmp_path: Path) -> None:
    spec = small_spec(num_layers=4)
    other = LayerSpec(layer=1, num_kv_heads=1, key_dim=16, value_dim=4, rope=None)
    spec = type(spec)(layers=(spec.layers[0], other, *spec.layers[2:]), ropes=spec.ropes, dtype=spec.dtype)
    source = random_source(spec, LENGTHS)
    store = open_store(write_store(tmp_path / "store", source, "q8"))
    attributes = zarr.open_group(Path(store.location) / "kv.zarr", mode="r").attrs["kvpipe"]
    assert attributes["groups"] == {"0": ["", 0], "1": ["group_1", 0], "2": ["", 1], "3": ["", 2]}
    batch = store.read([4], layers=[1])
    np.testing.assert_allclose(batch.key[0], source.kv[4][1][0], atol=0.1)
    with pytest.raises(ValueError, match="key heads and dims differ"):
        store.read([4])


@rule("4.1")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_raw_holds_the_captured_bits(tmp_path: Path, dtype: str) -> None:
    source = random_source(small_spec(dtype=dtype), LENGTHS)
    store = open_store(write_store(tmp_path / "store", source, "raw"))
    start = int(store.samples.token_start[3])
    for index, kind in enumerate(("key", "value")):
        stored = np.asarray(zarr.open_array(Path(store.location) / "kv.zarr" / kind, mode="r")[2, start : start + 300])
        expected = source.kv[3][2][index]
        assert stored.dtype == (np.uint16 if dtype == "bfloat16" else np.dtype(dtype))
        assert stored.tobytes() == expected.tobytes()
    decoded = store.read([3], layers=[2])
    np.testing.assert_array_equal(decoded.key[0], source.kv[3][2][0].astype(np.float32))


FORMS = {"raw": "raw raw", "q8": "8-bit 8-bit", "fp8": "e4m3 e4m3", "q8z": "8-bit 8-bit", "mix": "8-bit 4-bit"}
FORMS |= {"q4z": "4-bit 4-bit", "q4z-min": "4-bit 4-bit"}


@pytest.fixture(scope="module")
def few() -> Source:
    return random_source(small_spec(), LENGTHS[:6])


@pytest.fixture(scope="module", params=FORMS)
def rung(request: pytest.FixtureRequest, few: Source, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Name of a codec and a store of a few samples written with it, for tests that do not damage it."""
    return request.param, write_store(tmp_path_factory.mktemp("rung") / "store", few, request.param)


def stored_codes(path: Path, kind: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Codes of all tokens of all samples as zarr-python gives them, [layer, token, kv_head, code]; mean and step for all tokens."""
    group = zarr.open_group(path / "kv.zarr", mode="r")
    arrays = {name: np.asarray(array[...]) for name, array in group.arrays()}
    codes = arrays.get(f"{kind}_byte", arrays.get(kind))
    assert codes is not None
    statistics = {name: arrays[f"{kind}_{name}"][:, None] for name in ("mean", "step") if f"{kind}_{name}" in arrays}
    return codes[:, arrays["input_ids"] >= 0], statistics


@rule("4.2")
def test_the_form_follows_from_name_and_data_type(rung: tuple[str, Path]) -> None:
    codec, path = rung
    arrays = {"8-bit": ("{}", "int8"), "4-bit": ("{}_byte", "uint8"), "e4m3": ("{}", "uint8"), "raw": ("{}", "float32")}
    group = zarr.open_group(path / "kv.zarr", mode="r")
    attributes = group.attrs["kvpipe"]
    assert attributes["codec"] == codec
    for kind, form in zip(("key", "value"), FORMS[codec].split(), strict=True):
        name, dtype = arrays[form][0].format(kind), arrays[form][1]
        assert ({kind, f"{kind}_byte"} & set(group.array_keys()), group[name].dtype) == ({name}, dtype)
        assert name in attributes["decode"][kind]


def test_the_table_of_rungs_is_the_codec_ladder() -> None:
    (table,) = re.findall(r"^\| rung (.*)\|\n.*\n\| keys / values (.*)\|", FORMAT.read_text(), flags=re.MULTILINE)
    rungs, forms = ([cell.strip(" `").replace(" /", "") for cell in line.split("|")[1:]] for line in table)
    assert dict(zip(rungs, forms, strict=True)) == FORMS
    names = {None: "raw", "int8": "8-bit", "nibble": "4-bit", "e4m3": "e4m3"}
    for codec in CODECS.values():
        assert FORMS[codec.name] == " ".join(names[q.form if q else None] for q in (codec.key, codec.value))


@rule("4.3", "4.4", "4.5")
def test_codes_decode_by_the_stated_formulas(rung: tuple[str, Path]) -> None:
    codec, path = rung
    batch = open_store(path).read(range(6))
    for kind, form in zip(("key", "value"), FORMS[codec].split(), strict=True):
        codes, channel = stored_codes(path, kind)
        if form == "raw":
            continue
        if form == "4-bit":
            code = np.concatenate([codes & 15, codes >> 4], axis=-1).astype(np.float32) - 8
        elif form == "e4m3":
            assert not np.isin(codes, (0x7F, 0xFF)).any()
            code = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        else:
            assert codes.min() >= -127
            code = codes.astype(np.float32)
        product = code * channel["step"]
        assert product.dtype == np.float32
        assert (product + channel["mean"]).tobytes() == getattr(batch, kind).tobytes()


@rule("4.6")
def test_errors_stay_within_the_stated_bound_unless_clipped(rung: tuple[str, Path], few: Source) -> None:
    codec, path = rung
    batch = open_store(path).read(range(6))
    for side, (kind, form) in enumerate(zip(("key", "value"), FORMS[codec].split(), strict=True)):
        exact = np.stack([np.concatenate([sample[layer][side] for sample in few.kv]) for layer in range(3)]).astype(np.float64)
        error = np.abs(getattr(batch, kind) - exact)
        if form == "raw":
            assert not error.any()
            continue
        codes, channel = stored_codes(path, kind)
        step, mean = channel["step"].astype(np.float64), channel["mean"].astype(np.float64)
        if form == "4-bit":
            codes = np.concatenate([codes & 15, codes >> 4], axis=-1)
        inside = ~np.isin(codes, {"8-bit": (-127, 127), "4-bit": (0, 15), "e4m3": (0x7E, 0xFE)}[form])
        assert inside.mean() > 0.99
        bound = np.maximum(np.abs(exact - mean) / 16, step / 1024) if form == "e4m3" else 0 * exact + step / 2
        rounding = 2.0**-21 * (np.abs(exact) + np.abs(exact - mean))
        assert (error <= bound + rounding)[inside].all()


@rule("4.7")
@pytest.mark.parametrize("codec", ["raw", "mix", "fp8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, codec: str, bad: float) -> None:
    source = random_source(small_spec(), [70, 70])
    manifest, calibration, tasks = begin_store(tmp_path / "store", source, codec)
    source.kv[1][2][1][3, 1, 4] = bad
    with pytest.raises(CodecError, match=r"NaN or infinity at \[token, kv_head, dim\] \[3, 1, 4\]"):
        write_shard(tmp_path / "store", source, manifest, calibration, len(tasks) - 1, tasks[-1])
    assert len(open_store(tmp_path / "store")) == 0


@rule("4.8")
def test_the_manifest_holds_what_rotates_the_keys(written: Path) -> None:
    spec = manifest_of(written)["spec"]
    assert spec["key_domain"] == "pre_rope"
    assert spec["ropes"] == [{"kind": "half", "inv_freq": [1.0, 0.1, 0.01, 0.001], "start": 0, "attention_scaling": 1.0}]


@rule("5.1")
def test_a_commit_is_created_once_and_wins_over_a_second_writer(store_path: Path) -> None:
    before = (store_path / "commits/00000.json").read_bytes()
    other = random_source(small_spec(), LENGTHS, seed=9)
    store = open_store(store_path)
    indices = [index for index in range(len(store)) if store.samples.shard[index] == 0]
    write_shard(store_path, other, store.manifest, store.calibration, 0, indices)
    assert (store_path / "commits/00000.json").read_bytes() == before
    store.read(indices)


@rule("5.2")
def test_a_commit_lists_every_object_with_size_and_hash(written: Path) -> None:
    objects = commit_of(written, 1)["objects"]
    assert {stored["path"] for stored in objects} == {
        "kv.zarr/key/c/0/1/0/0",
        "kv.zarr/value_byte/c/0/1/0/0",
        "kv.zarr/input_ids/c/1",
    }
    for stored in objects:
        content = (written / stored["path"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (stored["size_bytes"], stored["sha256"])
        layout = open_store(written).manifest.layout
        chunks = layout.shard_tokens // layout.chunk_tokens * (1 if "input_ids" in stored["path"] else 3)
        assert stored["index_sha256"] == hashlib.sha256(content[-(16 * chunks + 8) :]).hexdigest()


@rule("5.2")
def test_a_shard_of_equal_size_with_another_index_is_refused(store_path: Path) -> None:
    file = store_path / "kv.zarr/key/c/0/1/0/0"
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)
    index = int(np.flatnonzero(open_store(store_path).samples.shard == 1)[0])
    with pytest.raises(CorruptShardError, match=r"shard 1: kv\.zarr/key/c/0/1/0/0 has another index than the one committed"):
        open_store(store_path).read([index])


@rule("5.3", "7.1", "7.2")
def test_sample_rows_say_who_and_where(written: Path, source: Source) -> None:
    store = open_store(written)
    layout = store.manifest.layout
    seen = 0
    for shard in range(layout.num_shards):
        for row in commit_of(written, shard)["samples"]:
            content = source.input_ids[seen].astype("<i4").tobytes()
            assert row["id"] == hashlib.sha256(content).hexdigest()
            assert row["crc32c"] == google_crc32c.value(content)
            assert (row["shard"], row["num_tokens"], row["count"]) == (shard, LENGTHS[seen], 1)
            assert (row["source"], row["text"]) == (f"document-{seen}", f"text of {seen}")
            assert row["token_start"] % layout.chunk_tokens == 0
            assert shard * layout.shard_tokens <= row["token_start"]
            assert row["token_start"] + row["num_tokens"] <= (shard + 1) * layout.shard_tokens
            seen += 1
    assert seen == len(LENGTHS)


@rule("5.4")
def test_a_shard_committed_for_another_signal_is_refused(store_path: Path) -> None:
    reseal(store_path / "commits/00001.json", signal="0" * 64)
    store = open_store(store_path)
    index = int(np.flatnonzero(store.samples.shard == 1)[0])
    with pytest.raises(CorruptShardError, match="shard 1: committed for signal 000000000000"):
        store.read([index])


@rule("5.5")
def test_fidelity_is_measured_on_what_was_written(written: Path, source: Source) -> None:
    store = open_store(written)
    indices = [index for index in range(len(store)) if store.samples.shard[index] == 2]
    batch = store.read(indices)
    exact = np.concatenate([source.kv[index][1][1] for index in indices]).astype(np.float32)
    mean = store.calibration[""]["value"][0][1]
    error = batch.value[1] - exact
    record = commit_of(written, 2)["fidelity"]["1"]["value"]
    assert record["centred_error"] == pytest.approx(np.linalg.norm(error) / np.linalg.norm(exact - mean), rel=1e-5)
    assert record["max_abs_error"] == pytest.approx(np.abs(error).max(), rel=1e-5)
    assert 0 <= record["saturation"] < 0.01
    stored_bits = 8 * (written / "kv.zarr/value_byte/c/0/2/0/0").stat().st_size
    layers = commit_of(written, 2)["fidelity"].values()
    by_layer = sum(layer["value"]["bits"] * exact.size for layer in layers)
    assert 0.9 * stored_bits < by_layer < stored_bits


@rule("5.6")
def test_only_committed_shards_are_visible(store_path: Path) -> None:
    whole = open_store(store_path)
    assert len(whole.samples.shard) == len(LENGTHS)
    _delete_tables(store_path)
    (store_path / "commits/00001.json").unlink()
    partial = open_store(store_path)
    missing = int((whole.samples.shard == 1).sum())
    assert len(partial) == len(whole) - missing
    assert 1 not in partial.samples.shard


@rule("6.1")
def test_parquet_tables_hold_the_rows_and_a_summary(written: Path) -> None:
    (part,), (summary,) = ((written / "samples").glob(f"{name}-*.parquet") for name in ("part", "summary"))
    rows = [
        row for shard in range(open_store(written).manifest.layout.num_shards) for row in commit_of(written, shard)["samples"]
    ]
    assert pq.read_table(part).to_pylist() == rows
    table = pq.read_table(summary)
    assert table.column_names == ["shard", "num_samples", "num_tokens", "stored_bytes"]
    assert sum(table["num_tokens"].to_pylist()) == sum(LENGTHS)


@rule("6.2", "8.4")
def test_shards_not_yet_in_a_table_are_read_from_their_commits(source: Source, tmp_path: Path) -> None:
    manifest, calibration, tasks = begin_store(tmp_path / "store", source)
    for shard in (3, 0, 2):
        write_shard(tmp_path / "store", source, manifest, calibration, shard, tasks[shard])
    compact(locate(tmp_path / "store"))
    write_shard(tmp_path / "store", source, manifest, calibration, 1, tasks[1])
    store = open_store(tmp_path / "store")
    assert store.samples.ids == [json_id for shard in range(4) for json_id in _ids(tmp_path / "store", shard)]
    for index, expected in enumerate(index for shard in range(4) for index in tasks[shard]):
        np.testing.assert_array_equal(store.read([index], layers=()).input_ids, source.input_ids[expected])


def _ids(path: Path, shard: int) -> list[str]:
    return [row["id"] for row in commit_of(path, shard)["samples"]]


@rule("6.3")
def test_deleting_the_tables_loses_nothing(store_path: Path) -> None:
    before = open_store(store_path).samples
    rows = list(zip(before.ids, before.source, before.text, before.token_start.tolist(), strict=True))
    _delete_tables(store_path)
    after = open_store(store_path).samples
    assert list(zip(after.ids, after.source, after.text, after.token_start.tolist(), strict=True)) == rows


@rule("6.4")
def test_a_shard_in_two_parts_counts_once(store_path: Path) -> None:
    before = open_store(store_path).samples.ids
    kept = {file.name: file.read_bytes() for file in (store_path / "samples").iterdir()}
    _delete_tables(store_path)
    for shard in (0, 1):  # another process compacts when only these are committed
        (store_path / f"commits/{shard:05d}.json").rename(store_path / f"{shard}.json")
    compact(locate(store_path))
    for shard in (0, 1):
        (store_path / f"{shard}.json").rename(store_path / f"commits/{shard:05d}.json")
    for name, content in kept.items():
        (store_path / "samples" / name).write_bytes(content)
    assert len(list((store_path / "samples").glob("part-*.parquet"))) == 2
    samples = open_store(store_path).samples
    assert (samples.ids, len(samples)) == (before, len(before))


@rule("10.3")
def test_repeats_count_once_the_manifest_names_them(store_path: Path) -> None:
    first = open_store(store_path).samples.ids[0]
    body = {"part": 1, "counts": {first: 2}}
    digest = hashlib.sha256(canonical_json(body).encode()).hexdigest()
    (store_path / "samples/repeats-00001.json").write_text(json.dumps({**body, "sha256": digest}))
    assert set(open_store(store_path).samples.count) == {1}
    data = manifest_of(store_path)["data"]
    (part,) = data["parts"]
    data["parts"].append({**part, "first_shard": part["num_shards"], "num_shards": 0, "repeats": digest})
    fingerprint = hashlib.sha256(canonical_json(data).encode()).hexdigest()
    signal = manifest_of(store_path)["fingerprints"]["signal"]
    reseal(store_path / "manifest.json", data=data, fingerprints={"signal": signal, "data": fingerprint})
    assert open_store(store_path).samples.count.tolist() == [3] + [1] * (len(LENGTHS) - 1)
    (store_path / "samples/repeats-00001.json").unlink()
    with pytest.raises(StoreFormatError, match=r"repeats-00001\.json: hashes to nothing"):
        _ = open_store(store_path).samples.count


@rule("7.3")
def test_chunks_of_samples_are_stored_even_when_they_equal_the_fill_value(tmp_path: Path) -> None:
    spec = small_spec(num_layers=1)
    source = random_source(spec, [128, 128])
    for sample in source.kv:
        sample[0][0][:] = 0.0
    path = write_store(tmp_path / "store", source, "raw")
    store = open_store(path)
    assert (store.read([0]).key == 0).all()
    file = largest_shard_file(path, "key")
    count = store.manifest.layout.shard_tokens // store.manifest.layout.chunk_tokens
    index = np.frombuffer(file.read_bytes()[-(16 * count + 4) : -4], dtype="<u8").reshape(count, 2)
    used = -(-128 // store.manifest.layout.chunk_tokens)
    assert (index[:used, 1] < 2**63).all()
    assert (index[used:] == 2**64 - 1).all()


@rule("8.1")
@pytest.mark.parametrize("array", ["key", "value_byte", "input_ids"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_a_missing_or_truncated_object_raises(store_path: Path, array: str, damage: str) -> None:
    store = open_store(store_path)
    parts = "c/1" if array == "input_ids" else "c/0/1/0/0"
    file = store_path / "kv.zarr" / array / parts
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 0 if damage == "empty" else -10])
    index = int(np.flatnonzero(store.samples.shard == 1)[0])
    with pytest.raises(CorruptShardError, match=rf"shard 1: kv\.zarr/{array}"):
        store.read([index])


@rule("8.1")
def test_an_object_lost_after_its_shard_was_first_read_raises(store_path: Path) -> None:
    store = open_store(store_path)
    indices = np.flatnonzero(store.samples.shard == 1).tolist()
    store.read(indices)
    (store_path / "kv.zarr/key/c/0/1/0/0").unlink()
    with pytest.raises(CorruptShardError, match="shard 1, sample "):
        store.read(indices)


@rule("8.2")
def test_every_flipped_bit_in_stored_codes_raises(store_path: Path) -> None:
    store = open_store(store_path)
    indices = np.flatnonzero(store.samples.shard == 0).tolist()
    file = store_path / "kv.zarr/key/c/0/0/0/0"
    pristine = file.read_bytes()
    chunks = 3 * store.manifest.layout.shard_tokens // store.manifest.layout.chunk_tokens
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(pristine) - 16 * chunks - 4, size=40):
        flip_bit(file, int(position), int(rng.integers(8)))
        with pytest.raises(CorruptShardError, match="shard 0"):
            open_store(store_path).read(indices)
        file.write_bytes(pristine)
    open_store(store_path).read(indices)


@rule("8.3")
def test_swapped_token_shards_raise_naming_shard_and_sample(tmp_path: Path) -> None:
    path = write_store(tmp_path / "store", random_source(small_spec(), [64] * 32))
    by_size: dict[int, Path] = {}
    for file in sorted((path / "kv.zarr/input_ids/c").iterdir()):
        twin = by_size.setdefault(file.stat().st_size, file)
        if twin is not file:
            break
    assert twin is not file, "no two shards of equal size: the size check alone would catch the swap"
    contents = {file: twin.read_bytes(), twin: file.read_bytes()}
    listed = {file: commit_of(path, int(file.name))["objects"], twin: commit_of(path, int(twin.name))["objects"]}
    for target, other in ((file, twin), (twin, file)):  # with records that fit, so that only the token ids are left to tell
        target.write_bytes(contents[target])
        swapped = {**listed[other][-1], "path": listed[target][-1]["path"]}
        reseal(path / f"commits/{int(target.name):05d}.json", objects=[*listed[target][:-1], swapped])
    store = open_store(path)
    index = int(np.flatnonzero(store.samples.shard == int(file.name))[0])
    with pytest.raises(CorruptShardError, match=rf"shard {file.name}, sample {index} \(id"):
        store.read([index])


@rule("8.5")
def test_token_ids_are_read_back_as_written(written: Path, source: Source) -> None:
    store = open_store(written)
    order = [5, 0, 23, 5]
    batch = store.read(order, layers=())
    np.testing.assert_array_equal(batch.input_ids, np.concatenate([source.input_ids[index] for index in order]))
    assert np.diff(batch.cu_seqlens).tolist() == [LENGTHS[index] for index in order]
    assert batch.key.size == batch.value.size == 0


@rule("2.6")
def test_zarr_metadata_is_the_one_the_manifest_names_but_for_its_length(store_path: Path) -> None:
    metadata = manifest_of(store_path)["metadata"]
    assert isinstance(metadata, dict)
    files = {str(file.relative_to(store_path / "kv.zarr")): file for file in (store_path / "kv.zarr").rglob("zarr.json")}
    assert metadata.keys() == files.keys()
    for name, file in files.items():
        document = json.loads(file.read_text())
        axes = document.get("dimension_names", [])
        if "token" in axes:
            document["shape"][axes.index("token")] = None
        assert metadata[name] == hashlib.sha256(canonical_json(document).encode()).hexdigest()
    file = files["key/zarr.json"]
    file.write_text(file.read_text().replace('"fill_value": 0', '"fill_value": 1'))
    with pytest.raises(CorruptShardError, match=r"key/zarr\.json: its content hashes to"):
        open_store(store_path).read([0])


@rule("2.7")
def test_the_manifest_names_the_tokenizer_files(source: Source, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    path = write_store(tmp_path / "store", source, tokenizer=tmp_path / "tokenizer")
    assert manifest_of(path)["tokenizer"] == {"tokenizer.json": hashlib.sha256(b"{}").hexdigest()}


@rule("3.11")
def test_unsharded_arrays_are_stored_even_when_they_are_zero(tmp_path: Path) -> None:
    source = random_source(small_spec(num_layers=1), [20])
    source.kv[0][0][1][:] = 0.0
    path = write_store(tmp_path / "store", source, "q8")
    assert (path / "kv.zarr/layer/c/0").read_bytes()[:4] == bytes(4)
    assert (path / "kv.zarr/value_mean/c/0/0/0").is_file()
    assert not open_store(path).read([0]).value.any()


@rule("6.5")
def test_tables_are_named_for_their_content(store_path: Path) -> None:
    (part,), (summary,) = ((store_path / "samples").glob(f"{name}-*.parquet") for name in ("part", "summary"))
    names = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in (part, summary)]
    assert (part.name, summary.name) == (f"part-{names[0]}.parquet", f"summary-{names[0]}-{names[1]}.parquet")
    (store_path / "samples" / "part-0000000000000000.parquet").write_bytes(part.read_bytes())
    assert len(open_store(store_path)) == len(LENGTHS)
    summary.write_bytes(summary.read_bytes() + b"x")
    with pytest.raises(StoreFormatError, match="does not hash to its name"):
        open_store(store_path)


@rule("6.6")
def test_columns_of_a_part_have_digests(written: Path, store_path: Path) -> None:
    (part,), (summary,) = ((store_path / "samples").glob(f"{name}-*.parquet") for name in ("part", "summary"))
    digests = json.loads(pq.read_schema(summary).metadata[b"kvpipe.columns"])
    table = pq.read_table(part)
    assert digests.keys() == set(table.column_names)
    texts = [text.encode() for text in table["text"].to_pylist()]
    content = np.array([len(text) for text in texts], dtype="<i8").tobytes() + b"".join(texts)
    assert digests["text"] == hashlib.sha256(content).hexdigest()
    starts = np.array(table["token_start"].to_pylist(), dtype="<i8").tobytes()
    assert digests["token_start"] == hashlib.sha256(starts).hexdigest()
    pq.write_table(table.set_column(1, "source", [["another"] * len(table)]), part)
    changed = open_store(store_path)
    assert changed.samples.ids == open_store(written).samples.ids
    with pytest.raises(StoreFormatError, match="column 'source' is not what its summary says"):
        _ = changed.samples.source


@rule("9.1")
def test_the_gate_record_may_be_missing_and_a_damaged_one_is_seen(store_path: Path) -> None:
    assert read_gate(locate(store_path)) == {}
    write_gate(locate(store_path), "before", {"kl": 0.01, "passed": True})
    write_gate(locate(store_path), "after", {"kl": 0.02, "passed": True})
    record = json.loads((store_path / "gate.json").read_text())
    assert (record["before"]["kl"], record["after"]["kl"]) == (0.01, 0.02)
    (store_path / "gate.json").write_text("{")
    with pytest.raises(StoreFormatError, match=r"gate\.json: not a sealed JSON record"):
        read_gate(locate(store_path))
    open_store(store_path).read([0])


@pytest.fixture(scope="module")
def merged(source: Source, written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the samples of `written`, written once more by merging it with a twin of another name."""
    folder = tmp_path_factory.mktemp("merged")
    signal = {"calibration": manifest_of(written)["calibration"]}
    sources = [str(write_store(folder / name, source, signal=signal)) for name in ("one", "two")]
    merge_stores(sources, str(folder / "store"))
    return folder / "store"


@rule("10.1", "10.6")
def test_the_data_is_a_list_of_parts_and_runs_say_where_they_are_from(merged: Path, tmp_path: Path) -> None:
    store = open_store(merged)
    (part,) = store.manifest.data["parts"]
    lines = "".join(f"{identity} 2\n" for identity in sorted(store.samples.ids))
    assert part == {
        "samples": hashlib.sha256(lines.encode()).hexdigest(),
        "num_samples": len(LENGTHS),
        "num_tokens": sum(LENGTHS),
        "seq_len": max(LENGTHS),
        "first_shard": 0,
        "num_shards": store.manifest.layout.num_shards,
    }
    (run,) = store.manifest.runs
    assert (run["first_part"], run["complete"], store.manifest.is_growing) == (0, True, False)
    growing = Path(shutil.copytree(merged, tmp_path / "store"))
    reseal(growing / "manifest.json", runs=[{**run, "complete": False}])
    assert open_store(growing).manifest.is_growing
    assert describe(open_store(growing))["complete"] is False
    with pytest.raises(KVStoreError, match="and its extraction has not planned all of its data; finish it first"):
        recode_store(str(growing), "q4z", str(tmp_path / "recoded"))
    assert [found["fingerprint"] for found in run["merged_from"]] == [
        open_store(merged.parent / name).manifest.fingerprint for name in ("one", "two")
    ]


def _grown(path: Path, source: Source) -> Source:
    """Append two samples by hand; returns them."""
    fresh = random_source(source.spec, [90, 40], seed=5)
    manifest, storage = open_store(path).manifest, locate(path)
    known = open_store(path).samples.ids[0]
    repeats = write_repeats(storage, len(manifest.data["parts"]), {known: 3})
    assert open_store(path).samples.count[0] == 2, "counted before the manifest lists the part"
    planned = manifest.layout.num_shards
    part = {**manifest.data["parts"][0], "first_shard": planned, "num_shards": 1, "repeats": repeats}
    manifest = dataclasses.replace(
        manifest,
        layout=dataclasses.replace(manifest.layout, num_shards=planned + 1),
        data={**manifest.data, "parts": [*manifest.data["parts"], part]},
    )
    extend_store(storage, manifest)
    write_shard(path, fresh, manifest, open_store(path).calibration, planned, [0, 1])
    return fresh


@rule("3.12")
def test_a_store_may_say_more_of_each_token(source: Source, tmp_path: Path) -> None:
    arrays = ("input_ids", "role", "loss_mask")
    manifest, calibration, tasks = begin_store(tmp_path, source, token_arrays=arrays)
    role, mask = (np.arange(len(source.input_ids[0])) % 5).astype(np.uint8), np.zeros(len(source.input_ids[0]), dtype=np.uint8)
    write_shard(tmp_path, source, manifest, calibration, 0, tasks[0], beside={0: {"role": role, "loss_mask": mask}})
    group = zarr.open_group(str(tmp_path / "kv.zarr"), mode="r")
    assert manifest_of(tmp_path)["token_arrays"] == list(arrays)
    assert [(group[name].dtype.name, group[name].fill_value) for name in arrays] == [("int32", -1), ("uint8", 0), ("uint8", 0)]
    assert all(group[name].metadata.dimension_names == ("token",) for name in arrays)
    store = open_store(tmp_path)
    first = store.samples.ids.index(sample_id(source.input_ids[0]))
    batch = store.read([first], layers=())
    np.testing.assert_array_equal(batch.beside["role"], role)
    np.testing.assert_array_equal(batch.beside["loss_mask"], mask)
    # Of the other samples nothing was said: they are all to be learnt from.
    assert len(store) > 1
    rest = store.read([index for index in range(len(store)) if index != first], layers=()).beside
    assert (set(rest["role"]), set(rest["loss_mask"])) == ({0}, {1})
    with pytest.raises(StoreFormatError, match=r"role: the store at .* has no such arrays, only input_ids"):
        write_shard(
            tmp_path / "plain", source, *begin_store(tmp_path / "plain", source)[:2], 0, tasks[0], beside={0: {"role": role}}
        )


@rule("3.13")
@pytest.mark.parametrize("codec", ["mix", "raw", "q8"])
def test_of_a_response_only_store_codes_of_other_tokens_are_the_fill_value(codec: str, source: Source, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    masks = {index: (rng.random(length) < 0.4).astype(np.uint8) for index, length in enumerate(LENGTHS)}
    whole, part = (
        open_store(write_store(tmp_path / name, source, codec, signal=signal, loss_masks=masks))
        for name, signal in (("whole", None), ("part", {"response_only": True}))
    )
    assert (whole.manifest.is_response_only, part.manifest.is_response_only) == (False, True)
    everything, learnt = whole.read_codes(range(len(whole))), part.read_codes(range(len(part)))
    assert 0 < learnt.learnt.sum() < len(learnt.learnt)
    for (path, kind), codes in learnt.codes.items():
        group = zarr.open_group(str(tmp_path / "part/kv.zarr" / path), mode="r")
        fill_value = group[kind if kind in group else f"{kind}_byte"].fill_value
        np.testing.assert_array_equal(codes[:, learnt.learnt], everything.codes[path, kind][:, learnt.learnt])
        assert (codes[:, ~learnt.learnt].astype(np.float32) == np.float32(fill_value)).all()
    assert verify_store(str(tmp_path / "part"), deep=True).problems == ()
    assert describe(part)["stored_bytes"] < 0.7 * describe(whole)["stored_bytes"]
    reseal(tmp_path / "part/manifest.json", token_arrays=["input_ids"])
    with pytest.raises(StoreFormatError, match=r"response_only without a loss_mask among token_arrays"):
        open_store(tmp_path / "part")


@rule("3.14")
def test_tokens_of_the_kv_mask_have_no_codes(source: Source, tmp_path: Path) -> None:
    arrays = ("input_ids", "loss_mask", "kv_mask")
    manifest, calibration, tasks = begin_store(tmp_path, source, "mix", token_arrays=arrays)
    ones = [np.ones(length, dtype=np.uint8) for length in LENGTHS]
    odd = [(np.arange(length) % 2).astype(np.uint8) for length in LENGTHS]
    beside = {index: {"loss_mask": ones[index], "kv_mask": odd[index]} for index in range(len(LENGTHS))}
    for shard, indices in enumerate(tasks):
        write_shard(tmp_path, source, manifest, calibration, shard, indices, beside=beside)
    store = open_store(tmp_path)
    batch = store.read_codes(range(len(store)))
    np.testing.assert_array_equal(batch.has_kv, np.concatenate(odd))
    for codes in batch.codes.values():
        assert np.unique(codes[:, ~batch.has_kv]).size == 1
        assert np.unique(codes[:, batch.has_kv]).size > 1
    assert store.count_learnt().tolist() == list(LENGTHS)
    assert store.count_compared(1).tolist() == [length // 2 for length in LENGTHS]
    assert verify_store(str(tmp_path), deep=True).problems == ()


@pytest.mark.parametrize("skip", [0, 1, 4, 1000])
def test_tokens_to_be_learnt_from_are_counted(skip: int, source: Source, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    masks = {index: (rng.random(length) < 0.3).astype(np.uint8) for index, length in enumerate(LENGTHS) if index}
    store = open_store(write_store(tmp_path / "masked", source, loss_masks=masks))
    expected = [int(store.read([index], layers=()).beside["loss_mask"][skip:].sum()) for index in range(len(store))]
    assert store.count_learnt(skip).tolist() == expected
    plain = open_store(write_store(tmp_path / "plain", source))
    assert plain.count_learnt(skip).tolist() == [max(length - skip, 0) for length in plain.samples.num_tokens.tolist()]


@rule("10.2", "10.3")
def test_a_store_grows_by_shards_and_known_samples_only_count(merged: Path, source: Source, tmp_path: Path) -> None:
    path = Path(shutil.copytree(merged, tmp_path / "store"))
    before, manifest = open_store(path), (path / "manifest.json").read_bytes()
    expected = before.read(range(len(before)))
    fresh = _grown(path, source)
    store = open_store(path)
    assert len(store) == len(before) + 2
    assert store.manifest.layout.shard_tokens == before.manifest.layout.shard_tokens
    np.testing.assert_array_equal(store.read(range(len(before))).key, expected.key)
    np.testing.assert_array_equal(store.read([len(before)], layers=()).input_ids, fresh.input_ids[0])
    assert store.samples.count.tolist() == [5, *[2] * (len(before) - 1), 1, 1]
    (path / "samples/repeats-00001.json").rename(path / "repeats")
    with pytest.raises(StoreFormatError, match=r"repeats-00001\.json: hashes to nothing"):
        _ = open_store(path).samples.count
    (path / "manifest.json").write_bytes(manifest)  # as if it had died before the manifest: the arrays are longer
    (path / f"commits/{before.manifest.layout.num_shards:05d}.json").unlink()
    np.testing.assert_array_equal(open_store(path).read(range(len(before))).key, expected.key)
    (path / "manifest.json").write_bytes(manifest)
    document = path / "kv.zarr/key/zarr.json"
    record = json.loads(document.read_text())
    record["shape"][1] = before.manifest.layout.shard_tokens
    document.write_text(json.dumps(record))
    with pytest.raises(CorruptShardError, match=r"token axis of 320, expected 3840 or more"):
        open_store(path).read([0])


@rule("10.4", "10.5")
def test_dropped_samples_are_listed_and_gone(merged: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(merged, tmp_path / "store"))
    before = open_store(path)
    shard = int(before.samples.shard[-1])
    gone = sorted(before.samples.ids[index] for index in np.flatnonzero(before.samples.shard == shard))
    start = dict(zip(before.samples.ids, before.samples.token_start.tolist(), strict=True))
    assert manifest_of(path)["data"]["dropped"] is None
    drop_samples(str(path), gone)
    assert json.loads((path / "samples/dropped.json").read_text())["shards"] == dict.fromkeys(gone, shard)
    digest = hashlib.sha256(canonical_json(gone).encode()).hexdigest()
    assert manifest_of(path)["data"]["dropped"] == digest
    after = open_store(path)
    assert dict(zip(after.samples.ids, after.samples.token_start.tolist(), strict=True)) == {
        identity: row for identity, row in start.items() if identity not in gone
    }
    assert (commit_of(path, shard)["objects"], commit_of(path, shard)["samples"]) == ([], [])
    np.testing.assert_array_equal(after.read(range(len(after))).key, before_rows(merged, len(after)))


def before_rows(path: Path, num_samples: int) -> np.ndarray:
    return open_store(path).read(range(num_samples)).key


@rule("10.7")
def test_a_recoded_store_names_its_source_and_adds_the_errors(merged: Path, tmp_path: Path) -> None:
    recode_store(str(merged), "q4z-min", str(tmp_path / "store"))
    source, store = open_store(merged), open_store(tmp_path / "store")
    assert store.manifest.signal["recoded_from"] == source.manifest.signal_fingerprint
    assert store.manifest.runs[0]["recoded_from"]["fingerprint"] == source.manifest.fingerprint
    exact, decoded = source.read(range(len(source))).value[1], store.read(range(len(store))).value[1]
    inherited, recorded = (found.samples.fidelity()["1"]["value"] for found in (source, store))
    new = np.linalg.norm(decoded - exact) / np.linalg.norm(exact - store.calibration[""]["value"][0][1])
    assert recorded["centred_error"] == pytest.approx(np.hypot(new, inherited["centred_error"]), rel=0.01)
    bound = np.abs(decoded - exact).max() + inherited["max_abs_error"]
    assert 0.8 * bound < recorded["max_abs_error"] <= bound * (1 + 1e-6)


@rule("11.1", "11.2")
def test_a_claim_says_who_writes_which_shards_and_dies_with_its_holder(tmp_path: Path) -> None:
    storage = locate(tmp_path)
    with lease(storage, 3, 5, "kvpipe extract"):
        (file,) = (tmp_path / ".staging" / "leases").glob("*.json")
        claim = json.loads(file.read_text())
        assert claim.keys() == {"purpose", "first", "stop", "host", "pid", "machine", "started_s", "uptime_s"}
        assert (claim["first"], claim["stop"], claim["pid"]) == (3, 5, os.getpid())
        with pytest.raises(LeaseHeldError, match="kvpipe drop: kvpipe extract"), lease(storage, *EVERYTHING, "kvpipe drop"):
            pass
    file.write_text(json.dumps({**claim, "machine": "elsewhere"}))
    for age_s, blocked in ((100, True), (140, False)):
        then = time.time() - age_s
        os.utime(file, (then, then))
        with pytest.raises(LeaseHeldError) if blocked else contextlib.nullcontext(), lease(storage, 4, 5, "kvpipe extract"):
            pass


@rule("11.3")
def test_who_takes_over_from_a_claim_revokes_it_first(store_path: Path) -> None:
    storage = locate(store_path)
    with lease(storage, *EVERYTHING, "kvpipe drop") as frozen:
        (claim,) = (store_path / LEASES).iterdir()
        assert (store_path / ".staging" / f"claim-{claim.stem}").is_dir()
        frozen.write("samples/ours", b"1", replace=True)
        claim.write_text(json.dumps({**json.loads(claim.read_text()), "machine": "elsewhere"}))
        os.utime(claim, (1, 1))
        with lease(storage, 4, 5, "kvpipe extract") as other:
            assert not (store_path / ".staging" / f"claim-{claim.stem}").exists()
            with pytest.raises(LeaseLostError, match="another writer took over"):
                frozen.write("samples/ours", b"2", replace=True)
            with pytest.raises(LeaseLostError, match="another writer took over"):
                frozen.delete("samples/ours")
            other.write("samples/theirs", b"3", replace=False)
    assert storage.read("samples/ours") == b"1"


@rule("12.1", "12.2")
def test_logs_say_how_runs_went_and_can_be_deleted(written: Path, store_path: Path) -> None:
    storage = locate(store_path)
    stages = {"compute_s": 0.5, "copy_s": 0.0, "encode_s": 0.1, "write_s": 0.1}
    done = TaskResult(shard=0, num_samples=1, num_tokens=100, stored_bytes=500, batch_tokens=100, **stages)
    for error in (None, ValueError("bad data")):
        run = Progress(storage, lambda _: None, workers=1, device="cpu", total_tokens=200)
        with contextlib.suppress(ValueError), run:
            run.add(done)
            if error:
                raise error
    files = sorted((store_path / "progress").glob("*/00000.jsonl"))
    assert len({file.parent for file in files}) == 2
    logs = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert {line["event"] for log in logs for line in log} == {"start", "progress", "error", "end"}
    for start, reading, _ in logs:
        assert (start["host"], start["pid"]) == (socket.gethostname(), os.getpid())
        assert reading["committed"] == {"0": [100, 500]}
        assert {"shards", "tokens", "stored_bytes", "tokens_per_s", "shares", "bottleneck", "eta_s"} <= reading.keys()
        assert time.time() - 60 < reading["time_s"] <= time.time()
    expected = open_store(written).samples.ids
    files[0].write_text("no JSON")
    assert open_store(store_path).samples.ids == expected
    shutil.rmtree(store_path / "progress")
    assert open_store(store_path).samples.ids == expected


@rule("1.5")
def test_only_regular_files_with_plain_names_are_read_and_nothing_is_written_behind_links(
    store_path: Path, tmp_path: Path
) -> None:
    shard_file, commit_file = store_path / "kv.zarr/input_ids/c/1", store_path / "commits/00001.json"
    shard_file.symlink_to(shard_file.rename(tmp_path / "object"))
    first = int(np.flatnonzero(open_store(store_path).samples.shard == 1)[0])
    open_store(store_path).read([first])
    content = commit_file.read_text()
    commit_file.unlink()
    os.mkfifo(commit_file)
    with pytest.raises(StoreFormatError, match=r"00001\.json: is a named pipe, expected a regular file"):
        open_store(store_path).read([first])
    commit_file.unlink()
    commit_file.write_text(content)
    shutil.rmtree(store_path / ".staging", ignore_errors=True)
    (store_path / ".staging").symlink_to(tmp_path)
    with pytest.raises(StoreFormatError, match="is a symbolic link"), lease(locate(store_path), *EVERYTHING, "test"):
        pass
    (store_path / ".staging").unlink()
    reseal(store_path / "manifest.json", tokenizer={"../x": "0" * 64})
    with pytest.raises(StoreFormatError, match=r"manifest\.json: tokenizer"):
        open_store(store_path)


@rule("1.6")
def test_files_of_others_are_nobodys_concern(written: Path, store_path: Path) -> None:
    for name in (".DS_Store", "commits/.DS_Store", "samples/notes.txt", "kv.zarr/key/c/Thumbs.db"):
        (store_path / name).write_bytes(b"mine")
    assert open_store(store_path).samples.ids == open_store(written).samples.ids
    report = verify_store(str(store_path))
    assert (report.ok, len(report.foreign)) == (True, 4)
    drop_samples(str(store_path), [open_store(store_path).samples.ids[0]])
    assert (store_path / "commits/.DS_Store").read_bytes() == b"mine"


@rule("2.8")
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("manifest.json", {"layout": {"chunk_tokens": 64, "shard_tokens": 2**40, "num_shards": 1}}),
        ("manifest.json", {"created": 5}),
        ("manifest.json", {"later": 5}),
        ("commits/00001.json", {"shard": "1"}),
        ("commits/00001.json", {"samples": {}}),
        ("commits/00001.json", {"objects": None}),
        ("commits/00001.json", {"later": 5}),
    ],
)
def test_fields_of_another_type_or_range_and_unknown_ones_are_refused(
    name: str, changes: dict[str, object], store_path: Path
) -> None:
    reseal(store_path / name, **changes)
    with pytest.raises(StoreFormatError, match=rf"{Path(name).name}: {next(iter(changes))}"):
        open_store(store_path).read(range(8))


@rule("2.9")
def test_a_manifest_must_not_contradict_itself(store_path: Path) -> None:
    groups: Any = manifest_of(store_path)["groups"]
    reseal(store_path / "manifest.json", groups=[{**groups[0], "key_dim": 16}])
    with pytest.raises(StoreFormatError, match=r"manifest\.json: groups: not those that the layers of spec"):
        open_store(store_path)


def test_all_store_errors_share_one_base_class() -> None:
    assert issubclass(CorruptShardError, KVStoreError)
    assert issubclass(StoreNotFoundError, KVStoreError)
