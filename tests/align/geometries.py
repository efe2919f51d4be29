"""The table of geometries: published models between which every pair is aligned.

    python -m tests.align.geometries

writes `docs/geometries.md` from the presets of `configs/teachers`. `test_geometries.py` takes every pair of them through projection,
resampling and a loss.
"""

from __future__ import annotations

import functools
from pathlib import Path

from pipeline.align import Alignment
from pipeline.models.presets import TeacherPreset, teacher_preset
from pipeline.planning.published import published_spec

DOCUMENT = Path(__file__).parents[2] / "docs" / "geometries.md"
NAMES = (
    "qwen2-7b",
    "qwen2-1.5b",
    "qwen2-0.5b",
    "qwen3-8b",
    "llama-2-7b",
    "llama-2-70b",
    "llama-3.1-8b",
    "tinyllama-1.1b",
    "mistral-7b",
    "gpt2",
    "gemma-2-2b",
    "falcon-7b",
)


@functools.cache
def preset(name: str) -> TeacherPreset:
    found = teacher_preset(name)
    assert found is not None, name
    return found


@functools.cache
def alignment(teacher: str, student: str) -> Alignment:
    """All student layers, as published."""
    return Alignment.plan(*(published_spec(preset(name).geometry, "bfloat16") for name in (teacher, student)))


def cell(teacher: str, student: str) -> str:
    """What happens to heads and to key channels from one to the other, in few signs."""
    planned = alignment(teacher, student)
    layer = planned.teacher_layers[-1]
    theirs, ours = planned.teacher.layer(layer), planned.student.layers[-1]
    comparison = planned.comparison(layer)
    signs = []
    if theirs.num_kv_heads != ours.num_kv_heads:
        signs.append(f"{theirs.num_kv_heads}→{ours.num_kv_heads}")
    if theirs.key_dim != ours.key_dim:
        signs.append(f"d {theirs.key_dim}→{ours.key_dim}")
    elif planned.teacher.rope_of(layer) != planned.student.rope_of(ours.layer):
        signs.append("θ")
    if not all(comparison.key_kept):
        signs.append(f"({sum(comparison.key_kept)} compared)")
    if comparison.side == "teacher":
        signs.append("↑")
    return " ".join(signs) or "="


def model_rows() -> list[str]:
    """One line for each model."""
    rows = []
    for name in NAMES:
        geometry = preset(name).geometry
        spec = published_spec(geometry, "bfloat16")
        rotation = "none (learned positions)" if geometry.rope_theta is None else f"{geometry.rope_theta:,.0f}"
        cells = (
            f"[{name}]({preset(name).source})",
            str(geometry.num_layers),
            f"{geometry.num_heads}/{geometry.num_kv_heads}",
            str(geometry.head_dim),
            rotation,
            f"{spec.values_per_token * 2:,}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def table() -> str:
    """The document."""
    lines = [
        "# Geometries",
        "",
        "Twelve published models, and what happens between every two of them; written by `python -m tests.align.geometries` from the",
        "presets in `configs/teachers`, and proved by `tests/align/test_geometries.py`: all 144 pairs go through projection, resampling to",
        "another length and a mean squared error, forward and backward, against the maps written out in float64.",
        "",
        "| model | layers | query/KV heads | head dim | rotary base | bytes of KV per token, bf16 |",
        "|---|---|---|---|---|---|",
        *model_rows(),
        "",
        "Rows are teachers, columns students. `4→2` are KV heads, averaged by equal shares or repeated; `d 128→64` are channels, of keys",
        "chosen by rotary frequency; `θ`: as many channels, of other frequencies, so each pair of key channels takes the one nearest in",
        "frequency; `=` is the very same tensor. `↑`: the student has more numbers per token, so it is pooled to the teacher's geometry",
        "and no target is inflated. In brackets: channels of a head that have a counterpart, where that is not all; the others stay out",
        "of the loss.",
        "",
        f"| teacher \\ student | {' | '.join(NAMES)} |",
        f"|---|{'---|' * len(NAMES)}",
        *(f"| {teacher} | {' | '.join(cell(teacher, student) for student in NAMES)} |" for teacher in NAMES),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(table(), encoding="utf-8")
