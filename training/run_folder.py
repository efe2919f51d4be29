"""The folder of a run: what identifies it, its metrics, its checkpoints, its summary. Knows no model and no tensors."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue
from safetensors import SafetensorError

from kvstore.errors import StoreWriteError
from kvstore.records import differences
from training import checkpoints
from training.config import TrainConfig
from training.records import Count, Record, parse, parse_json, read_json
from training.report import METRICS, read_metrics

RUN = "run.json"
SUMMARY = "summary.json"
MODEL = "model"
PLOT = "loss.png"

FREE_FIELDS = frozenset(
    {
        *("store", "out", "resume", "device", "threads", "workers", "report_to"),
        *("micro_batch_size", "micro_batch_tokens", "activation_checkpointing", "torch_compile"),
    }
)
"""Settings a resumed run may change: they say where and how it computes, not what."""


TRIAL = ".trial-"
"""How the name of a folder begins in which saving is tried."""


class TrainedSamples(Record):
    """What of a store a run is trained on."""

    shards: str
    num_samples: Count
    sha256: str


class RunSettings(Record):
    """The settings of a run as they were recorded; TrainConfig may know others by now, so only what is read is typed."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)

    steps: Count


class RunRecord(Record):
    """What the numbers of a run follow from; `run.json` holds it."""

    store: str
    samples: TrainedSamples | None = None
    config: RunSettings
    alignment: dict[str, JsonValue] | None = None
    variances: list[Annotated[list[Annotated[FiniteFloat, Field(gt=0.0)]], Field(min_length=2, max_length=2)]] | None = None
    """Of the targets' keys and values in each compared layer."""


class TrainSummary(BaseModel):
    """What a finished run came to; `summary.json` holds it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    out: Path
    steps: Count
    tokens: Count
    """Tokens predicted in training, repeats over epochs counted."""
    seconds: Annotated[FiniteFloat, Field(ge=0.0)]
    """Wall time of training and evaluation, over all resumed parts."""
    train_ce: float
    """Cross-entropy of the last logged steps, nats per token."""
    eval_loss: float | None
    """Cross-entropy on the held-out documents after the last step, nats per token; None where nothing was held out."""
    eval_nats_per_byte: float | None
    """The same per byte of the text predicted, which compares across tokenizers."""
    num_train_samples: Count
    num_dropped_samples: Count
    """Training samples each epoch leaves out because they fill no whole batch."""
    num_padded_samples: Count
    """Samples of weight 0 that fill the last batch of each epoch."""
    num_held_out_samples: Count
    peak_rss_bytes: Count
    """Largest memory of this process."""
    peak_device_bytes: Count | None
    """Largest memory torch held on the GPU; None on CPU."""
    store_fingerprint: str
    config: TrainConfig


class RunFolder:
    """One run's folder on disk, written by the main process only."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def summary(self) -> TrainSummary | None:
        """The summary, if the run is finished.

        Raises:
            ValueError: it is damaged.
        """
        path = self.path / SUMMARY
        return parse_json(TrainSummary, path) if os.path.lexists(path) else None

    def recorded(self) -> dict[str, Any] | None:
        """The identity of the run in this folder, None where there is none.

        Raises:
            ValueError: it is damaged.
        """
        path = self.path / RUN
        if not os.path.lexists(path):
            return None
        try:
            record = read_json(path)
            parse(RunRecord, record, str(path))
        except ValueError as error:
            raise ValueError(f"{error}; the run is damaged, choose another --out") from error
        return dict(record)

    def refuse_unless_resuming(self, resume: bool) -> None:
        """Keep a new run from mixing with another's files.

        Raises:
            ValueError: the folder holds a run and `resume` was not asked for, or files of nobody knows what.
        """
        if not (self.path / RUN).exists():
            self._refuse_strangers()
        elif not resume:
            raise ValueError(f"out: {self.path} already holds a run; continue it with --resume, or choose another --out")
        links = sorted(entry.name for entry in self.path.glob("*") if entry.is_symlink() and _is_ours(entry.name))
        if links:
            raise ValueError(
                f"out: {self.path} holds {links[0]} as a symbolic link, and training would write to wherever it leads; remove the link, or "
                "choose another --out"
            )

    def _refuse_strangers(self) -> None:
        """A run writes its record first, so whatever lies in a folder without one is somebody else's."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out: {self.path} is a file, expected a folder or nothing; choose another --out")
        found = sorted(entry.name + "/" * entry.is_dir() for entry in self.path.glob("*") if not _is_leftover(entry.name))
        if found:
            shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
            raise ValueError(
                f"out: {self.path} holds {shown} but no {RUN}, so it is not the folder of a run, and training would write over "
                "what is there; choose a new --out"
            )

    def refuse_other(self, identity: Mapping[str, Any], parts: Sequence[str]) -> None:
        """Compare some parts of an identity with that of the run in this folder.

        Raises:
            ValueError: they differ; every differing field is named with what this run has and what the folder's has.
        """
        recorded = self.recorded() or {}
        found = [str(difference) for part in parts for difference in differences(identity.get(part), recorded.get(part), part)]
        if found:
            raise ValueError(
                f"--resume: this run differs from the one in {self.path} in {len(found)} field(s):\n  "
                + "\n  ".join(found)
                + "\nUse the run's own settings and store to continue it, or choose another --out."
            )

    def begin(self, identity: Mapping[str, Any]) -> Path | None:
        """Start the run, or continue it: the checkpoint to continue from, None to start at step 0.

        Metrics logged after that checkpoint are forgotten: their steps will be run again.

        Raises:
            ValueError: the folder holds a run of another identity.
        """
        if self.recorded() is None:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / RUN, json.dumps(identity, indent=1) + "\n")
        self.refuse_other(identity, list(identity))
        self._sweep()
        checkpoint = self.last_checkpoint()
        step = 0 if checkpoint is None else checkpoints.step_of(checkpoint)
        kept = [record for record in read_metrics(self.path / METRICS) if record["step"] <= step]
        write_text(self.path / METRICS, "".join(f"{json.dumps(record)}\n" for record in kept))
        return checkpoint

    def _sweep(self) -> None:
        """Remove what killed processes left: checkpoints cut short, and folders in which saving was tried."""
        checkpoints.sweep(self.path)
        for trial in self.path.glob(f"{TRIAL}*"):
            shutil.rmtree(trial, ignore_errors=True)

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end.

        Raises:
            ValueError: its record is damaged.
        """
        return checkpoints.newest(self.path)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to the metrics."""
        with writing(self.path / METRICS), (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(record)}\n")

    @contextlib.contextmanager
    def checkpoint(self, step: int) -> Iterator[None]:
        """Around the writing of a checkpoint beside its place (`checkpoints.staging`): one that fails leaves nothing.

        Raises:
            StoreWriteError: the disk refused.
        """
        name = f"checkpoint-{step}"
        try:
            with writing(self.path / name):
                yield
                open_as_the_rest(checkpoints.staging(self.path) / name)
        except BaseException:
            checkpoints.discard(self.path)
            raise

    @contextlib.contextmanager
    def model(self) -> Iterator[Path]:
        """A folder to save the student into, put in place as a whole when that is done."""
        staged, path = self.path / _staged(MODEL), self.path / MODEL
        shutil.rmtree(staged, ignore_errors=True)
        try:
            with writing(path):
                yield staged
                open_as_the_rest(staged)
                shutil.rmtree(path, ignore_errors=True)
                staged.replace(path)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def finish(self, summary: TrainSummary) -> None:
        """Write the summary; from here on the run counts as finished."""
        write_text(self.path / SUMMARY, summary.model_dump_json(indent=1) + "\n")


def to_plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as JSON gives it back, lists for tuples, so that it compares with what a file holds."""
    plain: dict[str, Any] = json.loads(json.dumps(record))
    return plain


