"""The fault table: every row damages a real store, and verification must report it and the reader refuse it, naming where.

Damage is done to the files beside the code under test. Silence is the only failure that counts: data that is not what was
committed, returned without an error.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from kvstore import CodecError, KVStoreError, open_store
from kvstore.commits import SampleRow, sample_id
from kvstore.compaction import compact
from kvstore.drop import drop_samples, read_dropped
from kvstore.errors import StoreWriteError
from kvstore.gate import read_gate, write_gate
from kvstore.records import canonical_json, fingerprint
from kvstore.repeats import write_repeats
from kvstore.rewrite import recode_store
from kvstore.samples import ROWS
from kvstore.storage import locate
from kvstore.verify import verify_store
from kvstore.writer import ShardWriter
from tests.stores import Source, add_repeats, begin_store, random_source, small_spec, write_shard, write_store

ROOT = Path(__file__).parents[2]
LENGTHS = [64, 50, 128, 64, 64, 70, 64, 64]
SHARDS = [[0, 1], [2], [3, 4], [5], [6, 7]]
"""Samples of each shard, as the layout of these lengths has it."""
KEY, IDS = "kv.zarr/key/c/0/{}/0/0", "kv.zarr/input_ids/c/{}"
CHUNKS = {"key": 6, "input_ids": 2}
"""Inner chunks of a shard."""
NOBODY = 65534


@pytest.fixture(scope="module")
def source() -> Source:
    return random_source(small_spec(), LENGTHS)


@pytest.fixture(scope="module")
def pristine(source: Source, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stores by name: `mix`, as users have it; `older` of other values but the same tokens; `even`, whose chunks are all of one
    size, so that any two shards fit each other's index; `older even`."""
    root = tmp_path_factory.mktemp("faults")
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0"}')
    other = dataclasses.replace(random_source(small_spec(), LENGTHS, seed=1), input_ids=source.input_ids)
    stores = {
        "mix": write_store(root / "mix", source, tokenizer=root / "tokenizer"),
        "older": write_store(root / "older", other),
        "even": write_store(root / "even", incompressible(source, 0), "raw"),
        "older even": write_store(root / "older-even", incompressible(source, 1), "raw"),
    }
    write_gate(locate(stores["mix"]), "before", {"kl": 0.01})
    samples = open_store(stores["mix"]).samples
    assert [np.flatnonzero(samples.shard == shard).tolist() for shard in range(len(SHARDS))] == SHARDS
    assert all(report.ok and not report.orphans for report in (verify_store(str(path), deep=True) for path in stores.values()))
    return stores


def incompressible(source: Source, seed: int) -> Source:
    """Samples of the same lengths, and equal tokens whatever the seed, in which every byte is noise."""
    rng, token_rng = np.random.default_rng(seed), np.random.default_rng(99)

    def draw(like: np.ndarray) -> np.ndarray:
        bits = rng.integers(0, 2**23, size=like.shape) | rng.integers(1, 170, size=like.shape) << 23
        return (bits | rng.integers(0, 2, size=like.shape) << 31).astype(np.uint32).view(np.float32)

    kv = [{layer: (draw(key), draw(value)) for layer, (key, value) in sample.items()} for sample in source.kv]
    input_ids = [token_rng.integers(0, 2**31, size=len(ids), dtype=np.int32) for ids in source.input_ids]
    return dataclasses.replace(source, kv=kv, input_ids=input_ids)


# ---- damage


