"""Extractions of data some of whose rows cannot be read: they end the run with file and line, or are left out and recorded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kvstore import open_store
from kvstore.verify import verify_store
from pipeline.cli import main
from pipeline.config import ExtractConfig
from pipeline.extract import ExtractSummary, extract
from pipeline.models.resolve import resolve_model
from pipeline.monitor.status import StatusReader
from pipeline.planning.data_size import measure_data
from pipeline.repair import repair_store
from tests.checkpoints import byte_tokenizer, save_checkpoint
from tests.data.chat_templates import TOOLS, chat_tokenizer
from tests.kvstore.test_rewrite import codes_by_id
from tests.pipeline.test_growth import settings_of, state

GOOD = [json.dumps({"text": f"row {number} is whole and long enough"}) for number in range(40)]
BAD = {
    4: '{"text": "before \\ud83d after"}',
    9: "[" * 3_000 + "]" * 3_000,
    15: '{"text": "cut',
    22: '{"text": 5}',
    23: '["a"]',
    30: '{"text": "a", "text": "b"}',
    31: '{"text": "n", "n": ' + "9" * 5_000 + "}",
}
"""By line."""
UNREAD = {7: b'{"text": "\xff\xfe"}', 12: b'{"text": null}', 13: b'{"text": ""}', 14: b""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad-rows")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Path:
    path = save_checkpoint(folder / "teacher", "qwen2", num_hidden_layers=1, hidden_size=32, vocab_size=300)
    chat_tokenizer(TOOLS).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    lines = [line.encode() for line in GOOD]
    for number, line in [*((number, line.encode()) for number, line in BAD.items()), *UNREAD.items()]:
        lines[number - 1] = line
    (folder / "data.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder / "data.jsonl"


def run(teacher: Path, data: Path, out: Path, say: list[str] | None = None, **more: Any) -> ExtractSummary:
    config = ExtractConfig(**settings_of(teacher, [data], out, **{"window_tokens": 300, "codec": "raw", **more}))
    return extract(config, resolve_model(config.teacher), say=(say if say is not None else []).append)


@pytest.mark.parametrize("line", [*BAD, 7])
def test_a_row_that_cannot_be_read_ends_the_run_with_one_line(line: int, teacher: Path, data: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.jsonl"
    lines = [GOOD[number].encode() for number in range(40)]
    lines[line - 1] = data.read_bytes().splitlines()[line - 1]
    alone.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=rf"--data: .*alone\.jsonl, line {line} [^\n]*--on-bad-sample quarantine$"):
        run(teacher, alone, tmp_path / "store", window_tokens=10**6)
    assert not (tmp_path / "store").exists()


def test_rows_that_cannot_be_read_are_left_out_and_recorded_and_the_rest_is_stored(
    teacher: Path, data: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    summary = run(teacher, data, tmp_path / "store", said, on_bad_sample="quarantine")
    store = open_store(tmp_path / "store")
    bad = {*BAD, 7}
    assert summary.num_samples == len(GOOD) - len(BAD) - len(UNREAD)
    assert verify_store(str(tmp_path / "store"), deep=True).problems == ()
    # A row keeps its number, whether rows before it can be read or not; the empty line has none.
    numbers = {int(source.rpartition(":")[2]) for source in store.samples.source}
    assert numbers == {line - 1 - (line > 14) for line in range(1, 41) if line not in BAD and line not in UNREAD}
    (told,) = [line for line in said if "cannot be read and are left out" in line][-1:]
    assert told.startswith("--data: 8 rows cannot be read and are left out, the first: ")
    assert "data.jsonl, line 4 has a lone surrogate \\ud83d" in told
    assert any("2 x a text that is empty or null, which gives nothing" in line for line in said)
    recorded = [row for note in StatusReader(str(tmp_path / "store")).read().notes for row in note["rows"]]
    assert [int(row.partition("data.jsonl, line ")[2].split()[0]) for row in recorded] == sorted(bad)

    before = state(tmp_path / "store")
    assert run(teacher, data, tmp_path / "store", on_bad_sample="quarantine").new_shards == 0
    assert state(tmp_path / "store") == before
    with pytest.raises(ValueError, match=r"data\.jsonl, line 4 has a lone surrogate"):
        run(teacher, data, tmp_path / "store")


@pytest.mark.slow
def test_a_store_without_some_rows_can_be_resumed_appended_to_and_repaired(teacher: Path, data: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run(teacher, data, tmp_path / "whole", on_bad_sample="quarantine")
    run(teacher, data, store, on_bad_sample="quarantine", max_tokens=600)
    more = tmp_path / "more.jsonl"
    more.write_text("{nonsense\n" + json.dumps({"text": "one more row that is whole"}) + "\n" + GOOD[0] + "\n")
    assert run(teacher, more, store, append=True, on_bad_sample="quarantine").num_samples > 1
    assert run(teacher, more, store, append=True, on_bad_sample="quarantine").new_shards == 0
    expected = codes_by_id(open_store(tmp_path / "whole"))
    newest = sorted((tmp_path / "whole" / "commits").glob("*.json"))[-1]
    newest.unlink()
    repair_store(str(tmp_path / "whole"))
    assert codes_by_id(open_store(tmp_path / "whole")) == expected


def test_a_conversation_that_the_template_refuses_is_left_out_like_a_row_that_cannot_be_read(
    teacher: Path, tmp_path: Path
) -> None:
    def chat(*roles: str) -> str:
        return json.dumps({"messages": [{"role": role, "content": f"{role} says"} for role in roles]}) + "\n"

    (tmp_path / "chat.jsonl").write_text(chat("user", "assistant") + chat("user", "critic", "assistant") + chat("user"))
    with pytest.raises(ValueError, match=r"chat\.jsonl, line 2: the chat template leaves out, .* turn 2 of 3 \(critic\)"):
        run(teacher, tmp_path / "chat.jsonl", tmp_path / "fails")
    said: list[str] = []
    run(teacher, tmp_path / "chat.jsonl", tmp_path / "store", said, on_bad_sample="quarantine")
    assert {source.rpartition(":")[2] for source in open_store(tmp_path / "store").samples.source} == {"0", "2"}
    assert any(
        "1 rows cannot be read and are left out, the first: " in line and "turn 2 of 3 (critic)" in line for line in said
    )
    assert any("1 x a conversation in which no assistant speaks" in line for line in said)


@pytest.mark.parametrize(
    "turns",
    [
        pytest.param([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], id="nobody"),
        pytest.param([{"from": "human", "value": "Who are you?"}], id="no-answer"),
    ],
)
def test_data_with_nothing_to_learn_from_is_refused_before_anything_is_stored(
    turns: list[dict[str, str]], teacher: Path, tmp_path: Path
) -> None:
    field = "messages" if "role" in turns[0] else "conversations"
    (tmp_path / "chat.jsonl").write_text(json.dumps({field: turns}) + "\n")
    said: list[str] = []
    with pytest.raises(ValueError, match=r"--data: got conversations in which no assistant speaks \(.*chat\.jsonl\), expected"):
        run(teacher, tmp_path / "chat.jsonl", tmp_path / "store", said)
    assert not (tmp_path / "store").exists()
    assert any("1 x a conversation in which no assistant speaks, so there is nothing to learn from it" in line for line in said)


def test_data_of_which_no_row_can_be_read_says_why(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("nonsense\n" * 3)
    with pytest.raises(
        ValueError, match=r"no sample of at least two tokens.* 3 rows were left out, the first: .*bad\.jsonl, line 1"
    ):
        run(teacher, tmp_path / "bad.jsonl", tmp_path / "store", on_bad_sample="quarantine")


def test_a_plan_reads_the_rows_that_the_extraction_will(data: Path, teacher: Path, tmp_path: Path) -> None:
    config = ExtractConfig(teacher=str(teacher), data=(str(data),), out=str(tmp_path / "store"), on_bad_sample="quarantine")
    planned = measure_data(config, byte_tokenizer(), 512)
    assert len(planned.window.samples) == len(GOOD) - len(BAD) - len(UNREAD)
    with pytest.raises(ValueError, match=r"data\.jsonl, line 4"):
        measure_data(config.model_copy(update={"on_bad_sample": "fail"}), byte_tokenizer(), 512)


def test_a_draw_from_all_of_the_data_leaves_out_each_row_once(data: Path, teacher: Path, tmp_path: Path) -> None:
    said: list[str] = []
    run(teacher, data, tmp_path / "store", said, on_bad_sample="quarantine", sample_tokens=10**6, seed=3)
    assert "8 rows cannot be read" in [line for line in said if "left out" in line][-1]


def test_the_command_line_says_one_line_and_no_traceback(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deep.jsonl").write_text('{"text": "a b c"}\n' + '{"a":' * 3_000 + "1" + "}" * 3_000)
    arguments = ["extract", "--teacher", str(teacher), "--data", str(tmp_path / "deep.jsonl"), "--out", str(tmp_path / "s")]
    monkeypatch.setattr(sys, "argv", ["kvpipe", *arguments])
    with pytest.raises(SystemExit, match="1"):
        main()
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "deep.jsonl, line 2 cannot be read as JSON: it is nested too deep" in error
    assert not (tmp_path / "s").exists()
