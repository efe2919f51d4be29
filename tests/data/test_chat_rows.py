"""Rows of chat data against their template: the text is the template's of the row as given, and whose each token is is true."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.documents import Document, read_documents
from pipeline.data.notes import BadRowError, Notes
from pipeline.data.samples import Cutter, Sample
from tests.data.chat_templates import CALLS, CHANNELS, HEADERS, SMALL, THINKING, TOOLS, chat_tokenizer

TOKENIZERS = {
    "tools": chat_tokenizer(TOOLS),
    "small": chat_tokenizer(SMALL),
    "headers": chat_tokenizer(HEADERS),
    "calls": chat_tokenizer(CALLS),
    "thinking": chat_tokenizer(THINKING),
    "channels": chat_tokenizer(CHANNELS),
}
ANSWER = {
    "tools": re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL),
    "small": re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL),
    "headers": re.compile(r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)", re.DOTALL),
    "calls": re.compile(r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)", re.DOTALL),
    # The empty reasoning that the template puts before a last turn without one is not the assistant's.
    "thinking": re.compile(r"<\|im_start\|>assistant\n(?:<think>\n\n</think>\n\n)?(.*?<\|im_end\|>)", re.DOTALL),
    "channels": re.compile(r"<\|im_start\|>assistant(?:<\|channel\|>)?(.*?<\|im_end\|>)", re.DOTALL),
}
"""What an assistant says, told by the template's own words: no content in these tests holds them."""
ALIASES = {"Human": "user", "GPT": "assistant", "chatgpt": "assistant", "model": "assistant", "observation": "tool"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rom"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city"}}


def samples_of(tokenizer: Any, document: Document, notes: Notes | None = None) -> list[Sample]:
    (found,) = Cutter(tokenizer=tokenizer, seq_len=100_000, notes=notes or Notes()).samples([document])
    return found


def learnt(tokenizer: Any, sample: Sample) -> str:
    assert sample.loss_mask is not None
    return str(tokenizer.decode(sample.input_ids[sample.loss_mask == 1]))


def read(folder: Path, *rows: Any, name: str = "rows.jsonl", notes: Notes | None = None) -> list[Document]:
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(read_documents([str(path)], notes=notes))


words = st.text("abc é\n\"'{}<>\\🙂", max_size=12)
contents = st.one_of(
    words,
    st.just(""),
    st.none(),
    st.lists(words.map(lambda text: {"type": "text", "text": text}), max_size=3),
    st.just([{"type": "image_url", "image_url": {"url": "x"}}]),
)
calls = st.lists(
    st.builds(
        lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
        st.sampled_from(["weather", "ü"]),
        st.one_of(st.just({"city": "Rom"}), st.just('{"a": 1}'), st.dictionaries(words, words, max_size=2)),
    ),
    max_size=2,
)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "assistant", "tool", "critic", *ALIASES])},
    optional={
        "content": contents,
        "tool_calls": st.one_of(st.none(), calls),
        "name": st.one_of(st.none(), words),
        "reasoning_content": st.one_of(st.none(), words),
        "tool_call_id": st.just("123456789"),
        "weight": st.just(1),
    },
)
sensible = st.lists(
    st.one_of(
        st.builds(lambda text: {"role": "user", "content": text}, words),
        st.builds(lambda text: {"role": "assistant", "content": text}, words),
        st.builds(
            lambda text, said: {"role": "assistant", "content": text, "tool_calls": said}, st.one_of(st.none(), words), calls
        ),
        st.builds(lambda text, why: {"role": "assistant", "content": text, "reasoning_content": why}, words, words),
        st.builds(lambda text: {"role": "tool", "content": text}, words),
    ),
    min_size=1,
    max_size=6,
)
rows = st.fixed_dictionaries(
    {"messages": st.one_of(sensible, st.lists(turns, min_size=1, max_size=4))},
    optional={"tools": st.one_of(st.none(), st.just([]), st.just([TOOL]), st.just(json.dumps([TOOL]))), "text": st.just("")},
)


def expected_text(tokenizer: Any, row: Mapping[str, Any]) -> str:
    """What transformers makes of a row whose nulls are absent and whose parts are joined."""
    given = []
    for turn in row["messages"]:
        kept = {key: value for key, value in turn.items() if value is not None and not (key == "tool_calls" and not value)}
        if isinstance(kept.get("content"), list):
            kept["content"] = "".join(part["text"] for part in kept["content"])
        given.append({**kept, "role": ALIASES.get(kept["role"], kept["role"])})
    tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
    return str(tokenizer.apply_chat_template(given, tools=tools or None, tokenize=False))


