"""The noun Teacher: samples in, keys and values of whole batches out, as many tokens at once as memory allows.

Knows models and tasks; neither stores nor codecs.
"""

from __future__ import annotations

import dataclasses
import gc
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvstore.spec import KVSpec
from kvstore.writer import Placed
from pipeline.align import Alignment
from pipeline.models.capture import capture_kv
from pipeline.models.partial import is_partial, leave_out_above
from pipeline.models.probe import length_dependent_rope, probe_causal, probe_kv_spec
from pipeline.tasks import CPU_BATCH_TOKENS, TaskSample, fit_batch_tokens, padded_length, plan_batches


class SampleTooLargeError(ValueError):
    """One sample alone does not fit the memory there is: cut samples shorter, or run on a larger device."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Samples of one forward pass, in the order in which their tokens are handed over."""

    samples: tuple[TaskSample, ...]
    width: int
    """Tokens each is padded to."""

    @property
    def lengths(self) -> list[int]:
        return [len(sample.input_ids) for sample in self.samples]

    @property
    def placed(self) -> list[Placed]:
        """Where their tokens go, laid end to end; neighbours in the shard are one."""
        placed: list[Placed] = []
        first = 0
        for sample, length in zip(self.samples, self.lengths, strict=True):
            if placed and placed[-1].offset + placed[-1].length == sample.offset:
                placed[-1] = placed[-1]._replace(length=placed[-1].length + length)
            else:
                placed.append(Placed(first, sample.offset, length))
            first += length
        return placed

    def padded(self) -> np.ndarray:
        """Token ids [sample, width]; causal models need no mask for padding behind."""
        padded = np.zeros((len(self.samples), self.width), dtype=np.int64)
        for row, sample in zip(padded, self.samples, strict=True):
            row[: len(sample.input_ids)] = sample.input_ids
        return padded

    def filled(self) -> np.ndarray | None:
        """Which of sample * width are no padding; None is all."""
        lengths = np.array(self.lengths)
        return np.flatnonzero(np.arange(self.width) < lengths[:, None]) if (lengths < self.width).any() else None


OnLayer = Callable[[int, Batch, Tensor, Tensor], None]
"""Called with a layer, the batch, and its keys and values [token, kv_head, dim], samples end to end without padding."""


Load = Callable[[int | None], Any]
"""Gives the model in evaluation mode, where it can without what is above a layer; None for all of it."""


