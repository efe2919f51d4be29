"""Dropping samples: gone from every file, the rest untouched, finished after a kill, refused where it is not clear what is meant."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from kvstore import CorruptShardError, KVStoreError, StoreNotFoundError, drop, open_store
from kvstore.compaction import compact, forget
from kvstore.drop import drop_samples, dropped_shards, read_dropped
from kvstore.lease import EVERYTHING, lease
from kvstore.storage import locate
from kvstore.verify import verify_store
from tests.kvstore.test_rewrite import codes_by_id
from tests.stores import Source, begin_store, random_source, small_spec, write_shard, write_store

LENGTHS = [100, 128, 70, 300, 64, 5] * 4
TEXTS = [f"the secret text number {index:02d}" for index in range(len(LENGTHS))]


@pytest.fixture(scope="module")
def source() -> Source:
    return random_source(small_spec(), LENGTHS)


@pytest.fixture
def path(source: Source, tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", source, "mix,0=raw", texts=TEXTS)


def everything_in(path: Path) -> bytes:
    """The bytes of all files, and those of parquet tables once more without compression; the manifest of a test's store lists ids."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name not in ("dropped.json", "manifest.json")]
    tables = [repr(pq.read_table(file).to_pylist()).encode() for file in files if file.suffix == ".parquet"]
    return b"\n".join([*(file.read_bytes() for file in files), *tables])


def test_dropped_samples_are_in_no_file_and_the_rest_is_bit_for_bit_as_before(path: Path, source: Source) -> None:
    store = open_store(path)
    before, rows = codes_by_id(store), dict(zip(store.samples.ids, store.samples.token_start.tolist(), strict=True))
    gone = [store.samples.ids[index] for index in (0, 5, 6, 23)]
    texts = [store.samples.text[index] for index in (0, 5, 6, 23)]
    tokens = [source.input_ids[index] for index in (0, 6)]
    assert all(str(text).encode() in everything_in(path) for text in texts)
    shards = {int(store.samples.shard[index]) for index in (0, 5, 6, 23)}
    untouched = {file: file.read_bytes() for file in (path / "commits").iterdir() if int(file.stem) not in shards}
    told: list[tuple[int, int]] = []
    summary = drop_samples(str(path), [gone[0][:8], *gone[1:]], lambda done, total: told.append((done, total)))
    assert (summary.num_dropped, summary.num_shards) == (4, len(shards))
    assert told[-1] == (len(shards), len(shards))
    after = open_store(path)
    assert codes_by_id(after) == {identity: codes for identity, codes in before.items() if identity not in gone}
    assert all(
        rows[identity] == start for identity, start in zip(after.samples.ids, after.samples.token_start.tolist(), strict=True)
    )
    content = everything_in(path)
    assert not any(identity.encode() in content for identity in gone)
    assert not any(str(text).encode() in content for text in texts)
    stored = np.concatenate([after.read([index], layers=()).input_ids for index in range(len(after))])
    raw = np.concatenate([file_tokens(path, shard) for shard in range(after.manifest.layout.num_shards)])
    assert sorted(raw[raw >= 0].tolist()) == sorted(stored.tolist())
    assert not any(token.tobytes() in raw.tobytes() for token in tokens)
    assert all(file.read_bytes() == bytes_ for file, bytes_ in untouched.items())
    assert read_dropped(after.storage) == sorted(gone)
    assert verify_store(str(path), deep=True).problems == ()


def file_tokens(path: Path, shard: int) -> np.ndarray:
    """Token ids of one shard, holes and all, through Zarr alone."""
    store = open_store(path)
    tokens = store.manifest.layout.shard_tokens
    array = zarr.open_array(path / "kv.zarr" / "input_ids", mode="r")
    return np.asarray(array[shard * tokens : (shard + 1) * tokens], dtype=np.int32)


def test_dropping_a_whole_shard_leaves_no_object_of_it(path: Path) -> None:
    store = open_store(path)
    gone = [identity for identity, shard in zip(store.samples.ids, store.samples.shard.tolist(), strict=True) if shard == 2]
    drop_samples(str(path), gone)
    left = {str(file.relative_to(path)) for file in (path / "kv.zarr").rglob("*") if file.is_file()}
    assert not [file for file in left if file.endswith(("/c/2", "/c/0/2/0/0"))]
    assert [file for file in left if file.endswith(("/c/1", "/c/0/1/0/0"))]
    after = open_store(path)
    assert len(after) == len(store) - len(gone)
    assert len(after.samples.summary) == store.manifest.layout.num_shards
    after.read(range(len(after)))
    assert verify_store(str(path), deep=True).problems == ()


def test_dropping_what_is_dropped_changes_nothing(path: Path) -> None:
    gone = open_store(path).samples.ids[4]
    drop_samples(str(path), [gone])
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    summary = drop_samples(str(path), [gone])
    assert (summary.num_dropped, summary.num_shards) == (0, 0)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([], id="none"),
        pytest.param(["f" * 64], id="unknown"),
        pytest.param(["known", "0123456789abcdef"], id="one-unknown"),
        pytest.param([""], id="ambiguous"),
        pytest.param(["short"], id="short"),
    ],
)
def test_unclear_ids_are_refused_and_nothing_is_changed(ids: list[str], path: Path) -> None:
    known = open_store(path).samples.ids[0]
    wanted = [{"known": known, "short": known[:7]}.get(identity, identity) for identity in ids]
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    with pytest.raises(KVStoreError, match=r"(?i)--ids: .*nothing was changed"):
        drop_samples(str(path), wanted)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()} == before


