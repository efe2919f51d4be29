"""Counting a run: parts of the loss, tokens, time, memory, and a progress bar on stderr. Knows no data and no losses."""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState

from training.report import METRICS, read_metrics
from training.run_folder import RunFolder


class StepSums:
    """Sums of the loss's parts over optimizer steps; kept on the device, so that adding never waits for it."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self._ce = torch.zeros((), dtype=torch.float64, device=device)
        self._errors = torch.zeros((num_layers, 2), dtype=torch.float64, device=device)
        self._steps: set[int] = set()
        self._kv_steps: set[int] = set()

    def add(self, step: int, ce: Float[Tensor, ""], errors: Float[Tensor, "layer 2"] | None) -> None:
        """Add the share of one micro-batch."""
        self._steps.add(step)
        self._ce += ce.detach()
        if errors is not None:
            self._kv_steps.add(step)
            self._errors += errors.detach()

    def take(self, accelerator: Any) -> tuple[float, Float[Tensor, "layer 2"] | None]:
        """Means per step over all ranks since the last call; no errors where no step had any."""
        ce = float(accelerator.reduce(self._ce, "sum")) / max(len(self._steps), 1)
        errors = accelerator.reduce(self._errors, "sum").cpu() / len(self._kv_steps) if self._kv_steps else None
        self._ce.zero_()
        self._errors.zero_()
        self._steps.clear()
        self._kv_steps.clear()
        return ce, errors


class Meter:
    """Tokens, seconds and memory of a run, going on where an interrupted one stopped."""

    def __init__(self, folder: RunFolder) -> None:
        last = (read_metrics(folder.path / METRICS) or [{}])[-1]
        self._tokens = int(last.get("tokens", 0))
        self._wait_s = float(last.get("loader_wait_s", 0.0))
        self._started = time.perf_counter() - float(last.get("seconds", 0.0))
        self._step = -1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in here is time the model waited for the loader."""
        started = time.perf_counter()
        yield
        self._wait_s += time.perf_counter() - started

    def count(self, step: int, num_computed: int) -> None:
        """Count the tokens of a step, unweighted; its micro-batches all bring the same number."""
        if step != self._step:
            self._step = step
            self._tokens += num_computed

    def read(self) -> dict[str, int | float]:
        """The present state, as the fields of a line of metrics."""
        return {
            "tokens": self._tokens,
            "seconds": time.perf_counter() - self._started,
            "loader_wait_s": self._wait_s,
            "peak_rss_bytes": peak_rss_bytes(),
        }


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far.

    Where Linux tells it from /proc: getrusage begins with the peak of the process that started this one.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class RunFlow(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """When to log and save beyond the Trainer's defaults.

    A checkpoint ends a line of metrics, so that a resumed run averages over the same steps. The last step leaves none: the final
    model follows at once, and a run cut off in between repeats its last steps.
    """

    def on_step_end(self, _args: Any, state: TrainerState, control: TrainerControl, **_kwargs: Any) -> TrainerControl:
        last = state.global_step >= state.max_steps
        control.should_log = control.should_log or control.should_save or last
        control.should_save = control.should_save and not last
        return control


_SHOWN = {"ce": "ce", "kv_loss": "kv", "eval_nats_per_byte": "held-out nats/byte"}
"""Losses beside a bar, by their names in the metrics."""


@contextlib.contextmanager
def following(out: Path, steps: int) -> Iterator[None]:
    """A bar on stderr for a run that other processes make: read once a second off the metrics in its folder."""
    over = threading.Event()
    with tqdm(total=steps, unit="step", file=sys.stderr) as bar:

        def update() -> None:
            records = read_metrics(out / METRICS)
            newest = {shown: f"{record[name]:.3f}" for record in records for name, shown in _SHOWN.items() if name in record}
            bar.set_postfix(newest, refresh=False)
            bar.update((records[-1]["step"] if records else 0) - bar.n)

        def poll() -> None:
            while not over.wait(1.0):
                update()

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            update()


class Progress(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """A bar on stderr with the newest losses."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._shown: dict[str, str] = {}

    def on_train_begin(self, _args: Any, state: TrainerState, *_rest: Any, **_kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", file=sys.stderr)

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update()

    def on_log(self, *_args: Any, logs: Mapping[str, Any], **_kwargs: Any) -> None:
        if "ce" in logs and "kv_loss" not in logs:
            self._shown.pop("kv", None)
        self._shown |= {shown: f"{logs[name]:.3f}" for name, shown in _SHOWN.items() if name in logs}
        if self._bar is not None:
            self._bar.set_postfix(self._shown)

    def on_train_end(self, *_args: Any, **_kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
