"""What killed writers leave in a store goes with the next that finishes, whichever command it is."""

from __future__ import annotations

from pathlib import Path

from kvstore.rewrite import merge_stores, recode_store
from kvstore.verify import verify_store
from tests.stores import random_source, small_spec, write_store


def leave(store: Path) -> None:
    """As a writer does that is killed while it compresses a shard."""
    folder = store / ".staging" / "shard-00001-0123456789abcdef" / "c" / "0"
    folder.mkdir(parents=True)
    (folder / "0").write_bytes(b"half of a chunk")


def test_a_finished_merge_or_recode_has_nothing_left_of_killed_ones(tmp_path: Path) -> None:
    spec = small_spec()
    first, second = (write_store(tmp_path / name, random_source(spec, [64, 40], seed), "raw") for seed, name in enumerate("ab"))
    leave(tmp_path / "merged")
    merge_stores([str(first), str(second)], str(tmp_path / "merged"))
    leave(tmp_path / "recoded")
    recode_store(str(first), "q8", str(tmp_path / "recoded"))
    for name in ("merged", "recoded"):
        report = verify_store(str(tmp_path / name), deep=True)
        assert (report.ok, report.orphans) == (True, ())
        assert not [path for path in (tmp_path / name / ".staging").rglob("*") if path.is_file()]
