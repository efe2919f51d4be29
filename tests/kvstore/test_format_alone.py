"""FORMAT.md is enough: a short reader written from it alone decodes every golden store as kvstore does."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest

from kvstore import open_store
from tests.golden.make import CASES, GOLDEN
from tests.kvstore.minimal_reader import read_sample

READER = Path(__file__).parent / "minimal_reader.py"
MAX_LINES = 60


def test_the_reader_is_short_and_needs_only_zarr_and_numpy() -> None:
    text = READER.read_text(encoding="utf-8")
    assert len(text.splitlines()) < MAX_LINES
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"__future__", "json", "pathlib", "numpy", "zarr"}


@pytest.mark.parametrize("name", CASES)
def test_every_sample_is_decoded_bit_for_bit(name: str) -> None:
    store = open_store(GOLDEN / name)
    for sample in range(len(store)):
        batch = store.read([sample])
        input_ids, layers = read_sample(GOLDEN / name, sample)
        assert input_ids.tobytes() == batch.input_ids.tobytes()
        assert tuple(sorted(layers)) == batch.layers
        for slot, layer in enumerate(batch.layers):
            key, value = layers[layer]
            assert key.tobytes() == batch.key[slot].tobytes()
            assert value.tobytes() == batch.value[slot].tobytes()


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    path = Path(shutil.copytree(GOLDEN / "q8", tmp_path / "q8"))
    record = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**record, "schema_version": 99}))
    with pytest.raises(ValueError, match="schema_version: got 99, expected 1"):
        read_sample(path, 0)
