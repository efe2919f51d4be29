"""Sample tables: what opening a store touches, and that columns come back as written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kvstore import open_store
from kvstore.compaction import compact, forget
from kvstore.storage import locate
from kvstore.verify import verify_store
from tests.stores import random_source, small_spec, write_sample_tables, write_store


class _OpenedFiles(list[str]):
    """Names of the files opened through Python; an audit hook cannot be taken away again, so it is told when to listen."""

    def __init__(self) -> None:
        super().__init__()
        self.listening = False
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.listening and event == "open":
            self.append(str(arguments[0]))

    @property
    def shard_objects(self) -> list[str]:
        return [name for name in self if "/kv.zarr/" in name and "/c/" in name]


@pytest.fixture(scope="module")
def hook() -> _OpenedFiles:
    return _OpenedFiles()


@pytest.fixture
def opened(hook: _OpenedFiles) -> Iterator[_OpenedFiles]:
    hook.clear()
    hook.listening = True
    yield hook
    hook.listening = False


def test_opening_and_looking_up_columns_opens_no_shard(tmp_path: Path, opened: _OpenedFiles) -> None:
    path = write_store(tmp_path / "store", random_source(small_spec(), [100, 128, 70, 300, 64, 5] * 2))
    opened.clear()
    store = open_store(path)
    assert (len(store), len(store.samples.summary)) == (12, store.manifest.layout.num_shards)
    names = sorted(Path(name).name.partition("-")[0] for name in opened if name.startswith(str(path)))
    assert names == ["manifest.json", "summary"]  # and no commit record, however many there are
    samples = store.samples
    columns = [samples.ids, samples.source, samples.text, samples.shard, samples.token_start, samples.num_tokens]
    assert [len(column) for column in [*columns, samples.crc32c, samples.count]] == [12] * 8
    assert opened.shard_objects == []
    store.read([0])
    assert opened.shard_objects  # the hook hears them


def test_columns_of_a_store_of_many_samples_come_back_as_written(tmp_path: Path) -> None:
    rows = write_sample_tables(tmp_path / "store", num_shards=20, samples_per_shard=50)
    samples = open_store(tmp_path / "store").samples
    assert len(samples) == 1000
    assert (samples.ids, samples.source, samples.text) == tuple(rows[name].to_pylist() for name in ("id", "source", "text"))
    for name in ("shard", "token_start", "num_tokens", "crc32c", "count"):
        column = getattr(samples, name)
        np.testing.assert_array_equal(column, rows[name].to_numpy())
        # Counts of several parts add up.
        assert pa.from_numpy_dtype(column.dtype) == (pa.int64() if name == "count" else rows[name].type)


def test_tables_are_read_in_the_calling_thread_alone(tmp_path: Path) -> None:
    """A thread of Arrow that lets go of a Python object while the interpreter ends aborts the process."""
    write_store(tmp_path / "kv", random_source(small_spec(), [9, 9]))
    (part,) = (tmp_path / "kv" / "samples").glob("part-*.parquet")
    script = (
        "import sys, psutil; from kvstore.samples import read_part; from kvstore.storage import locate\n"
        "before = psutil.Process().num_threads()\n"
        "table = read_part(locate(sys.argv[1]), sys.argv[2], ['id', 'shard'])\n"
        "assert table.column_names == ['id', 'shard'] and len(table) == 2\n"
        "assert psutil.Process().num_threads() == before"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "kv"), f"samples/{part.name}"], check=True)


def test_rows_are_put_into_parts_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_store(tmp_path / "store", random_source(small_spec(), [1000] * 80), "q8")
    columns = ("ids", "source", "num_tokens", "count")
    store, storage = open_store(path), locate(path)
    before = [getattr(store.samples, column) for column in columns]
    shards = range(store.manifest.layout.num_shards)
    assert len(shards) > 3
    forget(storage, shards)
    monkeypatch.setattr("kvstore.compaction.PART_BYTES", 1)
    assert compact(storage) == len(shards)
    assert len(list((path / "samples").glob("part-*"))) == len(shards)
    after = open_store(path)
    for column, values in zip(columns, before, strict=True):
        np.testing.assert_array_equal(getattr(after.samples, column), values)
    assert after.manifest.fingerprint == store.manifest.fingerprint
    assert verify_store(str(path)).ok
