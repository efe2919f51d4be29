"""Where in the text of a conversation each turn lies, whatever the chat template does with it.

A turn is what changes in the text when the turn says something else and everything else stays. Each answer is proved on the text
itself: what is before and after the other words must be what is before and after the turn. Knows no tokenizers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pipeline.data.notes import BadRowError
from pipeline.data.turns import CALLS, REASONING, SAID, Message

_MARK = re.compile("\ue000(\\d+)(t?)\ue001")
"""Stands for what a turn says: its number, and `t` where that is reasoning."""
_HEADER = ("role", "name", "tool_call_id")
"""Fields of a turn that say who speaks, not what."""
Span = tuple[int, int]
"""First character and the one after the last."""


class Rendering:
    """A conversation and the text its template makes of it.

    Args:
        apply: makes a text of turns; raises BadRowError where the template refuses them.
        source: place of the conversation, which errors name.
        ends: words of which one may end a turn; spans are without it.
    """

    def __init__(self, apply: Callable[..., str], messages: Sequence[Message], source: str, ends: Sequence[str] = ()) -> None:
        self.messages, self.source, self.ends = messages, source, ends
        self.turns = [message.as_given() for message in messages]
        self._apply = apply
        self.text = apply(self.turns)

    def other(self, turns: Sequence[Mapping[str, Any]], **variables: Any) -> str | None:
        """The text of other turns; None where the template refuses them."""
        try:
            return self._apply([dict(turn) for turn in turns], **variables)
        except BadRowError:
            return None

    @functools.cached_property
    def prompt(self) -> str:
        """What asks the assistant to speak, '' where the template has nothing of the kind."""
        asked = self.other(self.turns, add_generation_prompt=True) or ""
        return asked.removeprefix(self.text) if asked.startswith(self.text) else ""

    def changed(self, index: int, turn: Mapping[str, Any]) -> str | None:
        """The text with another turn in place of one."""
        return self.other([*self.turns[:index], turn, *self.turns[index + 1 :]])

    def place(self, index: int) -> str:
        """A turn, for people."""
        return f"{self.source}: turn {index + 1} of {len(self.turns)} ({self.messages[index].role[:40]})"


def turn_spans(rendering: Rendering) -> list[Span]:
    """The span of every turn, in order.

    Raises:
        BadRowError: it cannot be told, or the template leaves out what a turn says; the turn and its field are named.
    """
    spans = _together(rendering) or _one_by_one(rendering)
    for index, span in enumerate(spans):
        _refuse_unwritten(rendering, index, span)
    return spans


def _together(rendering: Rendering) -> list[Span] | None:
    """The spans of all turns by one other rendering; None where it does not fit the text, or in more than one way."""
    turns, text = rendering.turns, rendering.text
    marks, around = _skeleton(rendering)
    if [index for index, _ in marks] != list(range(len(turns))):
        return None
    forms = [_forms(turn) for turn in turns]
    spans = _fit(text, around, forms)
    if spans is None:
        return None
    if None in forms:
        # Fitted from the end too: where both agree, there is no third way.
        backward = [form and [text[::-1] for text in form] for form in reversed(forms)]
        mirrored = _fit(text[::-1], [piece[::-1] for piece in reversed(around)], backward) or []
        if [(len(text) - stop, len(text) - first) for first, stop in reversed(mirrored)] != spans:
            return None
    befores = [0, *(stop for _, stop in spans)]
    return [
        _with_opening(rendering, span, before) if is_thought else span
        for span, before, (_, is_thought) in zip(spans, befores, marks, strict=False)
    ]


def _skeleton(rendering: Rendering) -> tuple[list[tuple[int, bool]], list[str]]:
    """The turns in the order in which they are written, and whether each begins with reasoning; and the text around them."""
    marked = [next(_replacements(turn, index)) for index, turn in enumerate(rendering.turns)]
    pieces = _MARK.split(rendering.other(marked) or "")
    marks, around = list[tuple[int, bool]](), [pieces[0]]
    for number, kind, after in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        if marks and marks[-1][0] == int(number):
            around[-1] = after  # what is between the reasoning of a turn and its content is the turn's
        else:
            marks.append((int(number), kind == "t"))
            around.append(after)
    return marks, around


def _forms(turn: Mapping[str, Any]) -> list[str] | None:
    """What a template may write of a turn that says nothing but its content: white space may be stripped. None for other turns."""
    content = turn.get("content")
    if not isinstance(content, str) or any(field in turn for field in SAID) or "</think>" in content:
        return None
    return [content, content.strip(), content.rstrip(), content.lstrip()]


def _fit(text: str, around: Sequence[str], forms: Sequence[Sequence[str] | None]) -> list[Span] | None:
    """Where the turns are if the text is what is around them and, between, one of the forms of each, or as little as may be."""
    if not text.startswith(around[0]):
        return None
    spans, position = list[Span](), len(around[0])
    for number, (after, possible) in enumerate(zip(around[1:], forms, strict=True), start=1):
        if possible is not None:
            length = next((len(form) for form in possible if text.startswith(form + after, position)), -1)
        elif number < len(forms):
            length = text.find(after, position) - position
        else:
            length = len(text) - len(after) - position if text.endswith(after) else -1
        if length < 0:
            return None
        spans.append((position, position + length))
        position += length + len(after)
    return spans if position == len(text) else None


def _one_by_one(rendering: Rendering) -> list[Span]:
    """The spans of all turns, by other renderings for each."""
    spans: list[Span] = []
    for index in range(len(rendering.turns)):
        before = spans[-1][1] if spans else 0
        span = _span(rendering, index, before)
        if span is None or span[0] < before:
            raise _refusal(rendering, index)
        spans.append(span)
    return spans


def _span(rendering: Rendering, index: int, before: int) -> Span | None:
    """Where a turn lies, by the first way that is proved; None where none is."""
    for replaced in _replacements(rendering.turns[index], index):
        other = rendering.changed(index, replaced)
        if other is not None and (span := _between(rendering.text, other)) is not None:
            is_thought = _mark(index, "t") in other
            return _with_opening(rendering, span, before) if is_thought else span
    return _around_content(rendering, index) or _by_beginnings(rendering, index)


def _mark(index: int, kind: str = "") -> str:
    return f"\ue000{index}{kind}\ue001"


def _replacements(turn: Mapping[str, Any], index: int) -> Iterator[dict[str, Any]]:
    """The turn saying something else, in the forms that templates take apart, the likeliest first."""
    header = {field: turn[field] for field in _HEADER if field in turn}
    for field in REASONING:
        if str(turn.get(field) or "").strip():
            yield {**header, field: _mark(index, "t"), "content": _mark(index)}
    yield {**header, "content": _mark(index)}
    if "</think>" in str(turn.get("content")):
        yield {**header, "content": f"<think>\n{_mark(index, 't')}\n</think>\n\n{_mark(index)}"}


def _between(text: str, other: str) -> Span | None:
    """What of a text stands where another has marks, if they are the same before and after."""
    pieces = _MARK.split(other)
    kinds = pieces[2::3]
    if not kinds or len(set(kinds)) < len(kinds):
        return None
    first, last = pieces[0], pieces[-1]
    if len(first) + len(last) > len(text) or not (text.startswith(first) and text.endswith(last)):
        return None
    return len(first), len(text) - len(last)


def _with_opening(rendering: Rendering, span: Span, before: int) -> Span:
    """The span and the tag that opens the reasoning in it: all that follows what asks the assistant to speak."""
    prompt = rendering.prompt
    found = rendering.text.rfind(prompt, before, span[0]) if prompt else -1
    return (found + len(prompt), span[1]) if found >= 0 else span


def _around_content(rendering: Rendering, index: int) -> Span | None:
    """The span of a turn that is its content letter by letter, where templates look at how it begins and ends."""
    turn = rendering.turns[index]
    content = str(turn.get("content") or "").strip()
    if not content or any(turn.get(field) for field in SAID):
        return None
    half, mark = len(content) // 2, _mark(index)
    other = rendering.changed(
        index, {**turn, "content": turn["content"].replace(content, content[:half] + mark + content[half:])}
    )
    pieces = (other or "").split(mark)
    if len(pieces) != 2 or "".join(pieces) != rendering.text:
        return None
    start = len(pieces[0]) - half
    return (start, start + len(content)) if rendering.text.startswith(content, start) else None


def _by_beginnings(rendering: Rendering, index: int) -> Span | None:
    """What an assistant's turn adds to the turns before it, where the text begins with theirs."""
    turns, text = rendering.turns, rendering.text
    if rendering.messages[index].role != "assistant":
        return None
    asked = rendering.other(turns[:index], add_generation_prompt=True)
    answered = rendering.other(turns[: index + 1])
    if not asked or not answered or not (text.startswith(answered) and answered.startswith(asked)):
        return None
    added = answered[len(asked) :].rstrip()
    return len(asked), len(asked) + min((len(added.removesuffix(end)) for end in rendering.ends), default=len(added))


