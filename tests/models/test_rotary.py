"""Undoing and redoing a rotation, whatever form the model's tables have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvstore.spec import RopeKind, RopeSpec
from pipeline.models.rotary import Layouts, rotary_tables, rotate, unrotate

FREQUENCIES = (1.0, 0.3, 0.1, 0.01)
ANGLES = torch.arange(7.0)[None, :, None] * torch.tensor(FREQUENCIES)


def form(layout: str) -> object:
    cos, sin = ANGLES.cos(), ANGLES.sin()
    if layout == "blocks":
        return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    if layout == "pairs":
        return [cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)]
    return torch.complex(cos, sin) if layout == "complex" else (cos, sin)


@pytest.mark.parametrize("num_freqs", [None, 4])
@pytest.mark.parametrize("layout", ["blocks", "pairs", "single", "complex"])
def test_tables_of_every_form_come_out_the_same(layout: str, num_freqs: int | None) -> None:
    tables = rotary_tables(form(layout), num_freqs)
    assert tables is not None
    assert torch.equal(tables[0], ANGLES.cos())
    assert torch.equal(tables[1], ANGLES.sin())


@pytest.mark.parametrize("layout", ["blocks", "pairs", "single", "complex"])
def test_a_single_first_position_has_as_many_frequencies_as_asked_for(layout: str) -> None:
    whole = form(layout)
    first = whole[:, :1] if isinstance(whole, Tensor) else tuple(table[:, :1] for table in whole)
    tables = rotary_tables(first, 4)
    assert tables is not None
    assert tables[0].shape == tables[1].shape == (1, 1, 4)


@pytest.mark.parametrize("layout", ["blocks", "pairs"])
def test_a_layout_is_remembered_once_there_is_no_doubt(layout: str) -> None:
    whole = form(layout)
    assert isinstance(whole, (tuple, list))
    layouts: Layouts = {}
    rotary_tables([table[:, :1] for table in whole], 4, layouts)
    assert not layouts, "at position 0 all frequencies look alike"
    rotary_tables(whole, 4, layouts)
    assert len(layouts) == 1
    last = rotary_tables([torch.randn(1, 1, 8) for _ in whole], 4, layouts)
    assert last is not None, "what is known is not looked for again"
    again = rotary_tables(whole, 4, layouts)
    assert again is not None
    assert torch.equal(again[0], ANGLES.cos())


@pytest.mark.parametrize(
    "embeddings",
    [
        pytest.param(None, id="none"),
        pytest.param(torch.zeros(1, 7, 8), id="one-real-tensor"),
        pytest.param((torch.zeros(7, 8), torch.zeros(7, 8)), id="no-batch"),
        pytest.param((torch.zeros(1, 7, 8), torch.zeros(1, 7, 4)), id="unequal"),
        pytest.param((torch.zeros(1, 7, 6), torch.zeros(1, 7, 6)), id="other-number"),
    ],
)
def test_what_is_no_table_of_these_frequencies_is_none(embeddings: object) -> None:
    assert rotary_tables(embeddings, 4) is None


@pytest.mark.parametrize("scaling", [1.0, 1.35])
@pytest.mark.parametrize(
    ("kind", "start", "pairs"),
    [
        pytest.param("half", 0, [(0, 4), (1, 5), (2, 6), (3, 7)], id="half"),
        pytest.param("interleaved", 0, [(0, 1), (2, 3), (4, 5), (6, 7)], id="interleaved"),
        pytest.param("half", 4, [(4, 8), (5, 9), (6, 10), (7, 11)], id="half-at-the-end"),
        pytest.param("interleaved", 2, [(2, 3), (4, 5), (6, 7), (8, 9)], id="interleaved-in-the-middle"),
    ],
)
def test_rotate_is_the_rotation_written_out_and_unrotate_its_inverse(
    kind: RopeKind, start: int, pairs: list[tuple[int, int]], scaling: float
) -> None:
    key = torch.randn(2, 3, 7, 12, generator=torch.Generator().manual_seed(0))
    rotated = key.clone()
    for frequency, (first, second) in enumerate(pairs):
        angle = ANGLES[0, :, frequency]
        rotated[..., first] = scaling * (key[..., first] * angle.cos() - key[..., second] * angle.sin())
        rotated[..., second] = scaling * (key[..., second] * angle.cos() + key[..., first] * angle.sin())
    rope = RopeSpec(kind=kind, inv_freq=FREQUENCIES, start=start, attention_scaling=scaling)
    tables = ANGLES.cos() * scaling, ANGLES.sin() * scaling
    torch.testing.assert_close(unrotate(rotated, tables, rope), key, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rotate(key, tables, rope), rotated, rtol=1e-5, atol=1e-6)
    coarse = key.bfloat16()
    assert unrotate(coarse, tables, rope).dtype == torch.bfloat16
    assert torch.equal(rotate(coarse, tables, rope), rotate(coarse.float(), tables, rope).bfloat16()), "rounded once"
