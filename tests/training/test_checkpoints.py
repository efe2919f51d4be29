"""Checkpoints that somebody changed or a crash cut short: refused with the file's name, or passed over; never loaded in part."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.cli import main
from pipeline.models.load import build_student
from tests.checkpoints import byte_tokenizer
from tests.training.test_trainer import metrics, settings, weights
from training.checkpoint_files import read_tensors, refuse_damaged, refuse_other_optimizer, refuse_other_schedule
from training.checkpoints import newest, publish, staging, sweep
from training.run_folder import TrainSummary
from training.trainer import run_training

NEXT = r"; remove the folder .*checkpoint-6 to continue with --resume from the checkpoint before it"
FILES = ["trainer_state.json", "model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
"""What a resumed run reads of a checkpoint."""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, store_path: Path, student: str) -> TrainSummary:
    """A run with checkpoints of steps 4 and 6, cut off before its end."""
    summary = run_training(settings(store_path, student, tmp_path_factory.mktemp("stopped") / "run", save_every=2))
    (summary.out / "summary.json").unlink()
    return summary


@pytest.fixture
def checkpoint(stopped: TrainSummary, tmp_path: Path) -> Path:
    """A copy of its newest checkpoint, to be damaged."""
    return Path(shutil.copytree(stopped.out / "checkpoint-6", tmp_path / "run" / "checkpoint-6"))


@pytest.fixture(scope="module")
def model(student: str) -> Any:
    return build_student(student, vocab_size=len(byte_tokenizer()), seed=0)[0]


class Hostile:
    """Makes a file where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self._proof),)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def made_empty(path: Path) -> None:
    path.write_bytes(b"")


def random_bytes(path: Path) -> None:
    path.write_bytes(torch.randint(256, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.uint8).numpy().tobytes())


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def missing(path: Path) -> None:
    path.unlink()


def hostile(path: Path) -> None:
    torch.save(Hostile(path.parent.parent / "proof"), path)


def as_before_zip(path: Path) -> None:
    torch.save(Hostile(path.parent.parent / "proof"), path, _use_new_zipfile_serialization=False)


def nested(path: Path) -> None:
    path.write_text("[" * 100_000)


def a_list(path: Path) -> None:
    path.write_text("[1, 2]")


