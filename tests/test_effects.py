"""Whether alignments teach: students in the demo's setting, three seeds each. The tables are those of docs/alignment.md."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kvstore import open_store
from pipeline.align.fit import Fit
from pipeline.align.fitted import FittedMap
from pipeline.demo import cached_teacher, stdlib_sources, write_corpus
from tests.experiments import RECIPE, STUDENT, kvpipe, train_student
from tests.online import train_online
from training.config import TrainConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]
SEEDS = range(3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo's teacher, trained or found, and the demo's corpus."""
    corpus, files = tmp_path_factory.mktemp("effects") / "corpus.jsonl", stdlib_sources()
    write_corpus(corpus, files)
    return cached_teacher(files, corpus, RECIPE, None, print), corpus


def extracted(teacher: tuple[Path, Path], codec: str) -> Path:
    """All layers of the teacher on the corpus, in its own geometry and tokens."""
    checkpoint, corpus = teacher
    flags = [item for key, value in RECIPE["extract"].items() for item in (f"--{key.replace('_', '-')}", str(value))]
    out = corpus.parent / codec
    kvpipe("extract", "--teacher", str(checkpoint), "--data", str(corpus), "--out", str(out), "--codec", codec, *flags)
    return out


@pytest.fixture(scope="module")
def raw_store(teacher: tuple[Path, Path]) -> Path:
    return extracted(teacher, "mix")


@pytest.fixture(scope="module")
def exact_store(teacher: tuple[Path, Path]) -> Path:
    return extracted(teacher, "raw")


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
    for adapter in ("orthogonal", "linear"):
        arm = ["--set", f"adapter={adapter}"]
        rows[f"adapter {adapter}"] = [train_student(tmp_path, raw_store, f"{adapter}-{seed}", seed, *arm) for seed in SEEDS]
    maps, store = tmp_path / "pca.safetensors", tmp_path / "pca"
    joint_components(raw_store, tmp_path / "complex-pca.safetensors").save(maps)
    kvpipe("align", str(raw_store), "--student", STUDENT, "--fit", str(maps), "--out", str(store))
    rows["joint components"] = [train_student(tmp_path, store, f"pca-{seed}", seed) for seed in SEEDS]
    table(rows)
    for method, losses in rows.items():
        gains = [plain - loss for plain, loss in zip(rows["CE"], losses, strict=True)]
        assert method == "CE" or statistics.mean(gains) > 0, method
    best = statistics.mean(rows["group-mean"])
    assert best < statistics.mean(rows["joint components"]), "a map that retains most but does not commute with rotation"


def joint_components(raw_store: Path, like: Path) -> Fit:
    """Principal components over all heads and channels, of keys too: what retains most and mixes rotary pairs."""
    store, fit = open_store(raw_store), Fit.load(like)
    maps = {}
    for layer in fit.maps:
        batch = store.read(range(0, len(store), 20), [layer])
        sides = []
        for side, wanted in ((batch.key[0], fit.maps[layer].key), (batch.value[0], fit.maps[layer].value)):
            flat = side.reshape(len(side), -1).astype(np.float64)
            rows = np.linalg.eigh(np.cov(flat.T))[1].T[::-1][: wanted[..., 0, 0].numel()]
            sides.append(torch.from_numpy(rows.copy()).float().reshape(wanted.shape))
        maps[layer] = FittedMap(key=sides[0], value=sides[1])
    return dataclasses.replace(fit, maps=maps)


def test_what_the_store_teaches_depends_little_on_the_codec_and_more_on_layers_and_schedule(
    exact_store: Path, teacher: tuple[Path, Path], tmp_path: Path
) -> None:
    """The table of README: equal steps, the learning rate best for cross-entropy."""
    stores = {}
    for codec in ("raw", "q8", "mix", "q4z", "q4z-min"):
        stores[codec] = tmp_path / f"store-{codec}"
        kvpipe("align", str(exact_store), "--student", STUDENT, "--codec", codec, "--out", str(stores[codec]))
    stores["uniform"] = tmp_path / "store-uniform"
    kvpipe("align", str(exact_store), "--student", STUDENT, "--layer-map", "uniform", "--out", str(stores["uniform"]))

    def seeds(name: str, store: Path, *arm: str) -> list[float]:
        return [train_student(tmp_path, store, f"{name}-{seed}", seed, *arm) for seed in SEEDS]

    mix = stores["mix"]
    rows = {"CE": seeds("ce", mix, "--ce-only")}
    rows["logit KD, teacher online"] = [teach_online(tmp_path, mix, f"kd-{seed}", seed, teacher[0]) for seed in SEEDS]
    rows |= {f"KV, {codec}": seeds(codec, stores[codec]) for codec in ("raw", "q8", "mix", "q4z", "q4z-min")}
    rows["KV, uniform layers"] = seeds("uniform", stores["uniform"])
    rows["KV in all steps"] = seeds("always", mix, "--set", "kv_until=1.0")
    rows["KV in a quarter of them"] = seeds("quarter", mix, "--set", "kv_until=0.25")
    rows |= {f"KV, {loss}": seeds(loss, mix, "--set", f"kv_loss={loss}") for loss in ("smooth_l1", "cosine", "relation")}
    rows["KV of other samples (control)"] = seeds("shuffled", mix, "--set", "shuffle_targets=true")
    table(rows)
    mean = {name: statistics.mean(losses) for name, losses in rows.items()}
    spread = statistics.stdev([a - b for a, b in zip(rows["KV, mix"], rows["KV, raw"], strict=True)])
    assert abs(mean["KV, mix"] - mean["KV, raw"]) <= max(2 * spread, 0.01)
    assert mean["KV, mix"] <= mean["logit KD, teacher online"] + 0.01
    assert mean["KV, mix"] < mean["KV of other samples (control)"] < mean["CE"]


def test_with_four_times_the_steps_the_gain_is_smaller(exact_store: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    kvpipe("align", str(exact_store), "--student", STUDENT, "--out", str(store))
    steps = ["--set", f"steps={4 * RECIPE['train']['steps']}"]
    rows = {
        "CE, 4x": [train_student(tmp_path, store, f"ce-{seed}", seed, "--ce-only", *steps) for seed in SEEDS],
        "KV, mix, 4x": [train_student(tmp_path, store, f"kv-{seed}", seed, *steps) for seed in SEEDS],
    }
    table(rows)
    assert statistics.mean(rows["KV, mix, 4x"]) <= statistics.mean(rows["CE, 4x"]) + 0.01


def teach_online(out: Path, store: Path, name: str, seed: int, teacher: Path) -> float:
    """Held-out nats per byte of a student that learnt from the teacher's logits."""
    settings: dict[str, Any] = {**RECIPE["train"], "store": str(store), "student": STUDENT, "out": out / name, "seed": seed}
    loss = train_online(TrainConfig(device="cpu", **settings), teacher, "logits").eval_nats_per_byte
    assert loss is not None
    return loss