def _refuse_unwritten(rendering: Rendering, index: int, span: Span) -> None:
    """Refuse calls that the template leaves out: what was said would be gone without a word."""
    turn, said = rendering.turns[index], rendering.text[slice(*span)]
    for field in CALLS:
        calls = turn.get(field)
        if not calls or (field == "tool_calls" and all(name and name in said for name in map(_called, calls))):
            continue
        if rendering.changed(index, {key: turn[key] for key in turn if key != field}) == rendering.text:
            raise BadRowError(
                f"{rendering.place(index)}: the chat template does not write its {field!r}; use a teacher whose template does, put the "
                "calls into the content, or leave the row out"
            )


def _called(call: Mapping[str, Any]) -> str:
    """The name of what is called, '' where it is not said in the usual way."""
    function = call.get("function", call)
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""


def _refusal(rendering: Rendering, index: int) -> BadRowError:
    turn, (marks, _) = rendering.turns[index], _skeleton(rendering)
    fields = ", ".join(repr(field) for field in ("content", *SAID) if turn.get(field)) or "'content'"
    if len(marks) != len(rendering.turns):
        what = f"leaves out, repeats or moves messages ({len(rendering.turns)} given, {len(marks)} written)"
    else:
        what = f"changes a message of role {rendering.messages[index].role[:40]}"
    return BadRowError(
        f"{rendering.source}: the chat template {what}, turn {index + 1} of {len(rendering.turns)} "
        f"({rendering.messages[index].role[:40]}), {fields}, so it cannot be told which tokens are whose; use a template that writes "
        "every message once, or leave the row out"
    )
