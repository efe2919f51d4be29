"""The command line as a user meets it: real processes, exit codes, messages, start-up cost."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ExtractConfig, load_config
from pipeline.models.presets import teacher_preset, teacher_preset_names
from tests import processes
from tests.checkpoints import lay_out_hub_cache, save_checkpoint
from tests.stores import random_source, small_spec, write_store

TEXT = Path(json.__file__)


def kvpipe(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return processes.kvpipe(*arguments, cwd=cwd, environment={"COLUMNS": "160"})


def fresh_kvpipe(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a new interpreter: what is imported, and variables that are read at import, count."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "160", **environment},
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local hub cache with a small Qwen2 of 28 query heads, 4 KV heads and head dim 128 under Qwen2-7B's id."""
    path = tmp_path_factory.mktemp("hub")
    checkpoint = save_checkpoint(
        path / "checkpoint",
        "qwen2",
        num_hidden_layers=2,
        hidden_size=256,
        head_dim=128,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=64,
        initializer_range=0.01,  # small enough for the default codec to pass the gate, as it does with trained models
    )
    lay_out_hub_cache(path / "home", "Qwen/Qwen2-7B", checkpoint)
    return path / "home"


def test_help_is_instant_and_imports_neither_torch_nor_ray() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = fresh_kvpipe("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert "kvpipe demo" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    script = (
        "import sys; from pipeline.cli import cli\n"
        "try: cli(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'transformers', 'zarr', 'numpy', 'pydantic'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(lambda teacher, student: ("plan", "--teacher", teacher, "--student", student, "--json"), id="plan"),
        pytest.param(lambda teacher, student: ("doctor", "--teacher", teacher, "--student", student, "--json"), id="doctor"),
    ],
)
@pytest.mark.slow
def test_presets_are_called_in_any_case_with_or_without_the_organisation(command: Any, tmp_path: Path) -> None:
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    names = [("qwen2-7b", "qwen2-0.5b"), ("Qwen2-7B", "Qwen/Qwen2-0.5B"), ("QWEN/qwen2-7B", "QWEN2-0.5B")]
    answers = []
    for teacher, student in names:
        done = processes.kvpipe(*command(teacher, student), cwd=tmp_path, environment=environment)
        assert done.returncode == 0, done.stderr
        named = re.sub("(?i)(qwen/)?qwen2-(7b|0.5b)", "NAME", done.stdout)
        answers.append(re.sub(r'"(\w*free\w*|tokens_that_fit)": \d+', "", named))  # the disk is not ours alone
    assert answers[0] == answers[1] == answers[2]


