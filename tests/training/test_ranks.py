"""Several ranks train as one, whoever starts them and wherever they were interrupted. Real processes and collectives."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import randomised, tiny_config
from tests.stores import Source, begin_store, write_shard
from tests.training.test_trainer import COUNTS, counted_store, logged, metrics, settings
from training.run_folder import TrainSummary
from training.student import compile_around_attention
from training.trainer import run_training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MAIN = """
import os, sys
from pathlib import Path
from training import trainer
from training.config import TrainConfig

if stop := int(os.environ.get("STOP_AFTER", "0")):
    genuine = trainer.KVDistillTrainer.compute_loss
    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == stop:
            os._exit(0)
        return genuine(self, *args, **kwargs)
    trainer.KVDistillTrainer.compute_loss = compute_loss
trainer.run_training(TrainConfig.model_validate_json(Path(sys.argv[1]).read_text()))
"""
SHARDED_MAIN = (
    """
# accelerate shards on GPUs only: it is told that these ranks are some. Shards and collectives are torch's own, over gloo.
import torch
from accelerate.state import DistributedType, PartialState
from torch.distributed.tensor import DTensor
torch.distributed.init_process_group("gloo")
PartialState._prepare_backend = lambda *_args, **_kwargs: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
from training.distill import KVDistillTrainer
as_it_is, steps = KVDistillTrainer.compute_loss, []
def compute_loss(self, *args, **kwargs):
    if steps:
        return as_it_is(self, *args, **kwargs)
    steps.append(self.state.global_step)
    weights = dict(self.model.named_parameters())
    assert all(isinstance(weight, DTensor) for weight in weights.values()), weights.keys()
    held, every = sum(w.to_local().numel() for w in weights.values()), sum(w.numel() for w in weights.values())
    assert held <= 0.6 * every, (held, every)
    return as_it_is(self, *args, **kwargs)
KVDistillTrainer.compute_loss = compute_loss
"""
    + MAIN
)
NAMES = ("loss", "ce", "kv_loss", "grad_norm", "eval_loss", "eval_nats_per_byte", "tokens")


TORCHRUN = ("torch.distributed.run", "--nproc-per-node={number}", "--master-port={port}")
ACCELERATE = (
    "accelerate.commands.launch",
    "--cpu",
    "--num_processes={number}",
    "--num_machines=1",
    "--main_process_port={port}",
)


def on_ranks(
    config: Any, folder: Path, number: int, stop_after: int = 0, launcher: tuple[str, ...] = TORCHRUN, main: str = MAIN
) -> None:
    """Run a training on so many ranks; all of them vanish in a step if told so."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "config.json").write_text(config.model_dump_json())
    (folder / "main.py").write_text(main)
    command = [sys.executable, "-m", *(part.format(number=number, port=port) for part in launcher)]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "STOP_AFTER": str(stop_after)}
    subprocess.run([*command, str(folder / "main.py"), str(folder / "config.json")], check=True, env=environment, timeout=600)


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize(
    "over", [{}, {"adapter": "orthogonal"}, {"tail": "short", "balance_tokens": True}, {"batch_tokens": 400}], ids=str
)
def test_ranks_train_as_one(number: int, over: dict[str, Any], store_path: Path, student: str, tmp_path: Path) -> None:
    one = run_training(settings(store_path, student, tmp_path / "one", **over))
    on_ranks(one.config.model_copy(update={"out": tmp_path / "run"}), tmp_path, number)
    for name in NAMES:
        assert logged(tmp_path / "run", name) == pytest.approx(logged(one.out, name), rel=2e-4), name


