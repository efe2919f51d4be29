"""The whole story on one small machine: train a teacher, store its KV with Ray workers, train two students from the store.

Sits on top of every room and runs the same commands a user types, each in a process of its own, so that memory and time are
those of the command. Needs no download.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.presets_path import configs_dir

Say = Callable[[str], None]

EXCERPT_BYTES = 1408
"""Text taken from each file: eleven samples of 128 bytes, so that many files are seen in few tokens."""
_CORPUS, _STORE, _PLOT = "corpus.jsonl", "store", "loss.png"
_ARMS = {"CE only": ("ce", ("--ce-only",)), "CE + KV": ("kv", ())}


def run_demo(
    out: Path, *, workers: int, seed: int, say: Say, steps: int | None = None, max_files: int | None = None
) -> dict[str, Any]:
    """Run the demo into `out` and print its table; a second time the teacher and a finished store are used again.

    Args:
        steps: optimizer steps of each student and of the teacher instead of the recipe's; for a quick look.
        max_files: files of the corpus to use; for a quick look.

    Raises:
        ValueError: a command failed; its own message is above.
    """
    started = time.perf_counter()
    recipe = tomllib.loads((configs_dir() / "tiny" / "demo.toml").read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    files = stdlib_sources()[:max_files]
    say(f"1/5  corpus: {len(files):,} files of Python's standard library, {EXCERPT_BYTES:,} bytes of each are stored")
    write_corpus(out / _CORPUS, files)
    say("2/5  teacher: a 6-layer Qwen2, trained here once and kept")
    teacher = cached_teacher(files, out / _CORPUS, recipe, steps, say)
    say(f"3/5  extract: {workers} Ray workers run the teacher and write its keys and values, aligned to the student")
    student = str(configs_dir() / "tiny" / "demo-student.toml")
    extraction = ["--teacher", str(teacher), "--data", str(out / _CORPUS), "--out", str(out / _STORE), "--student", student]
    store = _kvpipe("extract", *extraction, "--workers", str(workers), *_flags(recipe["extract"]))
    say("4/5  look: kvpipe inspect, then plain Zarr")
    subprocess.run(_command("inspect", str(out / _STORE)), check=True)
    _show_with_plain_zarr(out / _STORE / "kv.zarr")
    say("5/5  train: two students from the same weights, on the same batches in the same order, no teacher in memory")
    results = {
        label: _train(out, name, arm, student, {**recipe["train"], **({"steps": steps} if steps else {})}, seed)
        for label, (name, arm) in _ARMS.items()
    }
    from training.report import plot_runs

    plot_runs({label: out / name for label, (name, _) in _ARMS.items()}, out / _PLOT)
    record = {
        "students": results,
        "store_bytes_per_token": store["stored_bytes"] / store["num_tokens"],
        "seconds": time.perf_counter() - started,
    }
    _print_table(record, out)
    return record


def stdlib_sources() -> list[Path]:
    """Source files of Python's standard library, without its tests, long enough for an excerpt; shuffled once and for all."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not skipped & set(path.relative_to(root).parts) and path.stat().st_size > EXCERPT_BYTES + 1
    )
    random.Random(0).shuffle(files)
    return files


def write_corpus(path: Path, files: Sequence[Path]) -> None:
    """One row per file: a contiguous excerpt from somewhere inside it, cut on character boundaries."""
    draw = random.Random(1)
    with path.open("w", encoding="utf-8") as corpus:
        for file in files:
            content = file.read_bytes()
            start = draw.randrange(len(content) - EXCERPT_BYTES)
            text = content[start : start + EXCERPT_BYTES].decode("utf-8", errors="ignore")
            corpus.write(json.dumps({"text": text, "file": file.name}) + "\n")


def cached_teacher(files: Sequence[Path], corpus: Path, recipe: dict[str, Any], steps: int | None, say: Say) -> Path:
    """Folder of the trained teacher; trained when no teacher of these settings and this text is kept."""
    settings = {**recipe["teacher"], **({"steps": steps} if steps else {})}
    identity = json.dumps([settings, recipe["extract"], recipe["train"]], sort_keys=True).encode() + corpus.read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "kvpipe" / "demo"
    folder = cache / hashlib.sha256(identity).hexdigest()[:16]
    if (folder / "config.json").is_file():
        say(f"     kept from an earlier run: {folder}")
        return folder
    train_teacher(files, corpus, settings, recipe, folder)
    return folder