def test_a_preset_runs_offline_from_the_local_hub_cache(hub: Path, tmp_path: Path) -> None:
    done = fresh_kvpipe(
        *("extract", "--teacher", "qwen2-7b", "--data", TEXT, "--seq-len", "32", "--limit", "20", "--json"),
        cwd=tmp_path,
        HF_HOME=str(hub),
        HF_HUB_OFFLINE="0",
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (Path(summary["out"]).name, summary["num_samples"]) == ("qwen2-7b-kv", 20)
    assert "at most 1,000,000 tokens" in done.stderr
    assert "num_layers: the checkpoint has 2, preset 'qwen2-7b' expected 28" in done.stderr
    described = json.loads(kvpipe("inspect", "qwen2-7b-kv", "--json", cwd=tmp_path).stdout)
    assert described["complete"]
    assert described["groups"] == [
        {
            "path": "kv.zarr",
            "layers": "0-1",
            "num_kv_heads": 4,
            "key_dim": 128,
            "value_dim": 128,
            "codec": "mix",
        }
    ]


def test_without_the_cache_a_preset_fails_soon_in_one_message(tmp_path: Path) -> None:
    started = time.monotonic()
    done = fresh_kvpipe(
        *("extract", "--teacher", "qwen2-7b", "--data", TEXT), cwd=tmp_path, HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="0"
    )
    assert time.monotonic() - started < 5
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Qwen/Qwen2-7B" in done.stderr
    assert "hf download Qwen/Qwen2-7B" in done.stderr
    assert not (tmp_path / "qwen2-7b-kv").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        pytest.param(["extract"], 2, "--teacher is needed", id="no-teacher"),
        pytest.param(["extract", "--teacher", "./nowhere", "--data", "x.txt"], 2, "--data and --out are needed", id="no-out"),
        pytest.param(["extract", "--teacher", "./nowhere", "--data", "x", "--out", "o"], 1, "nowhere", id="bad-folder"),
        pytest.param(["extract", "--teacher", "gpt2", "--codec"], 2, "requires an argument", id="misuse"),
        pytest.param(["extract", "--teacher", "gpt2", "--seq-len", "x"], 2, "'x' is not a valid integer", id="type"),
        pytest.param(
            *(["extract", "--teacher", "gpt2", "--set", "sequence=1"], 1),
            "sequence: Extra inputs are not permitted; got 1\nknown settings are: teacher, data",
            id="unknown-setting",
        ),
        pytest.param(
            *(["extract", "--teacher", "gpt2", "--max-bytes", "9GX"], 1),
            "max_bytes: could not interpret byte unit: GX; got '9GX'",
            id="size",
        ),
        pytest.param(["extract", "--teacher", "gpt2", "--set", "seed"], 1, "expected name=value", id="bad-set"),
        pytest.param(
            ["extract", "--teacher", str(Path(__file__).parent), "--data", "x.txt", "--out", "o"],
            1,
            "config.json",
            id="no-model",
        ),
        pytest.param(
            *(["extract", "--config", "none.toml"], 1, "no file none.toml and no recipe of that name; recipes are llama"),
            id="no-config",
        ),
        pytest.param(["extract", "--config", "bad.toml"], 1, "bad.toml cannot be read as TOML", id="bad-config"),
        pytest.param(["inspect", "nothing"], 1, "nothing: manifest.json is missing", id="no-store"),
        pytest.param(["train", "--student", "s", "--out", "o"], 2, "--store is needed: a folder", id="train-no-store"),
        pytest.param(["train"], 2, "; --out is needed: the folder of the run. A table [train] in", id="train-nothing"),
        pytest.param(["train", "--steps", "0"], 1, "steps: Input should be greater than", id="train-wrong-and-missing"),
        pytest.param(["nonsense"], 2, "No such command 'nonsense'", id="no-command"),
    ],
)
def test_misuse_is_one_message_with_the_right_exit_status(
    arguments: list[str], status: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / "bad.toml").write_text("[extract")
    done = kvpipe(*arguments, cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
    assert message in done.stderr
    assert done.stdout == ""


def test_a_config_file_settings_and_flags_override_each_other_in_order(tmp_path: Path) -> None:
    teacher = save_checkpoint(tmp_path / "teacher", "llama", num_hidden_layers=2)
    (tmp_path / "run.toml").write_text(
        f'[extract]\nteacher = "{teacher}"\ndata = ["{TEXT}"]\nout = "store"\ncodec = "raw"\nseq_len = 64\nlimit = 3\n'
    )
    done = kvpipe(
        *("extract", "--config", "run.toml", "--set", "extract.codec=q8", "--set", "limit=4", "--limit", "5", "--json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    described = json.loads(kvpipe("inspect", "store", "--json", cwd=tmp_path).stdout)
    assert (described["groups"][0]["codec"], described["samples"]) == ("q8", 5)
    shown = kvpipe("inspect", "store", cwd=tmp_path).stdout
    assert "complete" in shown
    assert "5 (" in shown
    assert "none: the teacher's own geometry" in shown


def test_of_a_teacher_that_rotates_nothing_it_is_said_that_its_keys_are_the_same_before_and_after(tmp_path: Path) -> None:
    teacher = save_checkpoint(tmp_path / "teacher", "gpt2")
    done = kvpipe(
        "extract", "--teacher", teacher, "--data", TEXT, "--out", "store", "--codec", "raw", "--limit", "2", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "layers 0-3 rotate no keys: those before and after rotation are the same" in done.stderr
    shown = " ".join(kvpipe("inspect", "store", cwd=tmp_path).stdout.split())
    assert "the same before and after rotation in layers 0-3, which rotate none" in shown


@pytest.mark.parametrize("arguments", [["inspect", "store"], ["inspect", "store", "--json"], ["verify", "store"], ["--help"]])
def test_a_reader_that_has_had_enough_is_no_error(arguments: list[str], tmp_path: Path) -> None:
    write_store(tmp_path / "store", random_source(small_spec(num_layers=40), [9]), "raw")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment, check=False)
    os.close(writer)
    assert [line for line in done.stderr.splitlines() if line and not line.startswith("verify:")] == []
    assert done.returncode == 1


def test_a_shipped_recipe_is_found_by_its_name_and_a_file_goes_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = Path("qwen2-7b-to-0.5b")
    assert load_config(ExtractConfig, "extract", name, (), {}).teacher == "qwen2-7b"
    name.write_text('[extract]\nteacher = "mine"\n')
    assert load_config(ExtractConfig, "extract", name, (), {}).teacher == "mine"
    assert "name of a shipped recipe" in " ".join(kvpipe("train", "--help").stdout.split())


def test_the_presets_asked_for_exist_and_are_listed() -> None:
    listed = kvpipe("extract", "--list").stdout.split()
    assert listed == list(teacher_preset_names())
    assert set(listed) >= {
        *("qwen2-7b", "qwen2-0.5b", "qwen2-1.5b", "qwen2.5-7b", "qwen3-8b", "llama-3.1-8b", "llama-2-7b", "llama-2-70b"),
        *("tinyllama-1.1b", "mistral-7b", "gpt2"),
    }
    for name in listed:
        preset = teacher_preset(name)
        assert preset is not None
        assert preset.max_tokens == 1_000_000


def test_a_file_of_ids_that_is_none_is_named_with_its_option(tmp_path: Path) -> None:
    for ids, what in ((tmp_path / "nope.txt", "No such file"), (tmp_path, "Is a directory")):
        done = kvpipe("drop", "store", "--ids", ids)
        assert done.returncode == 1
        assert re.search(rf"--ids: .* cannot be read \({what}", done.stderr)
