"""Named teachers and students: the TOML files under `configs/teachers` and `configs/students`, as plain records.

Knows published numbers only, neither weights nor the hub. It imports in milliseconds, so that `kvpipe --help` and
`kvpipe plan` can use it.
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pipeline.presets_path import configs_dir, find_preset

Record = TypeVar("Record", "Geometry", "TeacherPreset", "StudentPreset")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Shape of a model as its `config.json` gives it, under this project's names."""

    model_type: str
    """The architecture's name in transformers."""
    num_layers: int
    hidden_size: int
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads: the ones a store holds."""
    head_dim: int
    vocab_size: int
    """Rows of the embedding, padding rows included."""
    max_position_embeddings: int
    rope_theta: float | None = None
    """Base of the rotary frequencies; None for learned positions."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TeacherPreset:
    """A teacher known by name, and what `kvpipe extract` does with it when told nothing else."""

    name: str
    id: str
    """Repository on the Hugging Face hub."""
    source: str
    """Where the geometry was published."""
    geometry: Geometry
    data: str
    """Default data set, `repository:configuration`."""
    out: str
    """Default store directory."""
    max_tokens: int
    """Default size of a store in tokens."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StudentPreset:
    """A student known by name: either a pretrained one (`id`) or a fresh one (`config`), never both."""

    name: str
    id: str | None = None
    """Repository on the Hugging Face hub."""
    source: str | None = None
    """Where the repository's geometry was published."""
    config: Mapping[str, Any] | None = None
    """Fields of a transformers config, `model_type` among them; without `vocab_size` the store's tokenizer gives it."""


def teacher_preset(name: str) -> TeacherPreset | None:
    """The teacher of that name or of that repository, in any case, with or without the organisation; None if there is none.

    A folder here wins over all but the preset's very own name.

    Raises:
        ValueError: several teachers have that name.
    """
    found = _find("teachers", name)
    return None if found is None else _teacher(found)


def teacher_preset_names() -> tuple[str, ...]:
    """Names of all teachers, sorted."""
    return _names("teachers")


def student_preset(name: str) -> StudentPreset | None:
    """The student of that name, found as a teacher is (`teacher_preset`); None if there is none."""
    found = _find("students", name)
    return None if found is None else _student(found)


def student_preset_names() -> tuple[str, ...]:
    """Names of all students, sorted."""
    return _names("students")


@functools.cache
def _names(folder: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (configs_dir() / folder).glob("*.toml")))


def _find(folder: str, name: str) -> str | None:
    """The preset's own name."""
    if name not in _names(folder) and Path(name).is_dir():
        return None
    found = find_preset(configs_dir() / folder, name)
    return None if found is None else found.stem


@functools.cache
def _teacher(name: str) -> TeacherPreset:
    return parse_teacher(configs_dir() / "teachers" / f"{name}.toml")


@functools.cache
def _student(name: str) -> StudentPreset:
    return parse_student(configs_dir() / "students" / f"{name}.toml")


def parse_teacher(path: Path) -> TeacherPreset:
    """Read one teacher file; the file's name is the teacher's.

    Raises:
        ValueError: a field is missing or unknown.
    """
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    geometry = _record(Geometry, table.pop("geometry", {}), f"{path} [geometry]")
    defaults = table.pop("defaults", {})
    return _record(TeacherPreset, {"name": path.stem, "geometry": geometry, **table, **defaults}, str(path))


def parse_student(path: Path) -> StudentPreset:
    """Read one student file; the file's name is the student's.

    Raises:
        ValueError: a field is missing or unknown, or there is not exactly one of `id` and `[config]`.
    """
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    preset = _record(StudentPreset, {"name": path.stem, **table}, str(path))
    if (preset.id is None) == (preset.config is None):
        raise ValueError(f"{path}: expected either 'id' (a pretrained model) or a [config] table (a fresh one)")
    return preset


def _record(kind: type[Record], fields: Mapping[str, Any], where: str) -> Record:
    """Build a record from the fields of a TOML table, naming those that do not fit."""
    known = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(kind)}
    unknown = sorted(fields.keys() - known.keys())
    missing = sorted(name for name, required in known.items() if required and name not in fields)
    if unknown or missing:
        raise ValueError(f"{where}: unknown fields {unknown}, missing fields {missing}; expected {sorted(known)}")
    return kind(**fields)
