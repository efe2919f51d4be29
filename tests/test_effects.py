"""Whether alignments teach: students in the demo's setting, three seeds each. The tables are those of docs/alignment.md."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.demo import cached_teacher, stdlib_sources, write_corpus
from tests.experiments import RECIPE, STUDENT, kvpipe, train_student

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]
SEEDS = range(3)


@pytest.fixture(scope="module")
def raw_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All layers of the demo's teacher on the demo's corpus, in the teacher's geometry and tokens."""
    folder = tmp_path_factory.mktemp("effects")
    files = stdlib_sources()
    write_corpus(folder / "corpus.jsonl", files)
    teacher = cached_teacher(files, folder / "corpus.jsonl", RECIPE, None, print)
    flags = [item for key, value in RECIPE["extract"].items() for item in (f"--{key.replace('_', '-')}", str(value))]
    kvpipe("extract", "--teacher", str(teacher), "--data", str(folder / "corpus.jsonl"), "--out", str(folder / "raw"), *flags)
    return folder / "raw"


@pytest.fixture(scope="module")
def tokenizer(raw_store: Path) -> str:
    """A BPE of 512 tokens trained on the corpus; the teacher reads bytes."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    texts = [json.loads(line)["text"] for line in (raw_store.parent / "corpus.jsonl").read_text().splitlines()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    found.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=512, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    )
    folder = raw_store.parent / "tokenizer"
    transformers.PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<|end|>", pad_token="<|end|>").save_pretrained(
        folder
    )
    return str(folder)


def table(rows: dict[str, list[float]]) -> None:
    """One line an arm: each seed, and the mean difference to the first arm with its spread."""
    first = next(iter(rows.values()))
    print()
    for name, losses in rows.items():
        differences = [loss - plain for loss, plain in zip(losses, first, strict=True)]
        spread = statistics.stdev(differences)
        seeds = " | ".join(f"{loss:.3f}" for loss in losses)
        print(f"| {name} | {seeds} | {statistics.mean(differences):+.3f} | {spread:.3f} |")


def test_a_student_with_another_tokenizer_learns_from_the_tokens_under_its_own(
    raw_store: Path, tokenizer: str, tmp_path: Path
) -> None:
    stores = {}
    for time in ("overlap", "last", "linear"):
        where = ["--student", STUDENT, "--tokenizer", tokenizer, "--out", str(tmp_path / time)]
        record = kvpipe("align", str(raw_store), *where, "--time", time)
        print(f"{time}: {record['coverage']:.3f} of {record['num_tokens']:,} tokens have keys and values")
        stores[time] = tmp_path / time
    rows = {"CE": [train_student(tmp_path, stores["overlap"], f"ce-{seed}", seed, "--ce-only") for seed in SEEDS]}
    for time, store in stores.items():
        rows[f"KV, {time}"] = [train_student(tmp_path, store, f"{time}-{seed}", seed) for seed in SEEDS]
    table(rows)
    gains = {name: [plain - loss for plain, loss in zip(rows["CE"], losses, strict=True)] for name, losses in rows.items()}
    assert min(gains["KV, overlap"]) > 0
    assert statistics.mean(gains["KV, overlap"]) >= 0.02
    assert statistics.mean(gains["KV, overlap"]) > statistics.mean(gains["KV, linear"])


def test_students_learn_from_fitted_projections_and_from_the_plain_mean_of_heads(raw_store: Path, tmp_path: Path) -> None:
    rows: dict[str, list[float]] = {}
    for method in ("group-mean", "procrustes", "complex-pca"):
        maps, store = tmp_path / f"{method}.safetensors", tmp_path / method
        found = kvpipe("fit", "--store", str(raw_store), "--student", STUDENT, "--method", method, "--out", str(maps))
        shares = [(round(row["key_held_out"], 3), round(row["value_held_out"], 3)) for row in found["retained"]]
        print(f"{method}: retained of keys and values by layer, held out: {shares}")
        kvpipe("align", str(raw_store), "--student", STUDENT, "--fit", str(maps), "--out", str(store))
        if not rows:
            rows["CE"] = [train_student(tmp_path, store, f"ce-{seed}", seed, "--ce-only") for seed in SEEDS]
        rows[method] = [train_student(tmp_path, store, f"{method}-{seed}", seed) for seed in SEEDS]
    table(rows)
    for method, losses in rows.items():
        gains = [plain - loss for plain, loss in zip(rows["CE"], losses, strict=True)]
        assert method == "CE" or statistics.mean(gains) > 0, method
