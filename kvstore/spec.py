"""Geometry of stored keys and values: how many layers, heads and channels, and how keys were rotated.

Knows no model, no array library and no file: these are plain records that cross processes and lie in `manifest.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from kvstore.errors import StoreFormatError
from kvstore.records import STRICT, differences, parse, plain

KeyDomain = Literal["pre_rope", "post_rope"]
RopeKind = Literal["half", "interleaved"]
Dtype = Literal["float32", "float16", "bfloat16"]
MAX_LAYERS = 2048
LayerNumber = Annotated[int, Field(ge=0, lt=2**16)]
Dim = Annotated[int, Field(ge=1, le=2**16)]
"""Heads of a layer, or channels of a head."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding of one kind of layer (Su et al., arXiv 2104.09864)."""

    __pydantic_config__ = STRICT

    kind: RopeKind
    """`half` rotates channels (i, i + rotary_dim/2), `interleaved` rotates (2i, 2i + 1)."""
    inv_freq: Annotated[tuple[float, ...], Field(max_length=2**15)]
    """Radians per position of each channel pair, after any scaling of the model, negative where the second channel turns
    towards the first; `rotary_dim` is twice their number."""
    start: Annotated[int, Field(ge=0, le=2**16)] = 0
    """First rotated channel of a head; others pass through."""
    attention_scaling: float = 1.0
    """Factor on cos and sin (YaRN, LongRoPE); 1 for plain RoPE."""

    @property
    def rotary_dim(self) -> int:
        """Number of rotated channels of a head."""
        return 2 * len(self.inv_freq)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """Keys and values of one attention layer."""

    __pydantic_config__ = STRICT

    layer: LayerNumber
    """The model's own layer number."""
    num_kv_heads: Dim
    key_dim: Dim
    value_dim: Dim
    rope: Annotated[int, Field(ge=0)] | None
    """Index into `KVSpec.ropes`; None where nothing is rotated (learned positions, ALiBi, NoPE)."""
    latent: bool = False
    """Multi-head latent attention (DeepSeek): `key` is the latent all keys and values are made of, never rotated; `value` is the
    key part all heads share, which is what `rope` rotates."""

    @property
    def geometry(self) -> tuple[int, int, int]:
        """(num_kv_heads, key_dim, value_dim): layers that share it can share an array."""
        return self.num_kv_heads, self.key_dim, self.value_dim


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KVSpec:
    """Geometry of a model's keys and values, or of the part of them a store holds."""

    __pydantic_config__ = STRICT

    layers: Annotated[tuple[LayerSpec, ...], Field(max_length=MAX_LAYERS)]
    """In increasing order of layer number."""
    ropes: Annotated[tuple[RopeSpec, ...], Field(max_length=MAX_LAYERS)]
    """The distinct rotary embeddings the layers refer to."""
    key_domain: KeyDomain = "pre_rope"
    """Whether keys, and values of latent layers, are given before or after rotation."""
    dtype: Dtype
    """What the numbers were when the model produced them; not how they lie on disk."""

    def __post_init__(self) -> None:
        numbers = self.layer_numbers
        if list(numbers) != sorted(set(numbers)):
            raise ValueError(f"layers: got {list(numbers)}, expected increasing layer numbers without repeats")
        for layer in self.layers:
            if layer.rope is not None and not 0 <= layer.rope < len(self.ropes):
                raise ValueError(f"layer {layer.layer}: rope index {layer.rope}, expected below {len(self.ropes)}")

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        return tuple(layer.layer for layer in self.layers)

    @property
    def values_per_token(self) -> int:
        """Numbers stored for one token over all layers, keys and values together."""
        return sum(layer.num_kv_heads * (layer.key_dim + layer.value_dim) for layer in self.layers)

    def layer(self, number: int) -> LayerSpec:
        """The layer of that number.

        Raises:
            ValueError: this spec has no such layer; the message lists those it has.
        """
        for layer in self.layers:
            if layer.layer == number:
                return layer
        raise ValueError(f"layer {number} is not here; there are layers {format_layers(self.layer_numbers)}")

    def rope_of(self, number: int) -> RopeSpec | None:
        """Rotary embedding of that layer's keys (values, if it is latent), None where there is none."""
        index = self.layer(number).rope
        return None if index is None else self.ropes[index]

    @property
    def unrotated_layers(self) -> tuple[int, ...]:
        """Layers without a rotary embedding, whose keys before and after rotation are the same."""
        return tuple(layer.layer for layer in self.layers if layer.rope is None)

    def select(self, numbers: Iterable[int]) -> KVSpec:
        """The same spec with only these layers."""
        chosen = tuple(self.layer(number) for number in sorted(set(numbers)))
        return dataclasses.replace(self, layers=chosen)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> KVSpec:
        """Parse what `to_json` gave.

        Raises:
            StoreFormatError: a field is missing, unknown, of another type or out of range.
        """
        try:
            spec = parse(cls, record, "spec")
        except StoreFormatError as error:
            raise StoreFormatError(f"{error}; expected the fields of KVSpec (FORMAT.md 2)") from error
        if missing := list(spec.missing_in(record)):
            raise StoreFormatError(f"spec: {', '.join(missing)} missing; expected the fields of KVSpec (FORMAT.md 2)")
        return spec

    def missing_in(self, record: Mapping[str, Any]) -> Iterator[str]:
        """Fields with a default that this spec's record leaves out: a record is written with all, so somebody took them away. `latent` is
        younger than the format."""
        for found in differences(plain(record), plain(self.to_json())):
            if not found.field.endswith(".latent"):
                yield found.field


def format_layers(numbers: Iterable[int]) -> str:
    """Layer numbers as a person writes them: [0, 1, 2, 5] -> '0-2,5'."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "none"


def parse_layers(text: str, available: Iterable[int]) -> tuple[int, ...]:
    """Parse `all`, `3`, `0-5`, `0,4,8-11`, or `-1` counted from the last, against the layers there are.

    Raises:
        ValueError: not such a list, or a layer that does not exist.
    """
    known = sorted(set(available))
    if text.strip() == "all":
        return tuple(known)
    chosen: set[int] = set()
    for part in text.split(","):
        try:
            if part.strip().startswith("-"):
                chosen.add(known[int(part)])
                continue
            first, _, last = part.partition("-")
            wanted = range(int(first), int(last or first) + 1)
        except (ValueError, IndexError):
            raise ValueError(
                f"layers: got {text!r}, expected 'all' or a list such as '0,4,8-11' or '-1' for the last of "
                f"{format_layers(known)}"
            ) from None
        if not wanted or not known or wanted[0] < known[0] or wanted[-1] > known[-1] or set(wanted) - set(known):
            raise ValueError(f"layers: got {part!r}, but the model has layers {format_layers(known)}")
        chosen.update(wanted)
    return tuple(sorted(chosen))
