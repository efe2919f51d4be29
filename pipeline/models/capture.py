"""The tap: keys and values of a transformers model while it runs, the same way for teacher and student.

Attention modules are tapped one by one (`attention`) and the model itself runs with `use_cache=False`. So K and V are seen once
per layer as attention uses them, whatever the architecture, also under non-reentrant gradient checkpointing, where model-level
caches are off. Knows a `KVSpec`; no store, no alignment, no training loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from types import TracebackType

import torch
from jaxtyping import Int
from torch import Tensor, nn

from kvstore.spec import KVSpec, format_layers
from pipeline.models.attention import CaptureError, attention_modules, tapped
from pipeline.models.passage import KeyValue, Passage, Passages

__all__ = ["CaptureError", "KVTap", "KeyValue", "OnLayer", "StopForward", "capture_kv", "evaluation_mode"]

OnLayer = Callable[[int, Tensor, Tensor], None]


class StopForward(BaseException):
    """Control flow, not an error: every wanted layer is captured. Like `GeneratorExit`, no `except Exception` sees it."""


class KVTap:
    """Context manager that captures keys and values of each forward of `model` run inside it.

    After a forward, `kv` maps layer number to (key, value), each `[batch, kv_head, token, dim]`, keys in the domain of the
    spec and both part of the autograd graph. Give it the model itself, not its DDP wrapper, and call either. The
    hooks may be gone before `backward`, and the same object entered again for the next forward. Not to be shared between threads.

    Args:
        layers: numbers of the layers wanted; all of the spec if None.
        on_layer: called with (layer, key, value) as each layer computes them, for inference only; `kv` then stays empty.
        stop: abandon the forward at the last wanted layer; the `with` block ends there, silently.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: KVSpec,
        layers: Sequence[int] | None = None,
        on_layer: OnLayer | None = None,
        stop: bool = False,
    ) -> None:
        self.kv: dict[int, KeyValue] = {}
        self._model = model
        self._spec = spec.select(spec.layer_numbers if layers is None else layers)
        self._on_layer = on_layer
        self._stop = stop
        self._modules = attention_modules(model)
        self._wanted = set(self._spec.layer_numbers)
        self._seen: dict[int, tuple[Tensor, Tensor, Passage] | None] = {}
        self._passages = Passages(model, self._spec)
        self._running = False
        self._wants_grad = False
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> KVTap:
        self._hooks.enter_context(tapped(self._modules, self._record))
        self._hooks.callback(self._model.register_forward_pre_hook(self._begin).remove)
        self._hooks.callback(self._model.register_forward_hook(self._finish).remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> bool:
        self._hooks.close()
        self._running = False
        return self._stop and kind is StopForward

    def take(self) -> dict[int, KeyValue]:
        """What the last forward left in `kv`, no longer kept here: between steps its graph would take memory."""
        taken, self.kv = self.kv, {}
        return taken

    def _begin(self, _model: nn.Module, _args: object) -> None:
        self.kv = {}
        self._seen.clear()
        self._passages.clear()
        self._running = True
        self._wants_grad = torch.is_grad_enabled()

    def _record(self, layer: int, key: Tensor, value: Tensor, tables: object) -> None:
        # Outside a forward of the whole model, a call is the recomputation of a checkpointed layer in `backward`.
        if not self._running or layer not in self._wanted:
            return
        self._validate(layer, key)
        passage = self._passages.of(layer, key, value, tables)
        if self._on_layer is None:
            # Un-rotation waits for the end of the forward: inside a checkpointed layer, operations that its
            # recomputation does not repeat would make torch reject the backward pass.
            self._seen[layer] = (key, value, passage)
        else:
            self._seen[layer] = None
            self._on_layer(layer, *passage.to_spec(key, value))
        if self._stop and len(self._seen) == len(self._wanted):
            self._collect()
            raise StopForward

    def _validate(self, layer: int, key: Tensor) -> None:
        if self._wants_grad and not torch.is_grad_enabled():
            raise RuntimeError(
                f"layer {layer}: keys and values have no gradient, because reentrant gradient checkpointing runs the forward "
                "without one; enable checkpointing with use_reentrant=False"
            )
        if self._on_layer is not None and key.requires_grad:
            raise CaptureError(
                f"layer {layer}: on_layer was called with gradients on; run it under torch.inference_mode(), or leave "
                "on_layer out and read `kv` after the forward"
            )
        if layer in self._seen:
            raise CaptureError(
                f"{type(self._model).__name__}: layer {layer} ran twice in one forward; kvpipe expects one call per layer"
            )

    def _finish(self, _model: nn.Module, _args: object, _output: object) -> None:
        require_layers(self._model, self._wanted, self._seen)
        self._collect()

    def _collect(self) -> None:
        self._running = False
        for layer, seen in self._seen.items():
            if seen is not None:
                key, value, passage = seen
                self.kv[layer] = passage.to_spec(key, value)
        self._seen.clear()
        self._passages.clear()


def require_layers(model: nn.Module, wanted: Collection[int], seen: Collection[int]) -> None:
    """Make sure that a forward gave keys and values of all wanted layers.

    Raises:
        CaptureError: it did not.
    """
    if missing := set(wanted) - set(seen):
        raise CaptureError(
            f"{type(model).__name__}: layers {format_layers(missing)} of the spec gave no keys and values, only "
            f"{format_layers(seen)} did. Was the spec probed on another model?"
        )


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off, and afterwards back on where it was on."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def capture_kv(
    model: nn.Module,
    spec: KVSpec,
    input_ids: Int[Tensor, "batch token"],
    layers: Sequence[int] | None = None,
    on_layer: OnLayer | None = None,
) -> dict[int, KeyValue]:
    """Run the model just far enough to capture these layers; returns them, or nothing where `on_layer` takes them.

    Sequences are padded on the right and need no attention mask: no position of a causal model sees what follows it.
    What is returned are inference tensors; `clone()` one before a loss with gradients uses it.
    """
    tap = KVTap(model, spec, layers, on_layer, stop=True)
    with torch.inference_mode(), evaluation_mode(model), tap:
        model(input_ids=input_ids, use_cache=False)
    return tap.kv
