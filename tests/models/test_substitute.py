"""What is substituted is what attention uses: nothing changes for its own keys and values, everything for others."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvstore.spec import KVSpec
from pipeline.models.attention import CaptureError
from pipeline.models.capture import KVTap
from pipeline.models.probe import probe_kv_spec
from pipeline.models.substitute import substituted
from tests.checkpoints import tiny_model
from tests.models.zoo import full_length_cache, zoo_model

PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
YARN = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "llama": ("llama", {}),
    "llama-yarn": ("llama", YARN),
    "qwen3": ("qwen3", {}),
    "gpt_neox-partial": ("gpt_neox", {}),
    "phi3-partial": ("phi3", PARTIAL),
    "gemma3-two-ropes": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    "cohere-interleaved": ("cohere", {}),
    "gpt2": ("gpt2", {}),
}
FROM_THE_ZOO = {
    "latent": "deepseek_v3",
    "latent-unrotated": "kimi_linear",
    "repeated-heads": "falcon",
    "tables-in-a-buffer": "gptj",
    "tables-made-inside": "recurrent_gemma",
    "backwards": "nanochat",
    "convolved": "zaya",
}
every_architecture = pytest.mark.parametrize("name", [*ARCHITECTURES, *FROM_THE_ZOO])


@cache
def cached_model(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, KVSpec]:
    if name in FROM_THE_ZOO:
        model = zoo_model(FROM_THE_ZOO[name], dtype)
    else:
        model_type, over = ARCHITECTURES[name]
        model = tiny_model(model_type, dtype=dtype, **over)
    return model, probe_kv_spec(model)


def input_ids(seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(seed))


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def itself(_layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return key, value


@every_architecture
def test_its_own_keys_and_values_change_nothing(name: str) -> None:
    model, spec = cached_model(name)
    expected = logits_of(model, input_ids())
    with substituted(model, spec, itself):
        got = logits_of(model, input_ids())
    if all(layer.rope is None for layer in spec.layers):
        assert torch.equal(got, expected)
    assert relative_error(got, expected) <= 1e-4
    assert torch.equal(logits_of(model, input_ids()), expected), "closed, nothing is left behind"


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_in_bfloat16_rotating_again_costs_about_one_rounding(name: str) -> None:
    model, spec = cached_model(name, torch.bfloat16)
    expected = logits_of(model, input_ids())
    with substituted(model, spec, itself):
        got = logits_of(model, input_ids())
    assert relative_error(got, expected) <= (0.05 if name == "qwen2" else 0.0)


@every_architecture
def test_values_of_zero_in_one_layer_change_the_prediction(name: str) -> None:
    model, spec = cached_model(name)
    expected = logits_of(model, input_ids())
    with substituted(model, spec, lambda _, key, value: (key, torch.zeros_like(value)), layers=spec.layer_numbers[:1]):
        assert relative_error(logits_of(model, input_ids()), expected) > 0.01


@every_architecture
def test_only_the_layers_listed_are_replaced_with_keys_as_the_tap_gives_them(name: str) -> None:
    model, spec = cached_model(name)
    called: dict[int, tuple[Tensor, Tensor]] = {}

    def record(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        assert layer not in called
        called[layer] = (key, value)
        return key, value

    with KVTap(model, spec) as tap:
        logits_of(model, input_ids())
    chosen = sorted({spec.layer_numbers[0], spec.layer_numbers[-2:][0]})
    with substituted(model, spec, record, layers=chosen):
        logits_of(model, input_ids())
    assert list(called) == chosen
    for layer, (key, value) in called.items():
        torch.testing.assert_close(key, tap.kv[layer][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(value, tap.kv[layer][1], rtol=1e-4, atol=1e-4)


@every_architecture
def test_keys_and_values_of_another_run_give_what_attention_over_its_cache_gives(name: str) -> None:
    """The last layer alone reads another text's keys and values; transformers' own cache class is the reference."""
    model, spec = cached_model(name)
    with KVTap(model, spec) as tap:
        logits_of(model, input_ids(seed=1))
    last = spec.layer_numbers[-1]
    other, other_rotated = tap.kv[last], full_length_cache(model)
    with torch.inference_mode():
        model(input_ids=input_ids(seed=1), past_key_values=other_rotated, use_cache=True)

    class LastLayerOfTheOther(DynamicCache):
        def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            own = super().update(key, value, layer_idx, *args, **kwargs)
            there = other_rotated.layers[layer_idx]
            return (there.keys, there.values) if layer_idx == last else own

    with torch.inference_mode():
        cache = full_length_cache(model, LastLayerOfTheOther)
        expected = model(input_ids=input_ids(), past_key_values=cache, use_cache=True).logits
    with substituted(model, spec, lambda *_: other, layers=[last]):
        got = logits_of(model, input_ids())
    assert relative_error(got, expected) <= 1e-4
    assert relative_error(logits_of(model, input_ids()), expected) > 0.01


def test_two_forwards_of_different_length_use_the_tables_of_each() -> None:
    model, spec = cached_model("gemma3-two-ropes")
    texts = [input_ids(), input_ids()[:, :17], input_ids(seed=2)]
    expected = [logits_of(model, ids) for ids in texts]
    with substituted(model, spec, itself):
        got = [logits_of(model, ids) for ids in texts]
    assert all(relative_error(one, other) <= 1e-4 for one, other in zip(got, expected, strict=True))


def test_keys_after_rotation_are_given_as_they_are() -> None:
    model, spec = cached_model("qwen2")
    expected = logits_of(model, input_ids())
    with substituted(model, KVSpec.from_json({**spec.to_json(), "key_domain": "post_rope"}), itself):
        assert torch.equal(logits_of(model, input_ids()), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda t: t[:, :, :-1], r"is \[2, 2, 39, 16\] float32 on cpu, expected \[2, 2, 40, 16\] float32", id="shape"
        ),
        pytest.param(
            lambda t: t.double(), r"is \[2, 2, 40, 16\] float64 on cpu, expected \[2, 2, 40, 16\] float32", id="dtype"
        ),
    ],
)
def test_tensors_of_another_kind_are_refused_and_hooks_are_gone(change: Any, message: str) -> None:
    model, spec = cached_model("qwen2")
    expected = logits_of(model, input_ids())
    with (
        pytest.raises(CaptureError, match=f"layer 0: the replaced value {message}"),
        substituted(model, spec, lambda _, key, value: (key, change(value))),
    ):
        logits_of(model, input_ids())
    assert torch.equal(logits_of(model, input_ids()), expected)
    assert not model._forward_pre_hooks


def test_a_layer_the_model_has_not_is_refused() -> None:
    _, spec = cached_model("qwen2")
    shallow = tiny_model("qwen2", num_hidden_layers=2)
    with (
        pytest.raises(CaptureError, match="layers 2-3 of the spec gave no keys and values, only 0-1 did"),
        substituted(shallow, spec, itself),
    ):
        logits_of(shallow, input_ids())
