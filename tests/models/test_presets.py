"""Shipped presets: their numbers agree with what was published, and reading them costs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from pipeline.models.presets import (
    Geometry,
    parse_student,
    parse_teacher,
    student_preset,
    student_preset_names,
    teacher_preset,
    teacher_preset_names,
)
from pipeline.presets_path import configs_dir, find_preset

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", teacher_preset_names())
def test_a_teacher_preset_is_consistent(name: str) -> None:
    preset = teacher_preset(name)
    assert preset is not None
    geometry = preset.geometry
    assert preset.name == name
    assert preset.source == f"https://huggingface.co/{preset.id}/blob/main/config.json"
    assert geometry.num_heads % geometry.num_kv_heads == 0
    # Gemma's heads are wider than its residual stream allots them.
    assert (geometry.num_heads * geometry.head_dim == geometry.hidden_size) == (geometry.model_type != "gemma2")
    assert preset.out == f"{name}-kv"
    assert preset.max_tokens == 1_000_000
    assert preset.data == "HuggingFaceFW/fineweb-edu:sample-10BT"
    AutoConfig.for_model(geometry.model_type)


@pytest.mark.parametrize(
    ("name", "kv_bytes_per_token"),
    [
        # 2 bytes x (key + value) x layers x kv heads x head dim, as given in papers and by serving engines.
        pytest.param("qwen2-7b", 57_344, id="qwen2-7b"),
        pytest.param("qwen2.5-7b", 57_344, id="qwen2.5-7b"),
        pytest.param("qwen2-1.5b", 28_672, id="qwen2-1.5b"),
        pytest.param("qwen2-0.5b", 12_288, id="qwen2-0.5b"),
        pytest.param("qwen3-8b", 147_456, id="qwen3-8b"),
        pytest.param("llama-3.1-8b", 131_072, id="llama-3.1-8b"),
        pytest.param("llama-2-7b", 524_288, id="llama-2-7b"),
        pytest.param("llama-2-70b", 327_680, id="llama-2-70b"),
        pytest.param("tinyllama-1.1b", 22_528, id="tinyllama-1.1b"),
        pytest.param("mistral-7b", 131_072, id="mistral-7b"),
        pytest.param("gpt2", 36_864, id="gpt2"),
    ],
)
def test_a_teacher_preset_has_the_published_kv_size(name: str, kv_bytes_per_token: int) -> None:
    preset = teacher_preset(name)
    assert preset is not None
    g = preset.geometry
    assert 2 * 2 * g.num_layers * g.num_kv_heads * g.head_dim == kv_bytes_per_token


def test_qwen2_7b_is_as_published() -> None:
    preset = teacher_preset("qwen2-7b")
    assert preset is not None
    assert preset.id == "Qwen/Qwen2-7B"
    assert preset.geometry == Geometry(
        model_type="qwen2",
        num_layers=28,
        hidden_size=3584,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=152064,
        max_position_embeddings=131072,
        rope_theta=1e6,
    )


def test_gpt2_has_no_rotary_base() -> None:
    preset = teacher_preset("gpt2")
    assert preset is not None
    assert preset.geometry.rope_theta is None


def test_an_unknown_name_is_no_preset() -> None:
    assert teacher_preset("qwen2-8b") is None
    assert teacher_preset("../teachers/qwen2-7b") is None
    assert student_preset("qwen2-8b") is None


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        *((spelling, "qwen2-7b") for spelling in ("Qwen2-7B", "QWEN2-7B", "Qwen/Qwen2-7B", "qwen/qwen2-7b", " qwen2_7b ")),
        *(
            (spelling, "llama-2-7b")
            for spelling in ("Llama-2-7B", "meta-llama/Llama-2-7b-hf", "Llama-2-7b-hf", "meta-llama/llama-2-7b")
        ),
        ("GPT2", "gpt2"),
        ("someone/Qwen2-7B", None),
        ("Qwen/", None),
        ("7b", None),
        ("", None),
    ],
)
def test_a_teacher_is_found_in_any_case_with_or_without_its_organisation(asked: str, found: str | None) -> None:
    preset = teacher_preset(asked)
    assert (preset and preset.name) == found


@pytest.mark.parametrize("asked", ["Qwen2-0.5B", "qwen/QWEN2-0.5b", "QWEN2-tiny", "TinyLlama-1.1B"])
def test_a_student_is_found_in_any_case_with_or_without_its_organisation(asked: str) -> None:
    preset = student_preset(asked)
    assert preset is not None
    assert preset.name == asked.rpartition("/")[2].lower()


def test_a_folder_wins_over_all_but_a_presets_very_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("Qwen2-7B", "Qwen/Qwen2-7B", "qwen2-7b"):
        assert teacher_preset(name) is not None
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        assert (teacher_preset(name) is not None) == (name == "qwen2-7b")


def test_a_name_of_several_presets_is_asked_about(tmp_path: Path) -> None:
    for stem, organisation in (("one", "first"), ("two", "second")):
        (tmp_path / f"{stem}.toml").write_text(f"id = '{organisation}/Same-7B'")
    with pytest.raises(ValueError, match="same-7b: got the name of several presets, expected one of one, two"):
        find_preset(tmp_path, "same-7b")
    assert find_preset(tmp_path, "FIRST/same-7b") == tmp_path / "one.toml"


def test_pretrained_students_are_the_teachers_of_the_same_name() -> None:
    pretrained = [preset for name in student_preset_names() if (preset := student_preset(name)) and preset.id]
    assert {preset.name for preset in pretrained} == {"qwen2-1.5b", "qwen2-0.5b", "tinyllama-1.1b"}
    for preset in pretrained:
        teacher = teacher_preset(preset.name)
        assert teacher is not None
        assert (preset.id, preset.source) == (teacher.id, teacher.source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("id = 'a/b'\nsource = 'x'\nvocab = 3", r"unknown fields \['vocab'\]", id="unknown"),
        pytest.param("id = 'a/b'\nsource = 'x'", r"\[geometry\].*missing fields \['head_dim'", id="no-geometry"),
    ],
)
def test_a_teacher_file_with_wrong_fields_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "x.toml"
    if "vocab" in text:
        text += "\n" + (configs_dir() / "teachers" / "gpt2.toml").read_text().partition("\n\n")[2]
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_teacher(file)


@pytest.mark.parametrize(
    "text", [pytest.param("source = 'x'", id="neither"), pytest.param("id = 'a/b'\n[config]\nx = 1", id="both")]
)
def test_a_student_is_either_pretrained_or_fresh(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"either 'id' .* or a \[config\] table"):
        parse_student(file)


@pytest.mark.parametrize("module", ["pipeline.models.presets", "pipeline.models.load", "pipeline.models.resolve"])
def test_importing_loads_no_heavy_library(module: str) -> None:
    heavy = "torch transformers huggingface_hub safetensors numpy pydantic"
    code = f"import sys, {module}; print([name for name in {heavy.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