DAMAGE = [truncated, made_empty, random_bytes, a_folder, a_pipe, endless, missing]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, damage) for name in FILES for damage in DAMAGE),
        *((name, damage) for name in FILES if name.endswith((".pt", ".pth")) for damage in (hostile, as_before_zip)),
        *((name, damage) for name in FILES if name.endswith(".json") for damage in (nested, a_list)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_damaged_file_of_a_checkpoint_is_named_and_none_of_its_code_runs(
    name: str, damage: Callable[[Path], None], checkpoint: Path, model: Any
) -> None:
    damage(checkpoint / name)
    named = "checkpoint-6: got no rng_state" if (name, damage) == ("rng_state.pth", missing) else re.escape(name)
    with pytest.raises(ValueError, match=rf"{named}.*{NEXT}") as raised:
        refuse_damaged(checkpoint, model)
    assert "\n" not in str(raised.value)
    assert not (checkpoint.parent / "proof").exists()


def test_what_a_run_wrote_passes(checkpoint: Path, model: Any) -> None:
    refuse_damaged(checkpoint, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"global_step": "6"}, r"global_step: got '6', expected a valid integer", id="text"),
        pytest.param({"global_step": -6}, "global_step: got -6, expected greater than or equal to 1", id="negative"),
        pytest.param({"global_step": 2**70}, "global_step: got 1180591620717411303424, expected less than", id="huge"),
        pytest.param({"global_step": True}, "global_step: got True, expected a valid integer", id="a truth"),
        pytest.param({"global_step": 5}, "global_step: got 5, expected 6, as the folder is named", id="of another step"),
        pytest.param({"save_steps": 0}, "save_steps: got 0, expected greater than 0", id="no interval"),
        pytest.param(
            {"log_history": [{"ce": "low"}]}, r"log_history.0.ce: got 'low', expected a valid number", id="a text as a loss"
        ),
        pytest.param({"log_history": 3}, "log_history: got 3, expected a valid list", id="no history"),
        pytest.param({"surprise": 1}, "surprise: got 1, expected", id="an unknown field"),
        pytest.param({"stateful_callbacks": {}}, "stateful_callbacks: got no TrainerControl", id="no control"),
        pytest.param({"best_model_checkpoint": "/etc"}, "best_model_checkpoint: got '/etc'", id="a path"),
    ],
)
def test_a_state_of_the_trainer_with_other_values_is_refused(
    change: dict[str, Any], message: str, checkpoint: Path, model: Any
) -> None:
    path = checkpoint / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=rf"trainer_state\.json: {message}.*{NEXT}"):
        refuse_damaged(checkpoint, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda tensors: tensors.pop("lm_head.weight"), r"got no weights for \['lm_head.weight'\]", id="left out"),
        pytest.param(
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}),
            r"model.norm.weight: got shape \(3,\), expected \(32,\)",
            id="another shape",
        ),
        pytest.param(
            lambda tensors: tensors.update({"extra": torch.zeros(3)}), r"extra: got shape \(3,\), expected no such", id="more"
        ),
    ],
)
def test_weights_of_another_student_are_refused_where_the_trainer_would_take_what_fits(
    change: Callable[[dict[str, Any]], Any], message: str, checkpoint: Path, model: Any
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.safetensors: {message}.*{NEXT}"):
        refuse_damaged(checkpoint, model)


@pytest.mark.parametrize("name", ["scaler.pt", "pytorch_model.bin", "adapter_model.bin", "adapter_model.safetensors"])
def test_files_that_the_trainer_would_load_and_no_run_writes_are_refused(name: str, checkpoint: Path, model: Any) -> None:
    torch.save({}, checkpoint / name)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: got a file that the Trainer would load.*{NEXT}"):
        refuse_damaged(checkpoint, model)


def test_an_index_that_leads_out_of_the_folder_is_refused(checkpoint: Path, model: Any) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../model.safetensors"}}))
    with pytest.raises(ValueError, match=r"index\.json: got no weight_map of plain file names"):
        refuse_damaged(checkpoint, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda _: [1], "got no state and 2 param_groups", id="a list"),
        pytest.param(lambda d: {**d, "param_groups": d["param_groups"][:1]}, "got no state and 2 param_groups", id="one group"),
        pytest.param(lambda d: {**d, "state": 3}, "got no state and 2 param_groups", id="no state"),
        pytest.param(lambda d: {**d, "state": {0: {}}}, r"state\[0\]: got another entry", id="an empty entry"),
        pytest.param(lambda d: {**d, "state": {99: d["state"][0]}}, r"state\[99\]: got another entry", id="of no parameter"),
        pytest.param(lambda d: {**d, "state": {0: d["state"][20]}}, r"state\[0\]: got another shape", id="of another"),
        pytest.param(lambda d: group_with(d, betas=(0.9, "x")), r"param_groups\[0\]: betas: got \(0.9, 'x'\)", id="a text"),
        pytest.param(lambda d: group_with(d, lr=float("nan")), r"param_groups\[0\]: lr: got nan", id="no number"),
        pytest.param(lambda d: group_with(d, params=[0]), r"param_groups\[0\].params: got others", id="other parameters"),
        pytest.param(lambda d: group_with(d, zap=1), r"param_groups\[0\]: got a field 'zap'", id="an unknown field"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str, checkpoint: Path, model: Any
) -> None:
    path = checkpoint / "optimizer.pt"
    torch.save(change(torch.load(path, weights_only=True)), path)
    with pytest.raises(ValueError, match=rf"optimizer\.pt: {message}"):
        refuse_other_optimizer(path, optimizer_of(model))


def group_with(found: dict[str, Any], **over: Any) -> dict[str, Any]:
    first, *rest = found["param_groups"]
    return {**found, "param_groups": [{**first, **over}, *rest]}


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """As the Trainer makes it: weight decay for matrices alone."""
    parameters = list(model.named_parameters())
    matrices, vectors = (
        [parameter for name, parameter in parameters if (parameter.ndim > 1 and "bias" not in name) == decays]
        for decays in (True, False)
    )
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return optimizer


def test_the_state_a_run_wrote_fits_its_optimizer(checkpoint: Path, model: Any) -> None:
    refuse_other_optimizer(checkpoint / "optimizer.pt", optimizer_of(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"base_lrs": [1e30, 1e30]}, r"base_lrs: got \[1e\+30, 1e\+30\], expected \[0.001, 0.001\]", id="rates"),
        pytest.param({"last_epoch": 10**9}, "last_epoch: got 1000000000, expected 6", id="step"),
        pytest.param({"step": 1}, "got a field 'step', expected none", id="a method replaced"),
        pytest.param({"_last_lr": "x"}, "_last_lr: got 'x', expected a value such as", id="text"),
    ],
)
def test_a_schedule_of_other_settings_is_refused(change: dict[str, Any], message: str, model: Any, tmp_path: Path) -> None:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer_of(model), lambda _: 1.0)
    torch.save({**schedule.state_dict(), "last_epoch": 6, **change}, tmp_path / "scheduler.pt")
    with pytest.raises(ValueError, match=rf"scheduler\.pt: {message}"):
        refuse_other_schedule(tmp_path / "scheduler.pt", schedule, 6)


