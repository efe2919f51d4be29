"""The tap gives what attention uses, changes nothing, and keeps gradients, with and without checkpointing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import DynamicCache

from kvstore.spec import KVSpec
from pipeline.models.attention import CaptureError, attention_modules, tapped
from pipeline.models.capture import KVTap, capture_kv
from pipeline.models.probe import probe_kv_spec
from tests.checkpoints import tiny_config, tiny_model

PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
}
ARCHITECTURES = {
    "qwen2": ("qwen2", {}),
    "llama": ("llama", {}),
    "llama-yarn": ("llama", YARN),
    "qwen3": ("qwen3", {}),
    "mistral-sliding": ("mistral", {"sliding_window": 8}),
    "phi3-partial": ("phi3", PARTIAL),
    "gemma3-two-ropes": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    "cohere-interleaved": ("cohere", {}),
    "gpt2": ("gpt2", {}),
}
ROTARY = [name for name in ARCHITECTURES if name != "gpt2"]


@cache
def cached_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model tests may run but not change."""
    model_type, over = ARCHITECTURES[name]
    return tiny_model(model_type, dtype=dtype, **over)


@cache
def spec_of(name: str, dtype: torch.dtype = torch.float32) -> KVSpec:
    return probe_kv_spec(cached_model(name, dtype))


def input_ids(batch: int = 2, num_tokens: int = 40) -> Tensor:
    return torch.randint(0, 256, (batch, num_tokens), generator=torch.Generator().manual_seed(0))


def as_post_rope(spec: KVSpec) -> KVSpec:
    return KVSpec.from_json({**spec.to_json(), "key_domain": "post_rope"})


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


