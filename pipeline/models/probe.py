"""Measuring a model's keys and values before trusting them: geometry, rotary convention, causality.

Nothing is inferred from a model's name. Shapes come from a real forward, the rotary convention of every layer from `rope_probe`.
Three forwards of at most 64 tokens in all. Knows no store.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvstore.spec import Dtype, KeyDomain, KVSpec, LayerSpec, RopeSpec
from pipeline.models.attention import AttentionModule, CaptureError, Sink, attention_modules, tapped
from pipeline.models.capture import StopForward, evaluation_mode
from pipeline.models.passage import is_repeated
from pipeline.models.rope_probe import CONSTANT, constant_rows, drift, find_rope

PROBE_TOKENS = 64
"""Enough positions for the fast frequencies to turn several times, few enough for any model's limit."""
CAUSAL_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative change of earlier K and V that rounding explains when a later token changes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Observed:
    attention: AttentionModule
    key: Float[Tensor, "batch kv_head token key_dim"]
    value: Float[Tensor, "batch kv_head token value_dim"]
    tables: object


def probe_kv_spec(model: nn.Module, key_domain: KeyDomain = "pre_rope", last_layer: int | None = None) -> KVSpec:
    """Measure which layers have keys and values, of what shape, and how keys are rotated, with one short forward.

    Args:
        last_layer: the forward ends there; layers above are not in the spec. None for all.

    Raises:
        CaptureError: the model has no K and V, disagrees with its own config, or uses a convention a `KVSpec` cannot say.
    """
    name = type(model).__name__
    modules = attention_modules(model)
    with constant_rows(modules):
        observed = _observe(model, modules, _spread_ids(model, PROBE_TOKENS), last_layer)
    if not observed:
        raise CaptureError(
            f"{name} (model_type {_config(model).model_type!r}) has no attention layer with keys and values to capture: none of "
            "its modules gave any to a cache; choose a transformer decoder"
        )
    ropes: list[RopeSpec] = []
    layers = []
    for number, seen in sorted(observed.items()):
        where = f"{name}, layer {number} ({seen.attention.name})"
        _refuse_not_finite(model, where, seen)
        num_kv_heads, latent = _validate_geometry(where, seen, _config(model))
        rope = find_rope(where, seen.value if latent else seen.key, seen.tables, model)
        if rope is not None and rope not in ropes:
            ropes.append(rope)
        layers.append(
            LayerSpec(
                layer=number,
                num_kv_heads=num_kv_heads,
                key_dim=seen.key.shape[-1],
                value_dim=seen.value.shape[-1],
                rope=None if rope is None else ropes.index(rope),
                latent=latent,
            )
        )
    return KVSpec(layers=tuple(layers), ropes=tuple(ropes), key_domain=key_domain, dtype=_dtype(name, observed))


def probe_causal(model: nn.Module, last_layer: int | None = None) -> None:
    """Make sure that changing the last token leaves all earlier keys and values alone.

    Args:
        last_layer: the last layer looked at; None for all.

    Raises:
        CaptureError: it does not, so what is stored for a token would depend on the tokens after it.
    """
    modules = attention_modules(model)
    ids = _spread_ids(model, 8)
    changed = ids.clone()
    changed[:, -1] = ids[:, 0]
    before, after = (_observe(model, modules, tokens, last_layer) for tokens in (ids, changed))
    for number, first in before.items():
        _refuse_not_finite(model, f"{type(model).__name__}, layer {number} ({first.attention.name})", first)
        for kind, old, new in (("K", first.key, after[number].key), ("V", first.value, after[number].value)):
            change = ((new - old)[:, :, :-1].abs().max() / old.abs().max().clamp_min(1e-30)).item()
            if not change <= CAUSAL_TOLERANCE[old.dtype]:
                raise CaptureError(
                    f"{type(model).__name__}: attention is not causal: {kind} of earlier positions in layer {number} changed "
                    f"by {change:.1e} with the last token, expected at most {CAUSAL_TOLERANCE[old.dtype]:.0e}; "
                    "kvpipe needs a decoder that reads left to right"
                )


