"""The main families as they are used: packed batches of a teacher, a student under gradient checkpointing, bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kvstore.commits import SampleRow
from kvstore.spec import KVSpec
from pipeline.models.capture import KVTap, capture_kv
from pipeline.models.probe import probe_kv_spec
from pipeline.tasks import TaskSample
from pipeline.teacher import Batch, Teacher
from tests.models.architectures import measured
from tests.models.test_architectures import prove
from tests.models.zoo import zoo_model

MAIN = [
    "qwen2",
    "qwen3",
    "llama",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "gpt_neox",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
]
LENGTHS = [5, 64, 3, 33, 70, 64, 1, 100, 17]
PADDED_ROUNDING = 5e-6
"""Largest change of a sample's numbers over the largest number, in float32, when others share its forward and padding follows.
Measured: 2.5e-6."""
BFLOAT16_ROUNDING = 5 * 2**-9
"""Largest error of an un-rotated bfloat16 key over the largest key. The model rounds two products and their sum, which un-rotation
in float32 mixes by at most the root of two: 4 half units in the last place; one more when the result is rounded. Measured: 0.65 of it,
rotated again too."""

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about its classes
main = pytest.mark.parametrize("model_type", MAIN)


def model_of(model_type: str) -> tuple[Any, KVSpec]:
    _, model, spec = measured(model_type)
    assert spec is not None
    return model, spec


def difference(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


def samples_of(lengths: list[int]) -> list[TaskSample]:
    draw = np.random.default_rng(0)
    return [
        TaskSample(
            row=SampleRow(id=str(n), source="s", shard=0, token_start=200 * n, num_tokens=length, crc32c=0, count=1, text=None),
            offset=200 * n,
            input_ids=draw.integers(0, 256, length).astype(np.int32),
            beside={},
        )
        for n, length in enumerate(lengths)
    ]


@main
def test_samples_packed_end_to_end_are_each_as_if_alone(model_type: str) -> None:
    model, spec = model_of(model_type)
    samples, placed = samples_of(LENGTHS), {}

    def take(layer: int, batch: Batch, key: Tensor, value: Tensor) -> None:
        assert len(key) == len(value) == sum(batch.lengths), "no padding"
        for place in batch.placed:
            for kind, values in (("key", key), ("value", value)):
                placed[layer, place.offset, kind] = values[place.first : place.first + place.length]

    Teacher(lambda _: model).compute(samples, spec.layer_numbers, None, 512, take)
    assert len(placed) == 2 * len(spec.layers) * len(samples)
    for sample in samples:
        alone = capture_kv(model, spec, torch.from_numpy(sample.input_ids.astype(np.int64))[None])
        for layer, pair in alone.items():
            for kind, values in zip(("key", "value"), pair, strict=True):
                got = placed[layer, sample.offset, kind]
                assert difference(got, values[0].transpose(0, 1)) <= PADDED_ROUNDING


def gradient_of_kv(model: Any, spec: KVSpec, ids: Tensor) -> tuple[dict[int, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Keys and values of a forward in training, and the gradients of a loss on them."""
    model.zero_grad()
    with KVTap(model, spec) as tap:
        model(input_ids=ids, use_cache=False)
    loss = sum(tensor.float().square().mean() for pair in tap.kv.values() for tensor in pair)
    assert isinstance(loss, Tensor)
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return {layer: (key.detach(), value.detach()) for layer, (key, value) in tap.kv.items()}, gradients


@main
def test_under_gradient_checkpointing_keys_values_and_gradients_are_the_same(model_type: str) -> None:
    model = zoo_model(model_type)
    spec = probe_kv_spec(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(2))
    plain = capture_kv(model, spec, ids)
    model.train()
    _, expected = gradient_of_kv(model, spec, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    kv, gradients = gradient_of_kv(model, spec, ids)
    assert all(torch.equal(one, other) for layer in plain for one, other in zip(kv[layer], plain[layer], strict=True))
    assert len(gradients) > 4 * (len(spec.layers) - 1)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name


@main
def test_in_bfloat16_what_is_captured_is_the_models_own_within_the_stated_rounding(model_type: str) -> None:
    model = zoo_model(model_type, torch.bfloat16)
    spec = probe_kv_spec(model)
    assert spec.dtype == "bfloat16"
    assert [layer.geometry for layer in spec.layers] == [layer.geometry for layer in model_of(model_type)[1].layers]
    prove(model_type, model, spec, rounding=BFLOAT16_ROUNDING, table_rounding=BFLOAT16_ROUNDING)
