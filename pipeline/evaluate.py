"""How well a model predicts text: perplexity per token, and nats per byte, which models of other tokenizers can be compared by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from kvstore.compose import Progress
from pipeline.data.documents import read_documents
from pipeline.data.samples import Cutter, Sample
from pipeline.models.load import load_causal_lm, load_tokenizer
from pipeline.models.resolve import resolve_model
from pipeline.tasks import padded_length, plan_batches

_SAMPLES_AT_ONCE = 256
_IGNORED = -100


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """What to evaluate, and how."""

    model: str
    """Preset, id, folder of a checkpoint, or of a training run with `model/` in it."""
    data: tuple[str, ...]
    text_field: str = "text"
    as_text: bool = False
    split: str = "train"
    seq_len: int = 2048
    max_tokens: int | None = None
    batch_tokens: int = 8192
    """Padded tokens of a forward pass."""
    device: str = "auto"
    """`auto` takes an accelerator if there is one."""
    dtype: str = "auto"
    revision: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvalSummary:
    """What was measured, over all predicted tokens: all of a sample but its first, of conversations the assistant's."""

    model: str
    num_samples: int
    num_predicted: int
    num_bytes: int
    """UTF-8 bytes of text in them."""
    nats_per_token: float
    perplexity: float
    nats_per_byte: float
    bits_per_byte: float


def evaluate(settings: EvalSettings, progress: Progress = lambda *_: None) -> EvalSummary:
    """Predict every token of the data from those before it in its sample, documents cut into consecutive samples.

    Raises:
        ValueError: no such model or data, or data without a token to predict.
    """
    resolved = resolve_model(settings.model, settings.revision)
    tokenizer = load_tokenizer(resolved.path)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    model = load_causal_lm(resolved.path, dtype=settings.dtype, device=device)
    positions = int(getattr(model.config.get_text_config(), "max_position_embeddings", settings.seq_len))
    vocab_size = model.get_input_embeddings().num_embeddings
    cutter = Cutter(tokenizer=tokenizer, seq_len=min(settings.seq_len, positions), keep_text=False, vocab_size=vocab_size)
    documents = read_documents(settings.data, settings.text_field, settings.split, as_text=settings.as_text)
    nats, predicted, num_bytes, samples = 0.0, 0, 0, 0
    for group in _groups(cutter.samples(documents), settings.max_tokens):
        lengths = [len(sample.input_ids) for sample in group]
        for rows in plan_batches(lengths, settings.batch_tokens, positions):
            chosen = [group[row] for row in rows]
            found, count = _nats(model, chosen, padded_length(lengths[rows[0]], positions))
            nats, predicted = nats + found, predicted + count
        num_bytes += sum(_predicted_bytes(tokenizer, sample) for sample in group)
        samples += len(group)
        progress(predicted, max(settings.max_tokens or 0, predicted))
    if predicted == 0:
        raise ValueError(f"--data: {', '.join(settings.data)} has no token to predict, got {samples} samples; give more text")
    return EvalSummary(
        model=str(resolved.path),
        num_samples=samples,
        num_predicted=predicted,
        num_bytes=num_bytes,
        nats_per_token=nats / predicted,
        perplexity=math.exp(min(nats / predicted, 700.0)),
        nats_per_byte=nats / num_bytes if num_bytes else math.nan,
        bits_per_byte=nats / num_bytes / math.log(2) if num_bytes else math.nan,
    )


def _groups(documents: Iterable[Sequence[Sample]], max_tokens: int | None) -> Iterator[list[Sample]]:
    """Samples in order, some at a time, the last one the first that passes the limit."""
    group: list[Sample] = []
    tokens = 0
    for samples in documents:
        for sample in samples:
            group.append(sample)
            tokens += len(sample.input_ids)
            if len(group) == _SAMPLES_AT_ONCE:
                yield group
                group = []
            if max_tokens is not None and tokens >= max_tokens:
                yield group
                return
    if group:
        yield group


def _learnt(sample: Sample) -> np.ndarray:
    """Which tokens are predicted."""
    learnt = np.ones(len(sample.input_ids), dtype=np.bool_) if sample.loss_mask is None else sample.loss_mask != 0
    learnt[0] = False
    return learnt


def _nats(model: Any, samples: Sequence[Sample], width: int) -> tuple[float, int]:
    """Sum of -log p over the predicted tokens of one batch, and how many there are."""
    input_ids = np.zeros((len(samples), width), dtype=np.int64)
    labels = np.full((len(samples), width), _IGNORED, dtype=np.int64)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        input_ids[row, :length] = sample.input_ids
        labels[row, :length] = np.where(_learnt(sample), sample.input_ids, _IGNORED)
    with torch.inference_mode():
        # Padded on the right and causal: no predicted position sees the padding.
        logits = model(input_ids=torch.from_numpy(input_ids).to(model.device), use_cache=False).logits
        wanted = torch.from_numpy(labels[:, 1:]).to(logits.device)
        total = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), wanted.flatten(), ignore_index=_IGNORED, reduction="sum"
        )
    return float(total), int((labels[:, 1:] != _IGNORED).sum())


def _predicted_bytes(tokenizer: Any, sample: Sample) -> int:
    """Bytes of text in the predicted tokens: of every run of them, with and without the token before it."""

    def size(ids: np.ndarray) -> int:
        return len(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).encode())

    edges = np.flatnonzero(np.diff(_learnt(sample).astype(np.int8), append=0)) + 1
    runs = edges.reshape(-1, 2).tolist()
    return sum(size(sample.input_ids[first - 1 : last]) - size(sample.input_ids[first - 1 : first]) for first, last in runs)
