"""What can be known to fail after hours is refused before the first step: nothing is trained, and nothing is left of the trial."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback
from transformers.integrations import integration_utils

from tests.checkpoints import byte_tokenizer, save_checkpoint, tiny_model
from tests.stores import write_store
from tests.training.conftest import make_texts, teacher_source
from tests.training.test_trainer import metrics, settings
from training.rehearsal import negative_tokens, rehearse_checkpoint, rehearse_saving, settle_generation
from training.report import METRICS
from training.trainer import run_training


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("pretrained") / "student", "qwen2", seed=3, num_hidden_layers=2)


def with_generation(pretrained: Path, folder: Path, content: str | bytes | dict[str, Any]) -> Path:
    """The student with other generation settings."""
    shutil.copytree(pretrained, folder)
    text = json.dumps(content) if isinstance(content, dict) else content
    (folder / "generation_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


# ---- generation settings


def test_a_student_with_sampling_flags_that_contradict_is_trained_and_saved_without_them(
    pretrained: Path, store_path: Path, tmp_path: Path
) -> None:
    given = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}
    student = with_generation(pretrained, tmp_path / "student", given)
    said: list[str] = []
    summary = run_training(settings(store_path, str(student), tmp_path / "run", steps=4, save_every=2), said.append)
    assert [line for line in said if "generation settings temperature, top_p contradict" in line] == said
    assert len(said) == 1
    for folder in (summary.out / "model", summary.out / "checkpoint-2"):
        saved = GenerationConfig.from_pretrained(folder)
        assert (saved.do_sample, saved.temperature, saved.top_p) == (False, None, None)
        assert 2 in saved.eos_token_id
    assert AutoModelForCausalLM.from_pretrained(summary.out / "model").generation_config.pad_token_id == 257


def test_a_negative_special_token_is_called_negative() -> None:
    given = GenerationConfig(pad_token_id=-1, eos_token_id=[2, -7], bos_token_id=1)
    assert negative_tokens(given) == ["eos_token_id", "pad_token_id"]
    assert negative_tokens(GenerationConfig(**TOKENS)) == negative_tokens(None) == []


TOKENS = {"eos_token_id": [2, 7], "bos_token_id": 1, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("given", "dropped"),
    [
        *(
            pytest.param({"do_sample": False, name: value}, [name], id=f"{name} and no sampling")
            for name, value in {
                **{"temperature": 0.3, "top_p": 0.5, "top_k": 7, "typical_p": 0.5, "min_p": 0.1, "top_h": 0.4},
                **{"epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
            }.items()
        ),
        pytest.param({"temperature": 0.3, "top_k": 0}, ["temperature", "top_k"], id="sampling not mentioned"),
        pytest.param(
            {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0}, ["early_stopping", "length_penalty"], id="beams"
        ),
        pytest.param({"length_penalty": 0.5}, ["length_penalty"], id="beams not mentioned"),
        pytest.param({"output_scores": True}, ["output_scores"], id="scores without a record"),
        pytest.param({"use_cache": False, "cache_implementation": "static"}, ["cache_implementation"], id="cache"),
        pytest.param({"do_sample": True, "temperature": 0.3, "num_beams": 4, "early_stopping": True}, [], id="none"),
        pytest.param({"repetition_penalty": 1.1, "chat_format": "chatml"}, [], id="unknown fields"),
    ],
)
def test_no_more_generation_settings_are_dropped_than_contradict(
    given: dict[str, Any], dropped: list[str], tmp_path: Path
) -> None:
    model = tiny_model("qwen2", num_hidden_layers=1)
    model.generation_config = GenerationConfig(**given, **TOKENS)
    assert sorted(settle_generation(model)) == sorted(dropped)
    model.generation_config.temporary = 1  # changed, so that transformers is strict
    model.generation_config.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    for name, value in {**given, **TOKENS}.items():
        assert getattr(saved, name) == (None if name in dropped else value), name


def test_a_padding_token_of_minus_one_is_dropped_and_one_that_is_no_number_is_refused() -> None:
    model = tiny_model("qwen2", num_hidden_layers=1)
    model.generation_config = GenerationConfig(pad_token_id=-1, eos_token_id=2)
    assert settle_generation(model) == ["pad_token_id"]
    model.generation_config = GenerationConfig(eos_token_id="two")
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id: got 'two', expected a token id"):
        settle_generation(model)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("{not JSON", id="no JSON"),
        pytest.param("", id="nothing"),
        pytest.param("[1]", id="a list"),
        pytest.param("null", id="null"),
        pytest.param("{}".encode("utf-16"), id="UTF-16"),
        pytest.param('{"a":' * 100_000, id="nested"),
        pytest.param({"pad_token_id": "x"}, id="a text for a number"),
        pytest.param({"max_new_tokens": 0}, id="a value transformers refuses"),
        pytest.param({"num_return_sequences": 2}, id="a combination transformers refuses"),
        pytest.param({"watermarking_config": 3}, id="a number for a record"),
        pytest.param({"validate": 3}, id="the name of a method"),
    ],
)
def test_a_damaged_file_of_generation_settings_is_named_before_anything_is_trained(
    content: Any, pretrained: Path, store_path: Path, tmp_path: Path
) -> None:
    student = with_generation(pretrained, tmp_path / "student", content)
    with pytest.raises(
        ValueError,
        match=r"generation_config\.json.*(these are no generation settings .*mend the file, or remove|a JSON file is damaged)|a JSON file is damaged.*generation_config\.json",
    ):
        run_training(settings(store_path, str(student), tmp_path / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


# ---- saving


def test_the_trial_costs_no_copy_of_the_weights_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = tiny_model("qwen2"), []
    genuine = type(byte_tokenizer()).save_pretrained

    def save(tokenizer: Any, folder: Path, **over: Any) -> Any:
        sizes.append((Path(folder) / "model.safetensors").stat().st_size)
        return genuine(tokenizer, folder, **over)

    monkeypatch.setattr(type(byte_tokenizer()), "save_pretrained", save)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rehearse_saving(model, byte_tokenizer(), tmp_path / "runs" / "new")
    rehearse_checkpoint(model, tmp_path / "runs" / "new")
    assert sizes[0] < 20_000 < sum(tensor.numel() * 4 for tensor in before.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(tmp_path.iterdir()) == []


def shares_undeclared(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def of_another_shape(model: Any) -> None:
    model.config.intermediate_size += 1


def unwritable_config(model: Any) -> None:
    model.config.note = {1, 2}


def own_generation(model: Any) -> None:
    model.generation_config.note = object()


@pytest.mark.parametrize("damage", [shares_undeclared, of_another_shape, unwritable_config, own_generation])
def test_a_student_that_cannot_be_saved_and_loaded_again_is_refused(damage: Callable[[Any], None], tmp_path: Path) -> None:
    model = tiny_model("qwen2", num_hidden_layers=2)
    damage(model)
    with pytest.raises(ValueError, match=r"student: (it|what is saved of it) cannot be .*; nothing was trained"):
        rehearse_saving(model, byte_tokenizer(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.init_kwargs["note"] = {1, 2}
    with pytest.raises(ValueError, match="student: its tokenizer cannot be saved and loaded again"):
        rehearse_saving(tiny_model("qwen2", num_hidden_layers=1), tokenizer, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["/proc/kvpipe-run", "/dev/null/run"])
def test_a_place_where_nothing_can_be_written_is_refused(out: str, store_path: Path, student: str) -> None:
    with pytest.raises(ValueError, match=rf"out: {out} cannot be written .*choose another --out"):
        run_training(settings(store_path, student, Path(out)))


def test_a_run_leaves_a_link_in_its_folder_alone(store_path: Path, student: str, tmp_path: Path) -> None:
    config = settings(store_path, student, tmp_path / "run", steps=2)
    run_training(config)
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "model").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"run holds model as a symbolic link, and training would write to wherever it leads"):
        run_training(config.model_copy(update={"resume": True}))
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.slow
def test_a_partial_file_that_is_a_link_is_replaced_and_not_followed(store_path: Path, student: str, tmp_path: Path) -> None:
    config = settings(store_path, student, tmp_path / "run", steps=2)
    run_training(config)
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run" / f".{METRICS}.partial").symlink_to(tmp_path / "mine")
    os.mkfifo(tmp_path / "run" / ".summary.json.partial")
    run_training(config.model_copy(update={"resume": True}))
    assert (tmp_path / "mine").read_text() == "mine"


# ---- room


@pytest.fixture
def free_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how much the disk says it has."""

    def set_to(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12 - free, free))

    return set_to


