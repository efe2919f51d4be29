"""Every TOML that is shipped loads into what it is for."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import transformers

from pipeline.config import ExtractConfig
from pipeline.models.presets import student_preset, student_preset_names, teacher_preset, teacher_preset_names
from pipeline.presets_path import configs_dir
from training.config import TrainConfig

CONFIGS = configs_dir()


def toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def test_every_toml_is_in_a_folder_that_is_tested_here() -> None:
    assert {path.parent.name for path in CONFIGS.rglob("*.toml")} == {"teachers", "students", "recipes", "tiny"}


@pytest.mark.parametrize("name", teacher_preset_names())
def test_a_teacher_preset_agrees_with_its_architecture(name: str) -> None:
    preset = teacher_preset(name)
    assert preset is not None
    geometry = preset.geometry
    assert geometry.model_type in transformers.CONFIG_MAPPING
    assert geometry.num_heads % geometry.num_kv_heads == 0
    assert preset.source.startswith(f"https://huggingface.co/{preset.id}/")


@pytest.mark.parametrize("name", student_preset_names())
def test_a_student_preset_is_an_id_or_a_config(name: str) -> None:
    preset = student_preset(name)
    assert preset is not None
    assert (preset.id is None) != (preset.config is None)
    if preset.config is not None:
        transformers.AutoConfig.for_model(**preset.config)


@pytest.mark.parametrize("path", sorted((CONFIGS / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_is_a_whole_run(path: Path) -> None:
    tables = toml(path)
    assert set(tables) == {"extract", "train"}
    extract = ExtractConfig.model_validate({"teacher": "FOLDER", **tables["extract"]})
    train = TrainConfig.model_validate(tables["train"])
    assert extract.out == train.store
    assert any("kvpipe extract" in line for line in path.read_text().splitlines() if line.startswith("#"))


def test_the_demo_recipe_fits_its_commands() -> None:
    tables = toml(CONFIGS / "tiny" / "demo.toml")
    assert set(tables) == {"teacher", "extract", "train"}
    ExtractConfig.model_validate({"teacher": "FOLDER", **tables["extract"]})
    TrainConfig.model_validate({"store": "s", "student": "s", "out": "o", **tables["train"]})
    teacher = tables["teacher"]["config"]
    student = toml(CONFIGS / "tiny" / "demo-student.toml")["config"]
    assert teacher["num_key_value_heads"] == 2 * student["num_key_value_heads"]
    for config in (teacher, student):
        transformers.AutoConfig.for_model(**config)
