"""The other way to train: with the teacher in memory. For comparison only; a run from a store needs none of this."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

import training.trainer
from kvstore.reader import open_store
from pipeline.models.capture import KVTap, capture_kv
from pipeline.models.load import build_student, load_causal_lm
from pipeline.models.probe import probe_kv_spec
from training.config import TrainConfig
from training.distill import KVDistillTrainer
from training.losses import cross_entropy, kv_errors, take_rows
from training.run_folder import TrainSummary
from training.targets import KVTargets, measure_variances, plan_alignment

Lesson = Literal["kv", "logits"]


def train_online(config: TrainConfig, teacher: Path, lesson: Lesson) -> TrainSummary:
    """Train as `config` says with a teacher beside the student: its keys and values, or its logits, computed for every batch.

    Logits: half cross-entropy, half KL(teacher || student) at temperature 1, in all steps. Keys and values: in the steps and with the
    weight of the config. Batches are those of the same config from the store, of which only tokens are read.
    """
    model = load_causal_lm(teacher)
    store = open_store(config.store)
    student, _ = build_student(config.student, vocab_size=model.config.vocab_size, seed=config.seed)
    spec = probe_kv_spec(student)
    alignment = plan_alignment(store, spec, layer_map=config.layer_map, layers=config.layers)
    variances = torch.from_numpy(measure_variances(store, KVTargets(alignment), sink_tokens=config.sink_tokens)).float()
    targets = KVTargets(dataclasses.replace(alignment, baked=False))  # what the teacher gives is not projected yet
    teacher_spec = probe_kv_spec(model)

    class OnlineTrainer(KVDistillTrainer):
        def compute_loss(self, model_: Any, inputs: Any, **_kwargs: Any) -> Tensor:
            input_ids, labels = inputs["input_ids"], inputs["labels"]
            with_kv = lesson == "kv" and inputs["step"] < config.kv_steps
            with KVTap(self.accelerator.unwrap_model(model_), spec, layers=targets.student_layers) as tap:
                logits = model_(input_ids=input_ids, attention_mask=inputs["attention_mask"], use_cache=False).logits
            ce = cross_entropy(logits, labels, inputs["num_predicted"], inputs["weights"])
            self._sums.add(inputs["step"], ce, None)
            self.meter.count(inputs["step"], inputs["num_computed"])
            if lesson == "logits":
                with torch.no_grad():
                    theirs = model(input_ids=input_ids, use_cache=False).logits[:, :-1].log_softmax(-1)
                ours = logits[:, :-1].log_softmax(-1)
                predicted = labels[:, 1:] != -100
                divergence = (theirs.exp() * (theirs - ours)).sum(-1)[predicted].sum() / inputs["num_predicted"]
                return 0.5 * ce + 0.5 * divergence
            if not with_kv:
                return ce
            valid = inputs["attention_mask"].bool() & (labels != -100)
            valid[:, : config.sink_tokens] = False
            rows = valid.flatten().nonzero().squeeze(1)
            captured = capture_kv(model, teacher_spec, input_ids, layers=targets.alignment.teacher_layers)
            pair = {layer: tuple(take_rows(side, rows).clone() for side in sides) for layer, sides in captured.items()}
            student_kv = {layer: tuple(take_rows(side, rows) for side in sides) for layer, sides in tap.kv.items()}
            errors = kv_errors(
                targets.student_side(student_kv),
                targets.teacher_side(pair),
                variances,
                len(rows),
            )
            loss: Tensor = ce + config.kv_weight * errors.mean()
            return loss

    with mock.patch.object(training.trainer, "KVDistillTrainer", OnlineTrainer):
        return training.trainer.run_training(config.model_copy(update={"ce_only": True}))


def main() -> None:
    """Run one config in a process of its own, whose peak memory is then its own: CONFIG.json store|kv|logits TEACHER."""
    config = TrainConfig.model_validate_json(Path(sys.argv[1]).read_text())
    if sys.argv[2] == "store":
        training.trainer.run_training(config)
    else:
        train_online(config, Path(sys.argv[3]), "kv" if sys.argv[2] == "kv" else "logits")


if __name__ == "__main__":
    main()