class Teacher:
    """A model that computes for one thread at a time: `lock` is to be held by whoever uses it."""

    def __init__(self, load: Load, last_layer: int | None = None) -> None:
        """
        Args:
            last_layer: the last layer there is work for; None for all.

        Raises:
            CaptureError: keys and values of this model cannot be captured truthfully.
        """
        self.lock = threading.Lock()
        self._load = load
        self._read(last_layer)
        self._config = self.model.config.get_text_config()
        self._alone = length_dependent_rope(self.model.config) is not None
        self._batch_limit: int | None = None

    def _read(self, last_layer: int | None) -> None:
        model = self._load(last_layer)
        there = last_layer if is_partial(model) else None
        probe_causal(model, there)
        self.model: Any = model
        self.spec: KVSpec = probe_kv_spec(model, last_layer=there)
        """Of the layers that were loaded."""
        self._last_layer = last_layer

    @property
    def is_partial(self) -> bool:
        """Whether upper layers and the output head are not in memory."""
        return is_partial(self.model)

    def drop_above(self, last_layer: int) -> None:
        """Free what only layers above the last wanted one need; `require_whole` brings it back."""
        if self._last_layer is None or last_layer < self._last_layer:
            leave_out_above(self.model, last_layer)
            self._last_layer = last_layer
            _free_memory()

    def require_whole(self) -> None:
        """Load the model again where something was left out or dropped: what predicts tokens needs all of it."""
        if self.is_partial:
            del self.model
            _free_memory()
            self._read(None)

    @property
    def max_positions(self) -> int:
        return int(self._config.max_position_embeddings)

    def batch_tokens(self, wanted: int) -> int:
        """Most padded tokens of a forward pass: what is wanted, or less after memory ran out."""
        return wanted if self._batch_limit is None else min(wanted, self._batch_limit)

    def fit_batch_tokens(self, layers: Sequence[int], seq_len: int) -> int:
        """Padded tokens of a forward pass that fit beside the model, measured on the GPU it lies on; a constant on the CPU.

        Args:
            seq_len: longest sample there can be.
        """
        if self.model.device.type != "cuda":
            return CPU_BATCH_TOKENS
        width = padded_length(min(seq_len, self.max_positions), self.max_positions)
        try:
            return fit_batch_tokens(lambda rows: self._memory_share(layers, rows, width), width)
        except torch.OutOfMemoryError:
            return width  # one such sample at a time; `compute` finds out whether that fits

    def compute(
        self,
        samples: Sequence[TaskSample],
        layers: Sequence[int],
        alignment: Alignment | None,
        batch_tokens: int,
        on_layer: OnLayer,
    ) -> None:
        """Run samples through the model, `batch_tokens` padded ones at once; values depend on the padded length alone on the CPU.

        A batch for which memory runs out is run in halves, and so are all that follow, of any task. `on_layer` may have seen
        some layers of it and sees them again, in parts.

        Raises:
            SampleTooLargeError: memory does not suffice for one sample.
        """
        lengths = [len(sample.input_ids) for sample in samples]
        batches = deque(plan_batches(lengths, batch_tokens, self.max_positions, alone=self._alone))
        while batches:
            rows = batches.popleft()
            width = lengths[rows[0]] if self._alone else padded_length(lengths[rows[0]], self.max_positions)
            most = max(self.batch_tokens(batch_tokens) // width, 1)
            if len(rows) > most:
                batches.appendleft(rows[most:])
            batch = Batch(samples=tuple(samples[row] for row in rows[:most]), width=width)
            if self._fits(batch, layers, alignment, on_layer):
                continue
            if len(batch.samples) == 1:
                raise SampleTooLargeError(
                    f"out of memory: a sample of {batch.lengths[0]} tokens alone does not fit {self.model.device} beside the teacher; use "
                    "a smaller --seq-len, --dtype bfloat16 or a larger device"
                )
            self._batch_limit = len(batch.samples) // 2 * width
            batches.appendleft(rows[:most])

    def _fits(self, batch: Batch, layers: Sequence[int], alignment: Alignment | None, on_layer: OnLayer) -> bool:
        """Run one batch; False when memory did not suffice."""
        filled = batch.filled()
        index = None if filled is None else self._to_device(torch.from_numpy(filled))

        def take(layer: int, key: Tensor, value: Tensor) -> None:
            key_THD, value_THD = _end_to_end(key, index), _end_to_end(value, index)
            if alignment is not None:
                aligned = alignment.project(layer, key_THD, value_THD)
                key_THD, value_THD = (tensor.to(self.model.dtype) for tensor in aligned)
            on_layer(layer, batch, key_THD, value_THD)

        try:
            self._capture(torch.from_numpy(batch.padded()), layers, take)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        else:
            fits = True
        if not fits:
            _free_memory()  # not before the error is gone, for it holds on to what was computed
        return fits

    def _capture(self, input_ids: Tensor, layers: Sequence[int], take: Callable[[int, Tensor, Tensor], None]) -> None:
        capture_kv(self.model, self.spec, self._to_device(input_ids), layers=layers, on_layer=take)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.model.device.type == "cuda":
            tensor = tensor.pin_memory()  # else the copy waits for the forward pass before it, and the GPU for this one
        return tensor.to(self.model.device, non_blocking=True)

    def _memory_share(self, layers: Sequence[int], rows: int, width: int) -> float:
        """How much of a GPU's free memory a forward pass takes at its peak; of several GPUs the fullest."""
        torch.cuda.empty_cache()
        before = {device: torch.cuda.memory_allocated(device) for device in self._gpus()}
        free = {device: torch.cuda.mem_get_info(device)[0] for device in before}
        for device in before:
            torch.cuda.reset_peak_memory_stats(device)
        self._capture(torch.zeros((rows, width), dtype=torch.int64), layers, lambda *_: None)
        return max((torch.cuda.max_memory_allocated(device) - before[device]) / free[device] for device in before)

    def _gpus(self) -> set[torch.device]:
        return {parameter.device for parameter in self.model.parameters() if parameter.device.type == "cuda"}


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the CPU where there is a limit to a process, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _free_memory() -> None:
    """Give back what nothing refers to any more: at once, and to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _end_to_end(tensor_BHTD: Tensor, filled: Tensor | None) -> Tensor:
    """[token, kv_head, dim] of a padded batch without its padding; no copy where none is needed."""
    flat = tensor_BHTD.transpose(1, 2).contiguous().flatten(0, 1)
    return flat if filled is None else flat.index_select(0, filled.to(flat.device))