def hook_count(model: torch.nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_tap_equals_the_models_own_cache_and_leaves_its_output_alone(name: str) -> None:
    model, ids = cached_model(name), input_ids()
    cache = DynamicCache()
    with torch.inference_mode():
        expected = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        with KVTap(model, as_post_rope(spec_of(name))) as tap:
            logits = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(logits, expected)
    assert sorted(tap.kv) == [0, 1, 2, 3]
    for layer, (key, value) in tap.kv.items():
        assert torch.equal(key, cache.layers[layer].keys)
        assert torch.equal(value, cache.layers[layer].values)


@pytest.mark.parametrize(
    ("dtype", "bound"), [pytest.param(torch.float32, 2e-7, id="float32"), pytest.param(torch.bfloat16, 6e-3, id="bfloat16")]
)
@pytest.mark.parametrize("name", ROTARY)
def test_pre_rope_keys_are_what_the_model_rotated(
    name: str, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, spec = cached_model(name, dtype), spec_of(name, dtype)
    code = importlib.import_module(type(model).__module__)
    rotate: Callable[..., Any] = code.apply_rotary_pos_emb
    entered: list[Tensor] = []

    def recording(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        entered.append(key)
        return rotate(query, key, *args, **kwargs)

    rotated = capture_kv(model, as_post_rope(spec), input_ids(num_tokens=400))
    monkeypatch.setattr(code, "apply_rotary_pos_emb", recording)
    kv = capture_kv(model, spec, input_ids(num_tokens=400))
    assert len(entered) == len(kv) == 4
    for layer, key in enumerate(entered):
        assert kv[layer][0].dtype == dtype
        assert relative_error(kv[layer][0], key) <= bound
        assert relative_error(rotated[layer][0], key) > 0.5, "rotation matters here"


def test_keys_that_are_not_rotated_are_the_same_in_both_domains() -> None:
    model, spec, ids = cached_model("gpt2"), spec_of("gpt2"), input_ids()
    before, after = capture_kv(model, spec, ids), capture_kv(model, as_post_rope(spec), ids)
    for layer in spec.layer_numbers:
        assert torch.equal(before[layer][0], after[layer][0])


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "phi3-partial"])
def test_stopping_early_gives_the_same_keys_and_runs_nothing_above(name: str) -> None:
    model, spec, ids = cached_model(name), spec_of(name), input_ids()
    with torch.inference_mode(), KVTap(model, spec) as full:
        model(input_ids=ids, use_cache=False)
    ran: list[str] = []
    hooks = [model.get_output_embeddings().register_forward_pre_hook(lambda *_: ran.append("lm_head"))]
    for attention in attention_modules(model):
        hooks.append(attention.module.register_forward_pre_hook(lambda *_, n=attention.layer: ran.append(f"layer {n}")))
    try:
        stopped = capture_kv(model, spec, ids, layers=[0, 2])
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == ["layer 0", "layer 1", "layer 2"]
    assert sorted(stopped) == [0, 2]
    for layer, (key, value) in stopped.items():
        assert torch.equal(key, full.kv[layer][0])
        assert torch.equal(value, full.kv[layer][1])


def test_on_layer_is_called_in_order_and_nothing_is_kept() -> None:
    model, spec, ids = cached_model("qwen2"), spec_of("qwen2"), input_ids()
    expected, got = capture_kv(model, spec, ids), {}

    def take(layer: int, key: Tensor, value: Tensor) -> None:
        got[layer] = (key, value)

    assert capture_kv(model, spec, ids, on_layer=take) == {}
    assert list(got) == [0, 1, 2, 3]
    for layer, (key, value) in got.items():
        assert torch.equal(key, expected[layer][0])
        assert torch.equal(value, expected[layer][1])


def test_right_padding_changes_no_earlier_key() -> None:
    model, spec, ids = cached_model("qwen3"), spec_of("qwen3"), input_ids(num_tokens=64)
    padded = ids.clone()
    padded[:, 40:] = 257
    whole, cut = capture_kv(model, spec, ids), capture_kv(model, spec, padded)
    for layer in spec.layer_numbers:
        assert torch.equal(whole[layer][0][:, :, :40], cut[layer][0][:, :, :40])


def test_a_model_in_training_is_captured_without_dropout_and_left_in_training() -> None:
    model = tiny_model("gpt2", embd_pdrop=0.5).train()
    model.transformer.h[1].eval()
    spec = probe_kv_spec(model)
    first, second = capture_kv(model, spec, input_ids()), capture_kv(model, spec, input_ids())
    assert torch.equal(first[3][0], second[3][0])
    assert model.training
    assert model.transformer.h[0].training
    assert not model.transformer.h[1].training


def kv_loss(kv: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    return sum((key.square().mean() + value.pow(3).mean() for key, value in kv.values()), start=torch.zeros(()))


def gradients(model: Any, spec: KVSpec, inside: bool, wrapper: Any = None) -> tuple[float, dict[str, Tensor]]:
    """Loss on K, V and logits and its gradients, with `backward` inside or after the tap."""
    model.zero_grad()
    torch.manual_seed(0)  # dropout
    with KVTap(model, spec) as tap:
        logits = (wrapper or model)(input_ids=input_ids(), use_cache=False).logits
        loss = kv_loss(tap.kv) + logits.float().square().mean()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("inside", [pytest.param(True, id="backward-inside"), pytest.param(False, id="backward-after")])
@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2", "phi3-partial"])
def test_gradients_are_bitwise_the_same_under_non_reentrant_checkpointing(name: str, inside: bool) -> None:
    model_type, over = ARCHITECTURES[name]
    model = tiny_model(model_type, **over).train()
    spec = spec_of(name)
    loss, expected = gradients(model, spec, inside)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for _ in range(2):
        again, got = gradients(model, spec, inside)
        assert again == loss
        assert_equal_gradients(got, expected)


def test_reentrant_checkpointing_is_refused() -> None:
    model = tiny_model("qwen2").train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    hooks_before = hook_count(model)
    with pytest.raises(RuntimeError, match=r"no gradient.* use_reentrant=False"):
        gradients(model, spec_of("qwen2"), inside=True)
    assert hook_count(model) == hooks_before


def test_a_gradient_through_pre_rope_keys_is_that_of_the_keys_before_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    code = importlib.import_module(type(model).__module__)
    rotate, entered = code.apply_rotary_pos_emb, []
    monkeypatch.setattr(
        code, "apply_rotary_pos_emb", lambda q, k, *args, **kwargs: (entered.append(k), rotate(q, k, *args, **kwargs))[1]
    )
    weights = torch.linspace(-1, 1, 16)
    with KVTap(model, spec_of("qwen3")) as tap:
        model(input_ids=input_ids(), use_cache=False)
    wanted = {name: p for name, p in model.named_parameters() if "k_proj" in name or "k_norm" in name}
    truth = torch.autograd.grad(
        sum(((k * weights).pow(3).mean() for k in entered), start=torch.zeros(())), list(wanted.values()), retain_graph=True
    )
    got = torch.autograd.grad(
        sum(((k * weights).pow(3).mean() for k, _ in tap.kv.values()), start=torch.zeros(())), list(wanted.values())
    )
    for name, expected, gradient in zip(wanted, truth, got, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item(), msg=name)


def test_the_tap_sits_on_the_model_inside_its_ddp_wrapper(tmp_path: Path) -> None:
    model, spec = tiny_model("qwen2").train(), spec_of("qwen2")
    expected = gradients(model, spec, inside=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        wrapper = DistributedDataParallel(model)
        for _ in range(2):
            loss, got = gradients(model, spec, inside=True, wrapper=wrapper)
            assert loss == expected[0]
            assert_equal_gradients(got, expected[1])
    finally:
        torch.distributed.destroy_process_group()


def test_each_forward_replaces_the_last_and_a_tap_can_be_opened_again() -> None:
    model, spec = cached_model("qwen2"), spec_of("qwen2")
    first_ids, second_ids = input_ids(num_tokens=12), input_ids(num_tokens=20)
    tap = KVTap(model, spec)
    for _ in range(2):
        with torch.inference_mode(), tap:
            model(input_ids=first_ids, use_cache=False)
            kept = tap.kv
            model(input_ids=second_ids, use_cache=False)
        assert torch.equal(kept[3][0], capture_kv(model, spec, first_ids)[3][0])
        assert torch.equal(tap.kv[3][0], capture_kv(model, spec, second_ids)[3][0])
    assert hook_count(model) == 0


def test_two_forwards_before_two_backwards_accumulate_their_gradients_under_checkpointing() -> None:
    model, spec = tiny_model("qwen2").train(), spec_of("qwen2")
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    expected = gradients(model, spec, inside=True)[1]
    model.zero_grad()
    with KVTap(model, spec) as tap:
        losses = []
        for _ in range(2):
            logits = model(input_ids=input_ids(), use_cache=False).logits
            losses.append(kv_loss(tap.kv) + logits.float().square().mean())
        for loss in losses:
            loss.backward()
    assert_equal_gradients({name: p.grad / 2 for name, p in model.named_parameters()}, expected)


def test_a_forward_that_failed_half_way_leaves_nothing_to_the_next() -> None:
    model, spec = tiny_model("qwen2"), spec_of("qwen2")

    def fail(*_: object) -> None:
        raise OSError("half way")

    with torch.inference_mode(), KVTap(model, spec) as tap:
        hook = model.model.layers[2].mlp.register_forward_pre_hook(fail)
        with pytest.raises(OSError, match="half way"):
            model(input_ids=input_ids(), use_cache=False)
        assert tap.kv == {}
        hook.remove()
        model(input_ids=input_ids(), use_cache=False)
    assert sorted(tap.kv) == [0, 1, 2, 3]


def test_hooks_are_gone_after_an_error_in_the_forward() -> None:
    model, spec = cached_model("qwen2"), spec_of("qwen2")
    with pytest.raises(IndexError), KVTap(model, spec):
        model(input_ids=torch.tensor([[10**6]]), use_cache=False)
    assert hook_count(model) == 0
    assert len(capture_kv(model, spec, input_ids())) == 4


def test_a_cache_in_use_is_refused() -> None:
    model = cached_model("qwen2")
    with (
        pytest.raises(CaptureError, match=r"got a DynamicCache, expected no cache .* use_cache=False"),
        KVTap(model, spec_of("qwen2")),
    ):
        model(input_ids=input_ids(), use_cache=True)


def test_on_layer_with_gradients_is_refused() -> None:
    model = cached_model("qwen2")
    tap = KVTap(model, spec_of("qwen2"), on_layer=lambda *_: None)
    with pytest.raises(CaptureError, match=r"on_layer was called with gradients on; .*inference_mode"), tap:
        model(input_ids=input_ids(), use_cache=False)


def test_a_layer_the_spec_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 7 is not here; there are layers 0-3"):
        capture_kv(cached_model("qwen2"), spec_of("qwen2"), input_ids(), layers=[0, 7])


@pytest.mark.parametrize(
    ("over", "message"),
    [
        pytest.param(
            {"num_hidden_layers": 2}, "layers 2-3 of the spec gave no keys and values, only 0-1 did", id="fewer-layers"
        ),
        pytest.param({"num_key_value_heads": 4}, r"got K \[2, 4, 40, 16\].*expected .*\(2, 16, 16\)", id="other-heads"),
    ],
)
def test_the_spec_of_another_model_is_refused(over: dict[str, Any], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture_kv(tiny_model("qwen2", **over), spec_of("qwen2"), input_ids())


def test_a_model_that_runs_one_layer_twice_is_refused() -> None:
    model = tiny_model("qwen2")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(CaptureError, match="layer 0 ran twice in one forward"):
        capture_kv(model, spec_of("qwen2"), input_ids(), layers=[0, 3])


def test_a_cache_argument_given_by_position_is_replaced_in_its_place() -> None:
    model = cached_model("qwen2")
    attention = attention_modules(model)[2]
    hidden, positions = torch.randn(1, 5, 64), torch.arange(5)[None]
    embeddings = model.model.rotary_emb(hidden, positions)
    by_position: list[Any] = []
    by_name: list[Any] = []
    with torch.inference_mode():
        with tapped([attention], lambda *seen: by_position.extend(seen)):
            attention.module(hidden, embeddings, None, None)
        with tapped([attention], lambda *seen: by_name.extend(seen)):
            attention.module(hidden_states=hidden, position_embeddings=embeddings, attention_mask=None)
    assert by_position[0] == by_name[0] == 2
    assert by_position[3] is by_name[3] is embeddings
    assert torch.equal(by_position[1], by_name[1])
    assert torch.equal(by_position[2], by_name[2])


def test_a_spec_with_rotation_is_refused_by_a_model_without() -> None:
    spec = probe_kv_spec(tiny_model("qwen2", num_key_value_heads=4))
    with pytest.raises(CaptureError, match="layer 0 was given no rotary table of 8 frequencies"):
        capture_kv(cached_model("gpt2"), spec, input_ids())


def test_every_attention_module_is_found_once_at_its_own_layer() -> None:
    found = attention_modules(cached_model("gemma3-two-ropes"))
    assert [(attention.layer, attention.name) for attention in found] == [
        (layer, f"model.layers.{layer}.self_attn") for layer in range(tiny_config("gemma3_text").num_hidden_layers)
    ]
