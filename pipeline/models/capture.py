"""The tap: keys and values of a transformers model while it runs, the same way for teacher and student.

A forward pre-hook puts a pass-through object where an attention module expects its cache; the model itself runs with
`use_cache=False`. So K and V are seen once per layer as attention uses them, whatever the architecture, also under
non-reentrant gradient checkpointing, where model-level caches are off. Knows transformers' calling conventions and a
`KVSpec`; no store, no alignment, no training loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvstore.spec import KVSpec, RopeSpec, format_layers
from pipeline.models.rotary import RotaryTables, rotary_tables, unrotate

CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")
"""What attention modules of transformers call their cache."""

KeyValue = tuple[Float[Tensor, "batch kv_head token key_dim"], Float[Tensor, "batch kv_head token value_dim"]]
OnLayer = Callable[[int, Tensor, Tensor], None]
Rotation = tuple[RotaryTables, RopeSpec]
Sink = Callable[[int, Tensor, Tensor, object], KeyValue | None]
"""Called with layer number, key, value and the `position_embeddings` the attention module was given; a key and value it
returns are what that attention then uses."""


class CaptureError(ValueError):
    """Keys and values of this model cannot be captured truthfully: choose another model, or follow the message."""


class StopForward(BaseException):
    """Control flow, not an error: every wanted layer is captured. Like `GeneratorExit`, no `except Exception` sees it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionModule:
    """One self-attention module of a model."""

    layer: int
    name: str
    module: nn.Module
    cache_argument: str


def attention_modules(model: nn.Module) -> dict[int, AttentionModule]:
    """Self-attention modules by layer number: those that know their layer and take a cache.

    Raises:
        CaptureError: two modules claim the same layer.
    """
    found: dict[int, AttentionModule] = {}
    for name, module in model.named_modules():
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            continue
        # Decoder layers of some models also know their layer and take the cache; they are not called attention.
        if "attention" not in type(module).__name__.lower() and "attn" not in name.rpartition(".")[2]:
            continue
        parameters = inspect.signature(type(module).forward).parameters
        argument = next((argument for argument in CACHE_ARGUMENTS if argument in parameters), None)
        if argument is None:
            continue
        if layer in found and not name.startswith(found[layer].name + "."):
            raise CaptureError(
                f"{type(model).__name__}: layer {layer} has two attention modules, {found[layer].name} and {name}; "
                "kvpipe expects one self-attention module per layer"
            )
        found[layer] = AttentionModule(layer=layer, name=name, module=module, cache_argument=argument)
    return found


class _PassThroughCache:
    """What one attention call sees as its cache: it reports K and V and gives them back, or what the sink has for them."""

    def __init__(self, record: Callable[[Tensor, Tensor], KeyValue | None]) -> None:
        self._record = record

    def update(self, key: Tensor, value: Tensor, *_args: object, **_kwargs: object) -> tuple[Tensor, Tensor]:
        replaced = self._record(key, value)
        return (key, value) if replaced is None else replaced

    def get_seq_length(self, *_args: object) -> int:
        return 0