def test_a_disk_without_room_for_one_checkpoint_and_the_model_is_refused(
    free_bytes: Callable[[int], None], store_path: Path, student: str, tmp_path: Path
) -> None:
    said: list[str] = []
    free_bytes(500_000)  # the student has 134 kB of weights, a checkpoint three times that
    with pytest.raises(
        ValueError, match=r"has 0\.00 GB free, and a checkpoint takes .*expected room for one of each; make room"
    ):
        run_training(settings(store_path, student, tmp_path / "run", save_every=2), said.append)
    assert not (tmp_path / "run").exists()
    free_bytes(700_000)
    run_training(settings(store_path, student, tmp_path / "run", save_every=2), said.append)
    assert len(said) == 1
    assert re.search(r"too little for the 0\.00 GB they take together at most; make room, or save less often", said[0])


@pytest.mark.slow
def test_what_a_resumed_run_replaces_counts_as_room(
    free_bytes: Callable[[int], None], store_path: Path, student: str, tmp_path: Path
) -> None:
    config = settings(store_path, student, tmp_path / "run", save_every=2)
    run_training(config)
    (tmp_path / "run" / "summary.json").unlink()
    free_bytes(100_000)
    run_training(config.model_copy(update={"resume": True}))


# ---- LoRA


def test_lora_layers_that_cannot_be_merged_are_refused_before_a_step(
    pretrained: Path, store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    def merge(_self: Any, **_over: Any) -> None:
        raise NotImplementedError("not of these weights")

    monkeypatch.setattr(Linear, "merge", merge)
    with pytest.raises(ValueError, match=r"lora_rank: the layers of Qwen2ForCausalLM cannot be merged .*not of these weights"):
        run_training(settings(store_path, str(pretrained), tmp_path / "run", lora_rank=2))
    assert not (tmp_path / "run").exists()


# ---- trackers


class Diary(TrainerCallback):  # type: ignore[misc]
    """A tracker that breaks at one event."""

    events: ClassVar[list[str]] = []
    breaks_at = ""

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        self._note("on_train_begin")

    def on_log(self, *_args: Any, **_kwargs: Any) -> None:
        self._note("on_log")

    def _note(self, event: str) -> None:
        self.events.append(event)
        if event == self.breaks_at:
            raise ConnectionResetError("the server is gone")


@pytest.fixture
def diary(monkeypatch: pytest.MonkeyPatch) -> type[Diary]:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "diary", Diary)
    monkeypatch.setattr(Diary, "events", [])
    return Diary


