"""A reader of stores written from FORMAT.md alone, without kvpipe; it verifies only what Zarr itself verifies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import zarr


def e4m3(code: np.ndarray) -> np.ndarray:
    """float8_e4m3fn: a sign, four bits of exponent with bias 7, three of mantissa."""
    exponent, mantissa = (code >> 3 & 15).astype(int), (code & 7).astype(np.float32)
    magnitude = np.where(exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa, -9))
    return np.where(code < 128, magnitude, -magnitude).astype(np.float32)


def decode(group: zarr.Group, kind: str, slot: int, tokens: slice) -> np.ndarray:
    """Float32 values [token, kv_head, dim] of one layer, by FORMAT.md 4."""
    if f"{kind}_byte" in group:
        byte = group[f"{kind}_byte"][slot, tokens]
        code = np.concatenate([byte & 15, byte >> 4], axis=-1).astype(np.float32) - 8
    else:
        code = group[kind][slot, tokens]
        if code.dtype == np.uint16:
            return (code.astype(np.uint32) << 16).view(np.float32)
        code = e4m3(code) if code.dtype == np.uint8 else code.astype(np.float32)
    if f"{kind}_step" not in group:
        return code
    return code * group[f"{kind}_step"][slot] + group[f"{kind}_mean"][slot]


def read_sample(store: Path, sample: int) -> tuple[np.ndarray, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Token ids of one sample, and keys and values of every layer by the teacher's layer number."""
    manifest = json.loads((store / "manifest.json").read_text())
    if manifest["schema_version"] != 1:
        raise ValueError(f"schema_version: got {manifest['schema_version']}, expected 1 ({store})")
    commits = [json.loads(file.read_text()) for file in (store / "commits").glob("*.json")]
    rows = sorted((row for commit in commits for row in commit["samples"]), key=lambda row: row["token_start"])
    start = rows[sample]["token_start"]
    tokens = slice(start, start + rows[sample]["num_tokens"])
    root = zarr.open_group(store / "kv.zarr", mode="r")
    layers = {}
    for layer, (path, slot) in root.attrs["kvpipe"]["groups"].items():
        group = root[path] if path else root
        layers[int(layer)] = (decode(group, "key", slot, tokens), decode(group, "value", slot, tokens))
    return root["input_ids"][tokens], layers
