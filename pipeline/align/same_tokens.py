"""Whether two tokenizers give the same ids to every text, and where they do not, in what they differ. Knows no store and no model."""

# ruff: noqa: RUF001
from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_PARTS = ("normalizer", "pre_tokenizer", "model", "post_processor", "added_tokens")
"""Of a tokenizer's description, what can change an id. Decoder, padding and chat template cannot."""
_TEXTS = (
    "The quick brown fox jumps over the lazy dog, doesn't it? I'LL say: it's 'quoted', we've won't.",
    "  leading, double  and trailing spaces  ",
    "\ttabs\t\tand\n\nlines\r\n    indented\n\n\n",
    'def f(x: int) -> str:\n    return f"{x!r:>10}"  # 0x1F, a_b, CamelCase, x**2 != y[-1]\n',
    "Numbers: 7, 42, 1234567, 3.14159, 1,000,000, 2024-01-31, ١٢٣, Ⅷ, ½",
    "Straße, naïve café, Ångström, ﬁ ligature, ＦＵＬＬ width, İstanbul",
    "e\u0301 and \u00e9, a\u030a and \u00e5, \u1112\u1161\u11ab and \ud55c",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก",
    "今天天气很好。東京は日本の首都です。안녕하세요 세계",
    "🙂👩‍👩‍👧‍👦🇩🇪 \u200b\u00a0\u3000\ufeff\u0000\ufffd ∀x∈ℝ: ⌈x⌉ → “quotes” – dash…",
    "https://example.org/a?b=c&d=%20 user@example.org <html>&amp;</html> ```code```",
    "Byte\u0300 Ａ１ ①②③ x² H₂O",
    "▁under ▁▁bars Ġbyte Ċmarks ## [UNK]",
    "a",
    " a",
    "",
)
"""Spaces, digits, case, composed and decomposed characters, scripts and signs: where splitting and normalising differ."""
_TOKENS_TRIED = 2048
_SPECIAL_TRIED = 64
_SHOWN = 6


def tokenizer_differences(one: Any, other: Any) -> list[str]:
    """In what two fast tokenizers differ in the ids they give to texts, first against second; empty where they give the same.

    Equal parts give equal ids. Vocabulary and merges must be equal; other parts may be written differently and are tried on texts of
    many kinds. Which token pads or ends a text plays no part by itself, nor does a padding token that only one of them has.
    """
    if one is other or one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str():
        return []
    ours, theirs = (json.loads(side.backend_tokenizer.to_str()) for side in (one, other))
    unlike = [part for part in _PARTS if ours[part] != theirs[part]]
    if not unlike:
        return []
    vocabularies = _without_padding(one, other), _without_padding(other, one)
    added = {part["content"] for description in (ours, theirs) for part in description["added_tokens"]}
    texts = _texts(one, vocabularies[0], sorted(added.intersection(*vocabularies)))
    found = [*_vocabularies(*vocabularies), *_models(ours["model"], theirs["model"]), *_ids(one, other, texts)]
    return [*found, f"parts that differ: {', '.join(unlike)}", *_classes(one, other)] if found else []


def _without_padding(side: Any, other: Any) -> dict[str, int]:
    """Tokens and their ids without a padding token that the other has not: no text has it in it."""
    vocabulary: dict[str, int] = side.get_vocab()
    if side.pad_token in vocabulary and side.pad_token not in other.get_vocab():
        del vocabulary[side.pad_token]
    return vocabulary


def _vocabularies(ours: Mapping[str, int], theirs: Mapping[str, int]) -> Iterator[str]:
    if ours == theirs:
        return
    token = min(ours.items() ^ theirs.items(), key=lambda entry: (entry[1], entry[0]))[0]
    yield (
        f"vocabularies of {len(ours):,} against {len(theirs):,} tokens: {token!r} is token {ours.get(token, 'none')} against "
        f"{theirs.get(token, 'none')}"
    )


def _models(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """Where tokens are joined in another order, or weighed otherwise (Unigram keeps a list of tokens with their scores)."""
    if ours["type"] != theirs["type"]:
        yield f"models of type {ours['type']} against {theirs['type']}"
        return
    for field, what in (("merges", "merges"), ("vocab", "scores")):
        mine, its = ours.get(field), theirs.get(field)
        if isinstance(mine, list) and isinstance(its, list) and mine != its:
            at = _first_unlike(mine, its)
            first, second = (each[at] if at < len(each) else "none" for each in (mine, its))
            yield f"{len(mine):,} against {len(its):,} {what}, the first that differ being {first} against {second}"


def _first_unlike(first: Sequence[Any], second: Sequence[Any]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))


def _texts(one: Any, vocabulary: Mapping[str, int], added: Sequence[str]) -> Iterator[str]:
    """What the two are tried on: kinds of text, added tokens within text, and what many tokens write."""
    yield from _TEXTS
    yield from (f"a {token} b{token}c" for token in added[:_SPECIAL_TRIED])
    numbers = sorted(vocabulary.values())
    yield from (one.decode([number]) for number in numbers[:: max(len(numbers) // _TOKENS_TRIED, 1)])


def _ids(one: Any, other: Any, texts: Iterable[str]) -> Iterator[str]:
    """The first text that gets other ids."""
    for text in texts:
        first, second = (list(side(text, verbose=False)["input_ids"]) for side in (one, other))
        if first != second:
            at = _first_unlike(first, second)
            yield (
                f"{text[:60]!r} becomes {_piece(first, at)} against {_piece(second, at)}, from token {at} of {len(first)} against "
                f"{len(second)} on"
            )
            return


def _piece(ids: list[int], at: int) -> str:
    return f"[{', '.join(map(str, ids[at : at + _SHOWN]))}{', ...' if len(ids) > at + _SHOWN else ''}]"


def _classes(one: Any, other: Any) -> Iterator[str]:
    kinds = [type(side).__name__ for side in (one, other)]
    if kinds[0] == kinds[1]:
        return
    files = [Path(side.name_or_path, "tokenizer.json") for side in (one, other)]
    same = all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()
    yield (
        f"{'although their tokenizer.json is the same, ' if same else ''}transformers loads them as {kinds[0]} against {kinds[1]}, "
        "for it picks the class by model_type in config.json and tokenizer_class in tokenizer_config.json"
    )
