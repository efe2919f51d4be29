"""Perplexity against a loop over single tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pipeline.cli import cli
from pipeline.evaluate import EvalSettings, evaluate
from pipeline.models.load import load_causal_lm, load_tokenizer
from tests.checkpoints import byte_tokenizer, save_checkpoint
from tests.data.test_chat import CHATML, SPECIAL

TEXTS = ["def f(x):\n    return x\n", "naïve 日本 " * 30, "ab"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("eval") / "model", "qwen2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "held-out.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def nats(model: Any, ids: list[int], learnt: list[bool]) -> float:
    with torch.no_grad():
        scores = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
    return -sum(float(scores[at - 1, ids[at]]) for at in range(1, len(ids)) if learnt[at])


def test_every_token_is_predicted_from_those_before_it_in_its_sample(model: Path, data: str) -> None:
    summary = evaluate(EvalSettings(model=str(model), data=(data,), seq_len=64, batch_tokens=200))
    loaded = load_causal_lm(model)
    pieces = [list(text.encode())[first : first + 64] for text in TEXTS for first in range(0, len(text.encode()), 64)]
    ids: list[list[int]] = [byte_tokenizer().convert_tokens_to_ids(_tokens(bytes(piece))) for piece in pieces]
    expected = sum(nats(loaded, piece, [True] * len(piece)) for piece in ids)
    predicted = sum(len(piece) - 1 for piece in ids)
    assert (summary.num_samples, summary.num_predicted) == (len(pieces), predicted)
    assert summary.nats_per_token == pytest.approx(expected / predicted, rel=1e-5)
    assert summary.perplexity == pytest.approx(math.exp(expected / predicted), rel=1e-4)
    assert summary.bits_per_byte == pytest.approx(expected / summary.num_bytes / math.log(2), rel=1e-5)
    # A character that a sample's end cuts decodes to a replacement character of three bytes.
    assert summary.num_bytes == pytest.approx(predicted, abs=3 * len(pieces))


def _tokens(content: bytes) -> list[str]:
    from pipeline.align.token_bytes import _BYTES

    symbols = {byte: symbol for symbol, byte in _BYTES.items()}
    return [symbols[byte] for byte in content]


def test_of_conversations_only_the_assistant_is_predicted(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = CHATML
    path = save_checkpoint(tmp_path / "chat", "qwen2", vocab_size=300)
    tokenizer.save_pretrained(path)
    turns = [{"role": "user", "content": "question?"}, {"role": "assistant", "content": "an answer"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    summary = evaluate(EvalSettings(model=str(path), data=(str(tmp_path / "chat.jsonl"),)))
    tokens: Any = load_tokenizer(path).apply_chat_template(turns, return_dict=True)["input_ids"]
    text = load_tokenizer(path).decode(tokens)
    assert "an answer" in text
    assert len("an answer") <= summary.num_predicted <= len("an answer") + 2
    assert summary.num_bytes == len("an answer") or summary.num_bytes == len("an answer\n")


def test_the_command_prints_what_it_measured_and_refuses_what_it_cannot(model: Path, data: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["eval", str(model), "--data", data, "--max-tokens", "30", "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["num_samples"] == 2
    assert record["perplexity"] > 1
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(ValueError, match=r"has no token to predict, got 0 samples"):
        evaluate(EvalSettings(model=str(model), data=(str(tmp_path / "short.txt"),)))
