"""Letting attention work on other keys and values than its own: the tap in the other direction.

Keys are given and taken in the domain of the spec; what rotates them is undone before and redone after, with the tables the
module itself used. Knows neither what the replacement is (a codec, a store, zeros) nor what the model then predicts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from kvstore.spec import KVSpec
from pipeline.models.capture import CaptureError, KeyValue, Rotations, modules_of, tapped
from pipeline.models.rotary import rotate, unrotate

Replace = Callable[[int, Tensor, Tensor], KeyValue]
"""Called with layer number, key and value `[batch, kv_head, token, dim]`, keys in the domain of the spec; returns what attention
is to use instead, of the same shapes, dtype and device."""


@contextlib.contextmanager
def substituted(model: nn.Module, spec: KVSpec, replace: Replace, layers: Sequence[int] | None = None) -> Iterator[None]:
    """While open, attention of these layers works on what `replace` gives; call the model with `use_cache=False`.

    Layers above see the consequences, so a later layer is called with keys and values that follow from the replacement. Not
    to be shared between threads, and not to be opened together with a `KVTap` on the same model.

    Args:
        layers: numbers of the layers to replace; all of the spec if None.

    Raises:
        CaptureError: the model lacks such a layer, or `replace` gave tensors of another kind; raised by the forward.
    """
    chosen = spec.select(spec.layer_numbers if layers is None else layers)
    rotations = Rotations(model, chosen)

    def swap(layer: int, key: Tensor, value: Tensor, position_embeddings: object) -> KeyValue:
        rotation = rotations.of(layer, position_embeddings)
        own = key if rotation is None else unrotate(key, *rotation)
        new_key, new_value = replace(layer, own, value)
        for kind, new, old in (("key", new_key, key), ("value", new_value, value)):
            if (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
                raise CaptureError(
                    f"layer {layer}: the replaced {kind} is {_describe(new)}, expected {_describe(old)} as attention has it. "
                    "Is it of another sample, or of another model?"
                )
        return (new_key if rotation is None else rotate(new_key, *rotation)), new_value

    with tapped(modules_of(model, chosen), swap):
        forgetting = model.register_forward_pre_hook(lambda *_: rotations.clear())
        try:
            yield
        finally:
            forgetting.remove()


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
