"""The checkpoints in a run's folder: written beside and renamed, so that one is there whole or not at all; the newest two are kept.

Knows names, order and the Trainer's record of where it was; `checkpoint_files` looks into the other files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, JsonValue

from training.records import Count, NotJsonError, Number, Record, parse, read_json

KEPT = 2
STATE = "trainer_state.json"
"""What the Trainer writes last into a checkpoint."""
_PREFIX = "checkpoint-"
_STAGING = ".checkpoint.partial"
_GONE = ".gone-"

_Interval = Annotated[FiniteFloat, Field(gt=0)]


class TrainerRecord(Record):
    """What the Trainer wrote of where it was, with the Trainer's own names and defaults."""

    global_step: Annotated[int, Field(ge=1, lt=2**53)]
    max_steps: Count = 0
    num_train_epochs: Count = 0
    epoch: FiniteFloat | None = None
    logging_steps: _Interval = 500
    eval_steps: _Interval = 500
    save_steps: _Interval = 500
    train_batch_size: Count | None = None
    num_input_tokens_seen: Count = 0
    total_flos: FiniteFloat = 0
    log_history: list[dict[str, Number]] | None = None
    best_metric: None = None
    best_global_step: None = None
    best_model_checkpoint: None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: Literal[False] = False
    trial_name: None = None
    trial_params: None = None
    stateful_callbacks: dict[str, JsonValue] | None = None


@contextlib.contextmanager
def advising(checkpoint: Path) -> Iterator[None]:
    """Add to an error about a checkpoint what can be done about it."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{error}; remove the folder {checkpoint} to continue with --resume from the checkpoint before it, or from the start where there is "
            "none, or choose another --out"
        ) from error


def is_checkpoint(name: str) -> bool:
    """Whether a run writes a checkpoint of that name."""
    number = name.removeprefix(_PREFIX)
    return name.startswith(_PREFIX) and number.isascii() and number.isdecimal()


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint is of, by its name."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def record_of(checkpoint: Path) -> TrainerRecord | None:
    """Where the Trainer was; None if the checkpoint was not written to its end.

    Raises:
        ValueError: the record is no regular file, is not of this step, or holds other values than the Trainer writes.
    """
    where = checkpoint / STATE
    try:
        found = read_json(where)
    except (FileNotFoundError, NotADirectoryError, NotJsonError):
        return None
    record = parse(TrainerRecord, found, str(where))
    if record.global_step != step_of(checkpoint):
        raise ValueError(
            f"{where}: global_step: got {record.global_step}, expected {step_of(checkpoint)}, as the folder is named"
        )
    return record


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end.

    Raises:
        ValueError: one that is newer is damaged.
    """
    return next((path for path in _by_age(folder) if _is_whole(path)), None)


def staging(folder: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return folder / _STAGING


def discard(folder: Path) -> None:
    """Remove what there is of a checkpoint that could not be written: it takes the room that is missing."""
    shutil.rmtree(staging(folder), ignore_errors=True)


def publish(folder: Path, step: int) -> None:
    """Give the checkpoint that was written its name, once it is on disk, and remove those that are too many."""
    staged = staging(folder) / f"{_PREFIX}{step}"
    for path in (*staged.rglob("*"), staged):
        _sync(path)
    staged.rename(folder / staged.name)
    _sync(folder)
    staging(folder).rmdir()
    for old in _by_age(folder)[KEPT:]:
        # Half of a checkpoint is never to be seen under its name.
        shutil.rmtree(old.rename(folder / f"{_GONE}{old.name}"))


def sweep(folder: Path) -> None:
    """Remove what killed processes left: checkpoints not written to their end, and those being written or removed."""
    unfinished = [path for path in _by_age(folder) if not _is_whole(path)]
    for path in (staging(folder), *folder.glob(f"{_GONE}*"), *unfinished):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _is_whole(checkpoint: Path) -> bool:
    with advising(checkpoint):
        return record_of(checkpoint) is not None


def _by_age(folder: Path) -> list[Path]:
    """All checkpoints, the newest first."""
    return sorted((path for path in folder.glob(f"{_PREFIX}*") if is_checkpoint(path.name)), key=step_of, reverse=True)


def _sync(path: Path) -> None:
    """Have the disk take what was written; folders cannot be opened everywhere, and where they cannot they need it not."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