@contextlib.contextmanager
def tapped(modules: Iterable[AttentionModule], sink: Sink) -> Iterator[None]:
    """While open, every call of these attention modules reports its keys and values to `sink`."""
    with contextlib.ExitStack() as stack:
        for attention in modules:
            handle = attention.module.register_forward_pre_hook(_injector(attention, sink), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _injector(attention: AttentionModule, sink: Sink) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    parameters = list(inspect.signature(type(attention.module).forward).parameters)[1:]

    def inject(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = {**dict(zip(parameters, args, strict=False)), **kwargs}
        if named.get(attention.cache_argument) is not None:
            raise CaptureError(
                f"{attention.name}: got a {type(named[attention.cache_argument]).__name__}, expected no cache while "
                "the tap is open; call the model with use_cache=False"
            )
        embeddings = named.get("position_embeddings")
        cache = _PassThroughCache(lambda key, value: sink(attention.layer, key, value, embeddings))
        index = parameters.index(attention.cache_argument)
        if index < len(args):
            return (*args[:index], cache, *args[index + 1 :]), kwargs
        return args, {**kwargs, attention.cache_argument: cache}

    return inject


def modules_of(model: nn.Module, spec: KVSpec) -> list[AttentionModule]:
    """The attention modules of the layers of a spec.

    Raises:
        CaptureError: the model has no such layer.
    """
    known = attention_modules(model)
    if missing := [number for number in spec.layer_numbers if number not in known]:
        raise CaptureError(
            f"{type(model).__name__}: layers {format_layers(missing)} of the spec have no attention module here; the "
            f"model has layers {format_layers(known)}. Was the spec probed on another model?"
        )
    return [known[number] for number in spec.layer_numbers]


class Rotations:
    """How the keys of each layer were rotated in the forward that is running; to be cleared before the next."""

    def __init__(self, model: nn.Module, spec: KVSpec) -> None:
        self._model = type(model).__name__
        self._spec = spec
        self._tables: dict[int, tuple[object, RotaryTables]] = {}

    def clear(self) -> None:
        self._tables.clear()

    def of(self, layer: int, position_embeddings: object) -> Rotation | None:
        """What turns a key of the spec's domain into the one attention uses; None where they are the same.

        Raises:
            CaptureError: the spec says the layer rotates its keys, but this is no such table.
        """
        rope = self._spec.rope_of(layer) if self._spec.key_domain == "pre_rope" else None
        if rope is None:
            return None
        # Layers share one object per forward; comparing its halves costs a device synchronisation, so do it once.
        known = self._tables.get(id(position_embeddings))
        if known is None:
            tables = rotary_tables(position_embeddings, rope.rotary_dim // 2)
            if tables is None:
                raise CaptureError(
                    f"{self._model}: layer {layer} was given no rotary table of {rope.rotary_dim // 2} "
                    "frequencies, expected one as its spec says. Was the spec probed on another model?"
                )
            known = self._tables[id(position_embeddings)] = (position_embeddings, tables)
        return known[1], rope


class KVTap:
    """Context manager that captures keys and values of each forward of `model` run inside it.

    After a forward, `kv` maps layer number to (key, value), each `[batch, kv_head, token, dim]`, keys in the domain of the
    spec and both part of the autograd graph. Give it the model itself, not its DDP wrapper, and call either. The
    hooks may be gone before `backward`. Not to be shared between threads.

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
        self._modules = modules_of(model, self._spec)
        self._seen: dict[int, tuple[Tensor, Tensor, Rotation | None] | None] = {}
        self._rotations = Rotations(model, self._spec)
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

    def _begin(self, _model: nn.Module, _args: object) -> None:
        self.kv = {}
        self._seen.clear()
        self._rotations.clear()
        self._running = True
        self._wants_grad = torch.is_grad_enabled()

    def _record(self, layer: int, key: Tensor, value: Tensor, position_embeddings: object) -> None:
        # Outside a forward of the whole model, a call is the recomputation of a checkpointed layer in `backward`.
        if not self._running:
            return
        self._validate(layer, key, value)
        rotation = self._rotations.of(layer, position_embeddings)
        if self._on_layer is None:
            # Un-rotation waits for the end of the forward: inside a checkpointed layer, operations that its
            # recomputation does not repeat would make torch reject the backward pass.
            self._seen[layer] = (key, value, rotation)
        else:
            self._seen[layer] = None
            self._on_layer(layer, _without(rotation, key), value)
        if self._stop and len(self._seen) == len(self._modules):
            self._collect()
            raise StopForward

    def _validate(self, layer: int, key: Tensor, value: Tensor) -> None:
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
        expected = self._spec.layer(layer)
        got = (key.shape[1], key.shape[-1], value.shape[-1])
        if got != expected.geometry:
            raise CaptureError(
                f"layer {layer}: got K {list(key.shape)} and V {list(value.shape)}, expected (kv heads, key dim, value dim) "
                f"{expected.geometry} as the spec says. Was the spec probed on another model?"
            )

    def _finish(self, _model: nn.Module, _args: object, _output: object) -> None:
        if missing := [number for number in self._spec.layer_numbers if number not in self._seen]:
            raise CaptureError(f"{type(self._model).__name__}: layers {format_layers(missing)} gave no keys and values")
        self._collect()

    def _collect(self) -> None:
        self._running = False
        for layer, seen in self._seen.items():
            if seen is not None:
                key, value, rotation = seen
                self.kv[layer] = (_without(rotation, key), value)
        self._seen.clear()
        self._rotations.clear()


def _without(rotation: Rotation | None, key: Tensor) -> Tensor:
    return key if rotation is None else unrotate(key, *rotation)


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