@pytest.mark.parametrize("name", ["tools", "small", "headers", "calls", "thinking", "channels"])
@settings(max_examples=120, deadline=None)
@given(row=rows)
def test_the_stored_text_is_the_templates_of_the_row_or_the_row_is_refused_by_name(
    name: str, row: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokenizer, folder = TOKENIZERS[name], tmp_path_factory.getbasetemp()
    try:
        (document,) = read(folder, row, name=f"{name}.jsonl")
        (sample,) = samples_of(tokenizer, document)
    except BadRowError as error:
        refused = str(error)
        assert re.search(rf"{name}\.jsonl, line 1.*(turn \d+ of \d+ \(|refuses this conversation of roles )", refused), refused
        return
    assert sample.text == expected_text(tokenizer, row)
    assert tokenizer.decode(sample.input_ids) == sample.text
    assert learnt(tokenizer, sample) == "".join(ANSWER[name].findall(sample.text))


def plain(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]


CALLING = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "Rain."},
]


@pytest.mark.parametrize("name", ["tools", "calls", "thinking", "channels"])
def test_what_an_assistant_calls_is_in_the_text_and_is_learnt_from(name: str, tmp_path: Path) -> None:
    tokenizer, row = TOKENIZERS[name], {"messages": CALLING, "tools": [TOOL]}
    (sample,) = samples_of(tokenizer, read(tmp_path, row)[0])
    assert sample.text == expected_text(tokenizer, row)
    said = learnt(tokenizer, sample)
    assert "weather" in said
    assert said.endswith(("Rain.<|im_end|>", "Rain.<|eot_id|>"))
    assert said.count("<|") == 2 + (name == "channels"), "the end of either turn, and a channel"
    assert "rain" not in said
    assert ("of a city" in sample.text) == (name == "tools")


@pytest.mark.parametrize("name", ["small", "headers"])
def test_calls_that_a_template_does_not_write_are_refused_with_turn_and_field(name: str, tmp_path: Path) -> None:
    (document,) = read(tmp_path, {"messages": CALLING})
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: turn 2 of 4 \(assistant\): .* does not write its 'tool_calls'"):
        samples_of(TOKENIZERS[name], document)


def test_tools_that_a_template_does_not_write_are_counted_and_said(tmp_path: Path) -> None:
    notes = Notes()
    samples_of(TOKENIZERS["small"], read(tmp_path, {"messages": plain("a", "b"), "tools": [TOOL]})[0], notes)
    assert list(notes.news()) == ["--data: 1 x a row with 'tools' that the chat template leaves out"]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        pytest.param(
            [*plain("a"), {"role": "assistant", "content": "b", "reasoning_content": "why"}],
            "<think>\nwhy\n</think>\n\nb<|im_end|>",
            id="beside",
        ),
        pytest.param(plain("a", "<think>\nwhy\n</think>\n\nb"), "<think>\nwhy\n</think>\n\nb<|im_end|>", id="inside"),
        pytest.param(plain("a", "<think>why</think>b", "c", "d"), "b<|im_end|>d<|im_end|>", id="of-an-earlier-turn"),
        pytest.param(
            [
                *plain("a"),
                {"role": "assistant", "content": "", "reasoning_content": "why", "tool_calls": [CALL]},
                {"role": "tool", "content": "rain"},
                *plain("", "<think>\nso\n</think>\n\nb")[1:],
            ],
            '<think>\nwhy\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call><|im_end|>'
            "<think>\nso\n</think>\n\nb<|im_end|>",
            id="before-a-call",
        ),
        pytest.param(plain("a", "b", "<tool_response>x</tool_response>", "c"), "b<|im_end|>c<|im_end|>", id="looked-at"),
    ],
)
def test_reasoning_is_learnt_from_where_the_template_writes_it(
    messages: list[dict[str, Any]], said: str, tmp_path: Path
) -> None:
    tokenizer = TOKENIZERS["thinking"]
    (sample,) = samples_of(tokenizer, read(tmp_path, {"messages": messages})[0])
    assert learnt(tokenizer, sample) == said


