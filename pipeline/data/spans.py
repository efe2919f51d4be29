"""Where in the text of a conversation each turn lies, whatever the chat template does with it.

A turn is what changes in the text when the turn says something else and everything else stays. Each answer is proved on the text
itself: what is before and after the other words must be what is before and after the turn. Knows no tokenizers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pipeline.data.notes import BadRowError
from pipeline.data.turns import REASONING, SAID, Message

_FIRST, _LAST = "\ue000", "\ue001"
_MARK = re.compile(f"{_FIRST}(\\d+){_LAST}")
_WORDS, _THOUGHT = f"{_FIRST}0{_LAST}", f"{_FIRST}1{_LAST}"
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

    def changed(self, index: int, turn: Mapping[str, Any]) -> str | None:
        """The text with another turn in place of one."""
        return self.other([*self.turns[:index], turn, *self.turns[index + 1 :]])

    def place(self, index: int) -> str:
        """A turn, for people."""
        return f"{self.source}: turn {index + 1} of {len(self.turns)} ({self.messages[index].role[:40]})"


def turn_spans(rendering: Rendering) -> list[Span]:
    """The span of every turn, in order.

    Raises:
        BadRowError: it cannot be told; the turn and its field are named.
    """
    written = _skeleton(rendering)
    if written is not None and (plain := _plain_spans(rendering, written)) is not None:
        return plain
    spans: list[Span] = []
    for index in range(len(rendering.turns)):
        before = spans[-1][1] if spans else 0
        span = _span(rendering, index, before)
        if span is None or span[0] < before:
            raise _refusal(rendering, index, len(rendering.turns) if written is None else len(written) // 2)
        spans.append(span)
    return spans


def _skeleton(rendering: Rendering) -> list[str] | None:
    """The text around the turns, in turn with their numbers, as written with a mark in place of all that each says."""
    marked = [{**_header(turn), "content": f"{_FIRST}{index}{_LAST}"} for index, turn in enumerate(rendering.turns)]
    text = rendering.other(marked)
    return None if text is None else _MARK.split(text)


def _plain_spans(rendering: Rendering, written: Sequence[str]) -> list[Span] | None:
    """The spans of turns that say nothing but their content, by two renderings for all of them; None where that does not suffice."""
    turns, text = rendering.turns, rendering.text
    if written[1::2] != [str(index) for index in range(len(turns))] or not text.startswith(written[0]):
        return None
    spans, position = [], len(written[0])
    for turn, after in zip(turns, written[2::2], strict=True):
        content = turn.get("content")
        if content is None or any(field in turn for field in SAID):
            return None
        # Templates may strip white space.
        forms = (content, content.strip(), content.rstrip(), content.lstrip())
        found = next((form for form in forms if text.startswith(form + after, position)), None)
        if found is None:
            return None
        spans.append((position, position + len(found)))
        position += len(found) + len(after)
    return spans if position == len(text) else None


def _span(rendering: Rendering, index: int, before: int) -> Span | None:
    """Where a turn lies, by the first way that is proved; None where none is."""
    turn = rendering.turns[index]
    _refuse_unwritten(rendering, index)
    for replaced in _replacements(turn):
        other = rendering.changed(index, replaced)
        if other is not None and (span := _between(rendering.text, other)) is not None:
            return _with_opening(rendering, span, before) if any(_THOUGHT in value for value in replaced.values()) else span
    return _around_content(rendering, index) or _by_beginnings(rendering, index)


def _replacements(turn: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The turn saying something else, in the forms that templates take apart."""
    yield {**_header(turn), "content": _WORDS}
    for field in REASONING:
        if turn.get(field):
            yield {**_header(turn), field: _THOUGHT, "content": _WORDS}
    if "</think>" in str(turn.get("content")):
        yield {**_header(turn), "content": f"<think>\n{_THOUGHT}\n</think>\n\n{_WORDS}"}


def _between(text: str, other: str) -> Span | None:
    """What of a text stands where another has marks, if they are the same before and after."""
    pieces = _MARK.split(other)
    numbers = pieces[1::2]
    if not numbers or len(set(numbers)) < len(numbers):
        return None
    first, last = pieces[0], pieces[-1]
    if len(first) + len(last) > len(text) or not (text.startswith(first) and text.endswith(last)):
        return None
    return len(first), len(text) - len(last)


def _with_opening(rendering: Rendering, span: Span, before: int) -> Span:
    """The span and the tag that opens the reasoning in it: all that follows what asks the assistant to speak."""
    asked = rendering.other(rendering.turns, add_generation_prompt=True) or ""
    prompt = asked.removeprefix(rendering.text)
    found = rendering.text.rfind(prompt, before, span[0]) if prompt and prompt != asked else -1
    return (found + len(prompt), span[1]) if found >= 0 else span


def _around_content(rendering: Rendering, index: int) -> Span | None:
    """The span of a turn that is its content letter by letter, where templates look at how it begins and ends."""
    turn = rendering.turns[index]
    content = str(turn.get("content") or "").strip()
    if not content or any(turn.get(field) for field in SAID):
        return None
    half = len(content) // 2
    other = rendering.changed(
        index, {**turn, "content": turn["content"].replace(content, content[:half] + _WORDS + content[half:])}
    )
    pieces = (other or "").split(_WORDS)
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


def _header(turn: Mapping[str, Any]) -> dict[str, Any]:
    return {field: turn[field] for field in _HEADER if field in turn}


def _refuse_unwritten(rendering: Rendering, index: int) -> None:
    """Refuse calls that the template leaves out: what was said would be gone without a word."""
    turn = rendering.turns[index]
    for field in SAID[:2]:
        if turn.get(field) and rendering.changed(index, {key: turn[key] for key in turn if key != field}) == rendering.text:
            raise BadRowError(
                f"{rendering.place(index)}: the chat template does not write its {field!r}; use a teacher whose template does, put the "
                "calls into the content, or leave the row out"
            )


def _refusal(rendering: Rendering, index: int, num_written: int) -> BadRowError:
    fields = ", ".join(repr(field) for field in ("content", *SAID) if rendering.turns[index].get(field)) or "'content'"
    if num_written != len(rendering.turns):
        what = f"leaves out, repeats or moves messages ({len(rendering.turns)} given, {num_written} written)"
    else:
        what = f"changes a message of role {rendering.messages[index].role}"
    return BadRowError(
        f"{rendering.source}: the chat template {what}, turn {index + 1} of {len(rendering.turns)} "
        f"({rendering.messages[index].role[:40]}), {fields}, so it cannot be told which tokens are whose; use a template that writes "
        "every message once, or leave the row out"
    )
