"""Stores somebody else made: what they may not do to their reader, and what is no damage."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from kvstore import KVStoreError, StoreFormatError, open_store
from kvstore.drop import drop_samples, read_dropped
from kvstore.errors import LeaseHeldError, LeaseLostError
from kvstore.lease import EVERYTHING, LEASES, claims, lease
from kvstore.manifest import read_manifest, write_manifest
from kvstore.records import fingerprint
from kvstore.rewrite import recode_store
from kvstore.storage import Storage, locate
from kvstore.verify import verify_store
from tests.kvstore import mutations
from tests.kvstore.try_mutations import snapshot
from tests.stores import Source, add_repeats, random_source, small_spec, write_store

ROOT = Path(__file__).parents[2]
LENGTHS = [64, 50, 128, 64, 64, 70, 64, 64]


@pytest.fixture(scope="module")
def source() -> Source:
    return random_source(small_spec(), LENGTHS)


@pytest.fixture(scope="module")
def pristine(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0"}')
    return write_store(folder / "store", source, tokenizer=folder / "tokenizer")


@pytest.fixture
def path(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "store"))


def change(file: Path, alter: Callable[[dict[str, Any]], object]) -> None:
    """Alter a record and make its seal, and a manifest's fingerprints, fit again."""
    record = json.loads(file.read_text())
    alter(record)
    if "fingerprints" in record:
        record["fingerprints"] = {name: fingerprint(record[name]) for name in ("signal", "data")}
    mutations.reseal(file, record)


def problems(path: Path) -> str:
    return "\n".join(problem.message for problem in verify_store(str(path), deep=True).problems)


# ---- names and links


