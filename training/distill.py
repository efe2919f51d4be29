"""The Trainer: batches from a store, cross-entropy plus the distance to the teacher's keys and values, held-out losses.

Knows one optimizer step at a time; `trainer` plans a whole run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerControl, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from kvstore.spec import KVSpec
from pipeline.models.capture import KVTap
from pipeline.models.resolve import one_line
from training import checkpoints
from training.adapters import ADAPTERS, KVAdapters
from training.checkpoint_files import OPTIMIZER, SCHEDULE, refuse_other_optimizer, refuse_other_schedule
from training.loader import KVCollator, KVDataLoader, KVDataset, ReadAhead, TrainBatch
from training.losses import KVLoss, KVSchedule, cross_entropy, kv_errors, kv_weight_at, take_rows
from training.meters import Meter, Progress, RunFlow, StepSums
from training.run_folder import RunFolder
from training.sampler import KVBatchSampler, SampleBatch
from training.targets import KVTargets, unstack
from training.trackers import Tracker


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KVObjective:
    """The KV term of the loss."""

    spec: KVSpec
    """The student's own geometry, as probed."""
    targets: KVTargets
    variances: Tensor
    """Of the targets, `[layer, 2]` for keys and values."""
    weight: float
    steps: int
    """Steps from the first that have it."""
    schedule: KVSchedule = "constant"
    loss: KVLoss = "mse"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainData:
    """What this rank reads: training batches and held-out batches of one store."""

    dataset: KVDataset
    batches: KVBatchSampler
    held_out: list[SampleBatch]
    num_train: int
    num_held_out: int
    held_out_tokens: int
    """Weighted tokens predicted in the held-out samples; like the numbers above, of all ranks."""
    held_out_bytes: int
    """Bytes of their text, weighted alike."""
    collator: KVCollator


class KVDistillTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """A Trainer whose batches come from a store and whose loss compares keys and values where a batch brings them.

    Batches know the counts of their whole optimizer step, so losses are normalised over it here, and micro-batches are read as
    they are used instead of all at once.
    """

    loss_is_scaled_for_ga = True
    control: TrainerControl

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase,
        data: TrainData,
        objective: KVObjective | None,
        folder: RunFolder,
        workers: int = 0,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            callbacks=list(trackers),
            processing_class=tokenizer,
            train_dataset=data.dataset,
            eval_dataset=data.dataset if data.num_held_out else None,
        )
        # Both print to stdout, which is for results.
        self.remove_callback(PrinterCallback)
        self.add_callback(RunFlow())
        self._progress = Progress()
        self.add_callback(self._progress)
        self._data, self._folder, self._workers = data, folder, workers
        self._objective = objective and dataclasses.replace(objective, variances=objective.variances.to(args.device))
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._ahead: ReadAhead | None = None
        self._tap: KVTap | None = None
        self._sums = StepSums(0 if objective is None else len(objective.targets.pairs), args.device)
        self.meter = Meter(folder)

    def close(self) -> None:
        """Stop the reading thread and the bar, however the run ended."""
        self._progress.on_train_end()
        self._executor.shutdown(wait=True, cancel_futures=True)

    # ---- data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Our own batches, already split by rank: accelerate's wrapper would lose the epoch on resume (accelerate#2016)."""
        return KVDataLoader(
            self._data.dataset,
            batch_sampler=self._data.batches,
            collate_fn=self._data.collator,
            num_workers=self._workers,
            # tensorstore has threads, so a forked reader would hang.
            multiprocessing_context="spawn" if self._workers else None,
            persistent_workers=self._workers > 0,
            pin_memory=self.args.device.type == "cuda",
        )

    def get_eval_dataloader(self, _eval_dataset: Any = None) -> DataLoader[Any]:
        return DataLoader(self._data.dataset, batch_sampler=self._data.held_out, collate_fn=self._data.collator)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, _device: Any) -> tuple[StepBatches, None]:
        """The micro-batches of one step, to be read while the one before computes; their counts come with them."""
        if self._ahead is None or self._ahead.left == 0:
            per_epoch = self._data.batches.steps_per_epoch
            done = self.state.global_step
            steps = min(per_epoch - done % per_epoch, self.state.max_steps - done)
            self._ahead = ReadAhead(epoch_iterator, steps * num_batches, self._executor)
        return StepBatches(self._ahead, num_batches, self.meter), None

    # ---- loss

    def compute_loss(self, model: Any, inputs: Any, **_kwargs: Any) -> Tensor:
        """This micro-batch's share of the step's loss: summed over micro-batches and ranks it is the mean over the step."""
        batch: TrainBatch = inputs
        assert batch["step"] == self.state.global_step, f"batch of step {batch['step']} in step {self.state.global_step}"
        objective = self._objective if batch["teacher"] else None
        tap = None if objective is None else self._tap_of(model, objective)
        with tap or contextlib.nullcontext():
            logits = _forward(model, batch)
        ce = cross_entropy(logits, batch["labels"], batch["num_predicted"], batch["weights"])
        loss, errors = ce, None
        if objective is not None and tap is not None:
            errors = self._kv_errors(objective, tap, batch)
            weight = kv_weight_at(batch["step"], objective.steps, objective.weight, objective.schedule)
            loss = ce + weight * errors.mean()
        elif (adapters := self._adapters(model)) is not None:
            loss = ce + adapters.untouched()
        self._sums.add(batch["step"], ce, errors)
        self.meter.count(batch["step"], batch["num_computed"])
        # DDP averages gradients over ranks, but the shares are to be summed.
        share: Tensor = loss * self.accelerator.num_processes
        return share

    def _tap_of(self, model: Any, objective: KVObjective) -> KVTap:
        if self._tap is None:
            student = self.accelerator.unwrap_model(model)
            self._tap = KVTap(student, objective.spec, layers=objective.targets.student_layers)
        return self._tap

    def _kv_errors(self, objective: KVObjective, tap: KVTap, batch: TrainBatch) -> Tensor:
        rows, weights, targets = batch["rows"], batch["weights"], objective.targets
        student = targets.student_side(
            {layer: (take_rows(key, rows), take_rows(value, rows)) for layer, (key, value) in tap.take().items()}
        )
        adapters = self._adapters(self.model)
        samples = rows // batch["input_ids"].shape[1]
        return kv_errors(
            student if adapters is None else adapters(student),
            targets.teacher_side(unstack(self._data.dataset.blocks, batch["teacher"])),
            objective.variances,
            batch["num_targets"],
            None if weights is None else weights[samples],
            objective.loss,
            samples,
        )

    def _adapters(self, model: Any) -> KVAdapters | None:
        found: KVAdapters | None = getattr(self.accelerator.unwrap_model(model), ADAPTERS, None)
        return found

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Weight decay is for the student: it would pull an adapter away from a map that keeps lengths."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if ADAPTERS not in name.split(".")]

    def evaluation_loop(self, dataloader: Any, *_args: Any, metric_key_prefix: str = "eval", **_kwargs: Any) -> EvalLoopOutput:
        """Cross-entropy over all held-out tokens, per token and per byte, samples weighted as in training."""
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        total = torch.zeros((), dtype=torch.float64)
        for inputs in dataloader:
            batch = self._prepare_inputs(inputs)
            with torch.no_grad():
                logits = _forward(model, batch)
                share = cross_entropy(logits, batch["labels"], self._data.held_out_tokens, batch["weights"])
            total += share.double().cpu()
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss = float(self.accelerator.reduce(total.to(self.args.device), "sum"))
        metrics = {f"{metric_key_prefix}_loss": loss}
        if self._data.held_out_bytes:
            nats = loss * self._data.held_out_tokens
            metrics[f"{metric_key_prefix}_nats_per_byte"] = nats / self._data.held_out_bytes
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=self._data.num_held_out)

    def rehearse_evaluation(self) -> None:
        """Predict the largest held-out batch once; sharded weights are not in place yet, so not those.

        Raises:
            ValueError: there is no memory for it.
        """
        if not self._data.held_out or self.is_fsdp_enabled:
            return
        largest = max(self._data.held_out, key=lambda batch: batch.num_computed)
        inputs = self._prepare_inputs(self._data.collator(self._data.dataset.__getitems__(largest)))
        try:
            with torch.no_grad(), self.accelerator.autocast():
                _forward(self.model.eval(), inputs)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"micro_batch_size: an evaluation of {len(largest)} samples at once needs more memory than there is ({one_line(error)}); lower "
                "--set micro_batch_size=..., or micro_batch_tokens"
            ) from error

    # ---- checkpoints

    def _get_output_dir(self, *_args: Any, **_kwargs: Any) -> str:
        """Where the Trainer writes checkpoints: beside their place, which they get when they are whole."""
        return str(checkpoints.staging(self._folder.path))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._folder.checkpoint(self.state.global_step):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            checkpoints.publish(self._folder.path, self.state.global_step)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the student and its tokenizer; weights under the names they have in memory, because the Trainer reads them back by these,
        where the names of published checkpoints may be others."""
        if self.args.should_save:
            student = self.accelerator.unwrap_model(self.model)
            student.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)
            self.processing_class.save_pretrained(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not self.is_fsdp_enabled:
            path = Path(checkpoint)
            with checkpoints.advising(path):
                refuse_other_optimizer(path / OPTIMIZER, self.optimizer)
                refuse_other_schedule(path / SCHEDULE, self.lr_scheduler, checkpoints.step_of(path))
        super()._load_optimizer_and_scheduler(checkpoint)

    # ---- metrics

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add the parts of the loss to the Trainer's own metrics, and keep them in the run's folder."""
        if "loss" in logs:
            logs.update(self._loss_parts())
            self._refuse_divergence(logs)
        super().log(logs, start_time)
        if self.is_world_process_zero() and ("loss" in logs or "eval_loss" in logs):
            kept = {_METRIC_NAMES.get(name, name): value for name, value in logs.items() if not name.endswith(_SPEED_METRICS)}
            self._folder.log({"step": self.state.global_step, **kept, **self.meter.read()})

    def _loss_parts(self) -> dict[str, float | None]:
        ce, errors = self._sums.take(self.accelerator)
        parts: dict[str, float | None] = {"ce": ce}
        if self._objective is not None and errors is not None:
            parts["kv_loss"] = float(errors.mean())
            for (student, _), (key, value) in zip(self._objective.targets.pairs, errors.tolist(), strict=True):
                parts |= {f"kv_key_{student}": key, f"kv_value_{student}": value}
        return parts

    def _refuse_divergence(self, logs: Mapping[str, Any]) -> None:
        if not math.isfinite(logs["loss"]):
            raise ValueError(
                f"loss: got {logs['loss']} over the steps up to {self.state.global_step} (ce {logs['ce']}, kv_loss "
                f"{logs.get('kv_loss')}, learning rate {logs.get('learning_rate')}); lower learning_rate or max_grad_norm. "
                f"The checkpoints in {self._folder.path} are from before."
            )


_METRIC_NAMES = {"learning_rate": "lr"}
_SPEED_METRICS = ("_runtime", "_per_second")


def _forward(model: Any, batch: TrainBatch) -> Tensor:
    """Logits; only what the model knows is handed on, since many swallow unknown arguments in silence."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits: Tensor = output.logits
    return logits


class StepBatches:
    """The micro-batches of one optimizer step, each read when its turn comes: a sized iterable, as the Trainer's loop needs."""

    def __init__(self, ahead: ReadAhead, count: int, meter: Meter) -> None:
        self._ahead, self._count, self._meter = ahead, count, meter

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[TrainBatch]:
        for _ in range(self._count):
            with self._meter.waiting():
                batch = self._ahead.next()
            yield batch