def length_dependent_rope(config: Any) -> int | None:
    """Longest sequence, in tokens, whose rotary frequencies do not depend on its length; None if none ever do.

    Types `dynamic` and `longrope` choose the frequencies from the longest position in the batch: a sequence up to this
    length must not share a batch with, or be padded to, more.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    per_layer_type = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    limits = [
        int(rope.get("original_max_position_embeddings") or text.max_position_embeddings)
        for rope in per_layer_type
        if rope.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=None)


def _config(model: nn.Module) -> Any:
    return cast(Any, model).config.get_text_config()


def _spread_ids(model: nn.Module, num_tokens: int) -> Int[Tensor, "1 token"]:
    """Different token ids from the whole vocabulary, the same every time."""
    transformer = cast(Any, model)
    rows: int = transformer.get_input_embeddings().weight.shape[0]
    limit: int = getattr(_config(model), "max_position_embeddings", None) or num_tokens
    num_tokens = min(num_tokens, limit) if limit > 0 else num_tokens  # XLNet says -1 for none
    ids = (torch.arange(num_tokens) * 7919 + 11) % rows
    return ids.unsqueeze(0).to(cast(torch.device, transformer.device))


def _observe(
    model: nn.Module, modules: Collection[AttentionModule], input_ids: Int[Tensor, "1 token"], last_layer: int | None
) -> dict[int, _Observed]:
    """Keys, values and rotary tables of one forward as the attention modules have them."""
    observed: dict[int, _Observed] = {}
    name = type(model).__name__

    def sink_of(attention: AttentionModule) -> Sink:
        def record(layer: int, key: Tensor, value: Tensor, tables: object) -> None:
            if layer in observed:
                raise CaptureError(
                    f"{name}: layer {layer} ran twice in one forward ({observed[layer].attention.name}, then {attention.name}), so "
                    "it has no one K and V"
                )
            if last_layer is None or layer <= last_layer:
                observed[layer] = _Observed(attention=attention, key=key, value=value, tables=tables)
            if last_layer is not None and layer >= last_layer:
                raise StopForward

        return record

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(StopForward))
        stack.enter_context(torch.inference_mode())
        stack.enter_context(evaluation_mode(model))
        for attention in modules:
            stack.enter_context(tapped([attention], sink_of(attention)))
        try:
            model(input_ids=input_ids, use_cache=False)
        except (AttributeError, KeyError, TypeError) as error:
            raise CaptureError(
                f"{name}: a forward of {input_ids.shape[1]} tokens with the tap failed ({type(error).__name__}: {error}); kvpipe "
                "cannot run this model on token ids alone, or not with something in the place of its cache. Choose another model"
            ) from error
    return observed


def _validate_geometry(where: str, seen: _Observed, config: Any) -> tuple[int, bool]:
    """Number of KV heads and whether the layer is latent; refuses what a `LayerSpec` cannot describe or the config contradicts."""
    shapes = f"K {list(seen.key.shape)}, V {list(seen.value.shape)}"
    if seen.key.ndim != 4 or seen.value.ndim != 4 or seen.key.shape[:3] != seen.value.shape[:3]:
        raise CaptureError(f"{where}: got {shapes}, expected both [batch, kv_head, token, dim] with equal heads")
    num_heads = seen.key.shape[1]
    latent = _is_latent(seen)
    if not latent and (drifting := drift(seen.value, seen.value)) > CONSTANT:
        raise CaptureError(
            f"{where}: values are rotated as keys are (drift {drifting:.2g}; {shapes}), which kvpipe's records cannot say; choose "
            "a model that rotates keys only"
        )
    repeats = next(n for n in range(num_heads, 0, -1) if num_heads % n == 0 and _both_repeated(seen, n))
    declared = _declared_heads(config)
    if not latent and declared and num_heads // repeats not in declared.values():
        raise CaptureError(
            f"{where}: got {shapes}, so {num_heads // repeats} KV heads, expected one of the numbers in its config ({declared}, "
            f"hidden_size {config.hidden_size}); kvpipe refuses to guess which one is right"
        )
    return num_heads // repeats, latent


def _refuse_not_finite(model: nn.Module, where: str, seen: _Observed) -> None:
    """Tell a broken row of the embedding, which loading may leave to the samples that have it, from numbers that overflow."""
    if torch.isfinite(seen.key).all() and torch.isfinite(seen.value).all():
        return
    ids = _spread_ids(model, PROBE_TOKENS)[0]
    rows = cast(Any, model).get_input_embeddings().weight[ids]
    broken = ids[~torch.isfinite(rows).all(dim=1)].tolist()
    cause = (
        f"the embedding of tokens {broken[:3]} is NaN or infinite; download or convert the checkpoint again"
        if broken
        else "are its weights damaged, or do its numbers overflow? Try --dtype bfloat16 or float32"
    )
    raise CaptureError(
        f"{where}: keys or values are not finite (K {list(seen.key.shape)}, V {list(seen.value.shape)}, {seen.key.dtype}), expected finite "
        f"numbers: {cause}"
    )


def _is_latent(seen: _Observed) -> bool:
    """Whether K is a compressed latent and V the key part all heads share, as the module itself names their sizes."""
    module = seen.attention.module
    sizes = (1, getattr(module, "kv_lora_rank", None), getattr(module, "qk_rope_head_dim", None))
    return (seen.key.shape[1], seen.key.shape[-1], seen.value.shape[-1]) == sizes


def _both_repeated(seen: _Observed, repeats: int) -> bool:
    return is_repeated(seen.key, repeats) and is_repeated(seen.value, repeats)


def _declared_heads(config: Any) -> dict[str, int]:
    """Every number of heads a config names, of layers of any kind."""

    def walk(fields: Mapping[Any, Any]) -> Iterator[tuple[str, int]]:
        for name, value in fields.items():
            if isinstance(value, dict):
                yield from walk(value)
            elif isinstance(value, int) and "heads" in str(name):
                yield name, value
            elif name == "multi_query" and value is True:
                yield name, 1

    return dict(walk(config.to_dict()))  # some of its tables have layer numbers or labels for keys


def _dtype(name: str, observed: dict[int, _Observed]) -> Dtype:
    dtypes = {tensor.dtype for seen in observed.values() for tensor in (seen.key, seen.value)}
    if len(dtypes) > 1 or not dtypes <= CAUSAL_TOLERANCE.keys():
        raise CaptureError(f"{name}: got keys and values in {dtypes}, expected one of float32, float16 or bfloat16")
    return cast(Dtype, str(dtypes.pop()).removeprefix("torch."))