@pytest.mark.parametrize(
    "name",
    [
        "/etc/outside",
        "../outside",
        "a/../../outside",
        "a/b",
        "..",
        ".",
        "",
        "nul\0byte",
        "C:\\outside",
        "a\\b",
        ".hidden",
        "a\nb",
    ],
)
@pytest.mark.parametrize("folder", ["tokenizer", "projection"])
def test_a_name_of_a_file_that_is_no_plain_name_is_refused_and_nothing_is_written(
    folder: str, name: str, path: Path, tmp_path: Path
) -> None:
    before = sorted(str(file) for file in tmp_path.rglob("*"))
    change(path / "manifest.json", lambda record: record.setdefault(folder, {}).update({name: "0" * 64}))
    assert folder in problems(path)
    for use in (open_store, lambda store: recode_store(str(store), "q8", str(tmp_path / "out"))):
        with pytest.raises(StoreFormatError, match=rf"manifest\.json: {folder}"):
            use(path)
    assert sorted(str(file) for file in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("key", ["/etc/passwd", "../../outside", "commits/../../x"])
def test_a_path_of_an_object_that_leads_out_of_the_store_is_refused(key: str, path: Path) -> None:
    change(path / "commits" / "00001.json", lambda record: record["objects"][0].update(path=key))
    assert "objects[0].path" in problems(path)
    with pytest.raises(StoreFormatError, match=r"shard 1: .*objects\[0\]\.path: got"):
        open_store(path).read([2])


def held_open(storage: Storage) -> None:
    with lease(storage, *EVERYTHING, "test"):
        pass


WRITERS: dict[str, Callable[[Path], object]] = {
    "drop": lambda path: drop_samples(str(path), [open_store(path).samples.ids[0]]),
    "lease": lambda path: held_open(locate(path)),
}


@pytest.mark.parametrize("link", [".staging", ".staging/leases", "samples", "commits", "kv.zarr", "kv.zarr/key/c"])
@pytest.mark.parametrize("writer", WRITERS)
def test_nothing_is_written_or_deleted_behind_a_symbolic_link(writer: str, link: str, path: Path, tmp_path: Path) -> None:
    if writer == "lease" and not link.startswith(".staging"):
        return
    home = tmp_path / "home"
    if (path / link).exists():
        (path / link).rename(home)
    else:
        home.mkdir()
        (home / "letter.txt").write_text("mine")
        (home / "leases").mkdir()
    (path / link).parent.mkdir(parents=True, exist_ok=True)
    (path / link).symlink_to(home)
    old = time.time() - 10_000
    before = {str(file): file.read_bytes() for file in home.rglob("*") if file.is_file()}
    for file in before:
        os.utime(file, (old, old))
    with pytest.raises(StoreFormatError, match=rf"{link}: is a symbolic link to .*home, expected a folder of the store's own"):
        WRITERS[writer](path)
    assert {str(file): file.read_bytes() for file in home.rglob("*") if file.is_file()} == before


def test_a_store_whose_files_are_links_as_caches_of_downloads_have_them_is_read(path: Path, tmp_path: Path) -> None:
    whole, blobs = snapshot(path), tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(file for file in sorted(path.rglob("*")) if file.is_file()):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    assert verify_store(str(path), deep=True).problems == ()
    assert snapshot(path) == whole


# ---- a frozen writer

FROZEN = """
import os, signal, sys
import kvstore.lease, kvstore.writer
from kvstore.drop import drop_samples
kvstore.lease.TOUCH_S = 0.05
step, calls = sys.argv[3], []
if step == "commit":
    before = kvstore.writer.replace_commit
    kvstore.writer.replace_commit = lambda *given: (os.kill(os.getpid(), signal.SIGSTOP), before(*given))
else:
    from kvstore.storage import Folder
    real = {"stage": Folder._staged, "rename": os.fsync}[step]
    def stopped(*given, **more):
        calls.append(given)
        if len(calls) == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(*given, **more)
    if step == "stage":
        Folder._staged = stopped
    else:
        os.fsync = stopped
drop_samples(sys.argv[1], [sys.argv[2]])
"""


@pytest.mark.parametrize(
    ("step", "number"),
    [
        ("commit", 1),
        ("stage", 6),
        ("rename", 7),
        *(pytest.param(*stop, marks=pytest.mark.slow) for stop in (("stage", 3), ("stage", 9), ("rename", 4), ("rename", 12))),
    ],
)
def test_a_writer_that_was_frozen_while_another_took_over_changes_nothing(step: str, number: int, path: Path) -> None:
    """Stopped at that step until its claim ran out, overtaken by another drop of its shard, then continued."""
    first, second = open_store(path).samples.ids[:2]
    command = [sys.executable, "-c", FROZEN, str(path), first, step, str(number)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as frozen:
        try:
            _wait_until_stopped(frozen.pid)
            for claim in (path / LEASES).iterdir():  # as if it were of another machine, and old
                claim.write_text(json.dumps({**json.loads(claim.read_text()), "machine": "elsewhere"}))
                os.utime(claim, (1, 1))
            drop_samples(str(path), [second])
            whole = snapshot(path)
            assert second not in open_store(path).samples.ids
        finally:
            os.kill(frozen.pid, signal.SIGCONT)
        assert frozen.stderr is not None
        told = frozen.stderr.read()
    assert frozen.returncode != 0
    assert "LeaseLostError" in told
    assert "its claim ran out and another writer took over" in told
    assert snapshot(path) == whole
    assert second not in open_store(path).samples.ids
    assert verify_store(str(path), deep=True).problems == ()
    drop_samples(str(path), [first])  # the same command again
    assert set(read_dropped(locate(path))) == {first, second}
    assert verify_store(str(path), deep=True).problems == ()


def _wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "Tt":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_whoever_lost_a_claim_can_neither_write_nor_delete(tmp_path: Path) -> None:
    storage = locate(tmp_path)
    with lease(storage, 0, 1, "frozen") as frozen:
        frozen.write("key", b"before", replace=False)
        assert frozen.claim is not None
        with frozen.scratch("shard") as folder:
            (folder / "file").write_bytes(b"late")
            (tmp_path / LEASES / f"{frozen.claim}.json").unlink()
            storage.revoke_claim(frozen.claim)
            for content in (b"late", folder / "file"):
                for replace in (True, False):
                    folder.mkdir(exist_ok=True)
                    (folder / "file").write_bytes(b"late")
                    with pytest.raises(LeaseLostError, match="another writer took over"):
                        frozen.write("key" if replace else "new", content, replace=replace)
            with pytest.raises(LeaseLostError, match="another writer took over"):
                frozen.delete("key")
    assert storage.read("key") == b"before"
    assert storage.size("new") is None


# ---- numbers that lie


def alter_table(path: Path, name: str, column: str, value: object, row: int = 0) -> None:
    """Change a number of a sample table; names and digests fit again."""
    (summary,), (part,) = ((path / "samples").glob(f"{kind}-*.parquet") for kind in ("summary", "part"))
    rows, shards = pq.read_table(part), pq.read_table(summary)
    table = rows if name == "part" else shards
    number = table.column_names.index(column)
    values = table[column].to_pylist()
    values[row] = value
    table = table.set_column(number, table.schema.field(column), pa.array(values, table.schema.field(column).type))
    metadata = dict(shards.schema.metadata)
    summary.unlink()
    if name == "part":
        part.unlink()
        metadata[b"kvpipe.columns"] = json.dumps(
            {one: mutations.column_digest(table[one]) for one in table.column_names}
        ).encode()
        rows = table
    else:
        shards = table
    mutations.write_tables(path / "samples", rows, shards.replace_schema_metadata(metadata))


@pytest.mark.parametrize(
    ("column", "value"),
    [("num_samples", 3), ("num_samples", 2**31 - 1), ("num_samples", -1), ("num_tokens", 1), ("stored_bytes", 7)],
)
def test_a_summary_must_say_what_the_commits_say(column: str, value: int, path: Path) -> None:
    alter_table(path, "summary", column, value)
    assert "summary-" in problems(path)
    if column != "stored_bytes":  # which no reader uses but to show it
        with pytest.raises(StoreFormatError, match=r"shard 0"):
            open_store(path).read([0])


@pytest.mark.parametrize("value", [-1, 0, 2, 0.5, 2**31, "1", True, None])
@pytest.mark.parametrize("where", ["commit", "table"])
def test_a_count_is_a_whole_number_of_times_that_all_records_agree_on(value: Any, where: str, path: Path) -> None:
    if where == "commit":
        change(path / "commits" / "00000.json", lambda record: record["samples"][0].update(count=value))
    elif isinstance(value, int) and not isinstance(value, bool) and value < 2**31:
        alter_table(path, "part", "count", value)
    else:
        return
    assert problems(path)
    with pytest.raises(StoreFormatError, match=r"count"):
        snapshot(path)


@pytest.mark.parametrize(
    "alter",
    [
        pytest.param(lambda record: record["spec"]["layers"][0].update(key_dim=2**63), id="huge-dim"),
        pytest.param(lambda record: record["spec"]["layers"][0].update(key_dim=16), id="other-dim"),
        pytest.param(lambda record: record["spec"]["layers"].pop(), id="layer-less"),
        pytest.param(lambda record: record["groups"][0].update(num_kv_heads=1), id="other-heads"),
        pytest.param(lambda record: record["groups"][0].update(codec="q8"), id="other-codec"),
        pytest.param(lambda record: record["groups"][0].update(layers=[0, 2, 1]), id="other-slots"),
        pytest.param(lambda record: record["groups"].append(record["groups"][0]), id="a-group-twice"),
        pytest.param(lambda record: record["layout"].update(chunk_tokens=96), id="odd-chunk"),
        pytest.param(lambda record: record["layout"].update(num_shards=10**9), id="a-billion-shards"),
        pytest.param(lambda record: record["layout"].update(num_shards=True), id="true-shards"),
        pytest.param(lambda record: record.update(token_arrays=["input_ids", "input_ids"]), id="an-array-twice"),
        pytest.param(lambda record: record["spec"].update(key_domain="post_rope"), id="other-domain"),
        pytest.param(lambda record: record["spec"]["ropes"][0]["inv_freq"].__setitem__(0, 2.0), id="other-rope"),
        pytest.param(lambda record: record["spec"].pop("key_domain"), id="default-instead"),
        pytest.param(lambda record: record["data"].pop("parts"), id="no-parts"),
        pytest.param(lambda record: record["metadata"].pop("key/zarr.json"), id="an-array-unnamed"),
    ],
)
def test_fields_of_a_manifest_must_agree(alter: Callable[[dict[str, Any]], object], path: Path) -> None:
    change(path / "manifest.json", alter)
    assert "manifest.json: " in problems(path)
    with pytest.raises(StoreFormatError, match=r"manifest\.json: "):
        open_store(path)


def test_metadata_of_an_array_must_say_what_the_manifest_says_even_if_its_hash_does(path: Path) -> None:
    file = path / "kv.zarr" / "key" / "zarr.json"
    document = json.loads(file.read_text())
    document["data_type"] = "uint8"
    file.write_text(json.dumps(document))
    change(
        path / "manifest.json",
        lambda record: record["metadata"].update({"key/zarr.json": mutations.metadata_fingerprint(document)}),
    )
    assert 'data_type: got "uint8", expected "int8"' in problems(path)
    with pytest.raises(KVStoreError, match='data_type: got "uint8"'):
        open_store(path).read([0])


def test_counts_of_repeats_are_not_lost_with_the_list_of_parts(path: Path) -> None:
    add_repeats(path, 0, 2)
    assert open_store(path).samples.count[0] == 3
    change(path / "manifest.json", lambda record: record["data"].pop("parts"))
    assert "runs: " in problems(path)
    with pytest.raises(StoreFormatError, match="runs: "):
        _ = open_store(path).samples.count


def test_counts_and_ids_are_those_the_data_was_planned_with(path: Path) -> None:
    """A commit and its table changed alike: the manifest knows better."""
    change(path / "commits" / "00001.json", lambda record: record["samples"][0].update(count=5))
    for file in (path / "samples").glob("*.parquet"):
        file.unlink()
    assert "part 0 of the data, shards 0 to 4: samples of its samples are not what the manifest says" in problems(path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "alter",
    [
        pytest.param(lambda record: record["signal"].update(codec="mix,0-99999999999=raw"), id="a-range-of-layers"),
        pytest.param(lambda record: record["signal"].update(codec="mix,5-2=raw"), id="an-empty-range"),
        pytest.param(
            lambda record: record["teacher"]["layers"].extend(
                {**record["teacher"]["layers"][0], "layer": number} for number in range(3, 65536)
            ),
            id="thousands-of-layers",
        ),
        pytest.param(lambda record: record.update(runs=[]), id="runs-gone"),
    ],
)
def test_a_small_record_asks_for_no_long_work(alter: Callable[[dict[str, Any]], object], path: Path) -> None:
    change(path / "manifest.json", alter)
    assert "manifest.json: " in problems(path)
    with pytest.raises(StoreFormatError, match=r"manifest\.json: "):
        open_store(path)


def test_counts_of_a_part_are_compared_after_a_drop_too(path: Path) -> None:
    drop_samples(str(path), [open_store(path).samples.ids[0]])
    assert problems(path) == ""
    change(path / "commits" / "00001.json", lambda record: record["samples"][0].update(count=1000))
    for file in (path / "samples").glob("*.parquet"):
        file.unlink()
    assert "part 0 of the data, shards 0 to 4: samples of its samples are not what the manifest says" in problems(path)


def test_an_invented_dropped_sample_is_found(path: Path) -> None:
    drop_samples(str(path), [open_store(path).samples.ids[0]])
    change(path / "samples" / "dropped.json", lambda record: record["shards"].update({"f" * 64: 0}))
    shards = json.loads((path / "samples" / "dropped.json").read_text())["shards"]
    change(path / "manifest.json", lambda record: record["data"].update(dropped=fingerprint(sorted(shards))))
    assert "num_samples" in problems(path)


def test_an_alignment_must_agree_with_spec_and_teacher(path: Path) -> None:
    def aligned(**lies: object) -> Callable[[dict[str, Any]], object]:
        def alter(record: dict[str, Any]) -> None:
            pairs = [[layer["layer"], layer["layer"]] for layer in record["spec"]["layers"]]
            true = {
                "teacher": record["teacher"],
                "student": record["spec"],
                "layer_map": pairs,
                "layer_map_name": "uniform",
                "baked": True,
            }
            record["alignment"], record["signal"]["capture_version"] = true | lies, 1

        return alter

    whole = (path / "manifest.json").read_bytes()
    change(path / "manifest.json", aligned())
    assert len(open_store(path)) == 8
    other = {**small_spec(4).to_json()}
    for lies, said in (
        ({"teacher": other}, "alignment.teacher: not the teacher"),
        ({"layer_map": [[0, 999], [1, 1], [2, 2]]}, "alignment.layer_map"),
        ({"layer_map": []}, "alignment.layer_map"),
        ({"layer_map": [[1, 1], [0, 0], [2, 2]]}, "alignment.layer_map"),
        ({"layer_map": [[0, 0]]}, "alignment.layer_map: leads to layers"),
        ({"student": small_spec(3, num_kv_heads=1).to_json()}, "spec: not the geometry of the alignment's student"),
    ):
        (path / "manifest.json").write_bytes(whole)
        change(path / "manifest.json", aligned(**lies))
        assert said in problems(path), lies


def test_a_table_that_grows_beyond_memory_is_refused_before_it_is_read(path: Path) -> None:
    (summary,), (part,) = ((path / "samples").glob(f"{kind}-*.parquet") for kind in ("summary", "part"))
    rows, shards = pq.read_table(part), pq.read_table(summary)
    number = rows.column_names.index("text")
    rows = rows.set_column(number, rows.schema.field("text"), pa.array(["a" * 2**27] * len(rows), pa.string()))
    summary.unlink()
    part.unlink()
    mutations.write_tables(path / "samples", rows, shards)
    with pytest.raises(StoreFormatError, match=r"part-.*got texts of 1,073,741,824 bytes, expected at most 536,870,912"):
        _ = open_store(path).samples.text


# ---- what other programs find


def test_only_listed_files_make_the_tokenizer(path: Path) -> None:
    (path / "tokenizer" / "special_tokens_map.json").write_text('{"eos_token": "x"}')
    (path / "tokenizer" / "notes.pdf").write_text("mine")
    store = open_store(path)
    folder = store.tokenizer_path
    assert folder is not None
    assert [file.name for file in folder.iterdir()] == ["tokenizer.json"]
    report = verify_store(str(path))
    assert report.unlisted == ("tokenizer/special_tokens_map.json",)
    assert [problem.part for problem in report.problems] == ["unlisted"]
    assert report.foreign == ("tokenizer/notes.pdf",)


# ---- files that are none


def pipe(file: Path) -> None:
    os.mkfifo(file)


def a_socket(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(file.parent):
        made.bind(file.name)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": pipe,
    "socket": a_socket,
    "device": lambda file: file.symlink_to("/dev/zero"),
    "loop": lambda file: file.symlink_to(file.name),
    "folder": lambda file: file.mkdir(),
    "huge": lambda file: (file.touch(), os.truncate(file, 2**40)),
}
FILES = [
    *(
        "manifest.json",
        "gate.json",
        "commits/00001.json",
        "tokenizer/tokenizer.json",
        "kv.zarr/key/zarr.json",
        "samples/dropped.json",
    ),
    *("kv.zarr/key_mean/c/0/0/0", "kv.zarr/key/c/0/1/0/0", "kv.zarr/input_ids/c/1"),
]


QUICK = {
    *(("pipe", name) for name in ("manifest.json", "commits/00001.json", "kv.zarr/key_mean/c/0/0/0", "kv.zarr/key/c/0/1/0/0")),
    *(("device", name) for name in ("gate.json", "kv.zarr/key/zarr.json", "kv.zarr/input_ids/c/1")),
    *(("loop", "commits/00001.json"), ("folder", "tokenizer/tokenizer.json"), ("socket", "manifest.json")),
    *(("huge", "commits/00001.json"), ("huge", "kv.zarr/key/c/0/1/0/0")),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("special", "name"),
    [
        pytest.param(special, name, marks=() if (special, name) in QUICK else pytest.mark.slow)
        for special in SPECIAL
        for name in FILES
    ],
)
def test_what_is_no_regular_file_of_a_sane_size_is_refused_at_once(special: str, name: str, path: Path) -> None:
    (path / name).unlink(missing_ok=True)
    SPECIAL[special](path / name)
    begun = time.monotonic()
    assert problems(path)
    with contextlib.suppress(KVStoreError):
        read = snapshot(path)
        assert name in ("gate.json", "samples/dropped.json"), read
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("depth", [900, 100_000])
@pytest.mark.parametrize("name", ["manifest.json", "gate.json", "commits/00001.json", "kv.zarr/key/zarr.json"])
def test_json_nested_without_end_is_a_damaged_record(name: str, depth: int, path: Path) -> None:
    (path / name).write_text("[" * depth + "]" * depth)
    assert name in problems(path)
    with contextlib.suppress(KVStoreError):
        open_store(path).read(range(8))
        assert name == "gate.json"


def test_a_sample_larger_than_memory_is_refused_and_ends_no_process(source: Source, tmp_path: Path) -> None:
    path = write_store(tmp_path / "store", random_source(small_spec(1, 8, 64), [64, 64]), "q8")
    code = (
        "import resource, sys; from kvstore import KVStoreError, open_store; store = open_store(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30,) * 2)\n"
        "try:\n    store.read([0] * 10**5)\nexcept KVStoreError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "6,400,000 tokens: 6.55 GB in 1 layers, more than there is memory" in done.stdout


def test_all_problems_of_a_store_are_named_at_once(path: Path) -> None:
    (path / "commits" / "00000.json").write_text("{")
    change(path / "commits" / "00001.json", lambda record: record["samples"][0].update(num_tokens=-5))
    change(path / "commits" / "00002.json", lambda record: record.update(objects="none"))
    (path / "gate.json").write_text("[]")
    told = problems(path)
    for what in (
        r"00000.json: not a sealed",
        "samples[0].num_tokens: got -5",
        "objects: got 'none'",
        "gate.json: not a sealed",
    ):
        assert what in told, told


# ---- leases


@pytest.mark.parametrize(
    "claim",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"purpose": "x"}',
        b"[" * 100_000,
        *(
            json.dumps(
                {"purpose": "x", "first": -1, "stop": 9, "host": "h", "pid": 7, "machine": "m", "started_s": 0.0} | lie
            ).encode()
            for lie in (
                {"pid": "1"},
                {"pid": -1},
                {"pid": 2**70},
                {"first": None},
                {"host": 5},
                {"started_s": "now"},
                {"stop": 1.5},
            )
        ),
    ],
)
def test_a_lease_that_is_none_blocks_nobody(claim: bytes, path: Path) -> None:
    (path / LEASES).mkdir(parents=True)
    (path / LEASES / "0123456789abcdef.json").write_bytes(claim)
    assert claims(locate(path)) == {}
    assert verify_store(str(path)).ok
    drop_samples(str(path), [open_store(path).samples.ids[0]])
    assert verify_store(str(path), deep=True).problems == ()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("special", ["pipe", "device", "loop", "folder"])
def test_a_lease_that_is_no_file_blocks_nobody(special: str, path: Path) -> None:
    (path / LEASES).mkdir(parents=True)
    SPECIAL[special](path / LEASES / "0123456789abcdef.json")
    drop_samples(str(path), [open_store(path).samples.ids[0]])
    assert verify_store(str(path), deep=True).problems == ()


def test_a_lease_from_the_future_blocks_nobody_for_ever(path: Path) -> None:
    (path / LEASES).mkdir(parents=True)
    claim = {"purpose": "x", "first": -1, "stop": 9, "host": "h", "pid": 7, "machine": "m", "started_s": 0.0}
    file = path / LEASES / "0123456789abcdef.json"
    file.write_text(json.dumps(claim))
    os.utime(file, (time.time() + 10**6,) * 2)
    drop_samples(str(path), [open_store(path).samples.ids[0]])
    file.write_text(json.dumps(claim))
    with pytest.raises(LeaseHeldError, match="x \\(host h, pid 7\\)"):
        drop_samples(str(path), [open_store(path).samples.ids[0]])


# ---- what is no damage


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part:zarr.errors.ZarrUserWarning")
def test_consolidated_metadata_is_no_damage_unless_it_misleads(path: Path) -> None:
    whole = snapshot(path)
    zarr.consolidate_metadata(str(path / "kv.zarr"))
    assert verify_store(str(path), deep=True).problems == ()
    assert snapshot(path) == whole
    root = path / "kv.zarr" / "zarr.json"
    document = json.loads(root.read_text())
    document["consolidated_metadata"]["metadata"]["key"]["data_type"] = "uint8"
    root.write_text(json.dumps(document))
    assert "consolidated_metadata of key is not that of the array" in problems(path)


def test_attributes_and_arrays_that_others_add_are_no_damage(path: Path) -> None:
    whole = snapshot(path)
    group = zarr.open_group(str(path / "kv.zarr"), mode="a")
    group.update_attributes({"note": "mine"})
    group["key"].update_attributes({"units": "none"})
    group.create_array("mine", data=np.ones(3))
    report = verify_store(str(path), deep=True)
    assert report.problems == ()
    assert set(report.foreign) == {"kv.zarr/mine/zarr.json", "kv.zarr/mine/c/0"}
    assert snapshot(path) == whole


STRAYS = [
    *(".DS_Store", "notes.txt", "commits/.DS_Store", "commits/00000.json.bak", "commits/00000 (1).json", "commits/Thumbs.db"),
    *(
        "commits/README",
        "samples/.DS_Store",
        "samples/copy.parquet",
        "tokenizer/.DS_Store",
        "kv.zarr/.DS_Store",
        "kv.zarr/key/c/.DS_Store",
    ),
    *("kv.zarr/key/c/0/1/0/._0", "kv.zarr/.zmetadata", "mine/data.csv"),
]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if number % 3 == 0 else pytest.mark.slow) for number, name in enumerate(STRAYS)]
)
def test_a_file_somebody_left_is_named_as_not_ours_and_blocks_nothing(name: str, path: Path) -> None:
    whole = snapshot(path)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(b"not a record")
    report = verify_store(str(path), deep=True)
    assert (report.problems, report.foreign, report.orphans) == ((), (name,), ())
    assert snapshot(path) == whole
    drop_samples(str(path), [open_store(path).samples.ids[0]])
    assert (path / name).read_bytes() == b"not a record"
    assert verify_store(str(path), deep=True).problems == ()


def test_a_manifest_read_and_written_again_is_the_same(path: Path) -> None:
    before = (path / "manifest.json").read_bytes()
    write_manifest(locate(path), read_manifest(locate(path)))
    assert (path / "manifest.json").read_bytes() == before
