"""Every pair of twelve published geometries, end to end: project, resample, compare; forward and backward.

Heads, dims and rotations are the published ones; few tokens and the last layer stand for the rest, for layers of one model are alike.

Suffixes: T token, H heads, D channels.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from pipeline.align import KVProjector, resample_kv_with_interpolation
from pipeline.align.heads import Channels, head_map, key_channels, spread_channels
from pipeline.align.time import linear_positions
from tests.align.geometries import DOCUMENT, NAMES, alignment, model_rows, preset, table
from training.losses import kv_errors

NUM_TOKENS, NUM_RESAMPLED = 7, 5
TURNING = [name for name in NAMES if preset(name).geometry.rope_theta is not None]
"""A `KVProjector` takes both sides to rotate."""


def test_the_document_is_what_the_presets_say() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == table(), "run python -m tests.align.geometries"
    readme = (DOCUMENT.parents[1] / "README.md").read_text(encoding="utf-8").splitlines()
    assert set(model_rows()) <= set(readme)


def dense(x_THD: torch.Tensor, num_heads: int, channels: Channels, num_tokens: int) -> torch.Tensor:
    """Heads, channels and time as three matrices, in float64."""
    select = torch.zeros(len(channels), x_THD.shape[-1], dtype=torch.float64)
    for target, source in enumerate(channels):
        if source is not None:
            select[target, source] = 1.0
    time = torch.zeros(num_tokens, len(x_THD), dtype=torch.float64)
    whole, remainder = linear_positions(len(x_THD), num_tokens)
    for token in range(num_tokens):
        share = float(remainder[token]) / max(num_tokens - 1, 1)
        time[token, whole[token]] += 1 - share
        if share:
            time[token, whole[token] + 1] += share
    return head_map(x_THD.shape[1], num_heads) @ torch.tensordot(time, x_THD.double(), dims=1) @ select.T


@pytest.mark.parametrize("student", NAMES)
@pytest.mark.parametrize("teacher", NAMES)
def test_every_pair_is_projected_resampled_and_compared(teacher: str, student: str) -> None:
    planned = alignment(teacher, student)
    layer = planned.teacher_layers[-1]
    theirs, ours = planned.teacher.layer(layer), planned.student.layers[-1]
    ropes = planned.teacher.rope_of(layer), planned.student.rope_of(ours.layer)
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(NUM_TOKENS, theirs.num_kv_heads, theirs.key_dim, generator=generator) for _ in range(2))
    projected = planned.project(layer, key, value)
    if theirs.geometry == ours.geometry and ropes[0] == ropes[1]:
        assert projected[0] is key
        assert projected[1] is value

    def resample(side: torch.Tensor) -> torch.Tensor:
        return resample_kv_with_interpolation(side.transpose(0, 1)[None], NUM_RESAMPLED)[0].transpose(0, 1)

    resampled = resample(projected[0]), resample(projected[1])
    channels = key_channels(theirs.key_dim, ours.key_dim, *ropes), spread_channels(theirs.value_dim, ours.value_dim)
    targets = [dense(x, ours.num_kv_heads, chosen, NUM_RESAMPLED) for x, chosen in zip((key, value), channels, strict=True)]
    for found, expected in zip(resampled, targets, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)

    shape = (NUM_RESAMPLED, ours.num_kv_heads, ours.key_dim)
    student_kv = (
        torch.randn(shape, generator=generator).requires_grad_(),
        torch.randn(shape, generator=generator).requires_grad_(),
    )
    errors = kv_errors([student_kv], [resampled], torch.ones(1, 2), NUM_RESAMPLED)
    errors.mean().backward()
    for kind, (side, target) in enumerate(zip(student_kv, targets, strict=True)):
        difference = side.detach().double() - target
        assert side.grad is not None
        assert errors[0, kind].item() == pytest.approx(difference.square().mean().item(), rel=1e-5)
        torch.testing.assert_close(side.grad.double(), difference / difference.numel(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("teacher", "student"), list(itertools.permutations(NAMES[:4] + NAMES[-3:], 2)))
def test_where_the_student_is_larger_it_is_pooled_and_only_counterparts_are_compared(teacher: str, student: str) -> None:
    planned = alignment(teacher, student)
    layer = planned.teacher_layers[-1]
    theirs, ours = planned.teacher.layer(layer), planned.student.layers[-1]
    comparison = planned.comparison(layer)
    smaller = min(theirs, ours, key=lambda side: side.num_kv_heads * side.key_dim)
    side = planned.student.layers[-1] if comparison.side == "student" else theirs
    assert side.num_kv_heads * side.key_dim == smaller.num_kv_heads * smaller.key_dim
    assert len(comparison.key_kept) == side.key_dim
    assert any(comparison.key_kept)


@pytest.mark.parametrize(("teacher", "student"), list(itertools.product(TURNING[::3], TURNING[1::3])))
def test_the_quick_fix_projector_does_the_same(teacher: str, student: str) -> None:
    planned = alignment(teacher, student)
    layer = planned.teacher_layers[-1]
    theirs, ours = planned.teacher.layer(layer), planned.student.layers[-1]
    projector = KVProjector(
        theirs.num_kv_heads,
        ours.num_kv_heads,
        theirs.key_dim,
        ours.key_dim,
        teacher_rope=planned.teacher.rope_of(layer),
        student_rope=planned.student.rope_of(ours.layer),
    )
    key, value = (torch.randn(1, theirs.num_kv_heads, NUM_TOKENS, theirs.key_dim) for _ in range(2))
    expected = planned.project(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    for found, side in zip(projector(key, value), expected, strict=True):
        torch.testing.assert_close(found[0].transpose(0, 1), side)
