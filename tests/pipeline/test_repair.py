"""Verify and repair on real extractions: exactly the damaged shards are made again, and the store is what it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from kvstore import FingerprintMismatchError, KVStoreError, Store, StoreFormatError, open_store
from kvstore.verify import verify_store
from pipeline.config import ExtractConfig
from pipeline.extract import extract
from pipeline.models.resolve import resolve_model
from pipeline.repair import repair_store
from pipeline.terminal import report_lines
from tests.checkpoints import save_checkpoint
from tests.kvstore.mutations import reseal
from tests.pipeline.test_extract import by_id
from tests.processes import kvpipe

STDLIB = Path(json.__file__).parent


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("teacher") / "qwen2", "qwen2", num_hidden_layers=2)


@pytest.fixture(scope="module")
def made(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store of whole documents, so that their texts give their tokens back."""
    root = tmp_path_factory.mktemp("made")
    text = (STDLIB / "decoder.py").read_text()
    rows = [json.dumps({"text": text[first : first + 90]}) for first in range(0, 7_200, 90)]
    (root / "corpus.jsonl").write_text("\n".join(rows))
    config = ExtractConfig(
        teacher=str(teacher),
        data=(str(root / "corpus.jsonl"),),
        out=str(root / "store"),
        seq_len=128,
        accept_fidelity=True,
        gate_tokens=256,
    )
    extract(config, resolve_model(config.teacher), say=lambda _: None)
    return root / "store"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "store"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def one_of(directory: Path) -> Path:
    return next(path for path in sorted(directory.rglob("*")) if path.is_file())


DAMAGE: dict[str, tuple[Callable[[Path], object], set[int]]] = {
    "bit-in-keys": (lambda store: flip(store / "kv.zarr/key/c/0/3/0/0"), {3}),
    "values-missing": (lambda store: (store / "kv.zarr/value_byte/c/0/2/0/0").unlink(), {2}),
    "tokens-missing": (lambda store: (store / "kv.zarr/input_ids/c/1").unlink(), {1}),
    "two-shards": (lambda store: [flip(store / f"kv.zarr/key/c/0/{shard}/0/0") for shard in (0, 4)], {0, 4}),
    "commit-lost": (lambda store: (store / "commits/00002.json").unlink(), {2}),
    "commit-damaged": (lambda store: flip(store / "commits/00001.json"), {1}),
    "table-damaged": (lambda store: flip(one_of(store / "samples")), set()),
}


ALIKE = {"values-missing", "two-shards"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in DAMAGE])
def test_exactly_what_is_damaged_is_made_again(name: str, store: Path, made: Path) -> None:
    damage, shards = DAMAGE[name]
    damage(store)
    found = verify_store(str(store))
    assert not found.ok
    assert set(found.bad_shards) == shards
    objects = {file: file.stat().st_mtime_ns for file in (store / "kv.zarr").rglob("*") if file.is_file()}
    summary = repair_store(str(store))
    assert set(summary.shards) == shards
    assert summary.report.ok, report_lines(summary.report)
    touched = {file for file, before in objects.items() if file.stat().st_mtime_ns != before}
    assert {_shard_of(file) for file in touched} <= shards
    assert verify_store(str(store), deep=True).ok
    assert by_id(open_store(store)) == by_id(open_store(made))


def _shard_of(file: Path) -> int:
    parts = file.parts[file.parts.index("c") + 1 :]
    return int(parts[0] if len(parts) == 1 else parts[1])


def test_an_intact_store_is_left_alone(store: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in store.rglob("*") if file.is_file()}
    report = verify_store(str(store), deep=True)
    assert report.ok
    assert (report.num_committed, report.num_samples) == (report.num_shards, len(open_store(store)))
    assert repair_store(str(store)).shards == ()
    assert {file: file.stat().st_mtime_ns for file in store.rglob("*") if file.is_file()} == before


