"""Rows to conversations: turns under the names of roles that chat templates know, and what else a template is given.

A turn keeps all it has; a key that is null counts as absent. Knows rows; no tokenizers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from pipeline.data.rows import parse_json, shown_type

CHAT_FIELDS = ("messages", "conversations")
"""Fields of a row that hold a conversation."""
ROW_FIELDS = (*CHAT_FIELDS, "system", "tools", "documents", "chat_template_kwargs", "functions", "chat_template")
"""All fields that decide what becomes of a conversation."""
_ALIASES = {
    "user": "user human prompter",
    "assistant": "assistant gpt chatgpt gpt4 gpt-4 gpt-3.5 ai bot chatbot model llm bing bard claude function_call tool_call",
    "tool": "tool observation function tool_response tool_result function_response",
    "system": "system",
    "developer": "developer",
    "ipython": "ipython",
}
ROLES = {alias: role for role, aliases in _ALIASES.items() for alias in aliases.split()}
"""How chat templates call the roles of data sets, by the names there in lower case."""
_TEXT_PARTS = ("text", "input_text", "output_text")
CALLS = ("tool_calls", "function_call")
REASONING = ("reasoning", "reasoning_content", "thinking")
SAID = (*CALLS, *REASONING)
"""What a turn may say beside its content."""
LEARNT = ("weight", "train")
"""Keys of an assistant's turn that say whether it is to be learnt from, as OpenAI's fine-tuning and axolotl call them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    """`system`, `user`, `assistant`, `tool` or what else the chat template knows."""
    content: str = ""
    turn: Mapping[str, Any] | None = None
    """All of the turn, as the chat template gets it; None where that is role and content."""

    @property
    def is_learnt(self) -> bool:
        """Whether the turn lets itself be learnt from, if it is an assistant's."""
        return self.turn is None or all(self.turn.get(name, True) for name in LEARNT)

    def as_given(self) -> dict[str, Any]:
        """The turn for a chat template."""
        return {"role": self.role, "content": self.content} if self.turn is None else dict(self.turn)

    def identity(self) -> Any:
        """All that decides what a template makes of the turn, as JSON."""
        turn = self.as_given()
        return [self.role, self.content] if turn.keys() == {"role", "content"} else turn


def conversation(row: Mapping[str, Any], field: str) -> tuple[tuple[Message, ...], dict[str, Any]]:
    """The turns in a field of a row, and what else the chat template gets, by the names of its variables.

    Raises:
        ValueError: the row holds something that no template would be given; the turn and its field are named.
    """
    turns = parsed(row[field], field)
    if not isinstance(turns, (list, tuple)):
        raise ValueError(f"has in {field!r} {shown_type(turns)}, expected a list of turns")
    messages = []
    for number, turn in enumerate(turns, start=1):
        try:
            messages.append(_message(turn))
        except ValueError as error:
            role = f" ({str(turn.get('role') or turn.get('from'))[:40]})" if isinstance(turn, Mapping) else ""
            raise ValueError(
                f"has in {field!r} a turn that cannot be read: turn {number} of {len(turns)}{role} {error}"
            ) from None
    if system := row.get("system"):
        if not isinstance(system, str):
            raise ValueError(f"has {shown_type(system)} in 'system', expected a text")
        if any(message.role == "system" for message in messages):
            raise ValueError(f"has a 'system' beside a turn of that role in {field!r}; leave one of them out")
        messages.insert(0, Message(role="system", content=system))
    return tuple(messages), _variables(row)


def parsed(value: Any, field: str) -> Any:
    """A value that a table may hold as JSON.

    Raises:
        ValueError: it is a text that is no JSON.
    """
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return parse_json(value)
    except ValueError as error:
        raise ValueError(f"has in {field!r} a text that is not JSON: {error}") from None


