"""A training whose disk fills up: at whichever file, it ends in one message, and with room again in the model of an undisturbed run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.disks import on_a_small_disk

TRAIN = """
import json, shutil, sys
from pathlib import Path
from kvstore.errors import StoreWriteError
from tests.training.test_trainer import metrics, settings, weights
import training.trainer
from training.trainer import run_training

training.trainer.refuse_full_disk = lambda *_, **__: None  # others take the room after it was looked at
disk, store, student, whole = map(Path, sys.argv[1:5])
expected = run_training(settings(store, str(student), whole, save_every=3))
out = disk / "run"
refused = 0
for kib in map(int, sys.argv[5:]):
    leave(disk, kib)
    finished = True
    try:
        run_training(settings(store, str(student), out, save_every=3))
    except OSError as error:
        finished, refused = False, refused + 1
        told = str(error)
        assert isinstance(error, StoreWriteError), repr(error)
        assert told.startswith(f"{out}/") and "writing failed (" in told and " bytes are free there" in told, told
        assert "same command with --resume" in told and "\\n" not in told, told
    left = sorted(path.name for path in out.glob("*"))
    for checkpoint in out.glob("checkpoint-*"):
        json.loads((checkpoint / "trainer_state.json").read_bytes())
    assert not (out / "model").exists() or weights(out) == weights(whole), left
    assert not (out / "summary.json").exists() or finished, left
    (disk / "filler").unlink()
    run_training(settings(store, str(student), out, save_every=3, resume=(out / "run.json").exists()))
    assert metrics(out) == metrics(whole), kib
    assert weights(out) == weights(whole), kib
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    shutil.rmtree(out)
print(refused)
"""


def refusals(tmp_path: Path, store: Path, student: str, kib: list[int]) -> int:
    return int(on_a_small_disk(tmp_path / "disk", 4, TRAIN, store, student, tmp_path / "whole", *map(str, kib)))


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_a_training_in_one_message_and_room_lets_it_finish(
    store_path: Path, student: str, tmp_path: Path
) -> None:
    assert refusals(tmp_path, store_path, student, [60, 300, 800]) == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_disk_may_fill_up_at_any_file_of_a_training(store_path: Path, student: str, tmp_path: Path) -> None:
    found = refusals(tmp_path, store_path, student, [0, *range(4, 1200, 22)])
    print(f"\nfull at {found} places of a training, each resumed to equal metrics and weights")
    assert found >= 40
