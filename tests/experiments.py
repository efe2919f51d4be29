"""Small experiments in the demo's setting, run by the commands a user types."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from pipeline.presets_path import configs_dir

RECIPE = tomllib.loads((configs_dir() / "tiny" / "demo.toml").read_text())
STUDENT = str(configs_dir() / "tiny" / "demo-student.toml")


def kvpipe(*arguments: str) -> dict[str, Any]:
    """What a command prints as JSON."""
    command = [sys.executable, "-m", "pipeline.cli", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def train_student(out: Path, store: Path, name: str, seed: int, *arm: str) -> float:
    """Train one of the demo's students from a store; returns held-out nats per byte."""
    flags = [item for key, value in RECIPE["train"].items() for item in ("--set", f"{key}={json.dumps(value)}")]
    where = ["--store", str(store), "--out", str(out / name), "--student", STUDENT, "--seed", str(seed)]
    return float(kvpipe("train", *where, *flags, *arm)["eval_nats_per_byte"])