def test_leftovers_are_reported_and_only_repair_removes_them(store: Path) -> None:
    (store / ".staging/shard-00001-dead/key").mkdir(parents=True)
    (store / ".staging/shard-00001-dead/key/zarr.json").write_text("{}")
    (store / "kv.zarr/key/c/0/99/0").mkdir(parents=True)
    (store / "kv.zarr/key/c/0/99/0/0").write_bytes(b"half")
    report = verify_store(str(store))
    assert report.ok
    assert set(report.orphans) == {".staging/shard-00001-dead/key/zarr.json", "kv.zarr/key/c/0/99/0/0"}
    assert "2 leftover files" in report_lines(report)[-1]
    assert set(repair_store(str(store)).removed) == set(report.orphans)
    assert verify_store(str(store)).orphans == ()


def test_another_teacher_cannot_repair(store: Path, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", "qwen2", seed=1, num_hidden_layers=2)
    flip(store / "kv.zarr/key/c/0/3/0/0")
    with pytest.raises(FingerprintMismatchError, match=r"1 field\(s\):\n  weights: got"):
        repair_store(str(store), settings={"teacher": str(other)})


def test_what_no_teacher_can_make_again_is_said(store: Path) -> None:
    flip(store / "kv.zarr/key_mean/c/0/0/0")
    with pytest.raises(KVStoreError, match="cannot be made again by extracting; restore it"):
        repair_store(str(store))


def test_the_commands_report_and_exit_as_they_say(store: Path) -> None:
    assert kvpipe("verify", store).returncode == 0
    flip(store / "kv.zarr/key/c/0/3/0/0")
    damaged = kvpipe("verify", "--deep", "--json", store)
    assert damaged.returncode == 1
    report = json.loads(damaged.stdout)
    assert (report["ok"], {problem["shard"] for problem in report["problems"]}) == (False, {3})
    mended = kvpipe("repair", store)
    assert mended.returncode == 0, mended.stderr
    assert "shards made again: 3; leftovers removed: 0" in mended.stdout
    assert "INTACT" in mended.stdout


def test_dropped_ids_are_not_part_of_what_a_damaged_shard_gets_back(store: Path) -> None:
    from kvstore.drop import drop_samples

    opened: Store = open_store(store)
    gone = opened.samples.ids[int(np.flatnonzero(opened.samples.shard == 2)[0])]
    drop_samples(str(store), [gone])
    (store / "commits/00002.json").unlink()
    assert repair_store(str(store)).report.ok
    after = by_id(open_store(store))
    assert gone not in after
    assert len(after) == len(opened) - 1


def set_settings(store: Path, **settings: object) -> None:
    """Put settings into the record of the store's run, sealed again."""
    record = json.loads((store / "manifest.json").read_text())
    record["runs"][0]["settings"].update(settings)
    reseal(store / "manifest.json", record)


@pytest.mark.parametrize(
    "settings",
    [
        {"ray_address": "attacker:6379"},
        {"out": "/elsewhere"},
        {"workers": 4},
        {"device": "cuda"},
        {"append": True},
        {"max_bytes": 1},
        {"__class__": "x"},
    ],
    ids=str,
)
def test_settings_that_no_extraction_records_are_not_obeyed(settings: dict[str, object], store: Path) -> None:
    set_settings(store, **settings)
    flip(store / "kv.zarr/key/c/0/3/0/0")
    before = {file: file.read_bytes() for file in store.rglob("*") if file.is_file()}
    with pytest.raises(KVStoreError, match=f"have {next(iter(settings))}, which no extraction records; it was changed"):
        repair_store(str(store))
    assert {file: file.read_bytes() for file in store.rglob("*") if file.is_file()} == before


def test_what_a_repair_reads_is_said_before_and_other_data_never_comes_in(store: Path, teacher: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("my own words " * 40)
    set_settings(store, data=[str(secret)])
    (store / "commits/00002.json").unlink()
    said: list[str] = []
    with pytest.raises(FingerprintMismatchError, match="Nothing was written"):
        repair_store(str(store), say=said.append)
    assert any(f"this reads teacher {teacher}; data {secret}" in line for line in said)
    assert not any(b"my own words" in file.read_bytes() for file in store.rglob("*") if file.is_file())


@pytest.mark.parametrize("folder", [".staging", ".staging/leases", "commits", "samples"])
def test_a_repair_deletes_nothing_behind_a_symbolic_link(folder: str, store: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    if (store / folder).exists():
        shutil.copytree(store / folder, tmp_path / "home", dirs_exist_ok=True)
        shutil.rmtree(store / folder)
    (tmp_path / "home" / "letter.txt").write_text("mine")
    (store / folder).parent.mkdir(exist_ok=True)
    (store / folder).symlink_to(tmp_path / "home")
    before = {file: file.read_bytes() for file in (tmp_path / "home").rglob("*") if file.is_file()}
    for shard in (0, 3):
        flip(store / f"kv.zarr/key/c/0/{shard}/0/0")
    with pytest.raises(StoreFormatError, match=f"{folder}: is a symbolic link"):
        repair_store(str(store))
    assert {file: file.read_bytes() for file in (tmp_path / "home").rglob("*") if file.is_file()} == before


METADATA: dict[str, Callable[[Path], object]] = {
    "array": lambda store: edit(store / "kv.zarr/key/zarr.json", data_type="uint8"),
    "group": lambda store: edit(store / "kv.zarr/zarr.json", attributes={"kvpipe": {"codec": "raw"}}),
    "missing": lambda store: (store / "kv.zarr/input_ids/zarr.json").unlink(),
    "no JSON": lambda store: (store / "kv.zarr/value_byte/zarr.json").write_text("{"),
    "layer numbers": lambda store: flip(store / "kv.zarr/layer/c/0"),
    "layer numbers missing": lambda store: (store / "kv.zarr/layer/c/0").unlink(),
    "misleading copy": lambda store: edit(
        store / "kv.zarr/zarr.json",
        consolidated_metadata={"kind": "inline", "metadata": {"key": {"dimension_names": ["token"], "shape": [1]}}},
    ),
}


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_follows_from_the_manifest_is_made_again_without_a_teacher(name: str, store: Path, made: Path) -> None:
    METADATA[name](store)
    assert {problem.part for problem in verify_store(str(store)).problems} == {"metadata"}
    said: list[str] = []
    summary = repair_store(str(store), say=said.append)
    assert (summary.shards, summary.report.problems) == ((), ())
    assert len(said) == 1
    assert said[0].startswith("made again from the manifest: kv.zarr/")
    assert by_id(open_store(store)) == by_id(open_store(made))


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part:zarr.errors.ZarrUserWarning")
def test_what_others_left_in_a_store_is_no_damage_and_stays_after_a_repair(store: Path) -> None:
    zarr.consolidate_metadata(str(store / "kv.zarr"))
    for name in ("commits/.DS_Store", "kv.zarr/key/c/.DS_Store", "notes.txt"):
        (store / name).write_bytes(b"mine")
    before = {file: file.read_bytes() for file in store.rglob("*") if file.is_file()}
    shown = kvpipe("verify", "--deep", store)
    assert shown.returncode == 0
    assert "not ours  3 files that kvpipe did not write and does not read, such as commits/.DS_Store" in shown.stdout
    assert repair_store(str(store)).report.problems == ()
    assert {file: file.read_bytes() for file in store.rglob("*") if file.is_file()} == before


def test_a_link_in_a_store_is_put_aside_as_it_is_and_what_it_names_is_not_copied(store: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (store / "tokenizer/special_tokens_map.json").symlink_to(tmp_path / "secret")
    assert repair_store(str(store)).report.problems == ()
    assert (store / "tokenizer/special_tokens_map.json.unlisted").is_symlink()
    assert not any(b"mine" in file.read_bytes() for file in store.rglob("*") if file.is_file() and not file.is_symlink())


def test_a_file_that_would_make_another_tokenizer_is_put_aside(store: Path) -> None:
    (store / "tokenizer/added_tokens.json").write_text('{"<x>": 0}')
    assert [problem.part for problem in verify_store(str(store)).problems] == ["unlisted"]
    assert repair_store(str(store)).report.problems == ()
    assert (store / "tokenizer/added_tokens.json.unlisted").read_text() == '{"<x>": 0}'
    assert not (store / "tokenizer/added_tokens.json").exists()
