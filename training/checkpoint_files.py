"""Whether the files of a checkpoint are what a run of this student wrote, seen before any of them is loaded.

Torch's files are opened by its reader of plain tensors and numbers alone, so no code of theirs runs. What the Trainer would take over
without looking (an optimizer's state, a schedule, random states) is compared with what it has to replace.
"""

from __future__ import annotations

import math
import random
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.trainer_pt_utils import safe_globals

from training.checkpoints import STATE, advising, record_of
from training.records import read_json, refuse_irregular

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.pt"
SCHEDULE = "scheduler.pt"
_INDEX = f"{WEIGHTS}.index.json"
_SHARDED = ("pytorch_model_fsdp.bin", "optimizer.bin")
_FOREIGN = ("scaler.pt", "pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin", "adapter_model.safetensors")
"""Files that the Trainer would load and that a run never writes."""
_MAX_PICKLE_BYTES = 64 * 2**20
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
"""What AdamW keeps of each parameter."""


def refuse_damaged(checkpoint: Path, student: nn.Module, *, sharded: bool = False) -> None:
    """Look through the files of a checkpoint, but for the tensors in them.

    Args:
        student: what the weights are to be loaded into.
        sharded: the run shards its weights over the ranks, and so wrote them once more in torch's own format.

    Raises:
        ValueError: a file is missing, damaged, of another student, or of a kind that a run never writes; the file is named.
    """
    with advising(checkpoint):
        _refuse_foreign(checkpoint)
        record = record_of(checkpoint)
        if record is None:
            raise ValueError(f"{checkpoint / STATE}: got nothing, or no JSON, expected what the Trainer writes")
        if "TrainerControl" not in (record.stateful_callbacks or {}):
            raise ValueError(
                f"{checkpoint / STATE}: stateful_callbacks: got no TrainerControl, expected it, as the Trainer writes it"
            )
        _refuse_other_weights(checkpoint, student)
        for name in (*(_SHARDED if sharded else (OPTIMIZER,)), SCHEDULE):
            read_tensors(checkpoint / name)
        randoms = sorted(checkpoint.glob("rng_state*.pth"))
        if not randoms:
            raise ValueError(f"{checkpoint}: got no rng_state.pth, expected the random states of each rank")
        for path in randoms:
            _refuse_other_random_state(path)


def read_tensors(path: Path) -> Any:
    """What `torch.save` wrote, the tensors not read but mapped.

    Raises:
        ValueError: it is no such file, or holds something else than tensors, numbers, texts and collections of them.
    """
    refuse_irregular(path)
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise ValueError(f"{path}: not a file that torch.save wrote ({error}); it is truncated or damaged") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or any(
        entry.file_size > _MAX_PICKLE_BYTES for entry in entries if entry.filename.endswith(".pkl")
    ):
        raise ValueError(f"{path}: got compressed or huge records, expected a file as torch.save writes it")
    try:
        with safe_globals():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a reader that is fed arbitrary bytes raises whatever comes to it
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(
            f"{path}: got a file that cannot be read as tensors and numbers alone ({reason}), expected what the run wrote; none of its code was "
            "run"
        ) from None


def _refuse_foreign(checkpoint: Path) -> None:
    for name in _FOREIGN:
        if (checkpoint / name).exists():
            raise ValueError(f"{checkpoint / name}: got a file that the Trainer would load and no run writes, expected none")
    config = read_json(checkpoint / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("transformers_version"), str | None):
        raise ValueError(f"{checkpoint / 'config.json'}: got other JSON than a model's config, expected what the run wrote")


def _refuse_other_weights(checkpoint: Path, student: nn.Module) -> None:
    """Names and shapes must be the student's: the Trainer leaves out what it does not find, and keeps the first step's weights there."""
    expected = student.state_dict()
    present: set[str] = set()
    for file in _weight_files(checkpoint):
        for name, shape in _tensors_of(file):
            wanted = tuple(expected[name].shape) if name in expected else "no such weight"
            if shape != wanted:
                raise ValueError(f"{file}: {name}: got shape {shape}, expected {wanted}, as the student has it")
            present.add(name)
    stored = {expected[name].data_ptr() for name in present}
    missing = sorted(name for name in expected.keys() - present if expected[name].data_ptr() not in stored)
    if missing:
        raise ValueError(
            f"{checkpoint / WEIGHTS}: got no weights for {missing[:3]} ({len(missing)} in all), expected all of the student's"
        )


