"""What a training leaves on disk, on machines whose clock is set and for users who share them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvstore.errors import CorruptShardError
from tests.training.test_trainer import ReadsOfTraining, metrics, settings, weights
from training.trainer import run_training

HOUR_S = 3600.0


@pytest.mark.slow
def test_after_the_clock_was_set_back_the_newest_checkpoints_are_kept(
    store_path: Path, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(store_path, student, tmp_path / "run", save_every=2)
    training = ReadsOfTraining(monkeypatch, fail_at=6)
    with pytest.raises(CorruptShardError, match="injected"):
        run_training(config)
    training.fail_at = None
    before = sorted(config.out.glob("checkpoint-*"))
    assert [path.name for path in before] == ["checkpoint-2", "checkpoint-4"]
    for path in before:  # as the disk has them when an hour is taken back
        os.utime(path, (path.stat().st_mtime + HOUR_S,) * 2)
    run_training(config.model_copy(update={"resume": True}))
    assert sorted(path.name for path in config.out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    straight = run_training(settings(store_path, student, tmp_path / "straight", save_every=2))
    assert metrics(config.out) == metrics(straight.out)
    assert weights(config.out) == weights(straight.out)


@pytest.mark.parametrize("umask", [pytest.param(0o022, id="022"), pytest.param(0o077, id="077", marks=pytest.mark.slow)])
def test_files_of_a_run_have_the_permissions_that_the_umask_leaves(
    umask: int, store_path: Path, student: str, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        run_training(settings(store_path, student, tmp_path / "run", save_every=4))
    finally:
        os.umask(before)
    found = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert any(path.name == "optimizer.pt" for path in found)
    for path in found:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
