"""The noun Alignment: a frozen map from a teacher's KVSpec to a student's.

A record of plain values that lies in a manifest and crosses processes, and the maps it implies on tensors in the store's order
[..., token, kv_head, dim]. Knows no store, no model and no time axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from kvstore.errors import StoreFormatError
from kvstore.provenance import AlignmentRecord
from kvstore.records import parse
from kvstore.spec import KVSpec, LayerSpec, RopeSpec, format_layers
from pipeline.align.heads import Channels, key_channels, project_geometry, spread_channels
from pipeline.align.layers import map_layers

_Side = tuple[LayerSpec, RopeSpec | None]
"""One layer of one model, and how its keys rotate."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """In whose geometry a teacher layer is compared with its student layers, and which channels mean something there."""

    side: Literal["student", "teacher"]
    """`student`: project the teacher (unless the store is baked). `teacher`: project the student, the target stays as it is."""
    key_kept: tuple[bool, ...]
    """Per key channel of that side, whether the other side has a counterpart; False is zero on one side, to be masked."""
    value_kept: tuple[bool, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """A frozen map from a teacher's KVSpec to a student's.

    Raises:
        ValueError: layers that do not exist, student layers on one teacher layer that differ among themselves, or rotated
            keys whose rotations differ.
    """

    teacher: KVSpec
    student: KVSpec
    """Geometry of all student layers, mapped or not."""
    layer_map: tuple[tuple[int, int], ...]
    """(student layer, teacher layer), by increasing student layer."""
    layer_map_name: str
    """How `layer_map` came about, as `layers.map_layers` reads it."""
    baked: bool = False
    """Whether the store already holds the projection: teacher layer numbers, student geometry (`stored_spec`)."""

    def __post_init__(self) -> None:
        student_layers = [student for student, _ in self.layer_map]
        if not student_layers or student_layers != sorted(set(student_layers)):
            raise ValueError(f"layer_map: got {list(self.layer_map)}, expected pairs by increasing student layer, one or more")
        if self.teacher.key_domain != self.student.key_domain:
            raise ValueError(
                f"key_domain: teacher {self.teacher.key_domain}, student {self.student.key_domain}, expected equal. Capture "
                "the student as the store was captured, or store keys before rotation."
            )
        first: dict[int, int] = {}
        for student_layer, teacher_layer in self.layer_map:
            self._validate_pair(student_layer, teacher_layer, first.setdefault(teacher_layer, student_layer))

    def _validate_pair(self, student_layer: int, teacher_layer: int, sharing: int) -> None:
        student, teacher = _side(self.student, student_layer), _side(self.teacher, teacher_layer)
        other = _side(self.student, sharing)
        if (student[0].geometry, student[1]) != (other[0].geometry, other[1]):
            raise ValueError(
                f"layer_map: student layers {sharing} and {student_layer} share teacher layer {teacher_layer} but differ: "
                f"{_describe(*other)} against {_describe(*student)}. Map them to different teacher layers or leave one out."
            )
        if self.teacher.key_domain == "post_rope" and (student[1] != teacher[1] or student[0].key_dim != teacher[0].key_dim):
            raise ValueError(
                f"rope: keys are stored after rotation, but teacher layer {teacher_layer} ({_describe(*teacher)}) and student "
                f"layer {student_layer} ({_describe(*student)}) rotate differently; projecting would mix phases. Store keys "
                "before rotation (key_domain pre_rope)."
            )

    @classmethod
    def plan(
        cls,
        teacher: KVSpec,
        student: KVSpec,
        layer_map: str = "last_aligned",
        student_layers: Sequence[int] | None = None,
    ) -> Alignment:
        """Map layers by name over the full depths of both specs; nothing is baked yet.

        Args:
            teacher: all attention layers of the teacher: depth is counted on what is here.
            layer_map: as `layers.map_layers` reads it: `last_aligned`, `uniform` or pairs.
            student_layers: the student's layer numbers to keep; None for all that are mapped.

        Raises:
            ValueError: an unknown map, a layer that does not exist, or whatever `Alignment` refuses.
        """
        pairs = map_layers(layer_map, teacher.layer_numbers, student.layer_numbers)
        wanted = set(student.layer_numbers if student_layers is None else student_layers)
        unknown = wanted - set(student.layer_numbers)
        if unknown or not wanted:
            raise ValueError(
                f"student_layers: got {sorted(wanted)}, expected some of {format_layers(student.layer_numbers)}, the student's "
                "attention layers"
            )
        return cls(
            teacher=teacher,
            student=student,
            layer_map=tuple(pair for pair in pairs if pair[0] in wanted),
            layer_map_name=layer_map,
        )

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """Teacher layers in use, increasing, without repeats."""
        return tuple(sorted({teacher for _, teacher in self.layer_map}))

    def teacher_layer_of(self, student_layer: int) -> int:
        """The teacher layer that student layer is compared with."""
        for student, teacher in self.layer_map:
            if student == student_layer:
                return teacher
        mapped = format_layers(student for student, _ in self.layer_map)
        raise ValueError(f"student layer {student_layer} is not mapped; mapped are {mapped}")

    @property
    def is_smaller(self) -> bool:
        """Whether a baked store would take fewer numbers per token than the same teacher layers as they are."""
        return self.stored_spec().values_per_token < self.teacher.select(self.teacher_layers).values_per_token

    def stored_spec(self) -> KVSpec:
        """Geometry of a baked store: the teacher's layer numbers with the student's heads, dims and rotations."""
        layers = tuple(dataclasses.replace(self._student_side(number)[0], layer=number) for number in self.teacher_layers)
        return dataclasses.replace(self.student, layers=layers, dtype=self.teacher.dtype)

    def project(
        self, teacher_layer: int, key: Float[Tensor, "..."], value: Float[Tensor, "..."]
    ) -> tuple[Float[Tensor, "*lead token Hs Dk"], Float[Tensor, "*lead token Hs Dv"]]:
        """Bring a teacher layer to its student's geometry; equal geometry gives the same objects back.

        Args:
            key: [..., token, kv_head, key_dim], `value` [..., token, kv_head, value_dim], in the teacher's geometry.

        Raises:
            ValueError: tensors of another geometry; the message has their shapes and both configs.
        """
        return _project(_side(self.teacher, teacher_layer), self._student_side(teacher_layer), key, value, "teacher")

    def project_student(
        self, student_layer: int, key: Float[Tensor, "..."], value: Float[Tensor, "..."]
    ) -> tuple[Float[Tensor, "*lead token Ht Dk"], Float[Tensor, "*lead token Ht Dv"]]:
        """Bring a student layer to its teacher's geometry: pool the student where `comparison` says `teacher`.

        Raises:
            ValueError: tensors of another geometry; the message has their shapes and both configs.
        """
        teacher_layer = self.teacher_layer_of(student_layer)
        return _project(_side(self.student, student_layer), _side(self.teacher, teacher_layer), key, value, "student")

    def comparison(self, teacher_layer: int) -> Comparison:
        """Compare in the smaller of the two geometries, the student's when equal or baked; never inflate a target."""
        teacher, student = _side(self.teacher, teacher_layer), self._student_side(teacher_layer)
        on_student = self.baked or _values_per_token(student[0]) <= _values_per_token(teacher[0])
        keys, values = _channels(teacher, student) if on_student else _channels(student, teacher)
        return Comparison(
            side="student" if on_student else "teacher",
            key_kept=tuple(channel is not None for channel in keys),
            value_kept=tuple(channel is not None for channel in values),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher.to_json(),
            "student": self.student.to_json(),
            "layer_map": [list(pair) for pair in self.layer_map],
            "layer_map_name": self.layer_map_name,
            "baked": self.baked,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Alignment:
        """Parse what `to_json` gave.

        Raises:
            StoreFormatError: a field is missing, of another type, or contradicts the others.
        """
        try:
            teacher, student = (KVSpec.from_json(record[side]) for side in ("teacher", "student"))
            alignment = cls(
                teacher=teacher,
                student=student,
                layer_map=tuple((student, teacher) for student, teacher in record["layer_map"]),
                layer_map_name=record["layer_map_name"],
                baked=record["baked"],
            )
            parse(AlignmentRecord, record, "alignment")  # types, which building one does not look at
            return alignment
        except (KeyError, TypeError, ValueError) as error:
            raise StoreFormatError(f"alignment: {error!r}; expected the fields of Alignment") from error

    def _student_side(self, teacher_layer: int) -> _Side:
        """The student layer on a teacher layer; when several share it they are alike, which `__post_init__` made sure of."""
        for student, teacher in self.layer_map:
            if teacher == teacher_layer:
                return _side(self.student, student)
        raise ValueError(f"teacher layer {teacher_layer} is not mapped; mapped are {format_layers(self.teacher_layers)}")


def _side(spec: KVSpec, number: int) -> _Side:
    return spec.layer(number), spec.rope_of(number)


def _channels(source: _Side, target: _Side) -> tuple[Channels, Channels]:
    """Where each key channel and each value channel of the target comes from."""
    return (
        key_channels(source[0].key_dim, target[0].key_dim, source[1], target[1]),
        spread_channels(source[0].value_dim, target[0].value_dim),
    )


def _project(source: _Side, target: _Side, key: Tensor, value: Tensor, whose: str) -> tuple[Tensor, Tensor]:
    num_heads, key_dim, value_dim = source[0].geometry
    fits = key.ndim >= 3 and key.shape[:-1] == value.shape[:-1] and key.shape[-2] == num_heads
    if not fits or (key.shape[-1], value.shape[-1]) != (key_dim, value_dim):
        raise ValueError(
            f"{whose} layer {source[0].layer}: got key {list(key.shape)}, value {list(value.shape)}, expected "
            f"[..., token, {num_heads}, {key_dim}] and [..., token, {num_heads}, {value_dim}] ({_describe(*source)}, to be "
            f"mapped to {_describe(*target)}). Axes are [..., token, kv_head, dim]; num_kv_heads is num_key_value_heads."
        )
    keys, values = _channels(source, target)
    return (
        project_geometry(key, target[0].num_kv_heads, keys),
        project_geometry(value, target[0].num_kv_heads, values),
    )


def _values_per_token(layer: LayerSpec) -> int:
    return layer.num_kv_heads * (layer.key_dim + layer.value_dim)


def _describe(layer: LayerSpec, rope: RopeSpec | None) -> str:
    turned = "no rope" if rope is None else f"rope {rope.kind}, rotary_dim {rope.rotary_dim}, start {rope.start}"
    return f"num_kv_heads {layer.num_kv_heads}, key_dim {layer.key_dim}, value_dim {layer.value_dim}, {turned}"