def _message(turn: object) -> Message:
    if not isinstance(turn, Mapping):
        raise ValueError(f"is {shown_type(turn)}, expected an object with 'role' and 'content', or 'from' and 'value'")
    given = {key: value for key, value in turn.items() if value is not None}
    for name, sharegpt in (("role", "from"), ("content", "value")):
        if name not in given and sharegpt in given:
            given = {name if key == sharegpt else key: value for key, value in given.items()}
    role = given.get("role")
    if not isinstance(role, str):
        raise ValueError(f"has no 'role' or 'from' that is a string; its fields are {', '.join(map(str, turn)) or 'none'}")
    given["role"] = ROLES.get(role.strip().lower(), role)
    if "content" in given:
        given["content"] = _text(given["content"])
    if "tool_calls" in given:
        given["tool_calls"] = _objects(given["tool_calls"], "tool_calls")
        if not given["tool_calls"]:
            del given["tool_calls"]
    if "content" not in given and not any(given.get(name) for name in SAID):
        raise ValueError(f"says nothing: it has neither 'content' nor 'tool_calls'; its fields are {', '.join(map(str, turn))}")
    if given["role"] == "assistant":
        for name in LEARNT:
            if given.get(name, 1) not in (0, 1):
                raise ValueError(f"has {given[name]!r:.40} in {name!r}, expected 1 or true to learn from it, 0 or false not to")
    plain = list(given) == ["role", "content"]
    return Message(role=given["role"], content=given.get("content", ""), turn=None if plain else given)


def _text(content: object) -> str:
    """The text of a content that is one or a list of parts, joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"has {shown_type(content)} in 'content', expected a text or a list of text parts")
    return "".join(map(_part, content))


def _part(part: object) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f"has {shown_type(part)} among the parts of 'content', expected text parts")
    filled = {key: value for key, value in part.items() if value not in (None, [], {}, "")}
    kind = filled.pop("type", "text")
    text = filled.pop("text", "")
    if kind not in _TEXT_PARTS:
        raise ValueError(f"has a part of type {kind!r} in 'content'; only text can be stored")
    if filled or not isinstance(text, str):
        other = ", ".join(map(str, filled)) or shown_type(text)
        raise ValueError(f"has a text part with {other} in 'content', expected 'type' and a 'text' that is a string")
    return text


def _objects(value: object, field: str) -> list[Any]:
    """A list of objects, each of which, or all, may be JSON."""
    found = parsed(value, field)
    found = [] if found is None else found
    if not isinstance(found, (list, tuple)):
        raise ValueError(f"has {shown_type(found)} in {field!r}, expected a list of objects")
    items = [parsed(item, field) for item in found]
    for item in items:
        if not isinstance(item, Mapping):
            raise ValueError(f"has {shown_type(item)} in the list {field!r}, expected objects")
    return items


def _variables(row: Mapping[str, Any]) -> dict[str, Any]:
    for field, instead in (("functions", "give them as 'tools'"), ("chat_template", "put it into the teacher's folder")):
        if _json_or_text(row.get(field)):
            raise ValueError(f"has {field!r}, which no chat template is given; {instead}")
    variables: dict[str, Any] = {}
    for field in ("tools", "documents"):
        if found := _objects(row.get(field), field):
            variables[field] = found
    more = parsed(row.get("chat_template_kwargs"), "chat_template_kwargs") or {}
    if not isinstance(more, Mapping):
        raise ValueError(f"has {shown_type(more)} in 'chat_template_kwargs', expected an object")
    return {**more, **variables}


def _json_or_text(value: Any) -> Any:
    """A value that may be JSON, or the text that it is."""
    try:
        return parsed(value, "")
    except ValueError:
        return value


def refuse_surrogates(value: Any) -> None:
    """Refuse texts that no file can hold.

    Raises:
        ValueError: half of a surrogate pair is in it; or it is nested too deep.
    """
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        text.encode()
    except UnicodeEncodeError as error:
        where = error.object[max(error.start - 20, 0) : error.start]
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"has a lone surrogate {half}, half of a character, after {where!r}") from None
    except (RecursionError, TypeError) as error:  # nested too deep, or keys that are no texts
        raise ValueError(f"cannot be read: {error}") from None
