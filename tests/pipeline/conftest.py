"""A teacher, texts and a finished store of more files than a process may open by some limits, for tests that only copy or read it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from pathlib import Path

import pytest

from pipeline.config import ExtractConfig
from pipeline.extract import extract
from pipeline.models.resolve import resolve_model
from tests.checkpoints import save_checkpoint

STUDENT = """
[config]
model_type = "qwen2"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 1
head_dim = 8
max_position_embeddings = 256
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What the commands of a test are about."""

    folder: Path
    teacher: Path
    corpus: Path
    more: Path
    """Other texts, to append."""
    student: Path
    store: Path

    def extract(self, out: Path | str, *more: str, data: Path | None = None) -> list[str]:
        """Arguments of the extraction that made the store."""
        source = ["extract", "--teacher", str(self.teacher), "--data", str(data or self.corpus), "--out", str(out)]
        return [*source, "--seq-len", "256", "--accept-fidelity", "--set", "gate_tokens=256", *more]

    def append(self, out: Path | str) -> list[str]:
        return self.extract(out, "--append", data=self.more)

    def align(self, out: Path | str, store: Path | str | None = None) -> list[str]:
        return ["align", str(store or self.store), "--student", str(self.student), "--out", str(out)]

    def train(self, out: Path | str, store: Path | str | None = None, *more: str) -> list[str]:
        """A training of twelve steps with two checkpoints."""
        told = ["--steps", "12", "--set", "save_every=4", "--set", "eval_fraction=0.1", "--set", "threads=1", *more]
        return ["train", "--store", str(store or self.store), "--student", str(self.student), "--out", str(out), *told]


def write_texts(path: Path, number: int, seed: int) -> Path:
    draw = random.Random(seed)
    texts = ("".join(draw.choice("abcdefgh ijkl") for _ in range(draw.randint(100, 400))) for _ in range(number))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    folder.chmod(0o755)
    student = folder / "student.toml"
    student.write_text(STUDENT)
    found = Bench(
        folder=folder,
        teacher=save_checkpoint(folder / "teacher", "qwen2", num_hidden_layers=2, max_position_embeddings=256),
        corpus=write_texts(folder / "corpus.jsonl", 300, 0),
        more=write_texts(folder / "more.jsonl", 300, 1),
        student=student,
        store=folder / "store",
    )
    config = ExtractConfig(
        teacher=str(found.teacher),
        data=(str(found.corpus),),
        out=str(found.store),
        seq_len=256,
        accept_fidelity=True,
        gate_tokens=256,
    )
    extract(config, resolve_model(config.teacher), say=lambda _: None)
    return found


def content(store: Path) -> dict[str, str]:
    """What a store holds, file by file: all but times, logs and how its tables are cut."""
    files = (path for part in ("kv.zarr", "commits", "tokenizer") for path in (store / part).rglob("*"))
    return {
        path.relative_to(store).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(files)
        if path.is_file()
    }
