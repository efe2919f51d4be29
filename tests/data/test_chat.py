"""Whose each token of a conversation is, under the kinds of chat template there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.chat import ROLES, render, template_fingerprint
from pipeline.data.documents import Document, Message
from pipeline.data.notes import Notes
from pipeline.data.samples import Cutter
from pipeline.data.turns import conversation
from tests.checkpoints import byte_tokenizer

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
HEADERS = "<|begin|>{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
INSTRUCTIONS = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}{% else %}"
    "{% set system = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}<s>[INST] "
    "{% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ m.content }} [/INST]{% else %} {{ m.content }} </s>"
    "{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
)
COUNTING = "{% for m in messages %}{{ m.content }} ({{ m.content | length }} characters){% endfor %}"
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "instructions": INSTRUCTIONS, "thinking": THINKING, "counting": COUNTING}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|start|>", "<|end|>", "<|eot|>", "<s>", "</s>"]


def tokenizer_with(template: str | None) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    return tokenizer


def turns(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    said = [Message(role=("user", "assistant")[number % 2], content=content) for number, content in enumerate(contents)]
    return (*([Message(role="system", content=system)] if system else []), *said)


def spoken(tokenizer: Any, messages: tuple[Message, ...], role: str) -> str:
    found = render(tokenizer, messages, "here")
    return str(tokenizer.decode(found.input_ids[found.role == ROLES.index(role)]))


@pytest.mark.parametrize(
    ("name", "assistant", "user", "system"),
    [
        ("chatml", "Hello!<|im_end|>Bye.<|im_end|>", "Hi<|im_end|>user<|im_end|>", "Be brief.<|im_end|>"),
        ("headers", "Hello!<|eot|>Bye.<|eot|>", "Hi<|eot|>user<|eot|>", "Be brief.<|eot|>"),
        ("instructions", "Hello! </s>Bye. </s>", "Hiuser", "Be brief."),
        ("thinking", "Hello!<|im_end|>Bye.<|im_end|>", "Hi<|im_end|>user<|im_end|>", "Be brief.<|im_end|>"),
    ],
)
def test_every_token_is_given_to_who_said_it(name: str, assistant: str, user: str, system: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    # One message is a word that the template writes too.
    messages = turns("Hi", "Hello!", "user", "Bye.", system="Be brief.")
    assert spoken(tokenizer, messages, "assistant") == assistant
    assert spoken(tokenizer, messages, "user") == user
    assert spoken(tokenizer, messages, "system") == system
    found = render(tokenizer, messages, "here")
    assert tokenizer.decode(found.input_ids) == found.text
    np.testing.assert_array_equal(found.loss_mask, found.role == ROLES.index("assistant"))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["chatml", "headers", "instructions"]),
    contents=st.lists(st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=20), min_size=1, max_size=5),
)
def test_what_the_assistant_says_is_found_whatever_it_is(name: str, contents: list[str]) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    messages = turns(*contents)
    found = render(tokenizer, messages, "here")
    said = "".join(content.strip() for content in contents[1::2])
    heard = "".join(str(tokenizer.decode(found.input_ids[span])) for span in _runs(found.loss_mask))
    for special in SPECIAL:
        heard, said = heard.replace(special, ""), said.replace(special, "")
    assert "".join(heard.split()) == "".join(said.split())


def _runs(mask: np.ndarray) -> list[slice]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]]).astype(np.int8)))
    return [slice(first, stop) for first, stop in edges.reshape(-1, 2)]


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(ValueError, match="the teacher's tokenizer has no chat template; use an instruction-tuned teacher"):
        template_fingerprint(tokenizer_with(None))
    assert template_fingerprint(tokenizer_with(CHATML)) != template_fingerprint(tokenizer_with(HEADERS))


@pytest.mark.parametrize(
    ("name", "messages", "message"),
    [
        pytest.param(
            "instructions", turns("a")[:1] + turns("b")[:1], "refuses this conversation of roles user, user", id="roles"
        ),
        pytest.param(
            "counting", turns("a", "b"), r"changes a message of role user, turn 1 of 2 \(user\), 'content'", id="length"
        ),
    ],
)
def test_what_a_template_changes_or_refuses_is_named(name: str, messages: tuple[Message, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"rows.jsonl:3: the chat template {message}"):
        render(tokenizer_with(TEMPLATES[name]), messages, "rows.jsonl:3")


def test_a_template_that_leaves_messages_out_is_refused() -> None:
    with pytest.raises(ValueError, match=r"leaves out, repeats or moves messages \(3 given, 1 written\)"):
        render(tokenizer_with("{{ messages[-1].content }}"), turns("a", "b", "c"), "here")


@pytest.mark.parametrize("overlap", [0, 4])
def test_a_long_conversation_is_cut_with_its_masks(overlap: int) -> None:
    tokenizer = tokenizer_with(CHATML)
    document = Document(source="here", messages=turns("Tell me a story", "Once upon a time there was a cache."))
    whole = render(tokenizer, document.messages or (), "here")
    (samples,) = Cutter(tokenizer=tokenizer, seq_len=16, overlap=overlap).samples([document])
    ids, mask = [], []
    for number, sample in enumerate(samples):
        assert sample.role is not None
        assert sample.loss_mask is not None
        fresh = slice(overlap if number else 0, None)
        ids += sample.input_ids[fresh].tolist()
        mask += sample.loss_mask[fresh].tolist()
        assert not sample.loss_mask[: overlap if number else 0].any()
    assert ids == whole.input_ids.tolist()
    assert mask == whole.loss_mask.tolist()


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m.content }", "{% if %}", "{{ messages | nonsense }}"])
def test_a_template_that_does_not_compile_is_a_fault_of_the_teacher_and_of_no_row(template: str) -> None:
    documents = [Document(source="a:0", messages=turns("Hi", "Hello!"))]
    cutter = Cutter(tokenizer=tokenizer_with(template), seq_len=64, notes=Notes(leaves_out=True))
    with pytest.raises(
        ValueError, match=r"^the chat_template of the teacher's tokenizer .* in its line 1, .*mend the template"
    ):
        list(cutter.samples(documents))
    assert cutter.notes.num_left_out == 0


@pytest.mark.parametrize("key", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 1, "train": False}])
def test_a_turn_that_says_so_is_not_learnt_from(key: dict[str, Any]) -> None:
    said = [{"role": "user", "content": "Hi", "weight": "70 kg"}, {"role": "assistant", "content": "Hello!", **key}]
    said += [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "Bye.", "weight": 1, "train": True}]
    messages, _ = conversation({"messages": said}, "messages")
    tokenizer = tokenizer_with(CHATML)
    found = render(tokenizer, messages, "here")
    assert tokenizer.decode(found.input_ids[found.loss_mask == 1]) == "Bye.<|im_end|>"
    assert spoken(tokenizer, messages, "assistant") == "Hello!<|im_end|>Bye.<|im_end|>"


@pytest.mark.parametrize("key", [{"weight": 0.5}, {"weight": "0"}, {"train": "no"}, {"train": [0]}])
def test_another_value_there_is_refused_with_turn_and_field(key: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"turn 1 of 1 \(assistant\) has .* in '{next(iter(key))}', expected 1 or true"):
        conversation({"messages": [{"role": "assistant", "content": "Hello!", **key}]}, "messages")
