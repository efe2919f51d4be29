"""What the probe measures is what the model does, and what it cannot describe it refuses by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from kvstore.spec import KVSpec, LayerSpec, RopeSpec
from pipeline.models.attention import CaptureError, attention_modules
from pipeline.models.probe import length_dependent_rope, probe_causal, probe_kv_spec
from tests.checkpoints import tiny_config, tiny_model
from tests.models.zoo import zoo_model

BASE = 10_000.0
PLAIN_16 = tuple((1.0 / BASE ** (torch.arange(0, 16, 2) / 16)).tolist())
PLAIN_8 = tuple((1.0 / BASE ** (torch.arange(0, 8, 2) / 8)).tolist())
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("model_type", "over", "ropes"),
    [
        pytest.param("qwen2", {}, [RopeSpec(kind="half", inv_freq=PLAIN_16)], id="qwen2"),
        pytest.param("qwen3", {}, [RopeSpec(kind="half", inv_freq=PLAIN_16)], id="qwen3-key-norm"),
        pytest.param(
            "cohere",
            {"rope_parameters": {"rope_type": "default", "rope_theta": BASE}},
            [RopeSpec(kind="interleaved", inv_freq=PLAIN_16)],
            id="cohere-interleaved",
        ),
        pytest.param(
            "phi3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": BASE, "partial_rotary_factor": 0.5}},
            [RopeSpec(kind="half", inv_freq=PLAIN_8)],
            id="phi3-partial",
        ),
        pytest.param("gpt2", {}, [], id="gpt2-learned-positions"),
        pytest.param("bloom", {}, [], id="bloom-alibi"),
    ],
)
def test_the_rotary_convention_is_found(
    model_type: str, over: dict[str, Any], ropes: list[RopeSpec], dtype: torch.dtype
) -> None:
    spec = probe_kv_spec(tiny_model(model_type, dtype=dtype, **over))
    assert spec.layer_numbers == (0, 1, 2, 3)
    assert [layer.rope for layer in spec.layers] == [0 if ropes else None] * 4
    assert (spec.key_domain, spec.dtype) == ("pre_rope", str(dtype).removeprefix("torch."))
    assert len(spec.ropes) == len(ropes)
    for got, expected in zip(spec.ropes, ropes, strict=True):
        assert (got.kind, got.start, got.attention_scaling) == (expected.kind, 0, 1.0)
        assert got.inv_freq == pytest.approx(expected.inv_freq, rel=1e-6)


def test_geometry_is_that_of_qwen2_7b() -> None:
    model = tiny_model("qwen2", num_attention_heads=28, num_key_value_heads=4, head_dim=128, num_hidden_layers=2)
    spec = probe_kv_spec(model, key_domain="post_rope")
    assert spec == KVSpec(
        layers=tuple(LayerSpec(layer=number, num_kv_heads=4, key_dim=128, value_dim=128, rope=0) for number in range(2)),
        ropes=spec.ropes,
        key_domain="post_rope",
        dtype="float32",
    )
    assert KVSpec.from_json(spec.to_json()) == spec


def test_yarn_scaling_is_read_from_the_model() -> None:
    rope = {"rope_type": "yarn", "rope_theta": BASE, "factor": 4.0, "original_max_position_embeddings": 128}
    model = tiny_model("llama", rope_parameters=rope)
    (found,) = probe_kv_spec(model).ropes
    assert found.attention_scaling == pytest.approx(0.1 * torch.log(torch.tensor(4.0)).item() + 1)
    assert found.inv_freq == tuple(model.model.rotary_emb.inv_freq.tolist())
    assert found.inv_freq[-1] == pytest.approx(PLAIN_16[-1] / 4, rel=1e-6), "the slowest frequency is interpolated"


LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
SLOW_ONLY = {
    "rope_type": "llama3",
    "rope_theta": BASE,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("other", "fastest", "slowest"),
    [
        pytest.param(LINEAR, 1 / 8, 1e6 ** (-7 / 8) / 8, id="all-frequencies"),
        pytest.param(SLOW_ONLY, 1.0, PLAIN_16[-1] / 8, id="slow-frequencies-only"),
    ],
)
def test_layers_with_different_ropes_are_told_apart(
    other: dict[str, Any], fastest: float, slowest: float, dtype: torch.dtype
) -> None:
    ropes = {"sliding_attention": {"rope_type": "default", "rope_theta": BASE}, "full_attention": other}
    model = tiny_model(
        "gemma3_text", dtype=dtype, rope_parameters=ropes, layer_types=["sliding_attention", "full_attention"] * 2
    )
    spec = probe_kv_spec(model)
    assert [layer.rope for layer in spec.layers] == [0, 1, 0, 1]
    assert [rope.inv_freq[0] for rope in spec.ropes] == pytest.approx([1.0, fastest])
    assert [rope.inv_freq[-1] for rope in spec.ropes] == pytest.approx([PLAIN_16[-1], slowest])


def test_layers_without_rotation_among_rotated_ones_are_found() -> None:
    spec = probe_kv_spec(tiny_model("smollm3", no_rope_layer_interval=2))
    assert [layer.rope for layer in spec.layers] == [0, None, 0, None]


def test_only_layers_with_keys_of_their_own_are_in_the_spec() -> None:
    model = tiny_model(
        "gemma4_text",
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=272,
        hidden_size_per_layer_input=16,
    )
    spec = probe_kv_spec(model)
    assert [(layer.layer, layer.geometry, layer.rope) for layer in spec.layers] == [
        (0, (2, 16, 16), 0),
        (1, (2, 512, 512), 1),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_key_biases_hide_nothing(dtype: torch.dtype) -> None:
    # Qwen2 and Qwen2.5 have biases up to a few hundred on slow channels, next to values of about 1.
    model = tiny_model("qwen2", dtype=dtype, hidden_size=256, head_dim=64)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.view(2, 64)[:, [29, 30, 31, 61]] += 300
    assert probe_kv_spec(model).ropes[0].kind == "half"


def test_a_model_in_training_mode_is_probed_without_its_dropout() -> None:
    model = tiny_model("gpt2", embd_pdrop=0.5, resid_pdrop=0.5)
    expected = probe_kv_spec(model)
    assert probe_kv_spec(model.train()) == expected
    probe_causal(model)
    assert model.training


@pytest.mark.parametrize("dtype", DTYPES)
def test_latents_are_told_from_keys_and_values(dtype: torch.dtype) -> None:
    spec = probe_kv_spec(zoo_model("deepseek_v3", dtype))
    assert spec.layers == tuple(
        LayerSpec(layer=number, num_kv_heads=1, key_dim=24, value_dim=8, rope=0, latent=True) for number in range(4)
    )
    assert spec.ropes == (RopeSpec(kind="half", inv_freq=spec.ropes[0].inv_freq),)
    assert spec.ropes[0].inv_freq == pytest.approx(PLAIN_8, rel=1e-6)
    assert KVSpec.from_json(spec.to_json()) == spec


def test_latents_without_rotation_are_latents() -> None:
    assert {(layer.layer, layer.latent, layer.rope) for layer in probe_kv_spec(zoo_model("kimi_linear")).layers} == {
        (1, True, None),
        (3, True, None),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", ["gptj", "codegen", "roformer"])
def test_tables_that_lie_in_the_model_are_found_without_a_rotary_module(model_type: str, dtype: torch.dtype) -> None:
    (rope,) = probe_kv_spec(zoo_model(model_type, dtype)).ropes
    assert (rope.kind, rope.start) == ("interleaved", 0)
    if model_type == "roformer":
        assert rope.inv_freq == pytest.approx(PLAIN_16, rel=1e-6)
    else:  # made in bfloat16, their frequencies are rounded to it
        assert rope.inv_freq == pytest.approx(torch.tensor(PLAIN_8).to(dtype).tolist(), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rotation_the_other_way_round_has_negative_frequencies(dtype: torch.dtype) -> None:
    (rope,) = probe_kv_spec(zoo_model("nanochat", dtype)).ropes
    assert rope.kind == "half"
    assert rope.inv_freq == pytest.approx([-frequency for frequency in PLAIN_16], rel=1e-6)


@pytest.mark.parametrize(
    ("over", "num_kv_heads"),
    [
        pytest.param({"num_kv_heads": 2, "new_decoder_architecture": True}, 2, id="falcon-40b"),
        pytest.param({"num_kv_heads": 4, "new_decoder_architecture": True}, 4, id="nothing-repeated"),
        pytest.param({"num_kv_heads": 1, "new_decoder_architecture": False, "multi_query": True}, 1, id="falcon-7b"),
        pytest.param(
            {"num_kv_heads": 4, "new_decoder_architecture": False, "multi_query": False, "alibi": True}, 4, id="alibi"
        ),
    ],
)
def test_heads_a_model_repeats_before_it_caches_them_count_once(over: dict[str, Any], num_kv_heads: int) -> None:
    spec = probe_kv_spec(zoo_model("falcon", **over))
    assert {layer.geometry for layer in spec.layers} == {(num_kv_heads, 16, 16)}


def test_a_module_that_several_layers_share_gives_each_its_own_keys() -> None:
    model = zoo_model("hrm_text")
    spec = probe_kv_spec(model)
    assert len(spec.layers) == model.config.num_hidden_layers > len(attention_modules(model))


@pytest.mark.parametrize("last_layer", [0, 1, 2, 3])
def test_a_probe_up_to_a_layer_runs_nothing_above_it(last_layer: int) -> None:
    model = tiny_model("gemma3_text", layer_types=["sliding_attention", "full_attention"] * 2)
    ran: list[int] = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, n=number: ran.append(n))
    assert probe_kv_spec(model, last_layer=last_layer) == dataclasses.replace(
        (whole := probe_kv_spec(model)).select(range(last_layer + 1)), ropes=whole.ropes[: last_layer + 1]
    )
    assert ran[:last_layer] == list(range(last_layer))
    assert len(ran) == last_layer + 4, "the second probe was of the whole model"
    ran.clear()
    probe_causal(model, last_layer=last_layer)
    assert ran == 2 * list(range(last_layer))


def test_a_probe_ends_in_front_of_the_layer_after_one_without_keys() -> None:
    model = zoo_model("qwen3_next")
    assert probe_kv_spec(model, last_layer=2).layer_numbers == (1,)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        pytest.param(
            "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM, layer 0 .* cannot tell .* changed after rotation", id="scaled"
        ),
        pytest.param("deepseek_v4", r"DeepseekV4ForCausalLM, layer 0 .* values are rotated as keys are", id="rotated-values"),
        pytest.param("mamba2", "'mamba2'.* has no attention layer with keys and values to capture", id="mamba"),
        pytest.param("openai-gpt", "'openai-gpt'.* none of its modules gave any to a cache", id="no-cache"),
        pytest.param("blt", r"layer 0 ran twice .*patcher.layers.0.self_attn, then model.local_encoder", id="several-stacks"),
    ],
)
def test_what_a_spec_cannot_say_is_refused_by_name(model_type: str, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        probe_kv_spec(zoo_model(model_type))


def test_a_model_that_wants_more_than_token_ids_is_refused() -> None:
    model = tiny_model("qwen2")
    model.model.layers[0].register_forward_pre_hook(lambda *_: {}["pixel_values"])
    with pytest.raises(CaptureError, match=r"a forward of 8 tokens with the tap failed \(KeyError: 'pixel_values'\)"):
        probe_causal(model)


def test_a_config_that_contradicts_the_tensors_is_refused() -> None:
    model = tiny_model("qwen2")
    model.config.num_key_value_heads = 4
    with pytest.raises(
        CaptureError,
        match=r"K \[1, 2, 64, 16\].* 2 KV heads, expected one .*'num_attention_heads': 4, 'num_key_value_heads': 4.*hidden_size 64",
    ):
        probe_kv_spec(model)


def test_a_model_that_runs_one_layer_twice_is_refused() -> None:
    model = tiny_model("qwen2")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(CaptureError, match="layer 0 ran twice in one forward"):
        probe_kv_spec(model)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(CaptureError, match=r"layer 2 .*not finite"):
        probe_kv_spec(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "mixtral", "gemma3_text"])
def test_decoders_are_causal(model_type: str, dtype: torch.dtype) -> None:
    probe_causal(tiny_model(model_type, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("model_type", "over"),
    [pytest.param("bert", {}, id="bert"), pytest.param("gemma3_text", {"use_bidirectional_attention": True}, id="gemma3")],
)
def test_models_that_look_ahead_are_not_causal(model_type: str, over: dict[str, Any], dtype: torch.dtype) -> None:
    with pytest.raises(CaptureError, match=r"attention is not causal: K of earlier positions in layer 1 changed by \d"):
        probe_causal(tiny_model(model_type, dtype=dtype, **over))


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        pytest.param({"rope_type": "default", "rope_theta": BASE}, None, id="default"),
        pytest.param({"rope_type": "dynamic", "rope_theta": BASE, "factor": 2.0}, 512, id="dynamic"),
        pytest.param(
            {
                "rope_type": "longrope",
                "rope_theta": BASE,
                "factor": 4.0,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 128,
            },
            128,
            id="longrope",
        ),
    ],
)
def test_ropes_that_depend_on_the_batch_are_known(rope: dict[str, Any], limit: int | None) -> None:
    assert length_dependent_rope(tiny_config("llama", rope_parameters=rope)) == limit
    assert length_dependent_rope(tiny_config("gpt2")) is None
