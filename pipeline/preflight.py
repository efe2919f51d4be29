"""What can be refused at once, before data is tokenised and a teacher loaded: a place that cannot be written, a missing GPU."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from kvstore.create import refuse_strangers
from kvstore.errors import StoreWriteError
from kvstore.manifest import MANIFEST
from kvstore.storage import Folder, Storage
from pipeline.config import ExtractConfig
from pipeline.executors.address import runs_elsewhere


def refuse_out(storage: Storage) -> None:
    """Make sure that a store is here or can be created here.

    Raises:
        StoreFormatError: there is something else.
        StoreWriteError: the folder cannot be written.
    """
    if storage.size(MANIFEST) is None:
        refuse_strangers(storage)
    if isinstance(storage, Folder):
        try:
            with tempfile.TemporaryFile(dir=existing_folder(storage.root)):
                pass
        except OSError as error:
            raise StoreWriteError(
                f"--out: {storage.root} cannot be written ({error}); mend its permissions, or choose another folder"
            ) from error


def existing_folder(path: Path) -> Path:
    """The path, or the nearest above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def refuse_device(config: ExtractConfig) -> None:
    """Refuse a GPU that is not there; of a running Ray cluster only Ray knows.

    Raises:
        ValueError: torch does not see it.
    """
    if not config.device.startswith("cuda") or runs_elsewhere(config.workers, config.ray_address):
        return
    number = config.device.partition(":")[2]
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen == 0 or (number.isdecimal() and int(number) >= seen):
        found = f"{seen} GPU(s), numbered from 0" if seen else "no GPU"
        raise ValueError(
            f"device: got {config.device}, but torch sees {found}; set device to cpu or auto, or install a CUDA build of torch"
        )