def _weight_files(checkpoint: Path) -> list[Path]:
    if not (checkpoint / _INDEX).exists():
        return [checkpoint / WEIGHTS]
    index = read_json(checkpoint / _INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    files = list(names.values()) if isinstance(names, dict) else []
    if not files or not all(isinstance(name, str) and Path(name).name == name for name in files):
        raise ValueError(f"{checkpoint / _INDEX}: got no weight_map of plain file names, expected one")
    return [checkpoint / name for name in sorted(set(files))]


def _tensors_of(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    refuse_irregular(file)
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # no mapping
                yield name, tuple(tensors.get_slice(name).get_shape())
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file ({error}); it is truncated or damaged") from error


def _refuse_other_random_state(path: Path) -> None:
    """Try random states on generators of their own."""
    found = read_tensors(path)
    try:
        random.Random().setstate(found["python"])
        np.random.RandomState().set_state(found["numpy"])
        torch.Generator().set_state(found["cpu"])
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        raise ValueError(
            f"{path}: got no random states of python, numpy and cpu ({error}), expected what the run wrote"
        ) from error


def refuse_other_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Compare a saved optimizer with the one it is to be loaded into: parameters, shapes and kinds of values.

    Raises:
        ValueError: they differ.
    """
    found, own = read_tensors(path), optimizer.state_dict()
    groups, states = (found.get("param_groups"), found.get("state")) if isinstance(found, dict) else (None, None)
    if not isinstance(groups, list) or not isinstance(states, dict) or len(groups) != len(own["param_groups"]):
        raise ValueError(
            f"{path}: got no state and {len(own['param_groups'])} param_groups of an optimizer, expected what the run wrote"
        )
    for number, (theirs, ours) in enumerate(zip(groups, own["param_groups"], strict=True)):
        if not isinstance(theirs, dict) or theirs.get("params") != ours["params"]:
            raise ValueError(f"{path}: param_groups[{number}].params: got others than this run trains, expected the same")
        _refuse_unlike(theirs, ours, f"{path}: param_groups[{number}]")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, state in states.items():
        parameter = parameters[number] if isinstance(number, int) and 0 <= number < len(parameters) else None
        if parameter is None or not isinstance(state, dict) or state.keys() != _MOMENTS:
            raise ValueError(f"{path}: state[{number!r:.40}]: got another entry, expected {sorted(_MOMENTS)} of a parameter")
        if not all(_fits(name, value, parameter) for name, value in state.items()):
            raise ValueError(
                f"{path}: state[{number}]: got another shape than {tuple(parameter.shape)}, expected that of the parameter"
            )


def refuse_other_schedule(path: Path, schedule: Any, step: int) -> None:
    """Compare a saved learning-rate schedule with the one it is to be loaded into.

    Raises:
        ValueError: it is of other settings, or at another step.
    """
    found, own = read_tensors(path), schedule.state_dict()
    if not isinstance(found, dict):
        raise ValueError(f"{path}: got a {type(found).__name__}, expected a learning-rate schedule")
    for name, value in {**{name: own[name] for name in ("base_lrs", "lr_lambdas")}, "last_epoch": step}.items():
        if found.get(name) != value:
            raise ValueError(f"{path}: {name}: got {found.get(name)!r:.80}, expected {value!r}")
    _refuse_unlike(found, own, str(path))


def _refuse_unlike(found: Mapping[Any, Any], own: Mapping[str, Any], where: str) -> None:
    """Compare kinds of values; a flag may be missing that another version of torch added."""
    for name in found.keys() | own.keys():
        if name not in own:
            raise ValueError(f"{where}: got a field {name!r:.40}, expected none of that name")
        if not (_alike(found[name], own[name]) if name in found else _is_flag(own[name])):
            raise ValueError(f"{where}: {name}: got {found.get(name)!r:.80}, expected a value such as {own[name]!r:.80}")


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _alike(found: Any, own: Any) -> bool:
    """Whether a value is of the same kind: numbers finite, collections with as many of the same kind."""
    if _is_flag(own):
        return _is_flag(found)
    if isinstance(own, int | float):
        return isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    if isinstance(own, list | tuple):
        return type(found) is type(own) and len(found) == len(own) and all(map(_alike, found, own))
    if isinstance(own, Mapping):
        return isinstance(found, dict) and found.keys() == own.keys() and all(_alike(found[name], own[name]) for name in own)
    return type(found) is type(own)


def _fits(name: str, value: Any, parameter: Tensor) -> bool:
    """Whether it is a moment of the parameter, or the number of its steps."""
    shape = torch.Size(()) if name == "step" else parameter.shape
    return isinstance(value, Tensor) and value.shape == shape and value.dtype.is_floating_point