def test_a_file_of_compressed_records_is_refused_before_it_is_unpacked(checkpoint: Path) -> None:
    with zipfile.ZipFile(checkpoint / "optimizer.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("optimizer/data.pkl", b"\0" * 10**6)
    with pytest.raises(ValueError, match=r"optimizer\.pt: got compressed or huge records"):
        read_tensors(checkpoint / "optimizer.pt")


# ---- whole runs


def copy_of(run: TrainSummary, out: Path) -> Any:
    """The stopped run in another place, to be resumed."""
    shutil.copytree(run.out, out)
    return run.config.model_copy(update={"out": out, "resume": True})


def test_resuming_from_a_hostile_optimizer_is_one_line_on_the_terminal(
    stopped: TrainSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = copy_of(stopped, tmp_path / "run")
    torch.save(Hostile(tmp_path / "proof"), tmp_path / "run" / "checkpoint-6" / "optimizer.pt")
    monkeypatch.setattr(sys, "argv", ["kvpipe", "train", "--resume", "--config", str(as_toml(config, tmp_path / "run.toml"))])
    with pytest.raises(SystemExit, match="1"):
        main()
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert re.search(rf"error: .*optimizer\.pt: .*none of its code was run{NEXT}", said)
    assert not (tmp_path / "proof").exists()


def as_toml(config: Any, path: Path) -> Path:
    """The settings that differ from the defaults, as a file for the command line."""
    table = {name: value for name, value in config.model_dump(mode="json", exclude_defaults=True).items() if name != "resume"}
    path.write_text("\n".join(["[train]", *(f"{name} = {json.dumps(value)}" for name, value in table.items())]))
    return path


def test_after_the_damaged_checkpoint_is_removed_the_run_goes_on_from_the_one_before(
    stopped: TrainSummary, tmp_path: Path
) -> None:
    config = copy_of(stopped, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-6" / "optimizer.pt"
    random_bytes(path)
    with pytest.raises(ValueError, match=r"optimizer\.pt"):
        run_training(config)
    shutil.rmtree(path.parent)
    resumed = run_training(config)
    assert weights(resumed.out) == weights(stopped.out)
    assert metrics(resumed.out) == metrics(stopped.out)


def test_an_optimizer_of_another_run_is_refused_before_a_step(stopped: TrainSummary, tmp_path: Path) -> None:
    config = copy_of(stopped, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-6" / "optimizer.pt"
    found = torch.load(path, weights_only=True)
    torch.save({**found, "state": {0: {name: torch.zeros(7) for name in ("step", "exp_avg", "exp_avg_sq")}}}, path)
    with pytest.raises(ValueError, match=rf"optimizer\.pt: state\[0\]: got another shape.*{NEXT}"):
        run_training(config)


def test_a_checkpoint_that_was_not_written_to_its_end_is_not_chosen_and_not_left(stopped: TrainSummary, tmp_path: Path) -> None:
    config = copy_of(stopped, tmp_path / "run")
    cut_short = tmp_path / "run" / "checkpoint-7"
    cut_short.mkdir()
    (cut_short / "config.json").write_text("{}")
    resumed = run_training(config)
    assert not cut_short.exists()
    assert weights(resumed.out) == weights(stopped.out)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 150 kB: the weights of the student fit, the state of its optimizer does not."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("small_files")
def test_a_checkpoint_that_cannot_be_written_leaves_no_half_of_itself(store_path: Path, student: str, tmp_path: Path) -> None:
    config = settings(store_path, student, tmp_path / "run", save_every=3)
    with pytest.raises(OSError, match=r"run/checkpoint-3: writing failed .*same command with --resume"):
        run_training(config)
    assert newest(tmp_path / "run") is None
    assert not list((tmp_path / "run").glob("*checkpoint*"))


def test_a_run_whose_checkpoint_could_not_be_written_goes_on_when_there_is_room(
    stopped: TrainSummary, store_path: Path, student: str, tmp_path: Path
) -> None:
    config = settings(store_path, student, tmp_path / "run", save_every=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
    try:
        with pytest.raises(OSError, match="writing failed"):
            run_training(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resumed = run_training(config.model_copy(update={"resume": True}))
    assert weights(resumed.out) == weights(stopped.out)
    assert sorted(path.name for path in resumed.out.glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.slow
def test_a_student_whose_weights_are_published_under_other_names_goes_on_from_its_checkpoint(
    store_path: Path, tmp_path: Path
) -> None:
    toml = tmp_path / "mixtral.toml"
    toml.write_text(
        '[config]\nmodel_type = "mixtral"\nhidden_size = 32\nintermediate_size = 32\nnum_hidden_layers = 2\nnum_attention_heads = 4\n'
        "num_key_value_heads = 1\nhead_dim = 8\nnum_local_experts = 2\nmax_position_embeddings = 128\n"
    )
    straight = run_training(settings(store_path, str(toml), tmp_path / "straight", save_every=3))
    stopped = settings(store_path, str(toml), tmp_path / "stopped", save_every=3)
    run_training(stopped)
    for name in ("summary.json", "model"):
        path = stopped.out / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    resumed = run_training(stopped.model_copy(update={"resume": True}))
    assert weights(resumed.out) == weights(straight.out)


# ---- names and order


def test_a_checkpoint_gets_its_name_when_it_is_whole_and_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        folder = staging(tmp_path) / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        publish(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    assert newest(tmp_path) == tmp_path / "checkpoint-10"


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".checkpoint.partial/checkpoint-3", ".gone-checkpoint-1", "checkpoint-4", "checkpoint-best", "runs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoint-5").symlink_to(tmp_path / "elsewhere")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-best", "elsewhere", "runs"]
