"""Stores that a stranger changed are refused or read as they were: no silent change, no other exception, no hang, no death of a process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore import open_store
from kvstore.drop import drop_samples
from kvstore.gate import write_gate
from kvstore.storage import locate
from kvstore.verify import verify_store
from pipeline.config import ExtractConfig
from pipeline.extract import extract
from pipeline.models.resolve import resolve_model
from tests.checkpoints import byte_tokenizer, save_checkpoint
from tests.data.test_chat import CHATML
from tests.stores import add_repeats, random_source, small_spec, write_store

ROOT = Path(__file__).parents[2]
GATE = {"codec": "mix", "num_tokens": 10, "kl": 0.01, "passed": True}
HARMLESS = {"same", "refused", "reported"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of record: two groups, a tokenizer, a gate, repeats and a dropped sample."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer" / "tokenizer_config.json").write_text("{}")
    source = random_source(small_spec(), [64, 50, 130, 20, 64, 30])
    masks = {index: np.ones(len(ids), dtype=np.uint8) for index, ids in enumerate(source.input_ids)}
    path = write_store(folder / "store", source, "mix,0=raw", tokenizer=folder / "tokenizer", loss_masks=masks)
    write_gate(locate(path), "before", GATE)
    drop_samples(str(path), [open_store(path).samples.ids[-1]])
    add_repeats(path, 0, 2)
    assert verify_store(str(path), deep=True).problems == ()
    return path


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store baked for a student, of conversations, by the real extraction."""
    folder = tmp_path_factory.mktemp("chat")
    teacher, tokenizer = save_checkpoint(folder / "teacher", "qwen2"), byte_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(teacher)
    student = save_checkpoint(folder / "student", "qwen2", num_key_value_heads=1, num_hidden_layers=2)
    turns = [[{"role": "user", "content": f"{n} plus {n}?"}, {"role": "assistant", "content": f"{2 * n}."}] for n in range(5)]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    config = ExtractConfig(
        teacher=str(teacher),
        student=str(student),
        data=(str(folder / "chat.jsonl"),),
        out=folder / "store",
        codec="q8",
        seq_len=200,
        accept_fidelity=True,
    )
    extract(config, resolve_model(config.teacher), say=lambda _: None)
    assert verify_store(str(folder / "store"), deep=True).problems == ()
    return folder / "store"


@pytest.mark.parametrize(
    "count", [pytest.param(300, id="300"), pytest.param(5000, marks=[pytest.mark.slow, pytest.mark.timeout(5400)], id="5000")]
)
def test_a_changed_store_is_refused_or_read_as_it_was(
    plain: Path, chat: Path, count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[dict[str, Any]] = []
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.kvstore.try_mutations", store, tmp_path / str(first), str(first), str(count // 2)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for first, store in ((10_000 * count, plain), (10_000 * count + count, chat))
    ]
    for process in started:
        output, _ = process.communicate()
        assert process.returncode == 0
        tried += [json.loads(line) for line in output.splitlines()]
    with capsys.disabled():
        print(f"\n{len(tried)} changed stores: {dict(Counter(one['outcome'] for one in tried))}")
    assert len(tried) == count
    assert [one for one in tried if one["outcome"] not in HARMLESS] == []
    assert sum(one["outcome"] != "same" for one in tried) > count / 3  # the changes were not all of no consequence
