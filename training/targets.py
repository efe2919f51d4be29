"""What a student's keys and values are compared with: which stored layers, in whose geometry, in units of which variance.

Knows the store and the alignment; neither models nor the trainer.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from kvstore.spec import KVSpec, RopeSpec, format_layers, parse_layers
from pipeline.align import Alignment
from training.loader import KVDataset
from training.mixture import Readable
from training.sampler import SampleBatch

VARIANCE_TOKENS = 32_768
"""Tokens the variances are measured on: a scalar per layer is then known to well under a percent."""
_READ_TOKENS = 4_096

KeyValue = tuple[Float[Tensor, "row _ _"], Float[Tensor, "row _ _"]]
"""Keys and values of one layer, `[row, kv_head, dim]`."""


def plan_alignment(store: Readable, student: KVSpec, *, layer_map: str, layers: str) -> Alignment:
    """Map a student's layers to what the store holds: the store's own map where it was made for this student, else a new one.

    Args:
        layers: student layers to compare, 'all' or a list (`kvstore.spec.parse_layers`).

    Raises:
        ValueError: the store is baked for a student of another geometry, or the map or a layer does not exist.
    """
    recorded = None if store.manifest.alignment is None else Alignment.from_json(store.manifest.alignment)
    if recorded is not None and recorded.baked and not _equal_geometry(recorded.student, student):
        raise ValueError(
            f"student: got {_describe(student)}, but the store is baked for {_describe(recorded.student)} ({store.location}). "
            "Train a student of that geometry, or extract a raw store, which serves any: leave out --student there."
        )
    if (
        recorded is not None
        and _equal_geometry(recorded.student, student)
        and (recorded.baked or recorded.layer_map_name == layer_map)
    ):
        wanted = parse_layers(layers, [mapped for mapped, _ in recorded.layer_map])
        return dataclasses.replace(recorded, layer_map=tuple(pair for pair in recorded.layer_map if pair[0] in wanted))
    planned = Alignment.plan(
        store.manifest.teacher, student, layer_map=layer_map, student_layers=parse_layers(layers, student.layer_numbers)
    )
    stored = tuple(pair for pair in planned.layer_map if pair[1] in store.spec.layer_numbers)
    if not stored:
        pairs = ", ".join(f"{mapped}<-{teacher}" for mapped, teacher in planned.layer_map)
        raise ValueError(
            f"layer_map: {layer_map} wants student<-teacher layers {pairs}, but the store holds teacher layers "
            f"{format_layers(store.spec.layer_numbers)} ({store.location}). Choose another with --set layer_map=..., or extract those layers."
        )
    return dataclasses.replace(planned, layer_map=stored)


def _equal_geometry(one: KVSpec, other: KVSpec) -> bool:
    """Whether two specs agree in all but dtype and the last bits of frequencies, which each machine computes."""
    return (
        one.key_domain == other.key_domain
        and one.layer_numbers == other.layer_numbers
        and all(ours.geometry == theirs.geometry for ours, theirs in zip(one.layers, other.layers, strict=True))
        and all(_equal_rope(one.rope_of(layer), other.rope_of(layer)) for layer in one.layer_numbers)
    )


def _equal_rope(one: RopeSpec | None, other: RopeSpec | None) -> bool:
    if one is None or other is None:
        return one is other
    return (one.kind, one.start, one.rotary_dim) == (other.kind, other.start, other.rotary_dim) and np.allclose(
        one.inv_freq, other.inv_freq, rtol=1e-4, atol=0.0
    )


def _describe(spec: KVSpec) -> str:
    """Geometry of a model in few words, layers of equal shape together."""
    runs = itertools.groupby(spec.layers, key=lambda layer: layer.geometry)
    shapes = [
        f"{len(list(run))} layers of {heads} KV heads, key_dim {key_dim}, value_dim {value_dim}"
        for (heads, key_dim, value_dim), run in runs
    ]
    return f"{', '.join(shapes)} ({spec.key_domain})"


class KVTargets:
    """Brings both sides of every compared layer to the smaller of the two geometries, so that no target is inflated."""

    def __init__(self, alignment: Alignment, *, as_they_are: bool = False) -> None:
        """Plan the comparison.

        Args:
            as_they_are: leave both sides in their own geometry: for learned adapters, and for a loss that needs no common one.
        """
        self.alignment = alignment
        self._as_they_are = as_they_are
        self.pairs = alignment.layer_map
        """(student layer, teacher layer) of each compared layer."""
        self._comparison = {teacher: alignment.comparison(teacher) for teacher in alignment.teacher_layers}

    @property
    def student_layers(self) -> tuple[int, ...]:
        return tuple(student for student, _ in self.pairs)

    def teacher_side(self, teacher: Mapping[int, KeyValue]) -> list[KeyValue]:
        """The target of each compared layer, from the stored keys and values of the teacher's layers."""
        sides = {layer: self._teacher_layer(layer, *teacher[layer]) for layer in self._comparison}
        return [sides[layer] for _, layer in self.pairs]

    def student_side(self, student: Mapping[int, KeyValue]) -> list[KeyValue]:
        """What is compared with it, with gradients, from the student's own keys and values."""
        return [self._student_layer(layer, teacher, *student[layer]) for layer, teacher in self.pairs]

    def _teacher_layer(self, layer: int, key: Tensor, value: Tensor) -> KeyValue:
        if self._as_they_are:
            return key, value
        if self._comparison[layer].side == "student" and not self.alignment.baked:
            key, value = self.alignment.project(layer, key, value)
        return self._kept(layer, key, value)

    def _student_layer(self, layer: int, teacher_layer: int, key: Tensor, value: Tensor) -> KeyValue:
        if self._as_they_are:
            return key, value
        if self._comparison[teacher_layer].side == "teacher":
            key, value = self.alignment.project_student(layer, key, value)
        return self._kept(teacher_layer, key, value)

    def _kept(self, teacher_layer: int, key: Tensor, value: Tensor) -> KeyValue:
        """Only the channels that have a counterpart on the other side."""
        comparison = self._comparison[teacher_layer]
        return _select_channels(key, comparison.key_kept), _select_channels(value, comparison.value_kept)


