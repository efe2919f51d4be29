"""What is wrong with a pair of models, said before anything is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pipeline.cli import cli
from pipeline.doctor import examine
from pipeline.models.load import load_tokenizer
from tests.align.test_spans import side
from tests.checkpoints import save_checkpoint
from tests.stores import write_store
from tests.training.conftest import make_texts, teacher_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("doctor")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> str:
    return str(save_checkpoint(folder / "teacher", "qwen2"))


@pytest.fixture(scope="module")
def student(folder: Path) -> str:
    return str(
        save_checkpoint(
            folder / "student", "qwen2", num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, hidden_size=16
        )
    )


@pytest.fixture(scope="module")
def store(folder: Path, teacher: str) -> str:
    load_tokenizer(Path(teacher)).save_pretrained(folder / "tokenizer")
    return str(write_store(folder / "kv", teacher_source(make_texts(8)), tokenizer=folder / "tokenizer"))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["doctor", *arguments])


def record(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    found: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (0 if found["ok"] else 1)
    return found


def test_one_screen_has_both_configs_every_shape_and_what_it_costs(teacher: str, student: str, store: str) -> None:
    result = run("--teacher", teacher, "--student", student, "--store", store)
    assert result.exit_code == 0, result.output
    for line in (
        "num_key_value_heads",
        "query heads but 2 KV heads",
        "teacher K",
        "projected K",
        "coverage",
        "nothing in the way of training",
    ):
        assert line in result.output
    found = record("--teacher", teacher, "--student", student, "--store", store)
    assert found["facts"]["num_key_value_heads"] == [2, 1]
    tokens = found["shapes"]["teacher K"][2]
    assert found["shapes"]["teacher K"] == [1, 2, tokens, 16]
    assert found["shapes"]["projected K"] == found["shapes"]["student K"] == [1, 1, tokens, 8]
    assert found["layer_map"] == [[0, 2], [1, 3]]
    assert found["coverage"] == 1.0
    assert found["index"].startswith("identity")
    assert found["bytes_per_token"]["aligned to the student"] < 0.3 * found["bytes_per_token"]["raw, all layers"]


def test_a_student_with_another_tokenizer_is_told_to_align_the_store(teacher: str, store: str, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", "qwen2", vocab_size=3100, num_hidden_layers=2)
    side("large").tokenizer.save_pretrained(other)
    found = record("--teacher", teacher, "--student", str(other))
    assert found["ok"], "without a store there is nothing that fails yet"
    said = next(finding["what"] for finding in found["findings"] if "has another tokenizer" in finding["what"])
    assert "student against teacher: vocabularies of" in said
    assert 0.9 < found["coverage"] <= 1.0
    assert found["index"].startswith("by bytes")
    assert found["shapes"]["projected K at the student's tokens"] == found["shapes"]["student K"]
    against = record("--teacher", teacher, "--student", str(other), "--store", store)
    assert not against["ok"]
    (fatal,) = [finding for finding in against["findings"] if finding["fatal"]]
    assert "are not those of" in fatal["what"]
    assert fatal["fix"].startswith("'kvpipe align")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("vocab_size = 100\n", "vocab_size 100, expected at least"),
        ("max_position_embeddings = 16\n", "has max_position_embeddings 16, the store samples of"),
    ],
)
def test_a_fresh_student_that_cannot_read_the_store_fails(
    config: str, message: str, teacher: str, store: str, tmp_path: Path
) -> None:
    fields = 'model_type = "qwen2"\nhidden_size = 16\nnum_hidden_layers = 2\nnum_attention_heads = 2\nnum_key_value_heads = 1\n'
    (tmp_path / "fresh.toml").write_text(f"[config]\n{fields}{config}")
    result = run("--teacher", teacher, "--student", str(tmp_path / "fresh.toml"), "--store", store)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split()) or message in str(result.exception)


def test_a_store_baked_for_another_geometry_fails(teacher: str, student: str, store: str, tmp_path: Path) -> None:
    aligned = CliRunner().invoke(cli, ["align", store, "--student", student, "--out", str(tmp_path / "baked"), "--json"])
    assert aligned.exit_code == 0, aligned.output
    assert record("--teacher", teacher, "--student", student, "--store", str(tmp_path / "baked"))["ok"]
    other = save_checkpoint(tmp_path / "other", "qwen2", num_hidden_layers=3)
    found = record("--teacher", teacher, "--student", str(other), "--store", str(tmp_path / "baked"))
    assert [finding["fatal"] for finding in found["findings"] if "is baked for" in finding["what"]] == [True]


def test_presets_that_are_not_here_are_known_by_their_published_numbers() -> None:
    found = examine("qwen2-7b", "tinyllama-1.1b", None, "last_aligned", None)
    assert found.ok
    assert found.coverage is None
    assert found.facts["num_attention_heads"] == (28, 32)
    assert found.facts["num_key_value_heads"] == (4, 4)
    assert found.shapes["teacher K"][1::2] == (4, 128)
    assert found.shapes["projected K"][1::2] == found.shapes["student K"][1::2] == (4, 64)
    assert sum("is not on this machine" in finding.what for finding in found.findings) == 2
    assert any("28 query heads but 4 KV heads" in finding.what for finding in found.findings)


def test_names_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no-such-model"):
        examine("no-such-model", "qwen2-0.5b", None, "last_aligned", None)