def test_the_beginning_of_two_ids_is_refused() -> None:
    twins = {"ab" * 32: 0, "ab" * 31 + "cd": 1}
    with pytest.raises(KVStoreError, match="stands for 2 samples of s, expected one"):
        drop._resolve(["ab" * 10], [], twins, "s")
    assert drop._resolve(["ab" * 32], [], twins, "s") == {"ab" * 32: 0}


def test_without_a_store_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError):
        drop_samples(str(tmp_path / "nowhere"), ["ab" * 32])
    assert not (tmp_path / "nowhere").exists()


KILLED = """
import os, sys
from kvstore import storage, writer
from kvstore.drop import drop_samples
objects = 0
publish = writer.ShardWriter._publish
def killed(self, *args):
    global objects
    objects += 1
    if objects > int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    publish(self, *args)
writer.ShardWriter._publish = killed
drop_samples(sys.argv[1], sys.argv[3:])
"""


@pytest.mark.parametrize(("objects", "then"), [(0, "same"), (2, "another"), (5, "same"), (7, "another")])
def test_an_interrupted_drop_is_finished_by_the_next(objects: int, then: str, path: Path) -> None:
    store = open_store(path)
    before, ids = codes_by_id(store), store.samples.ids
    gone = [ids[1], ids[8], ids[20]]
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), str(objects), *gone], check=False)
    assert done.returncode == -signal.SIGKILL
    left = {problem.sample for problem in verify_store(str(path)).problems if "the drop was interrupted" in problem.message}
    assert left == set(gone[objects // 5 :]), "verify does not say which dropped samples are still there"
    more = gone if then == "same" else [ids[12]]
    drop_samples(str(path), more)
    expected = {identity: codes for identity, codes in before.items() if identity not in {*gone, *more}}
    assert codes_by_id(open_store(path)) == expected
    assert not any(identity.encode() in everything_in(path) for identity in gone)
    report = verify_store(str(path), deep=True)
    assert (report.problems, report.orphans) == ((), ())


@pytest.mark.parametrize("damage", ["swapped", "flipped"])
def test_a_damaged_shard_is_not_made_good_by_writing_it_again(damage: str, path: Path) -> None:
    gone = open_store(path).samples.ids[0]
    victim, other = (path / "kv.zarr/group_1/key/c/0" / f"{shard}/0/0" for shard in (0, 1))
    if not victim.exists():
        victim, other = (path / "kv.zarr/key/c/0" / f"{shard}/0/0" for shard in (0, 1))
    content = bytearray(victim.read_bytes())
    content[20] ^= 1
    victim.write_bytes(other.read_bytes() if damage == "swapped" else content)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    with pytest.raises(CorruptShardError, match=r"shard 0: .*Nothing was changed"):
        drop_samples(str(path), [gone])
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()} == before


def test_a_part_without_a_summary_does_not_keep_the_text(path: Path) -> None:
    samples = open_store(path).samples
    text, gone = str(samples.text[0]), samples.ids[0]
    (summary,) = (path / "samples").glob("summary-*.parquet")
    orphan = (path / "samples" / "part-0123456789abcdef.parquet", next((path / "samples").glob("part-*.parquet")).read_bytes())
    orphan[0].write_bytes(orphan[1])
    drop_samples(str(path), [gone])
    assert text.encode() not in everything_in(path)
    assert not orphan[0].exists()
    assert not summary.exists()


def test_what_a_killed_writer_left_in_staging_is_swept(path: Path) -> None:
    left = path / ".staging" / "shard-00000-dead" / "input_ids"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"tokens")
    drop_samples(str(path), [open_store(path).samples.ids[0]])
    assert not left.exists()


def test_a_store_not_yet_complete_can_be_dropped_from(source: Source, tmp_path: Path) -> None:
    manifest, calibration, tasks = begin_store(tmp_path / "store", source)
    for shard in (0, 1):
        write_shard(tmp_path / "store", source, manifest, calibration, shard, tasks[shard])
    gone = open_store(tmp_path / "store").samples.ids[0]
    drop_samples(str(tmp_path / "store"), [gone])
    for shard in range(2, len(tasks)):
        write_shard(tmp_path / "store", source, manifest, calibration, shard, tasks[shard])
    compact(locate(tmp_path / "store"))
    store = open_store(tmp_path / "store")
    assert (len(store), gone in store.samples.ids) == (len(LENGTHS) - 1, False)
    assert dropped_shards(store.storage) == {gone: 0}
    assert verify_store(str(tmp_path / "store"), deep=True).problems == ()


def test_nobody_drops_while_another_writes(path: Path) -> None:
    gone = open_store(path).samples.ids[0]
    with lease(locate(path), 0, 1, "kvpipe extract"), pytest.raises(KVStoreError, match=r"kvpipe extract \(host .*, pid \d+\)"):
        drop_samples(str(path), [gone])
    drop_samples(str(path), [gone])
    with lease(locate(path), *EVERYTHING, "x"):
        pass


def test_forgetting_leaves_the_tables_of_other_shards(source: Source, tmp_path: Path) -> None:
    manifest, calibration, tasks = begin_store(tmp_path / "store", source)
    for shard in range(len(tasks)):
        write_shard(tmp_path / "store", source, manifest, calibration, shard, tasks[shard])
        if shard in (1, len(tasks) - 1):
            compact(locate(tmp_path / "store"))
    first = {file.name for file in (tmp_path / "store" / "samples").iterdir()}
    forget(locate(tmp_path / "store"), [0])
    kept = {file.name for file in (tmp_path / "store" / "samples").iterdir()}
    assert len(first) == 4
    assert len(kept & first) == 2
    assert len(open_store(tmp_path / "store")) == len(LENGTHS)
