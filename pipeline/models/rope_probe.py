"""Finding out how a layer rotates its keys: feed its attention one row repeated over all positions, and see what undoes it.

K then varies with position through rotation alone, and the one inverse that makes it constant is the right one. Nothing is
inferred from a model's name. Knows tables and tensors; shapes and layers are the business of `probe`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvstore.spec import RopeKind, RopeSpec
from pipeline.models.attention import AttentionModule, CaptureError
from pipeline.models.rotary import RotaryTables, rotary_tables, unrotate

CONSTANT = 0.05
"""Largest drift of a constant row. Measured on all architectures of docs/architectures.md: 1e-6 in float32, 0.02 in bfloat16."""
ROTATED = 0.2
"""Smallest drift under a wrong inverse. Measured on the same: 0.9."""
WARM_UP = 8
"""First positions left out: a short causal convolution before the keys (Inkling, Zaya) sees zeros there."""
USUAL_BASE = 10_000.0
"""Base of nearly all tables of models that keep no frequencies, only the tables (GPT-J, CodeGen, RoFormer)."""


@contextlib.contextmanager
def constant_rows(modules: Iterable[AttentionModule]) -> Iterator[None]:
    """While open, these attention modules read their last input row at every position."""

    def repeat_last(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        if not isinstance(hidden, Tensor):
            raise CaptureError(f"{type(_module).__name__}: expected hidden states as its first argument or by that name")
        constant = hidden[:, -1:].expand_as(hidden).contiguous()
        # CTRL hands the same rows over three times, as queries, keys and values.
        return (
            tuple(constant if given is hidden else given for given in args),
            {name: constant if given is hidden else given for name, given in kwargs.items()},
        )

    with contextlib.ExitStack() as stack:
        for attention in modules:
            stack.callback(attention.module.register_forward_pre_hook(repeat_last, with_kwargs=True).remove)
        yield


def find_rope(where: str, states: Float[Tensor, "batch head token dim"], tables: object, model: nn.Module) -> RopeSpec | None:
    """The one rotation whose inverse makes the states of a constant row constant; None if they already are.

    Raises:
        CaptureError: no rotation does, or several do.
    """
    drifts: dict[RopeSpec | None, float] = {None: drift(states, states)}
    frequencies = _frequencies(model, tables)
    if frequencies is not None:
        inv_freq, scaling = frequencies
        own_tables = rotary_tables(tables, len(inv_freq))
        assert own_tables is not None, "frequencies were verified against these tables"
        kinds: tuple[RopeKind, ...] = ("half", "interleaved") if len(inv_freq) > 1 else ("half",)  # equal for one pair
        last = states.shape[-1] - 2 * len(inv_freq)
        for kind, start, sign in itertools.product(kinds, {0, last} if last >= 0 else (), (1, -1)):
            turning = tuple(sign * frequency for frequency in inv_freq)
            rope = RopeSpec(kind=kind, inv_freq=turning, start=start, attention_scaling=scaling)
            drifts[rope] = drift(unrotate(states, own_tables, rope), states)
    best, *others = sorted(drifts, key=drifts.__getitem__)
    if drifts[best] <= CONSTANT and all(drifts[other] >= ROTATED for other in others):
        return best
    tried = ", ".join(f"{_describe(rope)} {drift:.2g}" for rope, drift in drifts.items())
    raise CaptureError(
        f"{where}: cannot tell how keys are rotated"
        f"{'' if frequencies else ' (no rotary table of known frequencies reaches the attention module)'}; drift of "
        f"a constant row by convention: {tried}, expected one below {CONSTANT} and all others above {ROTATED}. Perhaps keys are "
        "changed after rotation (Hunyuan scales them channel by channel). kvpipe cannot take them to before rotation and back; "
        "choose another model"
    )


def drift(restored: Float[Tensor, "batch head token dim"], seen: Float[Tensor, "batch head token dim"]) -> float:
    """Largest change of any channel over positions, relative to the size of that channel as seen.

    Relative to the channel, because Qwen2's key biases make some of them a hundred times larger than others.
    """
    size = seen.float().abs().amax(dim=2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    change = (restored.float() - restored.float()[:, :, -1:]).abs()[:, :, WARM_UP:]
    return (change / size).max().item()


def _describe(rope: RopeSpec | None) -> str:
    if rope is None:
        return "none"
    backwards = " backwards" if min(rope.inv_freq) < 0 else ""
    return f"{rope.kind} from channel {rope.start}{backwards}"


def _frequencies(model: nn.Module, tables: object) -> tuple[tuple[float, ...], float] | None:
    """Frequencies and scaling that these tables are of; None if they are no tables of turning by equal steps."""
    found = rotary_tables(tables)
    if found is None:
        return None
    num_freqs = found[0].shape[-1]
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or buffer.shape != (num_freqs,):
                continue
            scaling = float(getattr(module, name.replace("inv_freq", "attention_scaling"), 1.0))
            if _tables_match(found, buffer, scaling):
                return tuple(buffer.float().tolist()), scaling
    usual = USUAL_BASE ** (-torch.arange(num_freqs, device=found[0].device) / num_freqs)
    # A model loaded in bfloat16 may have made its table of frequencies rounded to it: these are in the table.
    of_table = torch.atan2(found[1][0, 1], found[0][0, 1])
    for frequencies in (usual, of_table):
        if _tables_match(found, frequencies, 1.0):
            return tuple(frequencies.tolist()), 1.0
    return None


def _tables_match(tables: RotaryTables, inv_freq: Float[Tensor, " freq"], scaling: float) -> bool:
    cos, sin = tables
    angle = torch.arange(cos.shape[1], device=cos.device)[:, None] * inv_freq.to(cos.device, torch.float32)
    # Relative, because slow frequencies differ between ropes only in small sines; 2**-7 covers tables in bfloat16.
    return all(
        torch.allclose(seen, (expected * scaling).expand_as(seen), rtol=2**-7, atol=2e-5)
        for seen, expected in ((cos, angle.cos()), (sin, angle.sin()))
    )