def write_text(path: Path, text: str) -> None:
    """Replace a file at once or not at all."""
    staged = path.with_name(_staged(path.name))
    with writing(path):
        staged.unlink(missing_ok=True)  # a link or a pipe left there would be written to
        with staged.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around whatever writes to a path of a run.

    Raises:
        StoreWriteError: the disk refused, in whichever exception torch, safetensors or Python says so.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(writer in str(error) for writer in _WRITERS_OF_TORCH):
            raise
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise StoreWriteError(
            f"{path}: writing failed ({reason}); {shutil.disk_usage(folder).free:,} bytes are free there. Mend that (space, permissions) and "
            "run the same command with --resume: it goes on from the last checkpoint"
        ) from error


_WRITERS_OF_TORCH = ("inline_container", "PytorchStreamWriter", "iostream error")
"""What torch names where a file could not be written; it has no class of error for that."""


def open_as_the_rest(folder: Path) -> None:
    """Give weights the permissions of the config beside them: safetensors writes for the owner alone, whatever the umask says."""
    config = folder / "config.json"
    if config.is_file():
        for file in folder.glob("*.safetensors"):
            file.chmod(config.stat().st_mode & 0o777)


def _staged(name: str) -> str:
    """Name of a file while it is being written."""
    return f".{name}.partial"


def _is_leftover(name: str) -> bool:
    """Whether a run leaves such a name behind that dies before its record is written."""
    return name == _staged(RUN) or name.startswith(TRIAL)


def _is_ours(name: str) -> bool:
    """Whether a run writes to such a name."""
    return name in {RUN, SUMMARY, MODEL, PLOT, METRICS} or checkpoints.is_checkpoint(name)
