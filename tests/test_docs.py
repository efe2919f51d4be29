"""The README is executed: its commands parse, its Python runs, its tree is the tree."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest

from kvstore import open_store
from kvstore.codec import CODECS
from pipeline.cli import cli
from pipeline.config import load_config
from tests.stores import random_source, small_spec, write_store
from training.config import TrainConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line.partition("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&")]


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("kvpipe")])
def test_a_kvpipe_command_of_the_readme_parses_and_its_files_exist(line: str) -> None:
    verb, *arguments = shlex.split(line)[1:]
    command = cli.commands[verb]
    with command.make_context(verb, arguments) as context:
        config = context.params.get("config")
        assert config is None or (ROOT / config).is_file()
        if verb == "train" and config is None:
            load_config(TrainConfig, "train", None, context.params["settings"], {"store": "s", "student": "s", "out": "o"})
    with contextlib.suppress(ValueError):
        position = arguments.index("--config")
        assert isinstance(command, click.Command)
        assert arguments[position + 1].startswith("configs/recipes/")


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {line.split()[1] for line in commands() if line.startswith("make")}
    assert named >= {"demo", "test"}
    assert named <= targets
    for name in ("README.md", "CONTRIBUTING.md"):
        assert set(re.findall(r"`make (\w+)`", (ROOT / name).read_text())) <= targets


def test_every_other_command_of_the_readme_is_the_install_line() -> None:
    others = [line for line in commands() if not line.startswith(("kvpipe", "make"))]
    assert others == ["pip install -c constraints.txt torch", "pip install -c constraints.txt ."]
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[0])
def test_python_in_the_readme_runs_as_written(code: str, tmp_path: Path) -> None:
    write_store(tmp_path / "my-store", random_source(small_spec(num_layers=4), [100] * 20), "q8")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("codec", ["raw", "q8", "q8z", "mix"])
def test_plain_zarr_in_the_readme_gives_what_the_reader_gives(codec: str, tmp_path: Path) -> None:
    (code,) = [block for block in blocks("python") if "zarr.open" in block]
    write_store(tmp_path / "my-store", random_source(small_spec(num_layers=1), [100] * 2), codec)
    code += "import numpy\nnumpy.save('keys.npy', keys)\n"
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, check=True)
    expected = open_store(tmp_path / "my-store").read([0]).key[0]
    np.testing.assert_allclose(np.load(tmp_path / "keys.npy"), expected, rtol=1e-6)


def test_xarray_opens_a_store_as_the_readme_says(tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    (arguments,) = re.findall(r"`xarray\.open_zarr\((.*?)\)`", README)
    write_store(tmp_path / "my-store", random_source(small_spec(), [10]), "q8")
    with contextlib.chdir(tmp_path):
        opened = eval(f"open_zarr({arguments})", {"open_zarr": xarray.open_zarr})
    assert opened["key"].dims == ("layer", "token", "kv_head", "key_dim")


def test_the_codec_table_of_the_readme_is_the_codec_ladder() -> None:
    rows = re.findall(r"^\| `([\w-]+)`.*?\|.*?\|(.*?)\|", README, flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(CODECS)
    for name, bits in rows:
        number = re.search(r"\d+(\.\d+)?", bits)
        assert number is not None
        assert float(number[0]) == CODECS[name].nominal_bits


def tree() -> Iterator[str]:
    """Files and folders the README's tree names, as paths."""
    (block,) = [block for block in blocks("text") if "errors.py" in block]
    folders: list[str] = []
    for line in block.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        folders = folders[: indent // 2]
        yield "/".join([*folders, name.rstrip("/")])
        if name.endswith("/"):
            folders.append(name.rstrip("/"))


def test_the_tree_in_the_readme_is_the_tree() -> None:
    named = set(tree())
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing
    sources = {
        str(path.relative_to(ROOT))
        for package in ("kvstore", "pipeline", "training")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert sources == {path for path in named if path.endswith(".py")}


def test_links_in_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_readme_shows_output_and_a_measured_number() -> None:
    first_screen = README.split("## The nouns")[0]
    assert "nats per byte lower after equal steps" in first_screen
    assert re.search(r"20\d\d-\d\d-\d\d", first_screen), "the measured number has no date"
