"""Would the tests notice? Known mistakes of other loaders are put into a copy of the sources, one at a time, and a test has to fail.

Each is a bug that somebody shipped, or the kind of one: orders that are no orders, places that are lost, data that is swapped.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAMPLER, LOADER, FAULTS = "tests/training/test_sampler.py", "tests/training/test_kv_loader.py", "tests/kvstore/test_faults.py"


@dataclasses.dataclass(frozen=True, slots=True)
class Mutant:
    name: str
    file: str
    changes: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]


MUTANTS = [
    Mutant(
        "a shuffle that shuffles nothing",
        "training/order.py",
        (
            (
                'return np.argsort(generator.random_raw(n), kind="stable").astype(np.int64)',
                "return np.arange(n, dtype=np.int64)",
            ),
        ),
        (SAMPLER,),
    ),
    Mutant(
        "the inverse of the permutation",
        "training/order.py",
        (
            (
                'return np.argsort(generator.random_raw(n), kind="stable").astype(np.int64)',
                'return np.argsort(np.argsort(generator.random_raw(n), kind="stable")).astype(np.int64)',
            ),
        ),
        (SAMPLER,),
    ),
    Mutant("the epoch is forgotten", "training/sampler.py", (('"epoch": epoch,', '"epoch": 0,'),), (SAMPLER,)),
    Mutant(
        "each rank has an order of its own",
        "training/sampler.py",
        (('"seed": plan.seed,', '"seed": plan.seed + self._rank,'),),
        (SAMPLER,),
    ),
    Mutant(
        "the last batch is dropped in silence",
        "training/sampler.py",
        (("itertools.islice(stream, len(self))", "itertools.islice(stream, len(self) - self.micro_batches_per_step)"),),
        (SAMPLER,),
    ),
    Mutant(
        "the last batch of a loader is dropped in silence",
        "training/sampler.py",
        (("in range(step, len(cuts) - 1):", "in range(step, len(cuts) - 2):"),),
        (LOADER,),
    ),
    Mutant(
        "a batch is sorted",
        "training/sampler.py",
        (("                table.index[rows[micro]].tolist(),", "                sorted(table.index[rows[micro]].tolist()),"),),
        (SAMPLER, LOADER),
    ),
    Mutant(
        "what fills up counts",
        "training/sampler.py",
        (("np.zeros(len(extra), dtype=np.int64)", "np.ones(len(extra), dtype=np.int64)"),),
        (SAMPLER,),
    ),
    Mutant(
        "a mixture that is right on average only",
        "training/order.py",
        (("    turns = fair_turns(counts)\n", "    turns = np.sort(fair_turns(counts))\n"),),
        (SAMPLER,),
    ),
    Mutant(
        "one step too far after a resume",
        "training/kv_loader.py",
        (
            (
                "batches_of(self._epoch, done)",
                "batches_of(self._epoch, done + 1)",
            ),
        ),
        (LOADER,),
    ),
    Mutant(
        "the state counts what was read ahead",
        "training/kv_loader.py",
        (
            (
                "                    in_flight += size\n",
                "                    in_flight += size\n                    self._consumed = int(cuts[done + len(pending)])\n",
            ),
            ("                self._consumed = int(cuts[done])\n", ""),
        ),
        (LOADER,),
    ),
    Mutant(
        "a place between batches is rounded down",
        "training/kv_loader.py",
        (
            (
                "        if consumed not in cuts[:-1]:",
                "        consumed = max(int(cut) for cut in cuts if cut <= consumed)\n        if False:",
            ),
        ),
        (LOADER,),
    ),
    Mutant(
        "skipped batches are read",
        "training/kv_loader.py",
        (
            (
                "            while pending or following is not None:\n",
                "            for skipped in itertools.islice(self._sampler.batches_of(self._epoch), done):\n"
                "                self._read(skipped)\n"
                "            while pending or following is not None:\n",
            ),
        ),
        (LOADER,),
    ),
    Mutant(
        "keys and values are swapped",
        "training/kv_loader.py",
        (
            (
                '(decoded["key"][layer], decoded["value"][layer])',
                '(decoded["value"][layer], decoded["key"][layer])',
            ),
        ),
        (LOADER,),
    ),
    Mutant(
        "layers come in another order",
        "training/kv_loader.py",
        (
            (
                "zip((group.layers[slot] for slot in slots), values, strict=True)",
                "zip((group.layers[slot] for slot in slots), values.flip(0), strict=True)",
            ),
        ),
        (LOADER,),
    ),
    Mutant(
        "a buffer is used again too early",
        "training/kv_loader.py",
        (
            (
                "        tensor = torch.from_numpy(np.ascontiguousarray(array))\n",
                "        tensor = _BUFFERS.setdefault((array.dtype.str, array.ndim), torch.from_numpy(np.zeros(10**7, array.dtype)))\n        tensor = tensor[: array.size].view(array.shape)\n        tensor.copy_(torch.from_numpy(np.ascontiguousarray(array)))\n",
            ),
            ("_THREADS = 4\n", "_THREADS = 4\n_BUFFERS: dict[object, Tensor] = {}\n"),
        ),
        (LOADER,),
    ),
    Mutant(
        "threads are left running",
        "training/kv_loader.py",
        (("            held.callback(executor.shutdown, wait=True, cancel_futures=True)\n", ""),),
        (LOADER,),
    ),
    Mutant(
        "a missing shard is read as nothing",
        "kvstore/arrays.py",
        (('"fill_missing_data_reads": False}', '"fill_missing_data_reads": True}'),),
        (FAULTS,),
    ),
]


def mutate(mutant: Mutant, folder: Path) -> None:
    for package in ("kvstore", "pipeline", "training", "configs", "tests"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("node_modules", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    text = (folder / mutant.file).read_text(encoding="utf-8")
    for old, new in mutant.changes:
        text = text.replace(old, new)
    (folder / mutant.file).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_mutant_can_still_be_made(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert [text.count(old) for old, _ in mutant.changes] == [1] * len(mutant.changes), f"write it anew for {mutant.file}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_mutant_is_killed(mutant: Mutant, tmp_path: Path) -> None:
    mutate(mutant, tmp_path)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-n0",
        "--timeout=60",  # a mutant that hangs is dead
        "-p",
        "no:cacheprovider",
        "--basetemp",
        str(tmp_path / "temp"),
    ]
    done = subprocess.run(
        [*command, *mutant.tests],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HYPOTHESIS_STORAGE_DIRECTORY": str(tmp_path / "hypothesis")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, f"{mutant.name} lives:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert " failed" in done.stdout
    assert "error" not in done.stdout.splitlines()[-1], "a test has to fail, not to break"