def flip(file: Path, position: int, bit: int = 3) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def rewrite(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


def reseal(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a record and give it a seal that fits, as a writer with a bug would."""

    def resealed(record: dict[str, object]) -> None:
        change(record)
        del record["sha256"]
        record["sha256"] = hashlib.sha256(canonical_json(record).encode()).hexdigest()

    edit_json(file, resealed)


def commit_file(store: Path, shard: int) -> Path:
    return store / f"commits/{shard:05d}.json"


def refit(store: Path, shard: int) -> None:
    """Make a shard's record fit its files, whatever they are now."""

    def fitted(record: dict[str, list[dict[str, object]]]) -> None:
        for stored in record["objects"]:
            content = (store / str(stored["path"])).read_bytes()
            array = str(stored["path"]).split("/")[1]
            end = content[-(16 * CHUNKS.get(array, CHUNKS["key"]) + 8) :]
            stored["size_bytes"] = len(content)
            stored["sha256"], stored["index_sha256"] = (hashlib.sha256(part).hexdigest() for part in (content, end))

    reseal(commit_file(store, shard), fitted)


def edit_index(file: Path, chunks: int, change: Callable[[np.ndarray], None]) -> None:
    """Edit the (offset, size) of every chunk of a shard and give the index a checksum that fits."""
    content = file.read_bytes()
    index = np.frombuffer(content[-(16 * chunks + 4) : -4], dtype="<u8").reshape(chunks, 2).copy()
    change(index)
    crc = google_crc32c.value(index.tobytes()).to_bytes(4, "little")
    file.write_bytes(content[: -(16 * chunks + 4)] + index.tobytes() + crc)


def lose_chunk(file: Path, chunks: int, chunk: int = 0) -> None:
    def lose(index: np.ndarray) -> None:
        index[chunk] = 2**64 - 1

    edit_index(file, chunks, lose)


def swap(one: Path, other: Path) -> None:
    contents = one.read_bytes(), other.read_bytes()
    assert len(contents[0]) == len(contents[1])
    assert contents[0] != contents[1]
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])


def shuffle_tokens(store: Path) -> None:
    array = zarr.open_array(store / "kv.zarr/input_ids", mode="r+")
    start = open_store(store).samples.token_start[3]
    array[start : start + 40] = np.asarray(array[start : start + 40])[::-1]


def put_nan(store: Path) -> None:
    array = zarr.open_array(store / "kv.zarr/value", mode="r+")
    array[1, int(open_store(store).samples.token_start[4]) + 5, 1, 3] = np.nan
    refit(store, 2)


def take_older(store: Path, older: Path, *, pad: bool) -> None:
    """Put the key shard of an older run in place, padded in front to the size of this run's."""
    ours, theirs = store / KEY.format(2), older / KEY.format(2)
    missing = ours.stat().st_size - theirs.stat().st_size
    assert (missing > 0) == pad, f"choose other seeds: the older shard is {missing} bytes shorter"
    ours.write_bytes(b"\0" * missing + theirs.read_bytes())

    def shift(index: np.ndarray) -> None:
        index[index[:, 1] < 2**63, 0] += np.uint64(missing)

    edit_index(ours, CHUNKS["key"], shift)


def copy_shard(store: Path) -> None:
    """Shard 1 once more in the place of shard 3, with a record that fits, and tables made of the records."""
    for name in ("key/c/0/{}/0/0", "value_byte/c/0/{}/0/0", "input_ids/c/{}"):
        shutil.copy(store / "kv.zarr" / name.format(1), store / "kv.zarr" / name.format(3))
    (row,) = json.loads(commit_file(store, 1).read_text())["samples"]
    moved = {**row, "shard": 3, "token_start": 3 * 128}
    reseal(commit_file(store, 3), lambda record: record.update(samples=[moved]))
    refit(store, 3)
    for file in (store / "samples").glob("*.parquet"):
        file.unlink()
    compact(locate(store))


