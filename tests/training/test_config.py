"""Settings of a run: what they refuse, what follows from them, and how quickly they are there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pydantic
import pytest

from training.config import TrainConfig


def config(**over: Any) -> TrainConfig:
    return TrainConfig(**{"store": Path("store"), "student": "qwen2-tiny", "out": Path("run"), **over})


def test_settings_load_without_torch_or_transformers() -> None:
    code = "import sys, training.config; print(sorted({'torch', 'transformers', 'numpy', 'ray'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "[]"


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(pydantic.ValidationError, match="learning_rat"):
        config(learning_rat=1e-3)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        pytest.param({"ce_only": True, "shuffle_targets": True}, "expected one", id="two controls at once"),
        pytest.param({"batch_size": 16, "micro_batch_size": 5}, "divisor of batch_size 16", id="uneven micro-batches"),
        pytest.param({"batch_size": 1, "shuffle_targets": True}, "no other sample", id="nothing to shuffle with"),
        pytest.param({"micro_batch_tokens": 512}, "without batch_tokens", id="a part of nothing"),
        pytest.param({"batch_tokens": 512, "micro_batch_size": 4}, "expected micro_batch_tokens", id="samples of tokens"),
        pytest.param({"batch_tokens": 512, "micro_batch_tokens": 513}, "at most batch_tokens 512", id="a part larger than all"),
        pytest.param({"batch_tokens": 512, "shuffle_targets": True}, "has no other", id="perhaps nothing to shuffle with"),
        pytest.param({"fsdp": True, "adapter": "linear"}, "not sharded", id="sharded adapters"),
        pytest.param({"fsdp": True, "lora_rank": 4}, "cannot be merged", id="sharded LoRA"),
        pytest.param({"kv_until": 1.5}, "less than or equal to 1", id="more than all steps"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(over: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        config(**over)


@pytest.mark.parametrize(
    ("over", "kv_steps"),
    [
        pytest.param({}, 50, id="half of the steps by default"),
        pytest.param({"kv_until": 1.0}, 100, id="all"),
        pytest.param({"ce_only": True}, 0, id="cross-entropy only"),
        pytest.param({"kv_weight": 0.0}, 0, id="weight 0 reads nothing either"),
    ],
)
def test_the_number_of_steps_with_kv_follows_from_the_settings(over: dict[str, Any], kv_steps: int) -> None:
    assert config(steps=100, **over).kv_steps == kv_steps


def test_every_setting_says_what_it_means() -> None:
    undocumented = [name for name, field in TrainConfig.model_fields.items() if not field.description]
    assert undocumented == []


@pytest.mark.parametrize("trackers", ["wandb", ["wandb"], ("wandb",)])
def test_one_tracker_needs_no_list(trackers: object) -> None:
    assert config(report_to=trackers).report_to == ("wandb",)
