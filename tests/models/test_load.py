"""Loading refuses whatever transformers would load wrongly in silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.models.load import (
    ModelLoadError,
    build_student,
    geometry_mismatch,
    load_causal_lm,
    load_tokenizer,
)
from pipeline.models.presets import student_preset, student_preset_names, teacher_preset
from tests.checkpoints import save_checkpoint, tiny_config, tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen2", seed=3)


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def rewrite_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_checkpoint_loads_with_its_own_weights_and_dtype_for_inference(tmp_path: Path) -> None:
    saved = tiny_model("qwen2", seed=3, dtype=torch.bfloat16)
    saved.save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path)
    assert not loaded.training
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
        assert loaded.get_parameter(name).dtype == torch.bfloat16
    assert load_causal_lm(tmp_path, dtype="float32").dtype == torch.float32


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "gpt2")
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load_causal_lm(tmp_path)


def test_missing_weights_are_refused(copy: Path) -> None:
    rewrite_weights(copy, lambda weights: [weights.pop(name) for name in list(weights) if ".layers.1." in name])
    with pytest.raises(ModelLoadError, match=r"12 weights .* missing .*model.layers.1.input_layernorm.weight"):
        load_causal_lm(copy)


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    rewrite_weights(copy, lambda weights: weights.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(ModelLoadError, match=r"1 have another shape .*model.norm.weight.*\[7\].*\[64\]"):
        load_causal_lm(copy)


def test_a_truncated_download_is_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelLoadError, match=r"model.safetensors \(\d+ bytes\) is damaged or still downloading"):
        load_causal_lm(copy)


def test_bert_is_refused_although_transformers_loads_it(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"BertLMHeadModel attends to later tokens .*is_decoder False"):
        load_causal_lm(save_checkpoint(tmp_path, "bert"))


def test_an_encoder_decoder_is_refused_before_its_weights_are_read(copy: Path) -> None:
    tiny_config("t5").save_pretrained(copy)
    with pytest.raises(ModelLoadError, match="t5 is an encoder-decoder model"):
        load_causal_lm(copy)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param({"model_type": "no_such_model"}, "model type `no_such_model`", id="unknown"),
        pytest.param({"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}, "runs no code that comes with", id="own-code"),
        pytest.param({"model_type": "qwen2", "hidden_size": "big"}, "'hidden_size' expected int, got str", id="typed"),
    ],
)
def test_a_config_transformers_cannot_use_is_refused(copy: Path, config: dict[str, Any], message: str) -> None:
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=message):
        load_causal_lm(copy)


def test_a_tokenizer_gives_byte_offsets(checkpoint: Path) -> None:
    encoded = load_tokenizer(checkpoint)("né", return_offsets_mapping=True)
    assert encoded["offset_mapping"] == [(0, 1), (1, 2), (1, 2)]


def test_a_folder_without_a_tokenizer_is_refused_rather_than_given_an_empty_one(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match=r"there is no tokenizer, expected one of tokenizer.json"):
        load_tokenizer(copy)


def test_a_damaged_tokenizer_is_refused(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="transformers cannot load this tokenizer"):
        load_tokenizer(copy)


def test_a_slow_tokenizer_is_refused_rather_than_losing_its_offsets(copy: Path) -> None:
    (copy / "tokenizer.json").rename(copy / "vocab.json")
    (copy / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    (copy / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ModelLoadError, match=r"ByT5Tokenizer is a slow tokenizer, which gives no offsets"):
        load_tokenizer(copy)


def test_a_published_config_matches_its_preset() -> None:
    preset = teacher_preset("qwen2-7b")
    assert preset is not None
    config = tiny_config(
        "qwen2",
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    assert geometry_mismatch(preset, config) == []
    config.num_key_value_heads = 2
    config.rope_parameters["rope_theta"] = 1e4
    assert geometry_mismatch(preset, config) == [
        "num_kv_heads: the checkpoint has 2, preset 'qwen2-7b' expected 4",
        "rope_theta: the checkpoint has 10000.0, preset 'qwen2-7b' expected 1000000.0",
    ]


def test_gpt2s_config_matches_its_preset() -> None:
    preset = teacher_preset("gpt2")
    assert preset is not None
    config = tiny_config("gpt2", hidden_size=768, num_hidden_layers=12, num_attention_heads=12, vocab_size=50257)
    assert geometry_mismatch(preset, config) == ["max_position_embeddings: the checkpoint has 512, preset 'gpt2' expected 1024"]


def test_a_fresh_student_depends_on_its_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, tokenizer = build_student("qwen2-tiny", vocab_size=258, seed=7)
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator is left alone"
    torch.manual_seed(2)
    second, other = (build_student("qwen2-tiny", vocab_size=258, seed=seed)[0] for seed in (7, 8))
    assert tokenizer is None
    assert first.dtype == torch.float32
    assert first.config.vocab_size == 258
    weights = [model.get_parameter("model.layers.0.self_attn.k_proj.weight") for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", [n for n in student_preset_names() if (p := student_preset(n)) and p.config])
def test_every_fresh_student_preset_can_be_built(name: str) -> None:
    preset = student_preset(name)
    assert preset is not None
    assert preset.config is not None
    config = build_student(name, vocab_size=300, seed=0)[0].config.to_dict()
    assert {key: config[key] for key in preset.config} == dict(preset.config)


def test_a_pretrained_student_comes_in_float32_with_its_tokenizer(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, dtype=torch.bfloat16)
    model, tokenizer = build_student(str(tmp_path), vocab_size=None, seed=0)
    assert model.dtype == torch.float32
    assert tokenizer is not None
    assert tokenizer("é")["input_ids"] == load_tokenizer(tmp_path)("é")["input_ids"]


def test_a_student_can_be_a_config_of_another_checkpoint(checkpoint: Path) -> None:
    student, tokenizer = build_student(str(checkpoint / "config.json"), vocab_size=258, seed=0)
    trained = load_causal_lm(checkpoint)
    assert tokenizer is None
    assert student.config.num_key_value_heads == 2
    assert not torch.equal(student.get_input_embeddings().weight, trained.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("[config]\nmodel_type = 'qwen2'\nnum_kv_heads = 2", r"qwen2 has no fields \['num_kv_heads'\]", id="typo"),
        pytest.param("[config]\nmodel_type = 'qwen9'", "got model_type 'qwen9'.*Unrecognized model", id="model-type"),
        pytest.param("[config]\nhidden_size = 8", "got model_type None and fields", id="no-model-type"),
        pytest.param("[config]\nmodel_type = 'qwen2'\nvocab_size = 9", "got vocab_size 9, expected at least 258", id="vocab"),
        pytest.param(
            "[config]\nmodel_type = 'qwen2'\nnum_attention_heads = 4",
            "got num_attention_heads 4, num_key_value_heads 32, expected the first to be a multiple",
            id="heads",
        ),
        pytest.param("[config", "TOMLDecodeError", id="toml"),
        pytest.param("config = 3\nseed = 1", r"unknown fields \['seed'\]", id="field"),
    ],
)
def test_a_student_file_that_says_nothing_sensible_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "student.toml"
    file.write_text(text)
    with pytest.raises(ModelLoadError, match=message):
        build_student(str(file), vocab_size=258, seed=0)


def test_a_fresh_student_needs_a_vocabulary() -> None:
    with pytest.raises(ModelLoadError, match="no vocab_size and no tokenizer gives one"):
        build_student("qwen2-tiny", vocab_size=None, seed=0)


def test_an_unknown_student_names_those_there_are() -> None:
    with pytest.raises(ModelLoadError, match=r"student ./none: there is nothing at .*\. Student presets are qwen2-0.5b"):
        build_student("./none", vocab_size=258, seed=0)
    with pytest.raises(ModelLoadError, match=r"there is no file none.toml"):
        build_student("none.toml", vocab_size=258, seed=0)
