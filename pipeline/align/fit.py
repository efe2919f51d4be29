"""Fitted maps of all layers, how they came about, and the file they are kept in. Knows no store and no model."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import StringConstraints, with_config
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from typing_extensions import TypedDict

from kvstore.errors import FingerprintMismatchError, StoreFormatError
from kvstore.records import STRICT, Size, canonical_json, differences, parse, plain
from kvstore.spec import LayerSpec, RopeSpec
from kvstore.storage import Folder
from pipeline.align.alignment import Alignment
from pipeline.align.fitted import FittedMap, Method, Retained

MAPS = "maps.safetensors"
"""The file in a store's projection/ folder."""


_Layer = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,5}$")]


@with_config(STRICT)
class FitRecord(TypedDict):
    """The fields of a `Fit` as its file has them, beside the maps; layers are names."""

    method: Method
    alignment: dict[str, Any]
    store: str
    num_tokens: Size
    num_held_out_tokens: Size
    retained: dict[_Layer, Retained]
    retained_held_out: dict[_Layer, Retained]
    attention_cosine: dict[_Layer, float]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fit:
    """Fitted maps of all teacher layers an alignment uses, and how they came about."""

    method: Method
    alignment: Alignment
    """Geometry and rotation of both sides and the layer map; not baked."""
    store: str
    """Fingerprint of the store the sums were taken over."""
    num_tokens: int
    num_held_out_tokens: int
    maps: Mapping[int, FittedMap]
    """By teacher layer."""
    retained: Mapping[int, Retained]
    """On the tokens of the fit, by teacher layer."""
    retained_held_out: Mapping[int, Retained]
    """On tokens the fit has not seen; empty if none were held out."""
    attention_cosine: Mapping[int, float]
    """`fitted.attention_cosine` on held-out samples, by teacher layer; empty if none were held out."""

    @property
    def fit_id(self) -> str:
        """sha256 of the record and all numbers, in hex; the same whatever wrote the file."""
        digest = hashlib.sha256(canonical_json(self._record()).encode())
        for name, array in sorted(self._arrays().items()):
            digest.update(f"{name}{list(array.shape)}".encode())
            digest.update(np.ascontiguousarray(array.numpy(), dtype="<f4").tobytes())
        return digest.hexdigest()

    def content(self) -> bytes:
        """The safetensors file that `load` reads."""
        return save(self._arrays(), {"fit_id": self.fit_id, "record": canonical_json(self._record())})

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, beside and renamed: whole or not at all."""
        path = Path(path)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_bytes(self.content())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Fit:
        """Read what `save` wrote, bit for bit.

        Raises:
            StoreFormatError: no such file, or its content does not hash to the fit_id it names.
        """
        try:
            if Folder(Path(path).absolute().parent).size(Path(path).name) is None:
                raise FileNotFoundError("no such file")  # a pipe would keep its reader waiting
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # the file itself cannot be iterated
            fit = cls._from_record(parse(FitRecord, metadata["record"], "record"), arrays)
            expected = metadata["fit_id"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StoreFormatError(f"{path}: {error!r}; expected a file that 'kvpipe fit' made") from error
        if fit.fit_id != expected:
            raise StoreFormatError(
                f"{path}: fit_id: got {fit.fit_id} from the content, expected {expected}; the file was changed. Fit again"
            )
        return fit

    def require(self, alignment: Alignment, fit_id: str | None = None) -> None:
        """Refuse to be used for anything else than what it was fitted for.

        Args:
            alignment: whose used layers have to be fitted, for the same geometry and rotation.
            fit_id: the one a store names, None for any.

        Raises:
            FingerprintMismatchError: another fit_id, or layers that are missing or of other geometry.
        """
        if fit_id is not None and self.fit_id != fit_id:
            raise FingerprintMismatchError(f"fit_id: got {self.fit_id}, expected {fit_id}; use the file that was baked with")
        missing = sorted(set(alignment.teacher_layers) - set(self.maps))
        if missing:
            raise FingerprintMismatchError(f"fit: got teacher layers {sorted(self.maps)}, expected {missing} too; fit again")
        for layer in alignment.teacher_layers:
            for difference in differences(_sides(self.alignment, layer), _sides(alignment, layer), f"layer {layer}"):
                raise FingerprintMismatchError(f"fit: {difference}; it was made for other geometry. Fit again for this student")

    def _arrays(self) -> dict[str, Tensor]:
        sides = {f"layer.{layer}": fitted for layer, fitted in self.maps.items()}
        arrays = {f"{name}.key": fitted.key for name, fitted in sides.items()}
        arrays |= {f"{name}.value": fitted.value for name, fitted in sides.items()}
        return {name: array.cpu().contiguous() for name, array in arrays.items()}

    def _record(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "alignment": self.alignment.to_json(),
            "store": self.store,
            "num_tokens": self.num_tokens,
            "num_held_out_tokens": self.num_held_out_tokens,
            "retained": {str(layer): dataclasses.asdict(share) for layer, share in self.retained.items()},
            "retained_held_out": {str(layer): dataclasses.asdict(share) for layer, share in self.retained_held_out.items()},
            "attention_cosine": {str(layer): cosine for layer, cosine in self.attention_cosine.items()},
        }

    @classmethod
    def _from_record(cls, record: FitRecord, arrays: Mapping[str, Tensor]) -> Fit:
        alignment = Alignment.from_json(record["alignment"])
        maps = {
            layer: FittedMap(key=arrays[f"layer.{layer}.key"], value=arrays[f"layer.{layer}.value"])
            for layer in alignment.teacher_layers
        }
        return cls(
            method=record["method"],
            alignment=alignment,
            store=record["store"],
            num_tokens=record["num_tokens"],
            num_held_out_tokens=record["num_held_out_tokens"],
            maps=maps,
            retained={int(layer): share for layer, share in record["retained"].items()},
            retained_held_out={int(layer): share for layer, share in record["retained_held_out"].items()},
            attention_cosine={int(layer): cosine for layer, cosine in record["attention_cosine"].items()},
        )


def student_side(alignment: Alignment, teacher_layer: int) -> tuple[LayerSpec, RopeSpec | None]:
    """Geometry and rotation of the student layers that are compared with a teacher layer; those of one are alike."""
    number = next(student for student, teacher in alignment.layer_map if teacher == teacher_layer)
    return alignment.student.layer(number), alignment.student.rope_of(number)


def _sides(alignment: Alignment, teacher_layer: int) -> Any:
    student, student_rope = student_side(alignment, teacher_layer)
    teacher_rope = alignment.teacher.rope_of(teacher_layer)
    record = {
        side: {"geometry": layer.geometry, "rope": dataclasses.asdict(rope) if rope else None}
        for side, layer, rope in (
            ("teacher", alignment.teacher.layer(teacher_layer), teacher_rope),
            ("student", student, student_rope),
        )
    }
    return plain({**record, "key_domain": alignment.teacher.key_domain})
