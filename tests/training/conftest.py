"""A store made by a real teacher from real text, and the runs the tests train on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.models.capture import capture_kv
from pipeline.models.probe import probe_kv_spec
from tests.checkpoints import byte_tokenizer, save_tokenizer, tiny_model
from tests.stores import Source, write_store

WORDS = ("store", "keys", "values", "layer", "teacher", "student", "shard", "token", "head", "naïve", "déjà")
STUDENT = """
[config]
model_type = "qwen2"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 1
head_dim = 8
max_position_embeddings = 128
"""


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=int(size))) for size in rng.integers(4, 12, size=count)]


def teacher_source(texts: list[str], seed: int = 0) -> Source:
    """Token ids and the keys and values a tiny teacher computes for them."""
    teacher = tiny_model("qwen2", seed=seed)
    spec = probe_kv_spec(teacher)
    tokenizer = byte_tokenizer()
    input_ids = [np.array(tokenizer(text)["input_ids"], dtype=np.int32) for text in texts]
    kv = []
    for ids in input_ids:
        captured = capture_kv(teacher, spec, torch.from_numpy(ids.astype(np.int64))[None])
        kv.append(
            {
                layer: (key[0].transpose(0, 1).numpy(), value[0].transpose(0, 1).numpy())
                for layer, (key, value) in captured.items()
            }
        )
    return Source(spec=spec, input_ids=input_ids, kv=kv)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def source() -> Source:
    return teacher_source(make_texts(44))


@pytest.fixture(scope="session")
def store_path(tmp_path_factory: pytest.TempPathFactory, source: Source, tokenizer_folder: Path) -> Path:
    """44 samples of 22 documents in several shards, exact values."""
    documents = [f"document-{index // 2}" for index in range(len(source.input_ids))]
    return write_store(
        tmp_path_factory.mktemp("store") / "kv", source, codec="raw", documents=documents, tokenizer=tokenizer_folder
    )


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Fresh, half the teacher's layers and KV heads."""
    path = tmp_path_factory.mktemp("student") / "tiny.toml"
    path.write_text(STUDENT)
    return str(path)


@pytest.fixture(scope="session")
def student_with_dropout(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same, but every step draws random numbers."""
    path = tmp_path_factory.mktemp("student") / "dropout.toml"
    path.write_text(f"{STUDENT}attention_dropout = 0.1\n")
    return str(path)
