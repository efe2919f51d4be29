"""Conversations to tokens: a chat template's text, and whose every token is.

The template decides the text, from all that a row has. Where in it each turn lies is told by rendering the conversation once more
with other words in place of the turn's (`spans.py`). Knows tokenizers; neither rows of a data set nor samples.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from pipeline.data.notes import BadRowError
from pipeline.data.spans import Rendering, turn_spans
from pipeline.data.turns import Message

ROLES = ("none", "system", "user", "assistant", "tool")
"""By the number a store holds in `role`; `none` is text of the template itself, and any role without a number."""
ASSISTANT = ROLES.index("assistant")
_NUMBERS = {**{role: number for number, role in enumerate(ROLES)}, "developer": 1, "ipython": 4}
"""With the names of some templates for system and tool."""


class Conversation(NamedTuple):
    """A conversation as tokens."""

    text: str
    input_ids: Int32[np.ndarray, "token"]
    offsets: list[tuple[int, int]]
    """First and last character of every token in `text`."""
    role: UInt8[np.ndarray, "token"]
    """Number in `ROLES` of the message a token belongs to."""
    loss_mask: UInt8[np.ndarray, "token"]
    """1 for what the assistant generates: its content, calls and reasoning, and the special token that ends its turn; 0 in
    a turn that says `weight` 0 or `train` false."""


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


def render(
    tokenizer: Any, messages: Sequence[Message], source: str, variables: Mapping[str, Any] = MappingProxyType({})
) -> Conversation:
    """Tokenise a conversation.

    Args:
        source: place of the conversation, which errors name.
        variables: what the chat template gets beside the turns, such as `tools`.

    Raises:
        BadRowError: the template refuses the conversation, or it cannot be told which tokens are whose.
        ValueError: the tokenizer has no template, or one that does not compile.
    """
    template_fingerprint(tokenizer)
    ours = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"tools", "documents"}
    if reserved := sorted(ours.intersection(variables)):
        raise BadRowError(f"{source}: 'chat_template_kwargs' may not say {', '.join(reserved)}; leave it out")
    apply = functools.partial(_apply, tokenizer, source, variables)
    rendering = Rendering(apply, messages, source, tokenizer.all_special_tokens)
    text = rendering.text
    # The template writes the special tokens itself.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    offsets = [(int(first), int(stop)) for first, stop in encoded["offset_mapping"]]
    of_character = np.zeros(len(text) + 1, dtype=np.uint8)
    generated = np.zeros(len(text) + 1, dtype=np.uint8)
    for message, (start, stop) in zip(messages, turn_spans(rendering), strict=True):
        number = _NUMBERS.get(message.role, 0)
        stop = _end_of_turn(tokenizer, text, stop)
        of_character[start:stop] = number
        generated[start:stop] = number == ASSISTANT and message.is_learnt
    # A token is whose its last character is: a space before a word is part of the word's token.
    last = np.array([stop - 1 if stop > first else len(text) for first, stop in offsets], dtype=np.int64)
    return Conversation(
        text=text,
        input_ids=np.array(encoded["input_ids"], dtype=np.int32),
        offsets=offsets,
        role=of_character[last],
        loss_mask=generated[last],
    )


def _apply(
    tokenizer: Any,
    source: str,
    variables: Mapping[str, Any],
    turns: list[dict[str, Any]],
    *,
    add_generation_prompt: bool = False,
) -> str:
    import jinja2

    try:
        return str(
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt, **variables)
        )
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"the chat_template of the teacher's tokenizer is no Jinja that compiles: got {error.message!r} in its line {error.lineno}, so no "
            "conversation can be rendered; mend the template in the teacher's folder"
        ) from error
    # What a template's own code may raise of what it is given.
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        roles = ", ".join(str(turn["role"]) for turn in turns[:8]) + (", ..." if len(turns) > 8 else "")
        raise BadRowError(
            f"{source}: the chat template refuses this conversation of roles {roles} ({error}); mend the row or leave it out"
        ) from error


def _end_of_turn(tokenizer: Any, text: str, stop: int) -> int:
    """Where the special token ends that follows a message, if one does; else where the message ends."""
    follows = stop + len(text[stop:]) - len(text[stop:].lstrip())
    ends = [follows + len(token) for token in tokenizer.all_special_tokens if text.startswith(token, follows)]
    return max(ends, default=stop)
