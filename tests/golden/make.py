"""Writes the golden stores: one small store for every codec, and beside them what its samples decode to.

    python -m tests.golden.make

`<name>/` is a store. `expected/<name>/` holds `ids.i32` [token], `key.f32` and `value.f32` [layer, token, kv_head, dim] of all its
samples in their order: plain little-endian numbers that any language reads. Run it only when the format changes on purpose: that
stores written by an earlier kvpipe decode to the same numbers is what `tests/kvstore/test_golden.py` proves.

The numbers are multiples of 2^-18, so that sums, means and steps are exact in float64 and the same on every machine.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np

from kvstore import open_store
from kvstore.spec import Dtype
from tests.stores import Source, small_spec, write_store

GOLDEN = Path(__file__).parent
EXPECTED = GOLDEN / "expected"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One golden store."""

    codec: str
    dtype: Dtype = "float32"
    lengths: tuple[int, ...] = (3, 4, 2, 1, 5, 3)
    """Tokens of each sample."""


CASES = {
    "raw-float32": Case(codec="raw"),
    "raw-bfloat16": Case(codec="raw", dtype="bfloat16"),
    "q8": Case(codec="q8"),
    "fp8": Case(codec="fp8"),
    "q8z": Case(codec="q8z"),
    "mix": Case(codec="mix", lengths=(2, 66, 1, 1, 2, 3)),  # one sample crosses a chunk
    "q4z": Case(codec="q4z"),
    "q4z-min": Case(codec="q4z-min", dtype="bfloat16"),
    "mix-layer-0-raw": Case(codec="mix,0=raw"),  # two groups
}


def draw(stream: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    """Nearly Gaussian multiples of 2^-18; of numpy's streams only RandomState's is promised never to change."""
    return np.asarray(stream.randint(-(2**18), 2**18, size=(4, *shape)).sum(axis=0) / 2.0**18)


def golden_source(case: Case) -> Source:
    """Samples with all that a codec meets: a loud mean, a loud channel, a constant one, -0.0, and values nibbles clip."""
    stream = np.random.RandomState(20260101)
    spec = small_spec(dtype=case.dtype)
    dtype = np.dtype(ml_dtypes.bfloat16 if case.dtype == "bfloat16" else case.dtype)

    def layer_values(length: int, mean: float) -> np.ndarray:
        values = draw(stream, (length, 2, 8)) + mean
        values[:, 0, 0] *= 4
        values[:, 1, 7] = 0.25
        values[0, 0, 3] = -0.0 if mean == 0 else values[0, 0, 3]
        return values

    input_ids = [stream.randint(0, 256, size=length).astype(np.int32) for length in case.lengths]
    kv = [
        {layer: (layer_values(length, 5.0 + layer), layer_values(length, 0.0)) for layer in spec.layer_numbers}
        for length in case.lengths
    ]
    for side, sign in ((0, 1), (1, -1)):
        kv[-1][1][side][-1, 1, 2] += sign * 20.0
    exact = [{layer: (key.astype(dtype), value.astype(dtype)) for layer, (key, value) in sample.items()} for sample in kv]
    return Source(spec=spec, input_ids=input_ids, kv=exact)


def write_golden_store(root: Path, case: Case) -> None:
    write_store(root, golden_source(case), case.codec)


def write_expected(store: Path, folder: Path) -> None:
    opened = open_store(store)
    batch = opened.read(range(len(opened)))
    folder.mkdir(parents=True)
    (folder / "ids.i32").write_bytes(batch.input_ids.astype("<i4").tobytes())
    (folder / "key.f32").write_bytes(batch.key.astype("<f4").tobytes())
    (folder / "value.f32").write_bytes(batch.value.astype("<f4").tobytes())


def main() -> None:
    shutil.rmtree(EXPECTED, ignore_errors=True)
    for name, case in CASES.items():
        shutil.rmtree(GOLDEN / name, ignore_errors=True)
        write_golden_store(GOLDEN / name, case)
        write_expected(GOLDEN / name, EXPECTED / name)


if __name__ == "__main__":
    main()
