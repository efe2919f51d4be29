"""Which teacher layer each student layer is compared with: pure functions of the two depths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from kvstore.spec import parse_layers


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


def monotone_match(similarity: Float[np.ndarray, "student teacher"]) -> tuple[int, ...]:
    """The teacher index of each student layer, never decreasing, with the largest sum of similarities; of equal sums the earliest."""
    num_student, num_teacher = similarity.shape
    _validate_depths(num_teacher, num_student)
    best = similarity[0].astype(np.float64)
    came_from = np.zeros((num_student, num_teacher), dtype=np.int64)
    for layer in range(1, num_student):
        top = 0
        for index in range(num_teacher):
            top = index if best[index] > best[top] else top
            came_from[layer, index] = top
        best = best[came_from[layer]] + similarity[layer]
    chosen = [int(np.argmax(best))]
    for layer in range(num_student - 1, 0, -1):
        chosen.append(int(came_from[layer, chosen[-1]]))
    return tuple(chosen[::-1])


LAYER_MAPS: Mapping[str, Callable[[int, int], tuple[int, ...]]] = {"last_aligned": last_aligned, "uniform": uniform}
"""By the name that configs and manifests use; (num_teacher, num_student) -> one teacher index per student layer."""


def map_layers(text: str, teacher: Sequence[int], student: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(student layer, teacher layer) of every student layer that is mapped, by increasing student layer.

    Args:
        text: a name in LAYER_MAPS, or pairs STUDENT=TEACHER as in '0=3,1=9,-1=-1'; -1 is a model's last.
        teacher: the teacher's attention layers, increasing; `student` the student's.

    Raises:
        ValueError: no such map or layer, or a student layer mapped twice.
    """
    if text in LAYER_MAPS:
        found = LAYER_MAPS[text](len(teacher), len(student))
        return tuple((layer, teacher[index]) for layer, index in zip(student, found, strict=True))
    if not is_explicit(text):
        raise ValueError(
            f"layer_map: got {text!r}, expected one of {sorted(LAYER_MAPS)}, or pairs STUDENT=TEACHER as in '0=3,1=9,-1=-1'"
        )
    pairs: dict[int, int] = {}
    for part in text.split(","):
        layers = []
        for side, number, numbers in zip(("student", "teacher"), part.split("="), (student, teacher), strict=False):
            try:
                (layer,) = parse_layers(number.strip(), numbers)
            except ValueError as error:
                raise ValueError(f"layer_map: {part.strip()!r}, {side}: {error}") from None
            layers.append(layer)
        if len(layers) != 2 or part.count("=") != 1 or layers[0] in pairs:
            raise ValueError(f"layer_map: got {part.strip()!r}, expected one pair STUDENT=TEACHER for each student layer")
        pairs[layers[0]] = layers[1]
    return tuple(sorted(pairs.items()))


def is_explicit(layer_map: str) -> bool:
    """Whether it lists pairs instead of naming a rule."""
    return "=" in layer_map


def choose_student_layers(layers: str | None, layer_map: str, student: Sequence[int]) -> tuple[int, ...]:
    """The student layers an aligned store keeps: those asked for, else those of an explicit map, else eight spread evenly.

    Args:
        layers: 'all' or a list (`kvstore.spec.parse_layers`).
    """
    if layers is not None:
        return parse_layers(layers, student)
    if is_explicit(layer_map):
        return tuple(student)
    return tuple(student[index] for index in default_student_layers(len(student)))


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