def test_a_tracker_that_fails_on_the_way_is_said_once_and_ends_no_run(
    diary: type[Diary], store_path: Path, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diary, "breaks_at", "on_log")
    said: list[str] = []
    summary = run_training(settings(store_path, student, tmp_path / "run", report_to="diary"), said.append)
    assert diary.events == ["on_train_begin", "on_log"]
    assert said == [
        "report_to: diary failed and gets no more of this run (ConnectionResetError: the server is gone); metrics.jsonl has everything"
    ]
    assert (summary.steps, metrics(summary.out)[-1]["step"]) == (8, 8)


@pytest.mark.slow
def test_a_tracker_hears_of_every_line_of_metrics(diary: type[Diary], store_path: Path, student: str, tmp_path: Path) -> None:
    run_training(settings(store_path, student, tmp_path / "run", steps=2, eval_fraction=0, report_to=["diary"]))
    assert diary.events == ["on_train_begin", "on_log", "on_log", "on_log"], "two steps, and the end"


def test_a_tracker_that_cannot_start_is_refused(
    diary: type[Diary], store_path: Path, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diary, "breaks_at", "on_train_begin")
    with pytest.raises(ValueError, match=r"report_to: diary cannot start \(ConnectionResetError: .*leave it out"):
        run_training(settings(store_path, student, tmp_path / "run", report_to="diary"))
    assert metrics(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("wandbb", r"report_to: got 'wandbb', expected one of .*wandb", id="no such tracker"),
        pytest.param("clearml", "report_to: clearml cannot be used here .*install it, or leave it out", id="not installed"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_before_the_student_is_built(
    name: str, message: str, store_path: Path, student: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run_training(settings(store_path, student, tmp_path / "run", report_to=name))
    assert not (tmp_path / "run").exists()


# ---- nothing to learn from


@pytest.mark.parametrize("over", [{}, {"ce_only": True}, {"adapter": "linear"}], ids=["with KV", "tokens alone", "adapter"])
def test_a_store_with_nothing_to_learn_from_is_refused_before_variances_are_measured(
    over: dict[str, Any], student: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    source = teacher_source(make_texts(10))
    masks = {index: ids * 0 for index, ids in enumerate(source.input_ids)}
    path = write_store(
        tmp_path / "kv", source, "raw", tokenizer=tokenizer_folder, loss_masks={n: m.astype("u1") for n, m in masks.items()}
    )
    with pytest.raises(
        ValueError, match=r"store: .*kv has nothing to learn from: got 10 samples .*extract conversations in which"
    ):
        run_training(settings(path, student, tmp_path / "run", **over))
    assert not (tmp_path / "run").exists()


def test_a_store_of_attention_sinks_alone_has_no_keys_and_values_to_learn_from(
    store_path: Path, student: str, tmp_path: Path
) -> None:
    over: dict[str, Any] = {"sink_tokens": 1000}
    with pytest.raises(ValueError, match=r"nothing to learn from but the tokens: .*behind the first sink_tokens \(1000\)"):
        run_training(settings(store_path, student, tmp_path / "run", **over))
    run_training(settings(store_path, student, tmp_path / "run", steps=1, ce_only=True, **over))
