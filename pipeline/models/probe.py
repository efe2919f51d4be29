"""Measuring a model's keys and values before trusting them: geometry, rotary convention, causality.

Nothing is inferred from a model's name. Shapes come from a real forward; the rotary convention of every layer comes from
feeding its attention one row repeated over all positions: then K varies with position through rotation alone, and the one
inverse that makes it constant is the right one. Knows no store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Collection, Iterator
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvstore.spec import Dtype, KeyDomain, KVSpec, LayerSpec, RopeKind, RopeSpec
from pipeline.models.capture import AttentionModule, CaptureError, attention_modules, evaluation_mode, tapped
from pipeline.models.rotary import RotaryTables, rotary_tables, unrotate

PROBE_TOKENS = 64
"""Enough positions for the fast frequencies to turn several times, few enough for any model's limit."""
CONSTANT = 0.05
"""Largest drift of a constant row. Measured on 36 architectures: 4e-7 in float32, 0.013 in
bfloat16."""
ROTATED = 0.2
"""Smallest drift under a wrong inverse. Measured on the same: 1.7."""
CAUSAL_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative change of earlier K and V that rounding explains when a later token changes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Observed:
    key: Float[Tensor, "batch kv_head token key_dim"]
    value: Float[Tensor, "batch kv_head token value_dim"]
    position_embeddings: object


def probe_kv_spec(model: nn.Module, key_domain: KeyDomain = "pre_rope") -> KVSpec:
    """Measure which layers have keys and values, of what shape, and how keys are rotated, with one short forward.

    Raises:
        CaptureError: the model has no K and V, disagrees with its own config, or uses a convention a `KVSpec` cannot say.
    """
    name = type(model).__name__
    attentions = attention_modules(model)
    observed: dict[int, _Observed] = {}
    if attentions:
        with _constant_rows(attentions.values()):
            observed = _observe(model, attentions.values(), _spread_ids(model, PROBE_TOKENS))
    if not observed:
        raise CaptureError(
            f"{name} (model_type {_config(model).model_type!r}) has no attention layer with keys and values to capture; "
            "choose a transformer decoder"
        )
    ropes: list[RopeSpec] = []
    layers = []
    for number, seen in sorted(observed.items()):
        where = f"{name}, layer {number} ({attentions[number].name})"
        _validate_geometry(where, seen, _config(model))
        rope = _rope_of(where, seen, _frequencies(model, seen.position_embeddings))
        if rope is not None and rope not in ropes:
            ropes.append(rope)
        layers.append(
            LayerSpec(
                layer=number,
                num_kv_heads=seen.key.shape[1],
                key_dim=seen.key.shape[-1],
                value_dim=seen.value.shape[-1],
                rope=None if rope is None else ropes.index(rope),
            )
        )
    return KVSpec(layers=tuple(layers), ropes=tuple(ropes), key_domain=key_domain, dtype=_dtype(name, observed))


def probe_causal(model: nn.Module) -> None:
    """Make sure that changing the last token leaves all earlier keys and values alone.

    Raises:
        CaptureError: it does not, so what is stored for a token would depend on the tokens after it.
    """
    modules = attention_modules(model).values()
    ids = _spread_ids(model, 8)
    changed = ids.clone()
    changed[:, -1] = ids[:, 0]
    before, after = _observe(model, modules, ids), _observe(model, modules, changed)
    for number, first in before.items():
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
    ids = (torch.arange(min(num_tokens, limit)) * 7919 + 11) % rows
    return ids.unsqueeze(0).to(cast(torch.device, transformer.device))


def _observe(model: nn.Module, modules: Collection[AttentionModule], input_ids: Int[Tensor, "1 token"]) -> dict[int, _Observed]:
    """Keys, values and rotary tables of one forward as the attention modules have them."""
    observed: dict[int, _Observed] = {}

    def record(layer: int, key: Tensor, value: Tensor, position_embeddings: object) -> None:
        if layer in observed:
            raise CaptureError(f"{type(model).__name__}: layer {layer} ran twice in one forward, so it has no one K and V")
        observed[layer] = _Observed(key=key, value=value, position_embeddings=position_embeddings)

    with torch.inference_mode(), evaluation_mode(model), tapped(modules, record):
        model(input_ids=input_ids, use_cache=False)
    return observed