def test_ranks_train_as_one_on_samples_that_the_data_had_several_times(
    student: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    store = counted_store(tmp_path / "kv", tokenizer_folder, list(range(len(COUNTS) + 2)), [*COUNTS, 3, 1])
    one = run_training(settings(store, student, tmp_path / "one"))
    on_ranks(one.config.model_copy(update={"out": tmp_path / "run"}), tmp_path, 2)
    for name in NAMES:
        assert logged(tmp_path / "run", name) == pytest.approx(logged(one.out, name), rel=2e-4), name


def test_ranks_that_see_other_samples_of_a_growing_store_are_refused(
    source: Source, store_path: Path, student: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    manifest, calibration, tasks = begin_store(tmp_path / "kv", source, codec="raw", tokenizer=tokenizer_folder)
    for shard, task in enumerate(tasks):
        write_shard(tmp_path / "kv", source, manifest, calibration, shard, task)
        if shard == len(tasks) - 2:
            shutil.copytree(tmp_path / "kv", tmp_path / "before")  # as one rank found it, a moment before the other
    looks = """
import os, sys
from pathlib import Path
from training.config import TrainConfig
from training.trainer import run_training
config = TrainConfig.model_validate_json(Path(sys.argv[1]).read_text())
try:
    run_training(config.model_copy(update={"store": config.store[: -len("kv")] + ("before", "kv")[int(os.environ["RANK"])]}))
except ValueError as error:
    Path(sys.argv[1]).with_name(f"told-{os.environ['RANK']}").write_text(str(error))
"""
    on_ranks(settings(tmp_path / "kv", student, tmp_path / "run"), tmp_path, 2, main=looks)
    for rank in (0, 1):
        told = (tmp_path / f"told-{rank}").read_text()
        assert "grew while the ranks opened it: they see 4" in told, told
        assert "finish its extraction first" in told


def test_accelerate_launch_starts_ranks_that_train_as_one(store_path: Path, student: str, tmp_path: Path) -> None:
    one = run_training(settings(store_path, student, tmp_path / "one"))
    on_ranks(one.config.model_copy(update={"out": tmp_path / "run"}), tmp_path, 2, launcher=ACCELERATE)
    for name in NAMES:
        assert logged(tmp_path / "run", name) == pytest.approx(logged(one.out, name), rel=2e-4), name


@pytest.mark.parametrize("step", range(1, 8))
def test_a_run_interrupted_in_any_step_goes_on_bit_by_bit_in_another_process(
    step: int, store_path: Path, student_with_dropout: str, tmp_path: Path
) -> None:
    whole = run_training(settings(store_path, student_with_dropout, tmp_path / "whole", save_every=1))
    config = whole.config.model_copy(update={"out": tmp_path / "run"})
    on_ranks(config, tmp_path, 1, stop_after=step)
    assert not (config.out / "summary.json").exists()
    run_training(config.model_copy(update={"resume": True}))
    assert metrics(config.out) == metrics(whole.out)


def test_a_run_goes_on_with_more_and_with_fewer_ranks(store_path: Path, student: str, tmp_path: Path) -> None:
    one = run_training(settings(store_path, student, tmp_path / "one"))
    config = one.config.model_copy(update={"out": tmp_path / "run", "save_every": 1})
    for number, stop_after in ((2, 2), (4, 5), (1, 0)):
        on_ranks(config, tmp_path, number, stop_after)
        config = config.model_copy(update={"resume": True})
    for name in NAMES:
        assert logged(tmp_path / "run", name) == pytest.approx(logged(one.out, name), rel=2e-4), name


def test_sharded_weights_train_as_whole_ones_and_are_saved_whole(store_path: Path, student: str, tmp_path: Path) -> None:
    one = run_training(settings(store_path, student, tmp_path / "one"))
    config = one.config.model_copy(update={"out": tmp_path / "run", "fsdp": True, "save_every": 3})
    on_ranks(config, tmp_path, 2, stop_after=5, main=SHARDED_MAIN)
    assert not (config.out / "summary.json").exists()
    on_ranks(config.model_copy(update={"resume": True}), tmp_path, 4, main=SHARDED_MAIN)
    for name in NAMES:
        assert logged(tmp_path / "run", name) == pytest.approx(logged(one.out, name), rel=2e-4), name
    whole, sharded = (AutoModelForCausalLM.from_pretrained(folder / "model") for folder in (one.out, config.out))
    for (name, expected), (_, found) in zip(whole.named_parameters(), sharded.named_parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=name)


def test_sharding_where_accelerate_would_not_is_refused(
    store_path: Path, student: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        on_ranks(settings(store_path, student, tmp_path / "run", fsdp=True), tmp_path, 2)
    assert "fsdp: got ranks on CPUs, expected one GPU for each" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_ray_starts_ranks_that_train_as_one(store_path: Path, student: str, tmp_path: Path) -> None:
    one = run_training(settings(store_path, student, tmp_path / "one"))
    done = train_on_ray(one, "run", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "8/8" in done.stderr
    for name in NAMES:
        assert logged(tmp_path / "run", name) == pytest.approx(logged(one.out, name), rel=2e-4), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "run"], "Ray's notes are gone"


def test_what_a_rank_on_ray_refuses_is_said_as_it_is(store_path: Path, student: str, tmp_path: Path) -> None:
    one = run_training(settings(store_path, student, tmp_path / "one"))
    done = train_on_ray(one, "run", tmp_path, "--set", 'layers="7"')
    assert done.returncode != 0
    assert "layers: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def train_on_ray(one: TrainSummary, name: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The command with two ranks, in the folder of the runs, so that paths are relative."""
    given = one.config.model_dump(mode="json", exclude_unset=True, exclude={"store", "student", "out"})
    flags = [item for key, value in given.items() for item in ("--set", f"{key}={value}")]
    where = ["--store", str(one.config.store), "--student", one.config.student, "--out", name]
    command = [sys.executable, "-m", "pipeline.cli", "train", *where, *flags, *more, "--ray-workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_a_compiled_student_trains_as_a_plain_one(store_path: Path, student: str, tmp_path: Path) -> None:
    one = run_training(settings(store_path, student, tmp_path / "one"))
    on_ranks(one.config.model_copy(update={"out": tmp_path / "run", "torch_compile": True}), tmp_path, 1)
    for name in NAMES:
        assert logged(tmp_path / "run", name) == pytest.approx(logged(one.out, name), rel=2e-4), name


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_all_but_what_holds_attention_is_compiled() -> None:
    model = randomised(tiny_config("llama"))
    compile_around_attention(model)
    compiled = {name for name, module in model.named_modules() if module._compiled_call_impl is not None}
    assert {"lm_head", "model.norm", "model.layers.0.mlp", "model.layers.1.input_layernorm"} <= compiled
    assert not any("attn" in name or name in ("", "model", "model.layers.0") for name in compiled)