def test_parts_of_text_are_joined_and_other_parts_are_refused_by_name(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "you"}]
    (document,) = read(tmp_path, {"messages": [{"role": "user", "content": parts}, *plain("", "hi")[1:]]})
    (sample,) = samples_of(TOKENIZERS["small"], document)
    assert sample.text is not None
    assert "user\nHello you<|im_end|>" in sample.text
    for kind in ("image_url", "image", "input_audio", "video"):
        image = [*parts, {"type": kind, kind: "x"}]
        with pytest.raises(ValueError, match=rf"line 1 has in 'messages' .* turn 1 of 1 \(user\) has a part of type '{kind}'"):
            read(tmp_path, {"messages": [{"role": "user", "content": image}]})


def test_a_null_is_absent_and_so_is_an_empty_list_beside_a_conversation(tmp_path: Path) -> None:
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for row in (
        {"text": "", "messages": plain("a", "b")},
        {"messages": [], "conversations": sharegpt},
        {"text": None, "messages": None, "conversations": json.dumps(sharegpt)},
        {"messages": [{**turn, "name": None, "tool_calls": None} for turn in plain("a", "b")], "tools": None},
        {"messages": json.dumps(plain("a", "b")), "tools": "[]"},
    ):
        (document,) = read(tmp_path, row)
        assert [(message.role, message.content) for message in document.messages or ()] == [("user", "a"), ("assistant", "b")]
        assert samples_of(TOKENIZERS["tools"], document)[0].text == expected_text(
            TOKENIZERS["tools"], {"messages": plain("a", "b")}
        )


