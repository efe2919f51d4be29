"""Between keys and values as attention uses them and as a `KVSpec` describes them: rotation and repeated heads, undone and redone.

Knows a spec and the tables a module rotated by; does not know how they were come by (`attention`) or what is done with the result.
"""

from __future__ import annotations

import dataclasses
import weakref

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvstore.spec import KVSpec, RopeSpec
from pipeline.models.attention import CaptureError
from pipeline.models.rotary import Layouts, RotaryTables, inverse, rotary_tables, rotate

KeyValue = tuple[Float[Tensor, "batch kv_head token key_dim"], Float[Tensor, "batch kv_head token value_dim"]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """What a layer rotates by in one forward."""

    rope: RopeSpec
    tables: RotaryTables
    back: RotaryTables
    """The tables that undo it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """The way of one layer in one forward."""

    repeats: int
    """How often the model repeats each head before it hands them over; 1 for nearly all."""
    rotation: Rotation | None
    """None where both sides rotate alike."""
    latent: bool
    """Whether the value is what turns: the key all heads of a latent layer share."""

    def to_spec(self, key: Tensor, value: Tensor) -> KeyValue:
        """From what attention uses to what the spec describes; the same objects where there is no difference."""
        key, value = (states if self.repeats == 1 else states[:, :: self.repeats] for states in (key, value))
        if self.rotation is None:
            return key, value
        rope, back = self.rotation.rope, self.rotation.back
        return (key, rotate(value, back, rope)) if self.latent else (rotate(key, back, rope), value)

    def to_attention(self, key: Tensor, value: Tensor) -> KeyValue:
        """The inverse of `to_spec`, up to one rounding of what is rotated."""
        if self.rotation is not None:
            rope, tables = self.rotation.rope, self.rotation.tables
            key, value = (key, rotate(value, tables, rope)) if self.latent else (rotate(key, tables, rope), value)
        key, value = (x if self.repeats == 1 else x.repeat_interleave(self.repeats, dim=1) for x in (key, value))
        return key, value


_LAYOUTS: weakref.WeakKeyDictionary[nn.Module, Layouts] = weakref.WeakKeyDictionary()
"""Found in the first forward of a model, so that later ones need not wait for the device."""


class Passages:
    """The passages of the forward that is running; to be cleared before the next."""

    def __init__(self, model: nn.Module, spec: KVSpec) -> None:
        self._model = type(model).__name__
        self._spec = spec
        self._layouts = _LAYOUTS.setdefault(model, {})
        self._tables: dict[int, tuple[object, RotaryTables, RotaryTables]] = {}

    def clear(self) -> None:
        self._tables.clear()

    def of(self, layer: int, key: Tensor, value: Tensor, tables: object) -> Passage:
        """The passage of a layer, from what its attention was given.

        Raises:
            CaptureError: they are not what the spec says of that layer.
        """
        expected = self._spec.layer(layer)
        repeats = max(key.shape[1] // expected.num_kv_heads, 1)
        repeated = repeats == 1 or all(is_repeated(states, repeats) for states in (key, value))
        if not repeated or (key.shape[1] // repeats, key.shape[-1], value.shape[-1]) != expected.geometry:
            raise CaptureError(
                f"layer {layer}: got K {list(key.shape)} and V {list(value.shape)}, expected (kv heads, key dim, value dim) "
                f"{expected.geometry} as the spec says. Was the spec probed on another model?"
            )
        rope = self._spec.rope_of(layer) if self._spec.key_domain == "pre_rope" else None
        rotation = None if rope is None else self._rotation(layer, rope, tables)
        return Passage(repeats=repeats, rotation=rotation, latent=expected.latent)

    def _rotation(self, layer: int, rope: RopeSpec, tables: object) -> Rotation:
        # Layers share one object per forward.
        known = self._tables.get(id(tables))
        if known is None:
            found = rotary_tables(tables, rope.rotary_dim // 2, self._layouts)
            if found is None:
                raise CaptureError(
                    f"{self._model}: layer {layer} was given no rotary table of {rope.rotary_dim // 2} "
                    "frequencies, expected one as its spec says. Was the spec probed on another model?"
                )
            known = self._tables[id(tables)] = (tables, found, inverse(found))
        return Rotation(rope=rope, tables=known[1], back=known[2])


def is_repeated(states: Float[Tensor, "batch head token dim"], repeats: int) -> bool:
    """Whether every group of that many heads in a row holds one head, bit for bit."""
    batch, _, num_tokens, dim = states.shape
    groups = states.detach().reshape(batch, -1, repeats, num_tokens, dim)
    return torch.equal(groups, groups[:, :, :1].expand_as(groups))
