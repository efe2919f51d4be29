"""Merging and recoding stores without a teacher: codes bit for bit, errors never flattered, killed runs resumed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kvstore import CodecError, CorruptShardError, FingerprintMismatchError, KVStoreError, Store, open_store
from kvstore import codec as codecs
from kvstore.calibration import ChannelMoments, calibration_fingerprint, calibration_mask, channels_of, fit_groups
from kvstore.codec import KINDS
from kvstore.describe import describe
from kvstore.drop import drop_samples, read_dropped
from kvstore.gate import read_gate, write_gate
from kvstore.rewrite import merge_stores, recode_store
from kvstore.storage import locate
from kvstore.verify import verify_store
from tests.stores import Source, calibrate, random_source, small_spec, write_store

LENGTHS = [100, 128, 70, 300, 64, 5] * 4


def part_of(source: Source, indices: range | list[int]) -> Source:
    return dataclasses.replace(
        source, input_ids=[source.input_ids[index] for index in indices], kv=[source.kv[index] for index in indices]
    )


def codes_by_id(store: Store) -> dict[str, list[bytes]]:
    """Codes and token ids of every sample as they lie on disk."""
    found = {}
    for index, identity in enumerate(store.samples.ids):
        batch = store.read_codes([index])
        found[identity] = [*(batch.codes[where].tobytes() for where in sorted(batch.codes)), batch.input_ids.tobytes()]
    return found


@pytest.fixture(scope="module")
def source() -> Source:
    return random_source(small_spec(), LENGTHS)


@pytest.fixture(scope="module")
def halves(source: Source, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two stores of one calibration that share four samples."""
    folder = tmp_path_factory.mktemp("halves")
    calibration = calibrate(source, "mix,0=raw")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    paths = [
        write_store(
            folder / name,
            part_of(source, part),
            "mix,0=raw",
            documents=[f"{name}-{index}" for index in part],
            counts=[2] * len(part),
            tokenizer=tokenizer,
            signal={"calibration": calibration_fingerprint(calibration)},
            calibration=calibration,
        )
        for name, part in (("a", range(14)), ("b", range(10, 24)))
    ]
    write_gate(locate(paths[0]), "before", {"kl": 0.01})
    write_gate(locate(paths[0]), "after", {"kl": 0.02})
    return [str(path) for path in paths]