def _select_channels(values: Tensor, kept: Sequence[bool]) -> Tensor:
    return values if all(kept) else values[..., [channel for channel, keep in enumerate(kept) if keep]]


def unstack(
    blocks: Sequence[Sequence[int]], arrays: Sequence[tuple[Float[Tensor, "layer _ _ _"], Float[Tensor, "layer _ _ _"]]]
) -> dict[int, KeyValue]:
    """Name the layers of what the loader read block by block."""
    return {
        layer: (keys[slot], values[slot])
        for block, (keys, values) in zip(blocks, arrays, strict=True)
        for slot, layer in enumerate(block)
    }


def measure_variances(
    store: Readable, targets: KVTargets, *, sink_tokens: int, num_tokens: int = VARIANCE_TOKENS
) -> Float64[np.ndarray, "layer 2"]:
    """Mean over channels of the variance about the channel's mean, of every layer's target keys and values.

    Measured on the store's first samples, weighted by their counts, on tokens to be learnt from without the sinks: a pure function
    of store, map and `sink_tokens`.

    Raises:
        ValueError: a target does not vary, so no distance to it can be scaled.
    """
    dataset = KVDataset(store, targets.alignment.teacher_layers)
    sums = [[_ChannelSums(), _ChannelSums()] for _ in targets.pairs]
    for samples in _first_samples(store.samples.num_tokens, store.count_compared(sink_tokens), num_tokens):
        request = SampleBatch(samples, step=0, num_predicted=0, targets=samples, num_targets=0, num_computed=0)
        read = dataset.__getitems__(request)
        starts = read.tokens.cu_seqlens
        compared = read.tokens.compared
        keep = np.concatenate([np.arange(first + sink_tokens, last) for first, last in itertools.pairwise(starts)])
        keep = keep[compared[keep]]
        weights = np.repeat(store.samples.count[samples], np.diff(starts))[keep]
        blocks = [(torch.from_numpy(block.key[:, keep]), torch.from_numpy(block.value[:, keep])) for block in read.targets]
        for layer, pair in enumerate(targets.teacher_side(unstack(dataset.blocks, blocks))):
            for kind, values in enumerate(pair):
                sums[layer][kind].add(values.numpy(), weights)
    variances = np.array([[kind.variance() for kind in layer] for layer in sums])
    for (student, teacher), row in zip(targets.pairs, variances, strict=True):
        if not (np.isfinite(row) & (row > 0)).all():
            raise ValueError(
                f"variance of targets: got {row.tolist()} (key, value) for student layer {student}, teacher layer {teacher} "
                f"({store.location}), expected above 0. Leave the layer out with --set layers=..., or lower "
                f"--set sink_tokens={sink_tokens}."
            )
    return variances


def _first_samples(lengths: np.ndarray, compared: np.ndarray, num_tokens: int) -> list[list[int]]:
    """The first samples that have so many compared tokens together, in groups small enough to be read at once."""
    groups: list[list[int]] = []
    total = filled = 0
    for sample, length in enumerate(lengths):
        if compared[sample] == 0:
            continue
        if not groups or filled >= _READ_TOKENS:
            groups.append([])
            filled = 0
        groups[-1].append(sample)
        filled += int(length)
        total += int(compared[sample])
        if total >= num_tokens:
            break
    return groups


class _ChannelSums:
    """Weighted first and second moments of every channel, in float64 about the first row, so that a loud mean costs no digits."""

    def __init__(self) -> None:
        self._origin: np.ndarray | None = None
        self._count = 0
        self._sum: np.ndarray | float = 0.0
        self._squares: np.ndarray | float = 0.0

    def add(self, values: Float[np.ndarray, "row kv_head dim"], weights: Int[np.ndarray, "row"]) -> None:
        if len(values) == 0:
            return
        if self._origin is None:
            self._origin = values[0].astype(np.float64)
        centred, weight = values - self._origin, weights[:, None, None]
        self._count += int(weights.sum())
        self._sum = self._sum + (weight * centred).sum(axis=0)
        self._squares = self._squares + (weight * np.square(centred)).sum(axis=0)

    def variance(self) -> float:
        """Mean over channels; 0 for nothing."""
        count = max(self._count, 1)
        return float(np.mean(self._squares / count - np.square(self._sum / count)))
