"""What each token of a tokenizer writes, in bytes: read off its vocabulary and its own description. Knows no store and no model."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int64

from pipeline.align.same_tokens import tokenizer_differences

Ids = Sequence[int] | np.ndarray
_SPACE = "\u2581"
"""What sentencepiece writes for a space."""


class TokenBytes:
    """What every token of a tokenizer writes.

    Args:
        tokenizer: a fast tokenizer of transformers, byte-level or of sentencepiece's kind.

    Raises:
        ValueError: it has no description to read, or one of another kind.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._lock = threading.Lock()
        self._same: dict[TokenBytes, bool] = {}
        self.name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"tokenizer {self.name}: got a {type(tokenizer).__name__}, expected a fast tokenizer (tokenizer.json), which says what "
                "its tokens write; load it with use_fast=True or convert it"
            )
        self._description: dict[str, Any] = json.loads(backend.to_str())
        kinds = {part["type"] for part in _parts(self._description, "decoder") + _parts(self._description, "pre_tokenizer")}
        spaces = any(
            part["type"] == "Metaspace" or (part["type"] == "Replace" and part["pattern"].get("String") == _SPACE)
            for part in _parts(self._description, "decoder")
        )
        if "ByteLevel" not in kinds and not spaces:
            raise ValueError(
                f"tokenizer {self.name}: its parts are {', '.join(sorted(kinds)) or 'none'}, expected a byte-level tokenizer (GPT-2, Qwen, Llama 3) "
                "or one of sentencepiece's kind (Llama 2, Mistral, Gemma): kvpipe cannot tell what its tokens write"
            )
        self._write = _byte_level if "ByteLevel" in kinds else _sentencepiece
        added = {int(part["id"]): part for part in self._description["added_tokens"]}
        self.special: dict[int, str] = {token: part["content"] for token, part in added.items() if part["special"]}
        """Content of the tokens that stand for no text of their own, by id."""
        self._plain = {token: part["content"].encode() for token, part in added.items() if not part["special"]}

    @cached_property
    def _tokens(self) -> dict[int, bytes]:
        vocabulary: Mapping[str, int] = self.tokenizer.get_vocab()
        written = {token: self._write(text) for text, token in vocabulary.items() if token not in self.special}
        return written | self._plain

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """Special tokens this tokenizer puts before and behind a text on its own."""
        probe = list(self.tokenizer("a")["input_ids"])
        inner = [token not in self.special for token in probe]
        first = inner.index(True)
        last = len(inner) - inner[::-1].index(True)
        return probe[:first], probe[last:]

    def same_as(self, other: TokenBytes) -> bool:
        """Whether both make the same tokens of every text; how many rows an embedding is padded to plays no part."""
        with self._lock:
            if other not in self._same:
                self._same[other] = self is other or not tokenizer_differences(self.tokenizer, other.tokenizer)
            return self._same[other]

    def write(self, ids: Ids) -> list[bytes]:
        """What each of these tokens writes, special ones nothing.

        Raises:
            ValueError: an id that is no token.
        """
        try:
            return [b"" if token in self.special else self._tokens[token] for token in map(int, ids)]
        except KeyError as error:
            raise ValueError(f"tokenizer {self.name}: token id {error} is none of its {len(self._tokens)} tokens") from None

    def encode(self, text: str) -> Int64[np.ndarray, "token"]:
        """Token ids of a text, without special tokens around it; literal special tokens in the text become such."""
        with self._lock:  # a tokenizer takes offence at being asked by two threads
            return np.array(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)

    @property
    def prepends_space(self) -> bool:
        """Whether it puts a space of its own before a text, as sentencepiece does."""
        parts = _parts(self._description, "normalizer") + _parts(self._description, "pre_tokenizer")
        return any(
            part["type"] == "Prepend" or (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
            for part in parts
        )


def _parts(description: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    """A tokenizer's decoder, normaliser or pre-tokenizer, sequences taken apart."""
    part = description.get(field)
    if part is None:
        return []
    inner = part.get("decoders") or part.get("normalizers") or part.get("pretokenizers")
    return [each for member in inner for each in _parts({field: member}, field)] if inner else [part]


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTES[symbol] for symbol in token)
    except KeyError:
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """The characters byte-level tokenizers write bytes with (GPT-2's `bytes_to_unicode`): visible ones themselves, others above."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()
