"""Which teacher layer each student layer is compared with: pure functions of the two depths."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def last_aligned(num_teacher: int, num_student: int) -> tuple[int, ...]:
    """Count from the last layer: the student's last meets the teacher's last, and so on down; what is left over meets 0."""
    _validate_depths(num_teacher, num_student)
    return tuple(max(0, num_teacher - num_student + layer) for layer in range(num_student))


def uniform(num_teacher: int, num_student: int) -> tuple[int, ...]:
    """Spread evenly by depth with first and last exact, halves going up; a single student layer meets the last."""
    _validate_depths(num_teacher, num_student)
    if num_student == 1:
        return (num_teacher - 1,)
    span = num_student - 1
    return tuple((2 * layer * (num_teacher - 1) + span) // (2 * span) for layer in range(num_student))


LAYER_MAPS: Mapping[str, Callable[[int, int], tuple[int, ...]]] = {"last_aligned": last_aligned, "uniform": uniform}
"""By the name that configs and manifests use; (num_teacher, num_student) -> one teacher index per student layer."""


def default_student_layers(num_student_layers: int, limit: int = 8) -> tuple[int, ...]:
    """At most `limit` student layers for a baked store, spread evenly with the last included."""
    if num_student_layers < 1 or limit < 1:
        raise ValueError(f"default_student_layers: got {num_student_layers} layers, limit {limit}, expected at least 1 each")
    kept = min(num_student_layers, limit)
    return tuple((slot + 1) * num_student_layers // kept - 1 for slot in range(kept))


def _validate_depths(num_teacher: int, num_student: int) -> None:
    if num_teacher < 1 or num_student < 1:
        raise ValueError(
            f"layer map: got num_teacher={num_teacher}, num_student={num_student}, expected at least one layer each"
        )