@contextlib.contextmanager
def _constant_rows(modules: Collection[AttentionModule]) -> Iterator[None]:
    """While open, these attention modules read their last input row at every position."""

    def repeat_last(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "hidden_states" in kwargs:
            hidden = kwargs["hidden_states"]
            return args, {**kwargs, "hidden_states": hidden[:, -1:].expand_as(hidden).contiguous()}
        return (args[0][:, -1:].expand_as(args[0]).contiguous(), *args[1:]), kwargs

    with contextlib.ExitStack() as stack:
        for attention in modules:
            stack.callback(attention.module.register_forward_pre_hook(repeat_last, with_kwargs=True).remove)
        yield


def _validate_geometry(where: str, seen: _Observed, config: Any) -> None:
    """Refuse tensors a `LayerSpec` cannot describe or the model's config contradicts."""
    shapes = f"K {list(seen.key.shape)}, V {list(seen.value.shape)}"
    if seen.key.ndim != 4 or seen.value.ndim != 4 or seen.key.shape[:3] != seen.value.shape[:3]:
        raise CaptureError(f"{where}: got {shapes}, expected both [batch, kv_head, token, dim] with equal heads")
    if not (torch.isfinite(seen.key).all() and torch.isfinite(seen.value).all()):
        raise CaptureError(f"{where}: keys or values are not finite ({shapes}, {seen.key.dtype}); damaged weights?")
    if (drift := _drift(seen.value, seen.value)) > CONSTANT:
        raise CaptureError(
            f"{where}: the cached value tensor is rotated (drift {drift:.2g}), as in multi-head latent attention "
            f"({shapes}); kvpipe cannot store that yet, choose a model that caches plain keys and values"
        )
    if seen.key.shape[1] > 1 and torch.equal(seen.key[:, 0], seen.key[:, 1]):
        raise CaptureError(
            f"{where}: KV heads 0 and 1 are equal: this model caches K and V already repeated for its "
            f"{config.num_attention_heads} query heads ({shapes}); kvpipe would store every head several times, choose another"
        )
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if seen.key.shape[1] != heads:
        raise CaptureError(
            f"{where}: got {shapes}, so {seen.key.shape[1]} KV heads, expected {heads} (config: num_key_value_heads "
            f"{getattr(config, 'num_key_value_heads', None)}, num_attention_heads {config.num_attention_heads}, "
            f"hidden_size {config.hidden_size}); kvpipe refuses to guess which one is right"
        )


def _dtype(name: str, observed: dict[int, _Observed]) -> Dtype:
    dtypes = {tensor.dtype for seen in observed.values() for tensor in (seen.key, seen.value)}
    if len(dtypes) > 1 or not dtypes <= CAUSAL_TOLERANCE.keys():
        raise CaptureError(f"{name}: got keys and values in {dtypes}, expected one of float32, float16 or bfloat16")
    return cast(Dtype, str(dtypes.pop()).removeprefix("torch."))


def _rope_of(where: str, seen: _Observed, frequencies: tuple[tuple[float, ...], float] | None) -> RopeSpec | None:
    """Find the one inverse rotation that makes the keys of a constant row constant; None if they already are."""
    drifts: dict[RopeSpec | None, float] = {None: _drift(seen.key, seen.key)}
    if frequencies is not None:
        inv_freq, scaling = frequencies
        tables = rotary_tables(seen.position_embeddings, len(inv_freq))
        assert tables is not None, "frequencies were verified against these tables"
        kinds: tuple[RopeKind, ...] = ("half", "interleaved") if len(inv_freq) > 1 else ("half",)  # equal for one pair
        last = seen.key.shape[-1] - 2 * len(inv_freq)
        for kind, start in itertools.product(kinds, {0, last} if last >= 0 else ()):
            rope = RopeSpec(kind=kind, inv_freq=inv_freq, start=start, attention_scaling=scaling)
            drifts[rope] = _drift(unrotate(seen.key, tables, rope), seen.key)
    best, *others = sorted(drifts, key=drifts.__getitem__)
    if drifts[best] <= CONSTANT and all(drifts[other] >= ROTATED for other in others):
        return best
    tried = ", ".join(
        f"{f'{rope.kind} from channel {rope.start}' if rope else 'none'} {drift:.2g}" for rope, drift in drifts.items()
    )
    raise CaptureError(
        f"{where}: cannot tell how keys are rotated"
        f"{'' if frequencies else ' (no rotary table of a known rotary module reaches the attention module)'}; drift of "
        f"a constant row by convention: {tried}, expected one below {CONSTANT} and all others above {ROTATED}. "
        "kvpipe does not support this model's position embedding; choose another model"
    )


def _drift(restored: Float[Tensor, "batch kv_head token dim"], seen: Float[Tensor, "batch kv_head token dim"]) -> float:
    """Largest change of any channel over positions, relative to the size of that channel as seen.

    Relative to the channel, because Qwen2's key biases make some of them a hundred times larger than others.
    """
    size = seen.float().abs().amax(dim=2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    change = (restored.float() - restored.float()[:, :, :1]).abs()
    return (change / size).max().item()


def _frequencies(model: nn.Module, position_embeddings: object) -> tuple[tuple[float, ...], float] | None:
    """Frequencies and scaling of the rotary module whose tables these are; None if it is none of the model's."""
    tables = rotary_tables(position_embeddings)
    if tables is None:
        return None
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or buffer.shape != tables[0].shape[-1:]:
                continue
            scaling = float(getattr(module, name.replace("inv_freq", "attention_scaling"), 1.0))
            if _tables_match(tables, buffer, scaling):
                return tuple(buffer.float().tolist()), scaling
    return None


def _tables_match(tables: RotaryTables, inv_freq: Float[Tensor, " freq"], scaling: float) -> bool:
    cos, sin = tables
    angle = torch.arange(cos.shape[1], device=cos.device)[:, None] * inv_freq.to(cos.device, torch.float32)
    # Relative, because slow frequencies differ between ropes only in small sines; 2**-7 covers tables in bfloat16.
    return all(
        torch.allclose(seen, (expected * scaling).expand_as(seen), rtol=2**-7, atol=2e-5)
        for seen, expected in ((cos, angle.cos()), (sin, angle.sin()))
    )