def train_teacher(files: Sequence[Path], corpus: Path, settings: dict[str, Any], recipe: dict[str, Any], folder: Path) -> None:
    """Train the teacher on whole files, those left out whose excerpts the students are evaluated on, and save it."""
    import numpy as np
    import torch
    import transformers

    tokenizer = byte_tokenizer()
    held_out = _held_out_rows(corpus, tokenizer, recipe)
    text = b"\n".join(file.read_bytes() for row, file in enumerate(files) if row not in held_out)
    # The tokenizer numbers the 256 bytes by their value, so the text is its own token ids.
    tokens = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
    length, batch, steps = int(settings["seq_len"]), int(settings["batch_size"]), int(settings["steps"])

    class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return steps * batch

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            start = random.Random(index).randrange(len(tokens) - length)
            window = tokens[start : start + length].long()
            return {"input_ids": window, "labels": window}

    transformers.set_seed(0)
    config = transformers.AutoConfig.for_model(**settings["config"], vocab_size=len(tokenizer))
    model = transformers.AutoModelForCausalLM.from_config(config)
    staging = folder.with_name(f"{folder.name}.{os.getpid()}")
    arguments = transformers.TrainingArguments(
        output_dir=str(staging),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=int(settings["warmup_steps"]),
        weight_decay=settings["weight_decay"],
        adam_beta2=0.95,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
        seed=0,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(int(settings["threads"]))
    transformers.Trainer(model=model, args=arguments, train_dataset=Windows()).train()
    torch.set_num_threads(threads)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    staging.rename(folder)


def byte_tokenizer() -> Any:
    """A fast tokenizer whose tokens are the 256 byte values, numbered as themselves, and an end-of-text token."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    symbols = _byte_symbols()
    tokenizer = Tokenizer(models.BPE(vocab={symbol: value for value, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def _byte_symbols() -> list[str]:
    """The printable stand-in of every byte in byte-level BPE (GPT-2): itself where printable, else from code point 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(value) if value in printable else chr(next(others)) for value in range(256)]


def _held_out_rows(corpus: Path, tokenizer: Any, recipe: dict[str, Any]) -> set[int]:
    """Rows of the corpus that training from the store will hold out: the split is a function of the samples alone."""
    import numpy as np

    from pipeline.data.documents import read_documents
    from pipeline.data.samples import Cutter
    from pipeline.data.windows import Limits, Windows
    from training.config import TrainConfig
    from training.held_out import split_held_out

    settings = TrainConfig(store=str(corpus), student="", out=corpus, **recipe["train"])
    cutter = Cutter(tokenizer=tokenizer, seq_len=int(recipe["extract"]["seq_len"]))
    samples = Windows(read_documents([str(corpus)]), cutter, Limits(window_tokens=sys.maxsize)).next().samples
    _, held_out = split_held_out(
        [sample.id for sample in samples],
        [sample.source for sample in samples],
        np.array([len(sample.input_ids) for sample in samples]),
        fraction=settings.eval_fraction,
        max_tokens=settings.eval_max_tokens,
    )
    return {int(samples[index].source.rpartition(":")[2]) for index in held_out}


def _train(out: Path, name: str, arm: Sequence[str], student: str, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    run = out / name
    shutil.rmtree(run, ignore_errors=True)
    chosen = [item for key, value in settings.items() for item in ("--set", f"{key}={json.dumps(value)}")]
    return _kvpipe(
        "train", "--store", str(out / _STORE), "--student", student, "--out", str(run), "--seed", str(seed), *chosen, *arm
    )


def _flags(settings: dict[str, Any]) -> list[str]:
    return [item for key, value in settings.items() for item in (f"--{key.replace('_', '-')}", str(value))]


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", *arguments]


def _kvpipe(*arguments: str) -> dict[str, Any]:
    """Run a command with its progress on our terminal and return what it prints as JSON."""
    done = subprocess.run(_command(*arguments, "--json"), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ValueError(f"kvpipe {' '.join(arguments)} failed with status {done.returncode}; its message is above")
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def _show_with_plain_zarr(arrays: Path) -> None:
    lines = ("import zarr", f"g = zarr.open({str(arrays)!r}, mode='r')", "print(g.tree())", "print(g['key'][0, 64:68, 0])")
    print(">>> " + "\n>>> ".join(lines), flush=True)
    subprocess.run([sys.executable, "-W", "error", "-c", "\n".join(lines)], check=True)


def _print_table(record: dict[str, Any], out: Path) -> None:
    from rich.table import Table

    from pipeline.terminal import console

    screen = console()
    table = Table("student", "held-out nats/byte", "tokens", "seconds", "peak memory", "store bytes/token")
    for label, result in record["students"].items():
        table.add_row(
            label,
            f"{result['eval_nats_per_byte']:.3f}",
            f"{result['tokens']:,}",
            f"{result['seconds']:.0f}",
            f"{result['peak_rss_bytes'] / 2**20:,.0f} MiB",
            "none read" if label == "CE only" else f"{record['store_bytes_per_token']:.0f}",
        )
    screen.print(table)
    plain, with_kv = (record["students"][label]["eval_nats_per_byte"] for label in _ARMS)
    screen.print(
        f"With the teacher's KV the student ends {abs(plain - with_kv):.3f} nats per byte {'lower' if with_kv < plain else 'higher'} "
        "after equal steps. "
        f"Curves: {out / _PLOT}. Whole demo: {record['seconds']:.0f} s.",
        highlight=False,
        soft_wrap=True,
    )
