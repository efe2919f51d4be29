"""Letting attention work on other keys and values than its own: the tap in the other direction.

Keys are given and taken in the domain of the spec; what rotates them is undone before and redone after, with the tables the
module itself used. Knows neither what the replacement is (a codec, a store, zeros) nor what the model then predicts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from kvstore.spec import KVSpec
from pipeline.models.attention import CaptureError, attention_modules, tapped
from pipeline.models.capture import require_layers
from pipeline.models.passage import KeyValue, Passages

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
    wanted = set(chosen.layer_numbers)
    passages = Passages(model, chosen)
    seen: set[int] = set()

    def begin(*_: object) -> None:
        passages.clear()
        seen.clear()

    def swap(layer: int, key: Tensor, value: Tensor, tables: object) -> KeyValue | None:
        if layer not in wanted:
            return None
        seen.add(layer)
        passage = passages.of(layer, key, value, tables)
        own_key, own_value = passage.to_spec(key, value)
        new_key, new_value = replace(layer, own_key, own_value)
        for kind, new, old in (("key", new_key, own_key), ("value", new_value, own_value)):
            if (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
                raise CaptureError(
                    f"layer {layer}: the replaced {kind} is {_describe(new)}, expected {_describe(old)} as attention has it. "
                    "Is it of another sample, or of another model?"
                )
        return passage.to_attention(new_key, new_value)

    with contextlib.ExitStack() as stack:
        stack.enter_context(tapped(attention_modules(model), swap))
        stack.callback(model.register_forward_pre_hook(begin).remove)
        stack.callback(model.register_forward_hook(lambda *_: require_layers(model, wanted, seen)).remove)
        yield


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
