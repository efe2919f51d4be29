"""What the probe measures is what the model does, and what it cannot describe it refuses by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvstore.spec import KVSpec, LayerSpec, RopeSpec
from pipeline.models.probe import CaptureError, length_dependent_rope, probe_causal, probe_kv_spec
from tests.checkpoints import tiny_config, tiny_model

BASE = 10_000.0
PLAIN_16 = tuple((1.0 / BASE ** (torch.arange(0, 16, 2) / 16)).tolist())
PLAIN_8 = tuple((1.0 / BASE ** (torch.arange(0, 8, 2) / 8)).tolist())
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]
DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}


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


@pytest.mark.parametrize(
    ("model_type", "over", "message"),
    [
        pytest.param("gptj", {}, r"GPTJForCausalLM, layer 0 .* cannot tell how keys are rotated \(no rotary", id="gptj"),
        pytest.param("deepseek_v3", DEEPSEEK, r"DeepseekV3ForCausalLM, layer 0 .* value tensor is rotated", id="mla"),
        pytest.param("mamba2", {"num_heads": 8, "head_dim": 16, "n_groups": 1}, "'mamba2'.* has no attention", id="mamba"),
        pytest.param("falcon", {"num_kv_heads": 2, "new_decoder_architecture": True}, "heads 0 and 1 are equal", id="falcon"),
    ],
)
def test_what_a_spec_cannot_say_is_refused_by_name(model_type: str, over: dict[str, Any], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        probe_kv_spec(tiny_model(model_type, **over))


def test_a_config_that_contradicts_the_tensors_is_refused() -> None:
    model = tiny_model("qwen2")
    model.config.num_key_value_heads = 4
    with pytest.raises(
        CaptureError, match=r"K \[1, 2, 64, 16\].* 2 KV heads, expected 4 .*num_attention_heads 4, hidden_size 64"
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
