"""Learned maps on the student's side."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import torch

from pipeline.align import Alignment
from tests.align.cases import uniform_spec
from training.adapters import ADAPTERS, KVAdapters
from training.distill import KVDistillTrainer

GEOMETRIES = [((4, 16), (2, 16)), ((2, 8), (4, 8)), ((4, 16), (2, 8)), ((6, 8), (4, 8)), ((3, 8), (3, 8))]
KINDS: tuple[Literal["orthogonal", "linear"], ...] = ("orthogonal", "linear")


def plan(teacher: tuple[int, int], student: tuple[int, int]) -> Alignment:
    return Alignment.plan(uniform_spec(6, *teacher), uniform_spec(3, *student), student_layers=[1, 2])


def draw(alignment: Alignment, rows: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    heads, key_dim, value_dim = alignment.student.layers[0].geometry
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(rows, heads, key_dim, generator=generator), torch.randn(rows, heads, value_dim, generator=generator))
        for _ in alignment.layer_map
    ]


@pytest.mark.parametrize(("teacher", "student"), GEOMETRIES)
def test_a_free_adapter_starts_as_the_fixed_map(teacher: tuple[int, int], student: tuple[int, int]) -> None:
    alignment = plan(teacher, student)
    kv = draw(alignment)
    for (layer, _), ours, found in zip(alignment.layer_map, kv, KVAdapters(alignment, "linear")(kv), strict=True):
        for side, expected in zip(found, alignment.project_student(layer, *ours), strict=True):
            torch.testing.assert_close(side, expected)


@pytest.mark.parametrize(("teacher", "student"), GEOMETRIES)
def test_a_turning_adapter_starts_near_it_and_stays_semi_orthogonal_while_it_learns(
    teacher: tuple[int, int], student: tuple[int, int]
) -> None:
    alignment = plan(teacher, student)
    adapters, kv = KVAdapters(alignment, "orthogonal"), draw(alignment)
    if teacher[1] == student[1] and (teacher[0] % student[0] == 0 or student[0] % teacher[0] == 0):
        expected = alignment.project_student(1, *kv[0])  # a mean or repeat of whole heads is semi-orthogonal but for its length
        torch.testing.assert_close(adapters(kv)[0][0], expected[0], rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=0.05, weight_decay=0.0)
    losses = []
    for _ in range(20):
        loss = torch.stack([(side - 1.0).square().mean() for pair in adapters(kv) for side in pair]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for module in (*adapters.key, *adapters.value):
        weight = module.linear.weight
        short = min(weight.shape)
        gram = weight @ weight.T if weight.shape[0] == short else weight.T @ weight
        torch.testing.assert_close(gram, torch.eye(short), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_baked_store_is_met_in_its_own_geometry(kind: Literal["orthogonal", "linear"]) -> None:
    alignment = dataclasses.replace(plan((4, 16), (2, 8)), baked=True)
    kv = draw(alignment)
    for ours, found in zip(kv, KVAdapters(alignment, kind)(kv), strict=True):
        for side, expected in zip(found, ours, strict=True):
            torch.testing.assert_close(side, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_making_adapters_uses_no_random_numbers_of_the_run_and_is_the_same_everywhere(
    kind: Literal["orthogonal", "linear"],
) -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        states.append(KVAdapters(plan((4, 16), (2, 8)), kind).state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_step_without_a_kv_loss_still_reaches_every_parameter() -> None:
    adapters = KVAdapters(plan((4, 16), (2, 8)), "orthogonal")
    adapters.untouched().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in adapters.parameters())


def test_weight_decay_is_for_the_student_alone() -> None:
    model = torch.nn.Module()
    model.head = torch.nn.Linear(4, 4)
    model.add_module(ADAPTERS, KVAdapters(plan((4, 16), (2, 8)), "linear"))
    trainer = KVDistillTrainer.__new__(KVDistillTrainer)
    assert trainer.get_decay_parameter_names(model) == ["head.weight"]
