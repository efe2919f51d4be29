"""The import rule of the house, read off the source: which room may know which, and which libraries belong to one room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kvstore", "pipeline", "training")
COMMANDS = {
    *("pipeline/cli.py", "pipeline/options.py", "pipeline/terminal.py", "pipeline/monitor/status_view.py"),
    *("pipeline/extract_commands.py", "pipeline/store_commands.py", "pipeline/fit_commands.py", "pipeline/doctor_commands.py"),
    "pipeline/train_commands.py",
}
TOP = {"pipeline/cli.py", "pipeline/store_commands.py", "pipeline/train_commands.py", "pipeline/demo.py"}

MAY_IMPORT = {
    "kvstore": set(),
    "pipeline/align": {"kvstore", "pipeline.presets_path"},
    "pipeline/models": {"kvstore", "pipeline.presets_path"},
    "pipeline": {"kvstore", "pipeline"},
    "training": {"kvstore", "training", "pipeline.align", "pipeline.models"},
}
"""Ours that a room may import beside itself."""

ONLY_IN = {
    "ray": {"pipeline/executors"},
    "zarr": {"kvstore"},
    "tensorstore": {"kvstore"},
    "datasets": {"pipeline/data/documents.py"},
    "click": COMMANDS,
    "matplotlib": {"training/report.py", "pipeline/monitor/plot.py"},
}
"""Libraries that only these files or rooms know."""

NEVER_IN = {
    "kvstore": {"torch", "transformers", "ray", "datasets"},
    "pipeline/align": {"transformers", "datasets", "zarr"},
}


def sources() -> list[Path]:
    return sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Full dotted names of everything a file imports, wherever in the file."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path: Path) -> str:
    return next(room for room in sorted(MAY_IMPORT, key=len, reverse=True) if str(path).startswith(f"{room}/"))


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


@pytest.mark.parametrize("path", sources(), ids=str)
def test_a_file_imports_only_what_its_room_may(path: Path) -> None:
    if str(path) in TOP:
        return
    room = room_of(path)
    allowed = {room.replace("/", "."), *MAY_IMPORT[room]}
    ours = [name for name in imports(path) if any(within(name, package) for package in PACKAGES)]
    wrong = [name for name in ours if not any(within(name, prefix) for prefix in allowed)]
    assert not wrong, f"{path} may not import {wrong}"
    on_top = [name for name in ours if within(name, "pipeline.cli") or within(name, "pipeline.demo")]
    assert not on_top, f"{path} imports {on_top}, which sit on top"


@pytest.mark.parametrize("path", sources(), ids=str)
def test_a_library_is_known_only_in_its_room(path: Path) -> None:
    for name in imports(path):
        library = name.partition(".")[0]
        homes = ONLY_IN.get(library)
        assert homes is None or any(str(path) == home or str(path).startswith(f"{home}/") for home in homes), (
            f"{path} imports {name}, which belongs to {homes}"
        )
        for room, banned in NEVER_IN.items():
            assert not (str(path).startswith(f"{room}/") and library in banned), f"{path} imports {name}"


def test_the_rules_name_rooms_that_exist() -> None:
    for place in [*MAY_IMPORT, *NEVER_IN, *TOP, *(home for homes in ONLY_IN.values() for home in homes)]:
        assert (ROOT / place).exists(), place
