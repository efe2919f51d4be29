"""Where a transformers model hands keys and values over, and how to step in there.

A module that takes a cache and calls its `update` is an attention module with keys and values: that is in its code, whatever
its name. A forward pre-hook puts a pass-through object where the module expects the cache, so K and V are seen as attention
uses them. Knows transformers' calling conventions; no geometry, no store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")
"""What attention modules of transformers call their cache."""

Sink = Callable[[int, Tensor, Tensor, object], tuple[Tensor, Tensor] | None]
"""Called with layer number, key, value and the rotary tables of that attention call, if it has any; a key and value it returns
are what that attention then uses."""


class CaptureError(ValueError):
    """Keys and values of this model cannot be captured truthfully: choose another model, or follow the message."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionModule:
    """One module of a model that hands keys and values to a cache."""

    name: str
    module: nn.Module
    cache_argument: str

    @property
    def layer(self) -> int | None:
        """The layer it believes to be; None where only its caller knows, as where several layers share one module."""
        number = getattr(self.module, "layer_idx", getattr(self.module, "layer_id", None))
        return number if isinstance(number, int) and number >= 0 else None


def attention_modules(model: nn.Module) -> list[AttentionModule]:
    """All modules that take a cache and call its `update`, in the order of the model."""
    return [
        AttentionModule(name=name, module=module, cache_argument=argument)
        for name, module in model.named_modules()
        if (argument := _cache_argument(type(module).forward)) is not None
    ]


@functools.cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments of a method, without the object's own."""
    return tuple(inspect.signature(forward).parameters)[1:]


@functools.cache
def _cache_argument(forward: Callable[..., Any]) -> str | None:
    forward = inspect.unwrap(forward)
    if "update" not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return None
    parameters = inspect.signature(forward).parameters
    return next((argument for argument in CACHE_ARGUMENTS if argument in parameters), None)


class _PassThroughCache:
    """What one attention call sees as its cache: it reports K and V and gives them back, or what the sink has for them."""

    def __init__(self, record: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor] | None], config: Any) -> None:
        self._record = record
        self._config = config

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_args: object, **_kwargs: object) -> tuple[Tensor, Tensor]:
        replaced = self._record(layer_idx, key, value)
        return (key, value) if replaced is None else replaced

    def get_seq_length(self, *_args: object) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        # Some attention modules also keep short convolutions or index keys there: they find what a new cache would have.
        from transformers import DynamicCache

        if self._config is None or not (name == "layers" or hasattr(DynamicCache, name)):
            raise AttributeError(name)
        return getattr(self._fresh, name)

    @functools.cached_property
    def _fresh(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._config)


@contextlib.contextmanager
def tapped(modules: Iterable[AttentionModule], sink: Sink) -> Iterator[None]:
    """While open, every call of these attention modules reports its keys and values to `sink`."""
    with contextlib.ExitStack() as stack:
        for attention in modules:
            own_tables: list[object] = []
            for module in attention.module.modules():
                if module is not attention.module and hasattr(module, "inv_freq"):
                    stack.callback(module.register_forward_hook(_keeper(own_tables)).remove)
            injector = _injector(attention, sink, own_tables)
            stack.callback(attention.module.register_forward_pre_hook(injector, with_kwargs=True).remove)
        yield


def _keeper(tables: list[object]) -> Callable[[nn.Module, Any, object], None]:
    def keep(_module: nn.Module, _args: Any, output: object) -> None:
        tables[:] = [output]

    return keep


def _injector(
    attention: AttentionModule, sink: Sink, own_tables: list[object]
) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    parameters = _parameters(type(attention.module).forward)
    config = getattr(attention.module, "config", None)

    def inject(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = {**dict(zip(parameters, args, strict=False)), **kwargs}
        if named.get(attention.cache_argument) is not None:
            raise CaptureError(
                f"{attention.name}: got a {type(named[attention.cache_argument]).__name__}, expected no cache while "
                "the tap is open; call the model with use_cache=False"
            )
        own_tables.clear()
        given = _given_tables(module, named)

        def record(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
            return sink(layer, key, value, own_tables[0] if given is None and own_tables else given)

        cache = _PassThroughCache(record, config)
        index = parameters.index(attention.cache_argument)
        if index < len(args):
            return (*args[:index], cache, *args[index + 1 :]), kwargs
        return args, {**kwargs, attention.cache_argument: cache}

    return inject


def _given_tables(module: nn.Module, named: dict[str, Any]) -> object:
    """Cosines and sines an attention module rotates by, where they come to it from outside or lie in its buffer."""
    if (given := named.get("position_embeddings")) is not None:
        return given
    packed = named.get("sinusoidal_pos")  # RoFormer
    positions, buffer = named.get("position_ids"), getattr(module, "embed_positions", None)  # GPT-J, CodeGen
    if packed is None and isinstance(buffer, Tensor) and isinstance(positions, Tensor):
        packed = buffer.to(positions.device)[positions]
    if packed is None:
        return None
    sin, cos = packed.reshape(-1, *packed.shape[-2:]).chunk(2, dim=-1)
    return cos, sin
