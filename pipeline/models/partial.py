"""Leaving out what nobody reads: the blocks of a decoder above the last wanted layer, and its output head.

The config stays as it is, for some models compute with the number of layers (MiniCPM scales by it). Such a model gives keys and
values of its lower layers; a forward that comes to its end raises, so it never gives wrong logits.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from pipeline.models.attention import attention_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LEFT_OUT = "kvpipe_left_out"
"""Attribute of a model with the names of what it lacks."""


def is_partial(model: nn.Module) -> bool:
    """Whether something was left out."""
    return hasattr(model, _LEFT_OUT)


def leave_out_above(model: PreTrainedModel, last_layer: int) -> None:
    """Remove what only layers above `last_layer` need, in place.

    Nothing is removed where the model does not tell what that is: its layers are in no common list, number themselves out of order,
    or share weights with what stays.
    """
    blocks = _blocks_above(model, last_layer)
    head = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if module is head and not _is_shared(model, [name])]
    if not blocks or _is_shared(model, [*blocks, *heads]):
        return
    name, _, first = blocks[0].rpartition(".")
    del model.get_submodule(name)[int(first) :]
    for head_name in heads:
        parent, _, child = head_name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
    left_out = [*blocks, *heads]
    if is_partial(model):
        left_out += getattr(model, _LEFT_OUT)
    else:
        model.register_forward_hook(_refuse)
    setattr(model, _LEFT_OUT, left_out)


def partial_class(kind: type[PreTrainedModel], last_layer: int) -> type[PreTrainedModel]:
    """A class like `kind` whose models lack from the start what is above a layer: its weights are neither read nor missed."""

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        leave_out_above(self, last_layer)
        patterns = [f"^{re.escape(name)}\\." for name in getattr(self, _LEFT_OUT, ())]
        self._keys_to_ignore_on_load_unexpected = {*(self._keys_to_ignore_on_load_unexpected or ()), *patterns}

    return type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__})


def _refuse(model: nn.Module, _args: object, _output: object) -> NoReturn:
    names = getattr(model, _LEFT_OUT)
    raise RuntimeError(
        f"{type(model).__name__} ran to its end without {len(names)} of its parts (first: {names[0]}), expected a forward that stops at "
        "the last layer there is; load the whole model"
    )


def _blocks_above(model: PreTrainedModel, last_layer: int) -> list[str]:
    """Names of the blocks that follow the one with this layer in the decoder's list; none where they are no such list."""
    layer_of = {attention.name: attention.layer for attention in attention_modules(model)}
    if None in layer_of.values():
        return []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        blocks = [f"{name}.{index}" for index in range(len(module))]
        layers = [[layer for attention, layer in layer_of.items() if attention.startswith(f"{block}.")] for block in blocks]
        at = next((index for index, within in enumerate(layers) if last_layer in within), None)
        if at is not None:
            above = [layer for within in layers[at + 1 :] for layer in within]
            ordered = min((layer for layer in above if layer is not None), default=last_layer + 1) > last_layer
            return blocks[at + 1 :] if ordered and sum(map(len, layers)) == len(layer_of) else []
    return []


def _is_shared(model: PreTrainedModel, names: list[str]) -> bool:
    """Whether a weight of these modules is one of the others too."""
    within = tuple(f"{name}." for name in names)
    return any(one.startswith(within) != other.startswith(within) for one, other in model.all_tied_weights_keys.items())
