"""The table of architectures: what is captured of every causal language model class transformers has.

    python -m tests.models.architectures

builds a tiny model of every class, probes it as `kvpipe extract` does and writes `docs/architectures.md`. `test_architectures.py`
proves each row again.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import transformers

from kvstore.spec import KVSpec, RopeSpec, format_layers
from pipeline.models.attention import CaptureError, attention_modules
from pipeline.models.probe import probe_causal, probe_kv_spec
from tests.models.zoo import MODEL_TYPES, zoo_config, zoo_model

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
EXACT, RAW_ONLY, REFUSED, NOT_BUILT = "captured exactly", "captured raw only", "refused", "not built here"

REASONS = {
    "is an encoder-decoder model": "encoder-decoder: keys and values are not causal",
    "has no attention layer with keys and values": "hands no keys and values to a cache",
    "attention is not causal": "attends to later tokens",
    "values are rotated as keys are": "values are rotated as keys are",
    "ran twice in one forward": "several stacks count their layers from 0, so a layer has no one K and V",
    "cannot tell how keys are rotated": "keys are scaled channel by channel after rotation, so there is no rotation to undo",
    "The set of layer types producing a cache": "every layer reads the keys of another model (transformers does not build it alone)",
    "requires the timm library": "needs the timm package",
}
"""What a message of ours or of transformers says, in words for the table; the numbers in a message depend on the machine."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    class_name: str
    model_type: str
    status: str
    layers: str
    """Layers with keys and values of their own, of how many there are."""
    geometry: str
    rotation: str
    notes: str

    def cells(self) -> tuple[str, ...]:
        return dataclasses.astuple(self)


@functools.lru_cache(maxsize=2)
def measured(model_type: str) -> tuple[Row, Any, KVSpec | None]:
    """The row of a model type, and what was built for it: the model and its spec, if there are."""
    build = functools.partial(Row, class_name=MODEL_TYPES[model_type], model_type=model_type)
    nothing = {"layers": "", "geometry": "", "rotation": ""}
    model = None
    try:
        config = zoo_config(model_type)
        if config.is_encoder_decoder:
            raise CaptureError(f"{model_type} is an encoder-decoder model")
        model = zoo_model(model_type)
        probe_causal(model)
        spec = probe_kv_spec(model)
    except ImportError as error:
        return build(status=NOT_BUILT, notes=_reason(error), **nothing), model, None
    except ValueError as error:
        return build(status=REFUSED, notes=_reason(error), **nothing), model, None
    text = model.config.get_text_config()
    row = build(
        status=RAW_ONLY if any(layer.latent for layer in spec.layers) else EXACT,
        layers=f"{format_layers(spec.layer_numbers)} of {_of_decoder(text, 'layers', 'num_hidden_layers')}",
        geometry=_geometry(spec, _of_decoder(text, "attention_heads", "num_attention_heads")),
        rotation=_rotation(spec),
        notes=_notes(model, text),
    )
    return row, model, spec


def _reason(error: Exception) -> str:
    for pattern, reason in REASONS.items():
        if re.search(pattern, str(error)):
            return reason
    raise AssertionError(f"no reason for the table in: {error}") from error


def _of_decoder(text: Any, what: str, otherwise: str) -> int:
    names = (f"decoder_{what}", f"num_decoder_{what}", otherwise)
    return next(int(getattr(text, name)) for name in names if hasattr(text, name))


def _geometry(spec: KVSpec, num_heads: int) -> str:
    kinds = {}
    for layer in spec.layers:
        if layer.latent:
            kinds[f"latent {layer.key_dim} + {layer.value_dim}"] = None
        else:
            dims = str(layer.key_dim) if layer.key_dim == layer.value_dim else f"{layer.key_dim}/{layer.value_dim}"
            kinds[f"{layer.num_kv_heads} of {num_heads} x {dims}"] = None
    return ", ".join(kinds)


def _rotation(spec: KVSpec) -> str:
    kinds: dict[str, None] = {}
    for layer in spec.layers:
        rope = spec.rope_of(layer.layer)
        kinds[_describe(rope, layer.value_dim if layer.latent else layer.key_dim)] = None
    text = ", ".join(kinds)
    return f"{text}; {len(spec.ropes)} tables" if len(spec.ropes) > 1 else text


def _describe(rope: RopeSpec | None, dim: int) -> str:
    if rope is None:
        return "none"
    turning = 2 * sum(frequency != 0 for frequency in rope.inv_freq)
    part = "" if turning == dim else f" {turning} of {dim}"
    return f"{rope.kind}{part}{' backwards' if min(rope.inv_freq) < 0 else ''}"


def _notes(model: Any, text: Any) -> str:
    notes = []
    if getattr(type(text), "is_decoder", None) is not None and "is_decoder" in type(text).__dataclass_fields__:
        notes.append("as a decoder (`is_decoder`)")
    if any(getattr(attention.module, "sliding_window", None) for attention in attention_modules(model)):
        notes.append("sliding window")
    if getattr(text, "num_kv_shared_layers", 0):
        notes.append("later layers share keys and values")
    elif any(kind in ("linear_attention", "conv") for kind in getattr(text, "layer_types", None) or ()):
        notes.append("linear layers between")
    if any("expert" in name for name, _ in model.named_modules()):
        notes.append("experts")
    return ", ".join(notes)


def table(rows: list[Row]) -> str:
    """The document of these rows."""
    counts = Counter(row.status for row in rows)
    lines = [
        "# Architectures",
        "",
        f"What kvpipe captures of the {len(rows)} model types that transformers {transformers.__version__} has a causal language model",
        "for, measured on tiny models with random weights by `python -m tests.models.architectures`, and proved again by the tests.",
        "",
        f"- **{EXACT}** ({counts[EXACT]}): keys and values as attention uses them, keys also as they were before rotation.",
        f"- **{RAW_ONLY}** ({counts[RAW_ONLY]}): latent attention; what is stored is the latent (as keys) and the rotary key all",
        "  heads share (as values). No map to a student's heads is known, so `--student` is refused.",
        f"- **{REFUSED}** ({counts[REFUSED]}): extraction stops before anything is written and says why.",
        f"- **{NOT_BUILT}** ({counts[NOT_BUILT]}): the class needs a package kvpipe does not install.",
        "",
        "Layers: those with keys and values of their own, of how many the config counts. Heads and dims: KV heads of query heads, times",
        "channels (key/value where they differ). Rotation: which channels turn together, how many of how many; `none` for learned",
        "positions, ALiBi and layers without positions. Sizes are those of the tiny models and only show which kinds there are.",
        "",
        "| class | model type | status | layers | heads x dims | rotation | notes |",
        "|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(row.cells())} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def rows_of(document: str) -> dict[str, Row]:
    """The rows a table has, by model type: what `table` wrote, read back."""
    rows = {}
    for line in document.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[1] in MODEL_TYPES:
            rows[cells[1]] = Row(**dict(zip((field.name for field in dataclasses.fields(Row)), cells, strict=True)))
    return rows


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    DOCUMENT.write_text(table([measured(model_type)[0] for model_type in sorted(MODEL_TYPES)]), encoding="utf-8")


if __name__ == "__main__":
    main()
