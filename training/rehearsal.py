"""What a run does for the first time only after hours, tried before its first step: saving, and the room for it.

Costs no copy of the weights: they are saved with their last axis empty, and the room they take is counted.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import logging

from pipeline.align.same_tokens import tokenizer_differences
from pipeline.models.load import load_tokenizer
from pipeline.models.resolve import one_line
from training import checkpoints
from training.checkpoint_files import WEIGHTS
from training.run_folder import MODEL, TRIAL

_TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id")
_MODES = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")
"""Settings that decide which others mean anything."""
_GENERATION_ERRORS = (ValueError, TypeError, AttributeError, KeyError)
"""What transformers raises for settings that contradict each other, or are of wrong types."""


def settle_generation(model: PreTrainedModel) -> list[str]:
    """Drop generation settings that transformers refuses to save, as few as can be, and return their names.

    Loading only warns of them, but a config that was changed since, as the Trainer changes it, is not saved with them.

    Raises:
        ValueError: a special token is no token id.
    """
    given = model.generation_config
    if given is None:
        return []
    for name in _TOKENS:
        ids = getattr(given, name)
        if not (ids is None or all(isinstance(token, int) for token in (ids if isinstance(ids, list) else [ids]))):
            raise ValueError(
                f"student: generation_config.json: {name}: got {ids!r:.80}, expected a token id or a list of them; mend the file"
            )
    if _is_consistent(given):
        return []
    fields = [name for name in given.to_diff_dict() if not name.startswith("_") and name != "transformers_version"]
    settled, dropped = GenerationConfig(), []
    for name in sorted(fields, key=lambda name: (name not in _TOKENS, name not in _MODES)):
        candidate = copy.copy(settled)
        setattr(candidate, name, getattr(given, name))
        if _is_consistent(candidate):
            settled = candidate
        else:
            dropped.append(name)
    model.generation_config = settled
    return dropped


def negative_tokens(settings: GenerationConfig | None) -> list[str]:
    """Special tokens of generation settings that are negative numbers, which name no token."""
    given = {name: getattr(settings, name, None) for name in _TOKENS}
    return [name for name, ids in given.items() if any(token < 0 for token in (ids if isinstance(ids, list) else [ids or 0]))]


def _is_consistent(settings: GenerationConfig) -> bool:
    try:
        settings.validate(strict=True)
    except _GENERATION_ERRORS:
        return False
    return True


@contextlib.contextmanager
def trial_folder(out: Path) -> Iterator[Path]:
    """A folder on the disk of a run, gone afterwards whatever happens.

    Raises:
        ValueError: nothing can be written there.
    """
    try:
        # Beside the run's folder where there is none: a run that is refused leaves nothing.
        parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        folder = tempfile.TemporaryDirectory(prefix=TRIAL, dir=parent)
    except OSError as error:
        raise ValueError(f"out: {out} cannot be written ({error}); mend its permissions, or choose another --out") from error
    with folder as name:
        yield Path(name)


def rehearse_saving(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, say: Callable[[str], object] = lambda _: None
) -> None:
    """Save what a run leaves at its end, but for the numbers in the weights; load it again.

    Args:
        say: told where AutoTokenizer, which goes by the model's type, will take the saved tokenizer for another.

    Raises:
        ValueError: the student cannot be saved, or what is saved is another model, or nothing can be written.
    """
    with trial_folder(out) as folder:
        _save_hollow(model, folder, published_names=True)
        with _refusing("its tokenizer cannot be saved and loaded again"):
            tokenizer.save_pretrained(folder)
            if changed := tokenizer_differences(load_tokenizer(folder), tokenizer):
                if tokenizer_differences(PreTrainedTokenizerFast.from_pretrained(folder), tokenizer):
                    raise ValueError(f"the loaded one gives other ids: {changed[0]}")
                say(
                    f"warning: transformers goes by the student's model type, {model.config.model_type}, so that AutoTokenizer will load the saved "
                    f"tokenizer as another ({changed[0]}); load it with PreTrainedTokenizerFast.from_pretrained"
                )
        with _refusing("what is saved of it cannot be loaded again"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            if model.can_generate():
                GenerationConfig.from_pretrained(folder)
            with torch.device("meta"):
                again = AutoModelForCausalLM.from_config(config)
            if _shapes(again) != _shapes(model):
                raise ValueError("its config describes a model of other weights")


def rehearse_checkpoint(model: PreTrainedModel, out: Path) -> None:
    """Save what a checkpoint has of the student, with its adapters and LoRA layers.

    Raises:
        ValueError: it cannot be saved, or weights would not be found again when a run is continued.
    """
    with trial_folder(out) as folder:
        _save_hollow(model, folder, published_names=False)
        with _refusing("a checkpoint of it cannot be continued from"), safe_open(folder / WEIGHTS, framework="pt") as saved:
            if lost := _own_weights(model).keys() ^ set(saved.keys()):
                raise ValueError(f"weights get other names when they are saved: {sorted(lost)[:3]}")


def refuse_full_disk(
    out: Path, model: nn.Module, *, steps: int, save_every: int, sharded: bool, say: Callable[[str], None]
) -> None:
    """Compare what the run will write with what is free; warn where only the newest checkpoint and the model find room.

    Raises:
        ValueError: not even they do.
    """
    weights = _bytes(_own_weights(model).values())
    moments = 2 * _bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    checkpoint, number = (2 if sharded else 1) * weights + moments, (steps - 1) // save_every
    least = weights + min(number, 1) * checkpoint
    most = max(min(number, checkpoints.KEPT + 1) * checkpoint, min(number, checkpoints.KEPT) * checkpoint + weights)
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free + _replaced_bytes(out)
    needs = f"out: {parent} has {free / 1e9:,.2f} GB free, and a checkpoint takes {checkpoint / 1e9:,.2f} GB, the model {weights / 1e9:,.2f} GB"
    if free < least:
        raise ValueError(f"{needs}, expected room for one of each; make room, or choose another --out")
    if free < most:
        say(
            f"{needs}: too little for the {most / 1e9:,.2f} GB they take together at most; make room, or save less often with --set save_every=..."
        )


def _save_hollow(model: PreTrainedModel, folder: Path, *, published_names: bool) -> None:
    """Save a student with the last axis of every weight empty: names, files and settings as in earnest."""
    with _refusing("it cannot be saved"), _without_bars():
        hollow = {name: tensor[..., :0] if tensor.ndim else tensor for name, tensor in _own_weights(model).items()}
        model.save_pretrained(folder, state_dict=hollow, save_original_format=published_names)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _own_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are saved: of those that share their numbers one; the others are no copies, here either."""
    weights: dict[str, Tensor] = remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
    return weights


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _replaced_bytes(out: Path) -> int:
    """What earlier parts of the run wrote and this part replaces."""
    folders = [path for path in out.glob("*") if path.name == MODEL or checkpoints.is_checkpoint(path.name)]
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever goes wrong here would go wrong after hours
        raise ValueError(
            f"student: {what} ({one_line(error)}); nothing was trained. Mend the student's folder, or choose another"
        ) from error