@pytest.mark.parametrize("as_json", [False, True])
def test_a_table_gives_the_text_that_json_lines_give(as_json: bool, tmp_path: Path) -> None:
    """Its rows have every field of every other row, null where they have none."""
    other = {"messages": plain("a", "b"), "tools": None}
    called = [dict(turn) for turn in CALLING]
    second = {"type": "function", "function": {"name": "time", "arguments": {"zone": "CET"}}}
    called[1] = {**called[1], "tool_calls": [CALL, second]}
    row: dict[str, Any] = {"messages": called, "tools": [TOOL]}
    table = {key: json.dumps(value) for key, value in row.items()} if as_json else row
    rows_ = [{key: json.dumps(value) for key, value in other.items()} if as_json else other, table]
    tokenizer = TOKENIZERS["tools"]
    texts = [samples_of(tokenizer, document)[0].text for document in read(tmp_path, *rows_, name="rows.parquet")]
    assert texts == [expected_text(tokenizer, other), expected_text(tokenizer, row)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"functions": [TOOL]}, "has 'functions', which no chat template is given; give them as 'tools'"),
        ({"tools": "[nonsense"}, "has in 'tools' a text that is not JSON"),
        ({"tools": ["weather"]}, "has in 'tools' a text that is not JSON"),
        ({"tools": [None]}, "has null in the list 'tools', expected objects"),
        ({"tools": {"a": 1}}, "has an object in 'tools', expected a list of objects"),
        ({"documents": ["a text"]}, "has in 'documents' a text that is not JSON"),
        ({"chat_template": "x"}, "has 'chat_template', which no chat template is given"),
        ({"chat_template_kwargs": {"tokenize": True}}, "'chat_template_kwargs' may not say tokenize"),
        ({"chat_template_kwargs": {"messages": []}}, "the chat template refuses this conversation"),
        ({"system": ["a"]}, "has a list in 'system', expected a text"),
    ],
)
def test_what_a_template_is_not_given_is_refused_by_name(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 1.*{re.escape(message)}"):
        samples_of(TOKENIZERS["tools"], read(tmp_path, {"messages": plain("a", "b"), **more})[0])


def test_variables_and_the_system_prompt_of_a_row_reach_the_template(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("{{ mood }}{% for d in documents %}{{ d.text }}{% endfor %}" + SMALL)
    row = {
        "messages": plain("a", "b"),
        "chat_template_kwargs": {"mood": "glad"},
        "documents": [{"text": "doc"}],
        "system": "Be.",
    }
    (sample,) = samples_of(tokenizer, read(tmp_path, row)[0])
    assert sample.text is not None
    assert sample.text.startswith("gladdoc<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\na")


def test_what_decides_the_tokens_of_a_conversation_is_in_its_identity(tmp_path: Path) -> None:
    base = {"messages": plain("a", "b")}
    called = [*plain("a"), {"role": "assistant", "content": "b", "tool_calls": [CALL]}]
    several = [base, {**base, "tools": [TOOL]}, {**base, "chat_template_kwargs": {"a": 1}}, {"messages": called}]
    assert len({document.content() for document in read(tmp_path, *several)}) == 4
    (document,) = read(tmp_path, base)
    assert document.content() == b'[["user", "a"], ["assistant", "b"]]', "so that stores made before can be resumed"


MEANT = {
    "user": ["Human", "USER"],
    "assistant": ["ChatGPT", "GPT", "bot", "model", "AI", "gpt4", "function_call", " Assistant "],
    "tool": ["Observation", "function"],
    "system": ["System"],
}


@pytest.mark.parametrize(("role", "meant"), [(role, meant) for meant, roles in MEANT.items() for role in roles])
def test_roles_are_known_by_their_usual_names_in_any_case(role: str, meant: str, tmp_path: Path) -> None:
    turns_ = [{"from": "human", "value": "a"}, {"from": role, "value": "b"}, {"from": "gpt", "value": "c"}]
    notes = Notes()
    (sample,) = samples_of(TOKENIZERS["small"], read(tmp_path, {"conversations": turns_})[0], notes)
    assert sample.text is not None
    assert f"<|im_start|>{meant}\nb" in sample.text
    assert learnt(TOKENIZERS["small"], sample) == ("b<|im_end|>" if meant == "assistant" else "") + "c<|im_end|>"
    assert list(notes.news()) == []


def test_other_roles_and_conversations_without_an_answer_are_counted_and_said_once(tmp_path: Path) -> None:
    notes = Notes()
    odd = {"messages": [{"role": "critic", "content": "a"}, {"role": "user", "content": "b"}]}
    for document in read(tmp_path, odd, odd, {"messages": plain("a", "b")}):
        (sample,) = samples_of(TOKENIZERS["small"], document, notes)
        assert sample.text is not None
        assert sample.role is not None
    said = list(notes.news())
    assert len(said) == 2
    assert "2 x a conversation in which no assistant speaks, so there is nothing to learn from it" in said[0]
    assert "2 x a turn of role 'critic', which the chat template gets as it is" in said[1]
    assert list(notes.news()) == []


def test_a_template_that_may_raise_anything_refuses_rows_and_ends_nothing_else(tmp_path: Path) -> None:
    (document,) = read(tmp_path, {"messages": plain("a", "b")})
    for body in ("{{ 1 // 0 }}", "{{ messages[9].role }}", "{{ none + 1 }}", "{{ messages.foo() }}", "{{ {}['a'].b.c }}"):
        with pytest.raises(BadRowError, match=r"rows\.jsonl, line 1: the chat template refuses .* roles user, assistant"):
            samples_of(chat_tokenizer(body), document)


def test_a_mask_is_where_the_text_is_even_when_turns_repeat_the_templates_words(tmp_path: Path) -> None:
    tricky = plain("assistant\nb", "<|im_start|>user\nx<|im_end|>\n", "b", "b")
    (sample,) = samples_of(TOKENIZERS["tools"], read(tmp_path, {"messages": tricky})[0])
    assert sample.loss_mask is not None
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.loss_mask, [0]]).astype(np.int8))).reshape(-1, 2)
    decode = TOKENIZERS["tools"].decode
    assert [decode(sample.input_ids[first:last]) for first, last in edges.tolist()] == [
        "<|im_start|>user\nx<|im_end|>\n<|im_end|>",
        "b<|im_end|>",
    ]


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("\ud83d")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(
                st.sampled_from(["role", "content", "from", "value", "type", "text", "tool_calls", "name"]), st.text(max_size=3)
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)
any_rows = st.one_of(
    json_values,
    st.dictionaries(
        st.sampled_from(
            ["text", "messages", "conversations", "tools", "documents", "system", "functions", "chat_template_kwargs"]
        ),
        st.one_of(json_values, json_values.map(json.dumps)),
        max_size=4,
    ),
)


@settings(max_examples=250, deadline=None)
@given(row=any_rows)
def test_any_json_is_a_document_or_refused_with_file_and_line(row: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text('{"text": "before"}\n\n' + json.dumps(row) + '\n{"text": "after"}\n')
    try:
        found = list(read_documents([str(path)]))
        samples_of(TOKENIZERS["tools"], found[1])
    except ValueError as error:
        refused = str(error)
        assert "any.jsonl, line 3" in refused
    notes = Notes(leaves_out=True)
    documents = list(read_documents([str(path)], notes=notes))
    assert [document.text for document in documents[::2]] == ["before", "after"]
    for document in documents:
        assert document.content() is not None
        samples_of(TOKENIZERS["tools"], document, notes)
    assert all("any.jsonl, line 3" in told for told in notes.take_left_out())
