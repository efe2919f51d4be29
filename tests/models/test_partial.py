"""A model without its upper layers: the same keys and values, less memory, nothing read from disk, and never wrong logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.models.capture import capture_kv
from pipeline.models.load import ModelLoadError, load_causal_lm
from pipeline.models.partial import is_partial, leave_out_above
from pipeline.models.probe import probe_causal, probe_kv_spec
from tests.checkpoints import save_checkpoint
from tests.models.architectures import measured

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about its classes

IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
WITH_LOWER_LAYERS = [
    "llama",
    "gpt2",
    "gemma3_text",
    "gemma3n_text",  # later layers share keys and values, and there are embeddings of every layer
    "minicpm3",  # computes with the number of layers
    "mixtral",  # experts that are put together while loading
    "deepseek_v3",
    "falcon_h1",  # visits all its blocks when weights are initialised
    "qwen3_next",
    "gemma3",  # a text model inside another
]
ALL_OR_NOTHING = ["zamba2"]
"""Its attention modules share weights."""


def num_bytes(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def assert_equal(got: dict[int, Any], expected: dict[int, Any]) -> None:
    assert got.keys() == expected.keys()
    for layer, pair in expected.items():
        assert all(torch.equal(one, other) for one, other in zip(got[layer], pair, strict=True)), layer


@pytest.mark.parametrize("model_type", WITH_LOWER_LAYERS)
def test_lower_layers_alone_give_the_same_bits_and_take_less_memory(model_type: str, tmp_path: Path) -> None:
    _, model, spec = measured(model_type)
    assert spec is not None
    last = spec.layer_numbers[len(spec.layers) // 2 - 1]
    model.save_pretrained(tmp_path)
    whole, loaded = load_causal_lm(tmp_path), load_causal_lm(tmp_path, last_layer=last)
    size = num_bytes(whole)
    kept = [number for number in spec.layer_numbers if number <= last]
    expected = capture_kv(whole, spec, IDS, kept)
    leave_out_above(whole, last)
    assert not loaded.training
    for partial in (loaded, whole):
        assert is_partial(partial)
        assert num_bytes(partial) < 0.75 * size
        probe_causal(partial, last)
        own = probe_kv_spec(partial, last_layer=last)
        assert own.layers == spec.select(kept).layers
        assert_equal(capture_kv(partial, own, IDS), expected)
        with pytest.raises(RuntimeError, match=r"ran to its end without \d+ of its parts .* load the whole model"):
            partial(input_ids=IDS, use_cache=False)


@pytest.mark.parametrize("model_type", ALL_OR_NOTHING)
def test_a_model_that_cannot_be_taken_apart_is_loaded_whole(model_type: str, tmp_path: Path) -> None:
    _, model, spec = measured(model_type)
    assert spec is not None
    model.save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path, last_layer=spec.layer_numbers[0])
    assert not is_partial(loaded)
    assert num_bytes(loaded) == num_bytes(model)
    loaded(input_ids=IDS, use_cache=False)


def test_weights_of_upper_layers_need_not_even_be_there_and_those_of_lower_layers_must(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama", tie_word_embeddings=False)
    weights = load_file(tmp_path / "model.safetensors")

    def write(left_out: tuple[str, ...]) -> None:
        left = {name: tensor for name, tensor in weights.items() if not name.startswith(left_out)}
        save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})

    write(("model.layers.2.", "model.layers.3.", "lm_head."))
    assert is_partial(load_causal_lm(tmp_path, last_layer=1))
    with pytest.raises(ModelLoadError, match="19 weights of the model are missing"):
        load_causal_lm(tmp_path)
    write(("model.layers.1.",))
    with pytest.raises(ModelLoadError, match=r"9 weights of the model are missing .*model\.layers\.1\."):
        load_causal_lm(tmp_path, last_layer=1)


@pytest.mark.parametrize("last_layer", [pytest.param(3, id="the-last"), pytest.param(9, id="no-such-layer")])
def test_where_no_layer_is_above_nothing_is_left_out(last_layer: int, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama", tie_word_embeddings=False)
    model = load_causal_lm(tmp_path, last_layer=last_layer)
    assert not is_partial(model)
    assert num_bytes(model) == num_bytes(load_causal_lm(tmp_path))


def test_leaving_out_twice_leaves_out_more(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    model, sizes = load_causal_lm(tmp_path), []
    for last in (2, 0, 1):
        leave_out_above(model, last)
        sizes.append(num_bytes(model))
    assert sizes[0] > sizes[1] == sizes[2]
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == model.config.num_hidden_layers == 4