def half_record(store: Path) -> None:
    rewrite(commit_file(store, 2), lambda content: content[: len(content) // 2])


def table(store: Path, name: str) -> Path:
    (file,) = (store / "samples").glob(f"{name}-*.parquet")
    return file


def retell(part: Path) -> None:
    """Write a valid part in the place of one, in which one text differs."""
    rows = pq.read_table(part).to_pylist()
    rows[3]["text"] = "another text"
    pq.write_table(pa.Table.from_pylist(rows, schema=ROWS), part)


def array_json(name: str, change: Callable[[dict[str, object]], object]) -> Callable[[Path, dict[str, Path]], None]:
    return lambda store, _: edit_json(store / "kv.zarr" / name / "zarr.json", change)


def add_part(store: Path) -> None:
    """One more part of the data, which had sample 0 twice more."""
    add_repeats(store, 0, 2)
    assert open_store(store).samples.count.tolist() == [3, *[1] * 7]


def plan_shards(manifest: dict[str, Any], num_shards: int) -> None:
    """Make a manifest say that there are so many shards, in all places."""
    manifest["layout"]["num_shards"] = manifest["data"]["parts"][0]["num_shards"] = num_shards
    manifest["fingerprints"]["data"] = fingerprint(manifest["data"])


def drop_one(store: Path) -> None:
    drop_samples(str(store), [open_store(store).samples.ids[7]])


def then(first: Callable[[Path], None], second: Callable[[Path], object]) -> Callable[[Path, dict[str, Path]], None]:
    def both(store: Path, _: dict[str, Path]) -> None:
        first(store)
        second(store)

    return both


def on(path: str, damage: Callable[[Path], object]) -> Callable[[Path, dict[str, Path]], object]:
    """Damage one file of the store."""
    return lambda store, _: damage(store / path)


# ---- the table


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One way to damage a store, and who must say what."""

    name: str
    damage: Callable[[Path, dict[str, Path]], object]
    """Given the copy to damage, and the undamaged stores by name."""
    part: str = "shard"
    """What verification says is damaged."""
    shard: int | None = 2
    sample: int | None = None
    """Sample that deep verification names."""
    raises: str | None
    """What the reader's error says; None where no reader returns the damaged data."""
    store: str = "mix"
    fast: bool = True
    """Whether hashes tell it, without decoding."""


ANOTHER_INDEX = r"shard 2: kv\.zarr/key/c/0/2/0/0 has another index"
SAMPLE_3 = r"shard 2, sample 3 \(id"
CHANGED = "changed or damaged"
FAULTS = [
    Fault(name="bit of a key", damage=on(KEY.format(2), lambda f: flip(f, 40)), sample=3, raises=SAMPLE_3),
    Fault(name="bit of a token", damage=on(IDS.format(2), lambda f: flip(f, 20)), sample=3, raises=SAMPLE_3),
    Fault(name="bit of a shard's index", damage=on(KEY.format(2), lambda f: flip(f, -60)), raises=ANOTHER_INDEX),
    Fault(name="bit of an index checksum", damage=on(KEY.format(2), lambda f: flip(f, -1)), raises=ANOTHER_INDEX),
    Fault(
        name="bit of a commit",
        damage=lambda store, _: flip(commit_file(store, 2), 300, 0),
        part="commit",
        raises="shard 2: .*commits/00002",
    ),
    Fault(
        name="half a commit",
        damage=lambda store, _: half_record(store),
        part="commit",
        raises="shard 2: .*truncated or damaged",
    ),
    Fault(
        name="bit of a part",
        damage=lambda store, _: flip(table(store, "part"), 60),
        part="tables",
        shard=None,
        raises=r"part-.*parquet",
    ),
    Fault(
        name="bit of a part's footer",
        damage=lambda store, _: flip(table(store, "part"), -400),
        part="tables",
        shard=None,
        raises=r"part-.*parquet",
    ),
    Fault(
        name="missing part",
        damage=lambda store, _: table(store, "part").unlink(),
        part="tables",
        shard=None,
        raises=r"part-.*parquet: missing or damaged",
    ),
    Fault(
        name="whole part of other texts",
        damage=lambda store, _: retell(table(store, "part")),
        part="tables",
        shard=None,
        raises=r"part-.*parquet: column 'text' is not what its summary says",
    ),
    Fault(
        name="bit of a summary",
        damage=lambda store, _: flip(table(store, "summary"), 30),
        part="tables",
        shard=None,
        raises=r"summary-.*parquet: its content does not hash to its name",
    ),
    Fault(
        name="value in zarr.json",
        damage=array_json("key", lambda d: d.update(fill_value=1)),
        part="metadata",
        shard=None,
        raises=r"key/zarr\.json: .*it was changed",
    ),
    Fault(
        name="codec list in zarr.json",
        damage=array_json("input_ids", lambda d: d["codecs"][0]["configuration"]["codecs"].pop()),
        part="metadata",
        shard=None,
        raises=r"input_ids/zarr\.json: .*it was changed",
    ),
    Fault(
        name="attributes in zarr.json",
        damage=array_json("value_byte", lambda d: d.update(attributes={"kvpipe": 1})),
        part="metadata",
        shard=None,
        raises=r"value_byte/zarr\.json: .*it was changed",
    ),
    Fault(
        name="attributes of the group",
        damage=array_json("", lambda d: d.update(attributes={})),
        part="metadata",
        shard=None,
        raises=None,
    ),
    Fault(
        name="wrong dtype",
        damage=array_json("key", lambda d: d.update(data_type="uint8")),
        part="metadata",
        shard=None,
        raises=r"key/zarr\.json: .*it was changed",
    ),
    Fault(
        name="token axis not of whole shards",
        damage=array_json("key", lambda d: d.update(shape=[3, 641, 2, 8])),
        part="metadata",
        shard=None,
        raises=r"key/zarr\.json: token axis of 641, expected 640 or more by whole shards of 128",
    ),
    Fault(
        name="no zarr.json",
        damage=on("kv.zarr/key/zarr.json", Path.unlink),
        part="metadata",
        shard=None,
        raises=r"key/zarr\.json: missing",
    ),
    Fault(
        name="bit of a mean",
        damage=on("kv.zarr/key_mean/c/0/0/0", lambda f: flip(f, 9)),
        part="metadata",
        shard=None,
        raises="key_mean: .*missing or damaged",
    ),
    Fault(
        name="bit of the layer numbers",
        damage=on("kv.zarr/layer/c/0", lambda f: flip(f, 0)),
        part="metadata",
        shard=None,
        raises=None,
    ),
    Fault(
        name="value in the manifest",
        damage=on("manifest.json", lambda f: edit_json(f, lambda d: d.update(created="yesterday"))),
        part="manifest",
        shard=None,
        raises=rf"manifest\.json: .*{CHANGED}",
    ),
    Fault(
        name="truncated object",
        damage=on(KEY.format(2), lambda f: rewrite(f, lambda c: c[:-7])),
        raises="shard 2: .*/2/0/0 has",
    ),
    Fault(
        name="half an object",
        damage=on(KEY.format(2), lambda f: rewrite(f, lambda c: c[: len(c) // 2])),
        raises="shard 2: .* has",
    ),
    Fault(name="empty object", damage=on(KEY.format(2), lambda f: f.write_bytes(b"")), raises="shard 2: .*/2/0/0 has 0 bytes"),
    Fault(name="missing object", damage=on(KEY.format(2), Path.unlink), raises="shard 2: .*/2/0/0 has no file"),
    Fault(name="missing tokens", damage=on(IDS.format(2), Path.unlink), raises="shard 2: .*input_ids/c/2 has no file"),
    Fault(
        name="folder in the place of an object",
        damage=on(KEY.format(2), lambda f: (f.unlink(), f.mkdir())),
        raises="shard 2: .*/2/0/0 has",
    ),
    Fault(
        name="missing commit",
        damage=lambda store, _: commit_file(store, 2).unlink(),
        part="commit",
        raises="shard 2: listed in .*summary-.*no commit record",
    ),
    Fault(
        name="commit of another shard",
        damage=lambda store, _: shutil.copy(commit_file(store, 1), commit_file(store, 2)),
        part="commit",
        raises="shard 2: .* is the record of shard 1",
    ),
    Fault(
        name="two key shards swapped",
        damage=lambda store, _: swap(store / KEY.format(2), store / KEY.format(4)),
        raises=r"shard 2: kv\.zarr/key/.* has another index",
        store="even",
    ),
    Fault(
        name="two token shards swapped",
        damage=lambda store, _: swap(store / IDS.format(2), store / IDS.format(4)),
        raises=r"shard 2: kv\.zarr/input_ids/c/2 has another index",
        store="even",
    ),
    Fault(
        name="shard of an older run, of the same size",
        damage=lambda store, stores: take_older(store, stores["older"], pad=True),
        raises=ANOTHER_INDEX,
    ),
    Fault(
        name="shard of an older run, of the same size and index",
        damage=lambda store, stores: take_older(store, stores["older even"], pad=False),
        raises=ANOTHER_INDEX,
        store="even",
    ),
    Fault(
        name="chunk lost from the index",
        damage=on(KEY.format(2), lambda f: lose_chunk(f, CHUNKS["key"], 1)),
        raises=ANOTHER_INDEX,
    ),
    Fault(
        name="chunk lost before the commit",
        damage=lambda store, _: (lose_chunk(store / KEY.format(2), CHUNKS["key"], 1), refit(store, 2)),
        sample=4,
        raises=r"shard 2, sample 4 \(id",
        fast=False,
    ),
    Fault(
        name="manifest older than the data",
        damage=on("manifest.json", lambda f: reseal(f, lambda d: plan_shards(d, 4))),
        part="commit",
        shard=None,
        raises="shard 4: committed, but the manifest has 4 shards",
    ),
    Fault(
        name="manifest newer than the arrays",
        damage=on("manifest.json", lambda f: reseal(f, lambda d: plan_shards(d, 9))),
        part="metadata",
        shard=None,
        raises=r"zarr\.json: token axis of 640, expected 1152 or more",
    ),
    Fault(
        name="shard of another signal",
        damage=lambda store, _: reseal(commit_file(store, 2), lambda d: d.update(signal="0" * 64)),
        part="commit",
        raises="shard 2: committed for signal 000000000000",
    ),
    Fault(
        name="shard of another layout",
        damage=lambda store, stores: shutil.copy(commit_file(stores["even"], 2), commit_file(store, 2)),
        part="commit",
        raises="shard 2: committed for signal",
    ),
    Fault(
        name="sample stored twice",
        damage=lambda store, _: copy_shard(store),
        shard=3,
        sample=2,
        raises="shard 1, 3: sample .* is stored 2 times",
    ),
    Fault(name="tokens shuffled", damage=lambda store, _: shuffle_tokens(store), raises=r"shard 2[:,]"),
    Fault(
        name="tokens shuffled before the commit",
        damage=lambda store, _: (shuffle_tokens(store), refit(store, 2)),
        sample=3,
        raises=r"shard 2, sample 3 \(id .*token ids have crc32c",
        fast=False,
    ),
    Fault(
        name="NaN before the commit",
        damage=lambda store, _: put_nan(store),
        sample=4,
        raises=None,
        store="even",
        fast=False,
    ),
    Fault(
        name="damaged tokenizer file",
        damage=on("tokenizer/tokenizer.json", lambda f: flip(f, 3)),
        part="tokenizer",
        shard=None,
        raises=r"tokenizer/tokenizer\.json: hashes to",
    ),
    Fault(
        name="missing tokenizer file",
        damage=on("tokenizer/tokenizer.json", Path.unlink),
        part="tokenizer",
        shard=None,
        raises=r"tokenizer/tokenizer\.json: hashes to nothing",
    ),
    Fault(
        name="damaged list of dropped samples",
        damage=then(drop_one, lambda store: flip(store / "samples/dropped.json", 20)),
        part="tables",
        shard=None,
        raises=None,
    ),
    Fault(
        name="missing list of dropped samples",
        damage=then(drop_one, lambda store: (store / "samples/dropped.json").unlink()),
        part="tables",
        shard=None,
        raises=None,
    ),
    Fault(
        name="damaged repeats",
        damage=then(add_part, lambda store: rewrite(store / "samples/repeats-00001.json", lambda c: c.replace(b": 2", b": 3"))),
        part="tables",
        shard=None,
        raises=rf"repeats-00001\.json: .*{CHANGED}",
    ),
    Fault(
        name="missing repeats",
        damage=then(add_part, lambda store: (store / "samples/repeats-00001.json").unlink()),
        part="tables",
        shard=None,
        raises=r"repeats-00001\.json: hashes to nothing",
    ),
    Fault(
        name="repeats of another part",
        damage=then(add_part, lambda store: write_repeats(locate(store), 1, {})),
        part="tables",
        shard=None,
        raises=r"repeats-00001\.json: hashes to",
    ),
    Fault(name="damaged gate record", damage=on("gate.json", lambda f: flip(f, 20)), part="gate", shard=None, raises=None),
]


def read_all(path: Path) -> None:
    """Everything a reader returns."""
    snapshot(path)


def snapshot(path: Path) -> str:
    """Everything a reader returns, as text that tells any difference."""
    store = open_store(path)
    samples = store.samples
    columns = [samples.shard, samples.token_start, samples.num_tokens, samples.crc32c, samples.count]
    folder = store.tokenizer_path
    batch = store.read(range(len(store)))
    return repr(
        [
            dataclasses.asdict(store.manifest),
            (samples.ids, samples.source, samples.text, samples.summary.to_pylist()),
            [(column.dtype, column.tolist()) for column in columns],
            {file.name: file.read_bytes() for file in sorted(folder.iterdir())} if folder else None,
            [array.tobytes() for array in (batch.key, batch.value, batch.input_ids, batch.cu_seqlens)],
            samples.fidelity(),
        ]
    )


@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name.replace(" ", "-")) for fault in FAULTS])
def test_damage_is_reported_and_never_read_silently(fault: Fault, pristine: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(pristine[fault.store], tmp_path / "store"))
    ids = open_store(path).samples.ids
    fault.damage(path, pristine)
    for deep in (False, True):
        report = verify_store(str(path), deep=deep)
        if not deep and not fault.fast:
            continue
        found = [problem for problem in report.problems if (problem.part, problem.shard) == (fault.part, fault.shard)]
        assert not report.ok
        assert found, report.problems
        assert fault.shard is None or any(re.search(rf"shards? .*\b{fault.shard}\b", problem.message) for problem in found)
        if deep and fault.sample is not None:
            assert {problem.sample for problem in found} - {None} == {ids[fault.sample]}
    if fault.raises is None:
        read_all(path)
    else:
        with pytest.raises(KVStoreError, match=fault.raises):
            read_all(path)


def test_every_row_of_the_table_has_its_own_name() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


# ---- writers that die or are refused


def test_objects_without_a_commit_are_invisible_and_reported_as_orphans(
    source: Source, pristine: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "store"
    manifest, calibration, tasks = begin_store(path, source)
    for shard in range(4):
        write_shard(path, source, manifest, calibration, shard, tasks[shard])
    before = snapshot(path)
    left = [KEY.format(4), IDS.format(4)]
    for name in left:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pristine["mix"] / name, path / name)
    rewrite(path / IDS.format(4), lambda content: content[: len(content) // 2])
    assert snapshot(path) == before
    report = verify_store(str(path), deep=True)
    assert (report.ok, report.orphans, report.num_committed) == (True, tuple(sorted(left)), 4)
    write_shard(path, source, manifest, calibration, 4, tasks[4])
    assert open_store(path).read(range(8)).input_ids.tolist() == np.concatenate(source.input_ids).tolist()
    report = verify_store(str(path), deep=True)
    assert (report.ok, report.orphans, report.num_committed) == (True, (), 5)


@pytest.mark.parametrize("kind", ["key", "value"])
def test_a_writer_names_shard_sample_and_layer_of_a_nan(source: Source, tmp_path: Path, kind: str) -> None:
    manifest, calibration, _ = begin_store(tmp_path / "store", source)
    rows = open_store(write_store(tmp_path / "whole", source)).samples
    listed = json.loads(commit_file(tmp_path / "whole", 2).read_text())["samples"]
    writer = ShardWriter(locate(tmp_path / "store"), manifest, calibration, 2, [SampleRow(**row) for row in listed])
    values = {
        side: np.concatenate([source.kv[index][1][number] for index in (3, 4)]) for number, side in enumerate(("key", "value"))
    }
    values[kind][64 + 9, 1, 3] = np.nan
    where = rf"shard 2, sample {rows.ids[4][:12]} \(document-4\), layer 1, {kind}: .*\[73, 1, 3\]"
    with pytest.raises(CodecError, match=where):
        writer.put(1, [(0, 64), (64, 64)], values["key"], values["value"])


@pytest.mark.parametrize("codec", ["raw", "q8", "mix"])
def test_finite_numbers_of_any_size_are_stored(source: Source, tmp_path: Path, codec: str) -> None:
    index, (layer, number) = 4, (1, 1)
    source = copy.deepcopy(source)
    source.kv[index][layer][number][9, 1, 3] = 3e38
    path = write_store(tmp_path / "store", source, codec=codec)
    report = verify_store(str(path), deep=True)
    assert report.ok, report.problems
    store = open_store(path)
    value = store.read([store.samples.ids.index(sample_id(source.input_ids[index]))], [layer]).value[0]
    assert np.isfinite(value).all()
    if codec == "raw":
        np.testing.assert_array_equal(value, source.kv[index][layer][number])


def test_nan_in_a_store_is_named_by_sample_when_another_codec_is_calibrated(source: Source, tmp_path: Path) -> None:
    path = write_store(tmp_path / "raw", source, codec="raw")
    put_nan(path)
    identity = open_store(path).samples.ids[4]
    with pytest.raises(CodecError, match=rf"sample {identity[:12]} of .*, layer 1, value: got NaN .*verify .*--deep"):
        recode_store(str(path), "q8", str(tmp_path / "q8"))
    assert not (tmp_path / "q8" / "manifest.json").exists()


FULL_DISK = """
import sys
from pathlib import Path
from kvstore import open_store
from kvstore.errors import StoreWriteError
from kvstore.compaction import compact
from kvstore.storage import locate
from kvstore.verify import verify_store
from tests.stores import begin_store, random_source, small_spec, write_shard

disk = Path(sys.argv[1])
source = random_source(small_spec(), [64] * 4)
manifest, calibration, tasks = begin_store(disk / "store", source, "raw")
write_shard(disk / "store", source, manifest, calibration, 0, tasks[0])
refused = 0


def leave(pages):
    (disk / "filler").unlink(missing_ok=True)
    with (disk / "filler").open("wb", buffering=0) as filler:
        try:
            while filler.write(bytes(4096)):
                pass
        except OSError:
            filler.truncate(max(filler.tell() - 4096 * pages, 0))


for pages in range(100):
    leave(pages)
    try:
        write_shard(disk / "store", source, manifest, calibration, 1, tasks[1])
        break
    except StoreWriteError as error:
        refused += 1
        assert str(error).startswith("shard 1: writing to") and "o space left" in str(error), error
    assert open_store(disk / "store").samples.shard.tolist() == [0]
    assert open_store(disk / "store").read([0]).input_ids.tolist() == source.input_ids[0].tolist()
    assert not any((disk / "store" / ".staging").iterdir())
leave(0)
try:
    compact(locate(disk / "store"))
except StoreWriteError as error:
    assert str(error).startswith("samples/: writing the sample tables") and "o space left" in str(error), error
else:
    raise AssertionError("the disk is not full")
assert open_store(disk / "store").read([0, 1]).input_ids.tolist() == [*source.input_ids[0], *source.input_ids[1]]
(disk / "filler").unlink()
for shard in (2, 3):
    write_shard(disk / "store", source, manifest, calibration, shard, tasks[shard])
assert compact(locate(disk / "store")) == 4
report = verify_store(str(disk / "store"), deep=True)
assert report.ok and not report.orphans, report
assert len(open_store(disk / "store").samples.ids) == 4
print(refused)
"""
"""Writes into a real small disk that has more and more free pages, so that it fills up at every step of a commit."""


def test_a_full_disk_stops_a_writer_at_any_step_and_freed_space_lets_it_finish(tmp_path: Path) -> None:
    disk, script = tmp_path / "disk", tmp_path / "script.py"
    disk.mkdir()
    script.write_text(FULL_DISK)
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    run = [sys.executable, str(script), str(disk)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if shutil.which("unshare") and not subprocess.run([*namespace, *mount], capture_output=True).returncode:
        command = [*namespace, "sh", "-c", f"{shlex.join(mount)} && exec {shlex.join(run)}"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    elif os.geteuid() == 0 and not subprocess.run(mount, capture_output=True).returncode:
        try:
            done = subprocess.run(run, capture_output=True, text=True, env=environment)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    else:
        pytest.skip("no small disk can be mounted here")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5


@contextlib.contextmanager
def as_nobody() -> Iterator[Path]:
    """A folder anyone may enter, and no rights beyond it."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        os.seteuid(0)
        shutil.rmtree(folder)


def test_a_writer_without_permission_says_so_and_leaves_nothing(source: Source) -> None:
    with as_nobody() as folder:
        path = folder / "store"
        manifest, calibration, tasks = begin_store(path, source)
        write_shard(path, source, manifest, calibration, 0, tasks[0])
        before = sorted(file for file in path.rglob("*"))
        os.seteuid(NOBODY)
        with pytest.raises(StoreWriteError, match=r"shard 1: writing to .*Permission denied"):
            write_shard(path, source, manifest, calibration, 1, tasks[1])
        assert open_store(path).samples.shard.tolist() == [0, 0]
        assert verify_store(str(path), deep=True).ok
        os.seteuid(0)
        (path / ".staging").chmod(0o777)  # its files can be staged, but not put in place
        os.seteuid(NOBODY)
        with pytest.raises(StoreWriteError, match=r"shard 1: writing to .*Permission denied"):
            write_shard(path, source, manifest, calibration, 1, tasks[1])
        assert sorted(file for file in path.rglob("*")) == before


@pytest.mark.parametrize(
    "name", ["manifest.json", "commits", "samples", "kv.zarr/key/zarr.json", "kv.zarr/key/c/0", IDS.format(2)]
)
def test_a_reader_without_permission_says_so_and_sees_no_smaller_store(pristine: dict[str, Path], name: str) -> None:
    with as_nobody() as folder:
        path = Path(shutil.copytree(pristine["mix"], folder / "store"))
        (path / name).chmod(0o700 if (path / name).is_dir() else 0o600)
        os.seteuid(NOBODY)
        with pytest.raises(PermissionError, match=re.escape(f"{path / name}")):
            read_all(path)


# ---- single bits


@pytest.mark.parametrize("num_flips", [250, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_flipped_bit_anywhere_is_read_silently_and_verification_finds_all_that_matter(
    num_flips: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0"}')
    source = random_source(small_spec(num_layers=2), [64, 40, 64])
    path = write_store(tmp_path / "store", source, tokenizer=tmp_path / "tokenizer", texts=["tab\tnew\nline", "é", "text"])
    write_gate(locate(path), "before", {"kl": 0.01})
    storage = locate(path)
    add_repeats(path, 0, 2)

    def everything() -> str:
        return repr([snapshot(path), read_gate(storage), read_dropped(storage)])

    whole, report = everything(), verify_store(str(path), deep=True)
    assert report.ok
    files = sorted(file for file in path.rglob("*") if file.is_file())
    sizes = [file.stat().st_size for file in files]
    stream, outcomes = random.Random(20260101), Counter[tuple[str, str]]()
    for _ in range(num_flips):
        position, bit = stream.randrange(sum(sizes)), stream.randrange(8)
        number = 0
        while position >= sizes[number]:
            position, number = position - sizes[number], number + 1
        content = files[number].read_bytes()
        flip(files[number], position, bit)
        try:
            outcome = "same" if everything() == whole else "silent"
        except KVStoreError:
            outcome = "raised"
        # Deep verification finds whatever fast verification does.
        found = "not found" if all(verify_store(str(path), deep=deep).ok for deep in (False, True)) else "found"
        outcomes[outcome, found] += 1
        assert outcome != "silent", f"{files[number]}: byte {position}, bit {bit} changes what is read without an error"
        assert (outcome, found) != ("raised", "not found"), f"{files[number]}: byte {position}, bit {bit}"
        files[number].write_bytes(content)
    assert everything() == whole
    with capsys.disabled():
        counts = {" and ".join(key): count for key, count in sorted(outcomes.items())}
        print(f"\n{num_flips} flipped bits in {sum(sizes):,} bytes of {len(files)} files: {counts}, read silently 0")
