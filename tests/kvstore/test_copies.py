"""A store handed to another process sees there what it saw here, whatever others have written in between."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from kvstore import FingerprintMismatchError, Store, open_store
from kvstore.compaction import compact
from kvstore.drop import drop_samples
from kvstore.storage import locate
from tests.stores import begin_store, random_source, small_spec, write_shard
from training.mixture import Mixture


@pytest.mark.parametrize("in_tables", [False, True], ids=["records", "tables"])
def test_a_pickled_store_numbers_the_same_samples_although_the_store_has_grown(in_tables: bool, tmp_path: Path) -> None:
    source = random_source(small_spec(), [64] * 4)
    manifest, calibration, tasks = begin_store(tmp_path, source, "raw")
    for shard in (1, 3):
        write_shard(tmp_path, source, manifest, calibration, shard, tasks[shard])
    seen = open_store(tmp_path)
    mixture = Mixture([seen])
    in_pickle = pickle.dumps((seen, mixture))
    for shard in (0, 2):  # before and between those seen, as several extractions of one store commit them
        write_shard(tmp_path, source, manifest, calibration, shard, tasks[shard])
    if in_tables:
        compact(locate(tmp_path))
    for copy in pickle.loads(in_pickle):
        assert len(copy) == 2
        assert copy.samples.ids == seen.samples.ids
        assert copy.read([0, 1]).input_ids.tolist() == [*source.input_ids[1], *source.input_ids[3]]
        assert copy.read([1]).key.tobytes() == seen.read([1]).key.tobytes()
    assert len(open_store(tmp_path)) == 4


def test_a_pickled_store_is_refused_where_samples_were_dropped_meanwhile(tmp_path: Path) -> None:
    source = random_source(small_spec(), [64] * 4)
    manifest, calibration, tasks = begin_store(tmp_path, source, "raw")
    for shard, task in enumerate(tasks):
        write_shard(tmp_path, source, manifest, calibration, shard, task)
    in_pickle = pickle.dumps(Store(str(tmp_path)))
    drop_samples(str(tmp_path), open_store(tmp_path).samples.ids[:1])
    with pytest.raises(FingerprintMismatchError, match=r"holds other samples than when the store was opened; .*Start again"):
        pickle.loads(in_pickle)
