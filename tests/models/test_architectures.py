"""Every class transformers has a causal language model for: its row in the table is true, and what the tap gives is what the
model itself computes.

Two references that share no code with the tap: the model's own cache, and the keys that enter the model's own rotary function.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kvstore.spec import KVSpec
from pipeline.align.rope import rotate
from pipeline.models.attention import attention_modules
from pipeline.models.capture import KVTap
from tests.models.architectures import DOCUMENT, EXACT, RAW_ONLY, Row, measured, rows_of, table
from tests.models.zoo import MODEL_TYPES, full_length_cache

COMMITTED = rows_of(DOCUMENT.read_text(encoding="utf-8"))
FLOAT32_ROUNDING = 4e-7
"""Largest error of an un-rotated key over the largest key: a rotation and its inverse in float32."""
TABLE_ROUNDING = 2e-5
"""The same where angles are computed anew from the spec's frequencies: at 40 positions they round a little differently."""
NORMED_AFTERWARDS = {"nanochat": "k_norm", "llama4": "qk_norm", "llama4_text": "qk_norm"}
"""Norms without weights between rotation and cache; they commute with the rotation. By the name the attention module has for it."""

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about its classes


def token_ids(model_type: str) -> Tensor:
    return torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(len(model_type)))


@contextlib.contextmanager
def rotary_calls(model: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What goes into and comes out of every rotary function of the attention modules' own code while this is open."""
    calls: list[tuple[Tensor, Tensor]] = []

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            results = result if isinstance(result, (tuple, list)) else (result,)
            given = [tensor for tensor in (*args, *kwargs.values()) if isinstance(tensor, Tensor) and tensor.ndim == 4]
            given = [tensor for tensor in given if len(tensor) == len(results[0])]  # some hand over tables of four axes
            for before, after in zip(given, results, strict=False):
                # DeepSeek keeps pairs side by side and puts them half by half as it rotates.
                pairs = before.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
                calls.append((pairs if "interleave" in function.__name__ else before, after))
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for kind in {type(attention.module) for attention in attention_modules(model)}:
            for place in (inspect.getmodule(kind), kind):
                for name, value in list(vars(place).items()):
                    if "apply" in name and "rotary" in name:
                        static = isinstance(value, staticmethod)
                        function = recording(value.__func__ if static else value)
                        patch.setattr(place, name, staticmethod(function) if static else function)
        yield calls


def before_rotation(attended: Tensor, calls: list[tuple[Tensor, Tensor]], norm: Any) -> Tensor:
    """The attended states with what came out of a rotary function replaced by what went into it."""
    dim = attended.shape[-1]
    for given, result in calls:
        for entering, leaving in ((given, result), (given.transpose(1, 2), result.transpose(1, 2))):
            if norm is not None:
                entering, leaving = norm(entering), norm(leaving)
            width = leaving.shape[-1]
            for start in {0, dim - width} if width <= dim else ():
                if torch.equal(attended[..., start : start + width], leaving):
                    return torch.cat([attended[..., :start], entering, attended[..., start + width :]], dim=-1)
    raise AssertionError("no rotary function of the model gave these")


def assert_close(got: Tensor, expected: Tensor, bound: float) -> None:
    assert got.shape == expected.shape
    error = float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
    assert error <= bound, error


def prove(
    model_type: str, model: Any, spec: KVSpec, rounding: float = FLOAT32_ROUNDING, table_rounding: float = TABLE_ROUNDING
) -> None:
    """Compare what the tap captures of every layer, in both domains, with the references."""
    ids = token_ids(model_type)
    post_rope = KVSpec.from_json({**spec.to_json(), "key_domain": "post_rope"})
    cache = full_length_cache(model)
    with torch.inference_mode():
        with rotary_calls(model) as calls:
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        with KVTap(model, post_rope) as after:
            again = model(input_ids=ids, use_cache=False).logits
        with KVTap(model, spec) as before:
            model(input_ids=ids, use_cache=False)
    assert torch.equal(again, logits), "the tap changes nothing"
    norm_of = {
        attention.layer: getattr(attention.module, NORMED_AFTERWARDS.get(model_type, ""), None)
        for attention in attention_modules(model)
    }
    for layer in spec.layers:
        own = cache.layers[layer.layer]
        repeats = own.keys.shape[1] // layer.num_kv_heads
        reference = {"key": own.keys[:, ::repeats], "value": own.values[:, ::repeats]}
        assert all(torch.equal(states, states[:, ::repeats].repeat_interleave(repeats, 1)) for states in (own.keys, own.values))
        _turning, still = ("value", "key") if layer.latent else ("key", "value")
        rope = spec.rope_of(layer.layer)
        for kind, got_after, got_before in zip(("key", "value"), after.kv[layer.layer], before.kv[layer.layer], strict=True):
            assert torch.equal(got_after, reference[kind])
            if kind == still or rope is None:
                assert torch.equal(got_before, reference[kind])
                continue
            truth = before_rotation(own.keys if kind == "key" else own.values, calls, norm_of.get(layer.layer))[:, ::repeats]
            assert_close(got_before, truth, rounding)
            assert_close(rotate(got_before, torch.arange(ids.shape[1]), rope), reference[kind], table_rounding)
            assert not torch.equal(got_before, reference[kind]), "rotation matters here"


@pytest.mark.parametrize("model_type", sorted(MODEL_TYPES))
def test_the_row_of_a_class_is_true_and_what_it_says_is_captured_is_the_models_own(model_type: str) -> None:
    row, model, spec = measured(model_type)
    assert row == COMMITTED[model_type], "if this is meant: python -m tests.models.architectures"
    assert (spec is not None) == (row.status in (EXACT, RAW_ONLY))
    if spec is not None:
        prove(model_type, model, spec)


def test_the_table_has_every_class_and_counts_them() -> None:
    rows = [COMMITTED[model_type] for model_type in sorted(MODEL_TYPES)]
    assert {row.model_type: row.class_name for row in rows} == MODEL_TYPES
    assert table(rows) == DOCUMENT.read_text(encoding="utf-8")
    assert sum(row.status == EXACT for row in rows) >= 35


def test_a_row_read_back_is_the_row_written() -> None:
    row = Row(
        class_name="GPT2LMHeadModel", model_type="gpt2", status=EXACT, layers="0 of 1", geometry="a", rotation="b", notes=""
    )
    assert rows_of(table([row])) == {"gpt2": row}
