"""Learned maps from a student's keys and values to a teacher's: trained beside the student, thrown away with the loss.

The target stays as it is, so the loss cannot be won by collapsing it, as a map on the teacher's side would. A free map may take
over work the student should do; a semi-orthogonal one can only turn (VkD, arXiv 2403.06213). No bias: a mean is content here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pipeline.align import Alignment
from training.targets import KeyValue

Adapter = Literal["none", "orthogonal", "linear"]
ADAPTERS = "kv_adapters"
"""Under which attribute a student carries its adapters while it is trained; so they are in the optimizer and in checkpoints."""


class KVAdapters(nn.Module):
    """For each compared layer two matrices, of keys and of values, from all student heads to all heads of what is stored.

    They start as the fixed map between the two geometries; `orthogonal` as the scaled semi-orthogonal matrix nearest to it, a scale
    that stays.
    """

    def __init__(self, alignment: Alignment, kind: Literal["orthogonal", "linear"]) -> None:
        super().__init__()
        self._pairs = alignment.layer_map
        self._heads = [_stored_heads(alignment, teacher) for _, teacher in self._pairs]
        self.key, self.value = nn.ModuleList(), nn.ModuleList()
        for student, _ in self._pairs:
            for modules, start in zip((self.key, self.value), _fixed_maps(alignment, student), strict=True):
                modules.append(_Scaled(start) if kind == "orthogonal" else _linear(start))

    def forward(self, student: Sequence[KeyValue]) -> list[KeyValue]:
        """Bring `[row, kv_head, dim]` of each compared layer to the stored geometry, in float32."""
        adapted = []
        for key_map, value_map, heads, (key, value) in zip(self.key, self.value, self._heads, student, strict=True):
            with torch.autocast(key.device.type, enabled=False):
                adapted.append(
                    tuple(
                        linear(side.float().flatten(1)).unflatten(1, (heads, -1))
                        for linear, side in ((key_map, key), (value_map, value))
                    )
                )
        return adapted

    def untouched(self) -> Tensor:
        """A zero that depends on every parameter: ranks wait for a gradient of each, also where a step has no KV loss."""
        return sum((parameter.sum() for parameter in self.parameters()), torch.zeros(())) * 0.0


class _Scaled(nn.Module):
    """A semi-orthogonal matrix times a number."""

    scale: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        left, sizes, right = torch.linalg.svd(start, full_matrices=False)
        self.register_buffer("scale", sizes.mean())
        with torch.random.fork_rng(devices=[]):
            # A basis is filled up at random: the same on every rank, and the run's own numbers are left alone.
            torch.manual_seed(0)
            # Cayley's map, for torch's default for uneven matrices takes one step per column.
            self.linear = parametrizations.orthogonal(_linear(left @ right), orthogonal_map="cayley")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) * self.scale
        return out


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone())
    return linear


def _stored_heads(alignment: Alignment, teacher_layer: int) -> int:
    spec = alignment.stored_spec() if alignment.baked else alignment.teacher
    return spec.layer(teacher_layer).num_kv_heads


def _fixed_maps(alignment: Alignment, student_layer: int) -> list[Tensor]:
    """The map of `Alignment.project_student`, or the identity for a baked store, as matrices [stored numbers, student's]."""
    heads, key_dim, value_dim = alignment.student.layer(student_layer).geometry
    if alignment.baked:
        return [torch.eye(heads * dim) for dim in (key_dim, value_dim)]
    num_key, num_value = heads * key_dim, heads * value_dim
    basis_rows = max(num_key, num_value)
    key = torch.eye(basis_rows, num_key).reshape(basis_rows, heads, key_dim)
    value = torch.eye(basis_rows, num_value).reshape(basis_rows, heads, value_dim)
    projected = alignment.project_student(student_layer, key, value)
    return [side.flatten(1)[:rows].T.contiguous() for side, rows in zip(projected, (num_key, num_value), strict=True)]
