"""Which layers are alike: a student made of a teacher's own layers must find them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from kvstore import open_store
from pipeline.align.fit import Fit
from pipeline.align.similarity import LayerSimilarity
from pipeline.cli import cli
from pipeline.match_layers import match_layers
from tests.checkpoints import byte_tokenizer, save_tokenizer, tiny_model
from tests.stores import write_store
from tests.training.conftest import make_texts, teacher_source


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("match")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    return write_store(folder / "kv", teacher_source(make_texts(12)), "raw", tokenizer=folder / "tokenizer")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's first two layers, a model of its own."""
    folder = tmp_path_factory.mktemp("pruned")
    model = tiny_model("qwen2", num_hidden_layers=2)
    model.load_state_dict(tiny_model("qwen2").state_dict(), strict=False)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_layers_that_are_the_teachers_own_are_found(raw: Path, pruned: Path) -> None:
    told: list[tuple[int, int]] = []
    found = match_layers(str(raw), str(pruned), 400, lambda done, total: told.append((done, total)))
    assert found.layer_map == "0=0,1=1"
    np.testing.assert_allclose([found.cka[0][0], found.cka[1][1]], 1.0, atol=1e-6)
    assert all(found.cka[row][other] < 0.999 for row in (0, 1) for other in range(4) if other != row)
    assert told[-1] == (400, 400)
    assert found.num_tokens >= 300


def test_the_command_prints_a_map_that_align_takes(raw: Path, pruned: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["match-layers", str(raw), "--student", str(pruned)])
    assert result.exit_code == 0, result.output
    assert "--layer-map 0=0,1=1" in result.output
    arguments = [
        "align",
        str(raw),
        "--student",
        str(pruned),
        "--layer-map",
        "0=0,1=1",
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    aligned = CliRunner().invoke(cli, arguments)
    assert aligned.exit_code == 0, aligned.output
    assert json.loads(aligned.stdout)["num_samples"] == 12


def test_a_layer_map_may_be_asked_for_by_likeness(raw: Path, pruned: Path, tmp_path: Path) -> None:
    both = ["--student", str(pruned), "--layer-map", "cka"]
    aligned = CliRunner().invoke(cli, ["align", str(raw), *both, "--out", str(tmp_path / "out")])
    assert aligned.exit_code == 0, aligned.output
    assert "layer map by CKA: 0=0,1=1" in aligned.output
    record = open_store(tmp_path / "out").manifest.alignment
    assert record is not None
    assert record["layer_map"] == [[0, 0], [1, 1]]
    fitted = CliRunner().invoke(cli, ["fit", "--store", str(raw), *both, "--out", str(tmp_path / "maps.safetensors")])
    assert fitted.exit_code == 0, fitted.output
    assert Fit.load(tmp_path / "maps.safetensors").alignment.layer_map == ((0, 0), (1, 1))
    settings = ["steps=2", "batch_size=4", "device=cpu", "layer_map=cka", "eval_fraction=0", "threads=1"]
    flags = [item for setting in settings for item in ("--set", setting)]
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    own = write_store(tmp_path / "own", teacher_source(make_texts(12)), "raw", tokenizer=tokenizer)
    run = ["train", "--store", str(own), "--student", str(pruned), "--out", str(tmp_path / "run"), *flags]
    trained = CliRunner().invoke(cli, run)
    assert trained.exit_code == 0, trained.output
    assert json.loads((tmp_path / "run" / "run.json").read_text())["alignment"]["layer_map"] == [[0, 0], [1, 1]]


def test_a_fresh_student_is_like_no_layer(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "fresh.toml").write_text(
        '[config]\nmodel_type = "qwen2"\nhidden_size = 32\nnum_hidden_layers = 2\nnum_attention_heads = 4\nnum_key_value_heads = 1\n'
    )
    with pytest.raises(ValueError, match=r"is a fresh model, about equally unlike every layer"):
        match_layers(str(raw), str(tmp_path / "fresh.toml"), 400)


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate with its matrices written out (Song et al. 2012, eq. 5)."""
    size, ones = len(x), np.ones(len(x))
    k, t = (z @ z.T * (1 - np.eye(size)) for z in (x - x.mean(axis=0), y - y.mean(axis=0)))
    first = np.trace(k @ t) + ones @ k @ ones * (ones @ t @ ones) / ((size - 1) * (size - 2))
    return float(first - 2 / (size - 2) * ones @ k @ t @ ones) / (size * (size - 3))


def test_cka_is_that_of_the_definition_and_blind_to_turning_and_scaling() -> None:
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(40, 2, 6)) for _ in range(4)]
    turn = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    turned = (3.0 * layers[0].reshape(40, 12) @ turn).reshape(40, 2, 6)
    side = [
        (torch.from_numpy(each), torch.from_numpy(other)) for each, other in ((layers[0], layers[1]), (layers[2], layers[3]))
    ]
    similarity = LayerSimilarity(2, 3)
    similarity.add(side, [*side, (torch.from_numpy(turned), side[0][1])])
    expected = [
        hsic(a.reshape(40, -1), b.reshape(40, -1))
        / np.sqrt(hsic(a.reshape(40, -1), a.reshape(40, -1)) * hsic(b.reshape(40, -1), b.reshape(40, -1)))
        for a, b in ((layers[0], layers[2]), (layers[1], layers[3]))
    ]
    np.testing.assert_allclose(similarity.cka()[0, 1], np.mean(expected), atol=1e-10)
    np.testing.assert_allclose(similarity.cka()[[0, 0, 1], [0, 2, 1]], 1.0)
    with pytest.raises(ValueError, match=r"got a batch of 3 tokens, expected at least 4"):
        similarity.add([(torch.zeros(3, 2), torch.zeros(3, 2))], [(torch.zeros(3, 2), torch.zeros(3, 2))])