def test_a_merge_holds_every_sample_once_bit_for_bit_in_order_of_ids(halves: list[str], tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    out = str(tmp_path / "both")
    summary = merge_stores(halves, out, lambda done, total: told.append((done, total)))
    merged, one, other = open_store(out), open_store(halves[0]), open_store(halves[1])
    assert merged.samples.ids == sorted({*one.samples.ids, *other.samples.ids})
    assert codes_by_id(merged) == {**codes_by_id(one), **codes_by_id(other)}
    shared = set(one.samples.ids) & set(other.samples.ids)
    counts = dict(zip(merged.samples.ids, merged.samples.count.tolist(), strict=True))
    assert counts == {identity: 4 if identity in shared else 2 for identity in merged.samples.ids}
    rows = dict(zip(one.samples.ids, zip(one.samples.source, one.samples.text, strict=True), strict=True))
    for identity, name, text in zip(merged.samples.ids, merged.samples.source, merged.samples.text, strict=True):
        assert identity not in rows or rows[identity] == (name, text)
    assert (summary.num_samples, summary.num_tokens) == (24, sum(LENGTHS))
    assert told[0] == (0, sum(LENGTHS))
    assert told[-1] == (sum(LENGTHS), sum(LENGTHS))
    assert verify_store(out, deep=True).problems == ()
    assert merged.tokenizer_path is not None
    assert read_gate(merged.storage) == {"before": {"kl": 0.01}}
    assert [origin["location"] for origin in describe(merged)["merged_from"]] == halves


def test_a_merge_equals_one_store_of_the_union(source: Source, halves: list[str], tmp_path: Path) -> None:
    merge_stores(halves, str(tmp_path / "both"))
    merge_stores(halves[::-1], str(tmp_path / "other-way"))
    merged, other = open_store(tmp_path / "both"), open_store(tmp_path / "other-way")
    assert (merged.manifest.fingerprint, codes_by_id(merged)) == (other.manifest.fingerprint, codes_by_id(other))
    whole = open_store(write_store(tmp_path / "whole", source, "mix,0=raw", calibration=calibrate(source, "mix,0=raw")))
    assert codes_by_id(merged) == codes_by_id(whole)
    for layer, kinds in whole.samples.fidelity().items():
        for kind, exact in kinds.items():
            found = merged.samples.fidelity()[layer][kind]
            assert found["centred_error"] == pytest.approx(exact["centred_error"], rel=0.05)
            assert found["max_abs_error"] == pytest.approx(exact["max_abs_error"], rel=1e-6)


def test_a_merge_again_writes_nothing(halves: list[str], tmp_path: Path) -> None:
    out = tmp_path / "both"
    merge_stores(halves, str(out))
    before = _state(out)
    assert merge_stores(halves, str(out)).new_shards == 0
    assert _state(out) == before
    with pytest.raises(FingerprintMismatchError, match="the data of this run differs"):
        merge_stores([halves[0], str(out)], str(_twin(halves[1], tmp_path)))
    assert _state(out) == before


def _twin(path: str, folder: Path) -> Path:
    return Path(shutil.copytree(path, folder / "twin"))


def _state(path: Path) -> dict[str, int]:
    """Every file of a store with the time it was written; claims come and go."""
    return {
        str(file.relative_to(path)): file.stat().st_mtime_ns
        for file in path.rglob("*")
        if file.is_file() and ".staging" not in file.parts
    }


@pytest.mark.parametrize(
    ("change", "field", "hint"),
    [
        pytest.param({"weights": "other"}, 'weights: got "other", expected "test"', None, id="weights"),
        pytest.param({}, r"calibration: got ", "--calibration", id="calibration"),
    ],
)
def test_stores_of_other_signals_are_refused_with_the_fields_named(
    change: dict[str, object], field: str, hint: str | None, source: Source, tmp_path: Path
) -> None:
    def made(name: str, samples: range, changed: dict[str, object]) -> Path:
        calibration = calibrate(part_of(source, samples), "mix")
        signal = {"calibration": calibration_fingerprint(calibration), **changed}
        return write_store(tmp_path / name, part_of(source, range(4)), signal=signal, calibration=calibration)

    one = made("a", range(4), {})
    other = made("b", range(4) if change else range(2), change)
    with pytest.raises(FingerprintMismatchError, match="Nothing was written") as refused:
        merge_stores([str(one), str(other)], str(tmp_path / "out"))
    refused.match(field)
    assert ("--calibration" in str(refused.value)) == (hint is not None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [["a"], ["a", "a"], ["a", "out"]])
def test_a_merge_needs_two_stores_and_a_new_one(names: list[str], source: Source, tmp_path: Path) -> None:
    for name in ("a", "out"):
        write_store(tmp_path / name, part_of(source, range(2)))
    with pytest.raises(KVStoreError, match="expected two or more stores and a new one"):
        merge_stores([str(tmp_path / name) for name in names], str(tmp_path / "out"))


def test_a_damaged_source_is_not_merged(source: Source, halves: list[str], tmp_path: Path) -> None:
    twin = _twin(halves[1], tmp_path)
    victim = [file for file in sorted((twin / "kv.zarr" / "key" / "c").rglob("*")) if file.is_file()][-1]
    content = bytearray(victim.read_bytes())
    content[10] ^= 1
    victim.write_bytes(content)
    with pytest.raises(CorruptShardError):
        merge_stores([halves[0], str(twin)], str(tmp_path / "out"))


def test_what_one_source_dropped_and_another_holds_is_kept(halves: list[str], tmp_path: Path) -> None:
    twin = str(_twin(halves[0], tmp_path))
    held = next(identity for identity in open_store(twin).samples.ids if identity in open_store(halves[1]).samples.ids)
    alone = next(identity for identity in open_store(twin).samples.ids if identity not in open_store(halves[1]).samples.ids)
    drop_samples(twin, [held, alone])
    merge_stores([twin, halves[1]], str(tmp_path / "both"))
    merged = open_store(tmp_path / "both")
    assert held in merged.samples.ids
    assert alone not in merged.samples.ids
    assert read_dropped(merged.storage) == [alone]
    assert verify_store(str(tmp_path / "both"), deep=True).problems == ()
    assert describe(merged)["dropped"] == 1


KILLED = """
import os, sys
from kvstore import rewrite
done = []
def progress(done_tokens, total):
    if (done_tokens / total if total else 0) > {share}:
        os.kill(os.getpid(), 9)
{call}
"""


@pytest.mark.parametrize(
    "call",
    [
        pytest.param("rewrite.merge_stores(sys.argv[2:], sys.argv[1], progress)", id="merge"),
        pytest.param("rewrite.recode_store(sys.argv[2], 'q4z', sys.argv[1], progress)", id="recode"),
    ],
)
def test_a_killed_rewrite_goes_on(call: str, halves: list[str], tmp_path: Path) -> None:
    out, sources = str(tmp_path / "out"), halves if "merge" in call else halves[:1]
    done = subprocess.run([sys.executable, "-c", KILLED.format(share=0.5, call=call), out, *sources], check=False)
    assert done.returncode == -signal.SIGKILL
    committed = len(list((tmp_path / "out" / "commits").iterdir()))
    assert committed > 0
    started = time.monotonic()
    again = merge_stores if "merge" in call else lambda sources, out: recode_store(sources[0], "q4z", out)
    summary = again(sources, out)
    assert time.monotonic() - started < 30, "the dead one's claim blocks"
    assert summary.new_shards == summary.num_shards - committed > 0
    again(sources, str(tmp_path / "whole"))
    assert codes_by_id(open_store(out)) == codes_by_id(open_store(tmp_path / "whole"))
    assert verify_store(out, deep=True).problems == ()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recoding_raw_gives_the_codes_of_its_values(dtype: str, tmp_path: Path) -> None:
    spec = small_spec(dtype=dtype)
    raw = write_store(tmp_path / "raw", random_source(spec, LENGTHS), "raw")
    recode_store(str(raw), "mix,2=raw", str(tmp_path / "mix"))
    source, recoded = open_store(raw), open_store(tmp_path / "mix")
    order = sorted(range(len(source)), key=source.samples.ids.__getitem__)
    assert recoded.samples.ids == [source.samples.ids[index] for index in order]
    batch = source.read(order)
    counted = calibration_mask(np.diff(batch.cu_seqlens).tolist())
    moments = {(layer, kind): ChannelMoments.zeros(2, 8) for layer in range(2) for kind in KINDS}
    for layer, kind in moments:
        moments[layer, kind].add(getattr(batch, kind)[layer][counted])
    expected = fit_groups([group for group in recoded.manifest.groups if group.codec == "mix"], moments)
    for layer in range(2):
        group, slot = recoded.manifest.group_of(layer)
        for kind in KINDS:
            mean, step = channels_of(recoded.calibration, group, kind, slot)
            np.testing.assert_allclose(mean, expected[group.path][kind][0][slot], rtol=1e-6)
            np.testing.assert_allclose(step, expected[group.path][kind][1][slot], rtol=1e-6)
            codes = codecs.encode(group.quantizer(kind), getattr(batch, kind)[layer], mean, step)
            stored = recoded.read_codes(range(len(recoded))).codes[group.path, kind][slot]
            np.testing.assert_array_equal(stored, codes)
    np.testing.assert_array_equal(recoded.read(range(len(recoded)), [2]).key, batch.key[2:3])
    assert recoded.samples.fidelity()["2"]["key"]["centred_error"] == 0.0
    assert recoded.manifest.signal["recoded_from"] == source.manifest.signal_fingerprint
    assert recoded.manifest.signal["codec"] == "mix,2=raw"
    assert verify_store(str(tmp_path / "mix"), deep=True).problems == ()
    assert describe(recoded)["recoded_from"]["codec"] == "raw"
    assert describe(recoded)["bits_per_value"] < describe(source)["bits_per_value"]


def test_recoding_a_rounded_store_admits_the_errors_of_both_codecs(source: Source, tmp_path: Path) -> None:
    mix = write_store(tmp_path / "mix", source, "mix")
    recode_store(str(mix), "q4z", str(tmp_path / "q4z"))
    first, second = open_store(mix), open_store(tmp_path / "q4z")
    index = {identity: number for number, identity in enumerate(second.samples.ids)}
    # Stored in the order of `source`, for write_store does not sort.
    batch = second.read([index[identity] for identity in first.samples.ids])
    direct = open_store(write_store(tmp_path / "direct", source, "q4z")).samples.fidelity()
    for layer in range(3):
        for side, kind in enumerate(KINDS):
            exact = np.concatenate([sample[layer][side] for sample in source.kv])
            error = getattr(batch, kind)[layer] - exact
            mean = second.calibration[""][kind][0][layer]
            actual = np.linalg.norm(error) / np.linalg.norm(exact - mean)
            recorded = second.samples.fidelity()[str(layer)][kind]
            before = first.samples.fidelity()[str(layer)][kind]
            assert recorded["centred_error"] == pytest.approx(actual, rel=0.06)
            assert direct[str(layer)][kind]["centred_error"] < actual
            assert np.abs(error).max() <= recorded["max_abs_error"]
            assert recorded["bits"] < before["bits"]


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        pytest.param(
            "raw", r"got raw for layers \[0, 1, 2\].*which are in mix: what was rounded does not become exact", id="raw"
        ),
        pytest.param("q8,1=raw", r"got raw for layers \[1\]", id="raw-layer"),
        pytest.param("mix", r"is in mix already; ask for another", id="same"),
        pytest.param("q5", r"codec: got 'q5', expected one of raw", id="unknown"),
        pytest.param("q8,7=raw", r"codec 'q8,7=raw'", id="no-such-layer"),
    ],
)
def test_codecs_that_cannot_be_had_are_refused(codec: str, message: str, source: Source, tmp_path: Path) -> None:
    store = write_store(tmp_path / "mix", part_of(source, range(3)), "mix")
    with pytest.raises(CodecError, match=message):
        recode_store(str(store), codec, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_other_recodings_that_make_no_sense_are_refused(source: Source, tmp_path: Path) -> None:
    odd = write_store(tmp_path / "odd", random_source(small_spec(dim=7), [20, 30]), "raw")
    with pytest.raises(CodecError, match="head dim: got 7, expected an even number"):
        recode_store(str(odd), "mix", str(tmp_path / "out"))
    with pytest.raises(KVStoreError, match="--out is the store itself"):
        recode_store(str(odd), "q8", str(odd))
    recode_store(str(odd), "q8", str(tmp_path / "out"))
    with pytest.raises(FingerprintMismatchError, match='codec: got "fp8", expected "q8"'):
        recode_store(str(odd), "fp8", str(tmp_path / "out"))
    last = sorted((odd / "commits").iterdir())[-1]
    for table in (odd / "samples").iterdir():
        table.unlink()
    last.unlink()
    with pytest.raises(KVStoreError, match=r"has \d+ of \d+ shards; finish it first"):
        recode_store(str(odd), "fp8", str(tmp_path / "other"))


def test_a_recoded_store_keeps_counts_texts_and_what_was_dropped(source: Source, tmp_path: Path) -> None:
    path = str(write_store(tmp_path / "raw", source, "raw", counts=list(range(1, 25))))
    gone = open_store(path).samples.ids[3]
    drop_samples(path, [gone])
    recode_store(path, "q8", str(tmp_path / "q8"))
    before, after = open_store(path).samples, open_store(tmp_path / "q8").samples
    rows = [
        dict(zip(table.ids, zip(table.count.tolist(), table.source, table.text, strict=True), strict=True))
        for table in (before, after)
    ]
    assert rows[0] == rows[1]
    assert json.loads((tmp_path / "q8" / "samples" / "dropped.json").read_text())["shards"] == {gone: -1}
    assert verify_store(str(tmp_path / "q8")).problems == ()
