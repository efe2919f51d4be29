"""Conversations to tokens: a chat template's text, and whose every token is.

The template decides the text. Where in it each message lies is found by rendering the conversation once more with a mark in place
of every content. Knows tokenizers; neither rows of a data set nor samples.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from pipeline.data.documents import Message

ROLES = ("none", "system", "user", "assistant", "tool")
"""By the number a store holds in `role`; `none` is text of the template itself, and any role without a number."""
ASSISTANT = ROLES.index("assistant")


class Conversation(NamedTuple):
    """A conversation as tokens."""

    text: str
    input_ids: Int32[np.ndarray, "token"]
    offsets: list[tuple[int, int]]
    """First and last character of every token in `text`."""
    role: UInt8[np.ndarray, "token"]
    """Number in `ROLES` of the message a token belongs to."""
    loss_mask: UInt8[np.ndarray, "token"]
    """1 for what the assistant generates: its content and the special token that ends its turn."""


def template_fingerprint(tokenizer: Any) -> str:
    """sha256 of the chat template: another template makes other tokens of the same conversation.

    Raises:
        ValueError: the tokenizer has none.
    """
    template = tokenizer.chat_template
    if not template:
        raise ValueError(
            "the data holds conversations, but the teacher's tokenizer has no chat template; use an instruction-tuned teacher, add a "
            "chat_template.jinja to its folder, or give rows with plain text"
        )
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()


def render(tokenizer: Any, messages: Sequence[Message], source: str) -> Conversation:
    """Tokenise a conversation.

    Raises:
        ValueError: the template refuses the conversation, or changes or leaves out a message.
    """
    text = _text(tokenizer, messages, source)
    # The template writes the special tokens itself.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    offsets = [(int(first), int(stop)) for first, stop in encoded["offset_mapping"]]
    of_character = np.zeros(len(text) + 1, dtype=np.uint8)
    generated = np.zeros(len(text) + 1, dtype=np.uint8)
    for message, (start, stop) in zip(messages, _spans(tokenizer, messages, text, source), strict=True):
        number = ROLES.index(message.role) if message.role in ROLES else 0
        stop = _end_of_turn(tokenizer, text, stop)
        of_character[start:stop] = number
        generated[start:stop] = number == ASSISTANT
    # A token is whose its last character is: a space before a word is part of the word's token.
    last = np.array([stop - 1 if stop > first else len(text) for first, stop in offsets], dtype=np.int64)
    return Conversation(
        text=text,
        input_ids=np.array(encoded["input_ids"], dtype=np.int32),
        offsets=offsets,
        role=of_character[last],
        loss_mask=generated[last],
    )


def _text(tokenizer: Any, messages: Sequence[Message], source: str) -> str:
    import jinja2

    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise ValueError(
            f"{source}: the chat template refuses this conversation of roles {', '.join(turn['role'] for turn in turns)} "
            f"({error}); mend the row or leave it out"
        ) from error


def _spans(tokenizer: Any, messages: Sequence[Message], text: str, source: str) -> Iterator[tuple[int, int]]:
    """First and last character of every message's content; templates may strip white space around it."""
    marked = [Message(role=message.role, content=f"\ue000{number}\ue001") for number, message in enumerate(messages)]
    pieces = re.split("\ue000(\\d+)\ue001", _text(tokenizer, marked, source))
    if pieces[1::2] != [str(number) for number in range(len(messages))] or not text.startswith(pieces[0]):
        raise ValueError(
            f"{source}: the chat template leaves out, repeats or moves messages ({len(messages)} given, {len(pieces) // 2} written), so "
            "it cannot be told which tokens are whose; use a template that writes every message once"
        )
    position = len(pieces[0])
    for message, after in zip(messages, pieces[2::2], strict=True):
        content = message.content
        forms = (content, content.strip(), content.rstrip(), content.lstrip())
        found = next((form for form in forms if text.startswith(form + after, position)), None)
        if found is None:
            raise ValueError(
                f"{source}: the chat template changes a message of role {message.role} (it begins {content[:40]!r}), so it cannot be told "
                "which tokens are whose; give the content as the template writes it, for instance without reasoning that it strips"
            )
        yield position, position + len(found)
        position += len(found) + len(after)


def _end_of_turn(tokenizer: Any, text: str, stop: int) -> int:
    """Where the special token ends that follows a message, if one does; else where the message ends."""
    follows = stop + len(text[stop:]) - len(text[stop:].lstrip())
    ends = [follows + len(token) for token in tokenizer.all_special_tokens if text.startswith(token, follows)]
    return max(ends, default=stop)
