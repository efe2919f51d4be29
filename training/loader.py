"""Samples of a store as padded tensors, read one batch at a time and one step ahead. Obeys the sampler; decides nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypedDict

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kvstore.batches import KVBatch, TokenBatch
from training.losses import IGNORED
from training.mixture import Readable
from training.sampler import SampleBatch


class TrainBatch(TypedDict):
    """What the trainer gets: tensors of one micro-batch, right-padded."""

    input_ids: Int64[Tensor, "batch token"]
    attention_mask: Int64[Tensor, "batch token"]
    labels: Int64[Tensor, "batch token"]
    """The same ids, -100 where padded or not learnt from; the loss shifts them."""
    step: int
    num_predicted: int
    num_targets: int
    num_computed: int
    weights: Float[Tensor, "batch"] | None
    """How many samples each one here stands for; None where that is one each."""
    rows: Int64[Tensor, "row"]
    """Compared positions, as `batch * num_tokens + token`; empty where no keys and values were read."""
    teacher: list[tuple[Float[Tensor, "layer row kv_head key_dim"], Float[Tensor, "layer row kv_head value_dim"]]]
    """Their keys and values for each block of layers of one geometry, as `KVDataset.blocks` lists them."""


@dataclasses.dataclass(frozen=True, slots=True)
class ReadBatch:
    """What one read brought, not yet padded."""

    request: SampleBatch
    tokens: KVBatch
    targets: tuple[KVBatch, ...]
    """One for each block of layers; empty where the request wants none."""


class KVDataset(Dataset[ReadBatch]):
    """A store as a map-style dataset that reads a whole batch at once.

    Pickles as the store's path: a worker process opens its own. Read by one thread at a time.
    """

    def __init__(self, store: Readable, layers: Sequence[int]) -> None:
        """Wrap a store.

        Args:
            layers: teacher layers to read where a batch wants keys and values.
        """
        self._store = store
        by_geometry: dict[tuple[int, int, int], list[int]] = {}
        for layer in sorted(set(layers)):
            by_geometry.setdefault(store.spec.layer(layer).geometry, []).append(layer)
        self.blocks: tuple[tuple[int, ...], ...] = tuple(tuple(block) for block in by_geometry.values())
        """The layers, those of equal geometry together: each block is one array and one read."""

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> ReadBatch:
        predicted, compared = (int(learnt[index]) for learnt in self._learnt)
        request = SampleBatch(
            [index], step=0, num_predicted=predicted, targets=[index], num_targets=compared, num_computed=predicted
        )
        return self.__getitems__(request)

    @cached_property
    def _learnt(self) -> tuple[np.ndarray, np.ndarray]:
        return self._store.count_learnt(1), self._store.count_compared()

    def __getitems__(self, request: SampleBatch) -> ReadBatch:
        """Read one micro-batch: a native read per array, of token ids only where the request wants no targets."""
        if request.targets is None or not self.blocks:
            return ReadBatch(request, self._store.read(request, layers=()), ())
        targets = tuple(self._store.read(request.targets, layers=block) for block in self.blocks)
        own = list(request.targets) == list(request)
        return ReadBatch(request, targets[0] if own else self._store.read(request, layers=()), targets)


class KVCollator:
    """Pads what was read and picks what is learnt from: the tokens of the loss mask, past the attention sinks where keys and values
    are compared."""

    def __init__(self, *, sink_tokens: int, pad_id: int = 0) -> None:
        self._sink_tokens, self._pad_id = sink_tokens, pad_id

    def __call__(self, read: Any) -> TrainBatch:
        """Pad what `KVDataset` read; torch types what comes from a dataset as a list."""
        assert isinstance(read, ReadBatch)
        lengths = np.diff(read.tokens.cu_seqlens)
        valid = np.arange(lengths.max()) < lengths[:, None]
        input_ids = np.full(valid.shape, self._pad_id, dtype=np.int64)
        input_ids[valid] = read.tokens.input_ids
        labels = np.full(valid.shape, IGNORED, dtype=np.int64)
        labels[valid] = np.where(read.tokens.learnt, read.tokens.input_ids, IGNORED)
        weights = read.request.weights
        rows, sources = self._rows(read, valid.shape[1])
        return TrainBatch(
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(valid.astype(np.int64)),
            labels=torch.from_numpy(labels),
            step=read.request.step,
            num_predicted=read.request.num_predicted,
            num_targets=read.request.num_targets,
            num_computed=read.request.num_computed,
            weights=None if weights is None else torch.tensor(weights, dtype=torch.float32),
            rows=rows,
            teacher=[(_select(block.key, sources), _select(block.value, sources)) for block in read.targets],
        )

    def _rows(self, read: ReadBatch, padded: int) -> tuple[Int64[Tensor, "row"], Int64[Tensor, "row"]]:
        """Where the compared positions lie in the padded batch, and where in the targets' packed tokens.

        The n-th of a sample is compared with the n-th of its target, which but for the control with wrong targets is the same token.
        """
        if not read.targets:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        places, samples = sources, targets = self._compared(read.tokens)
        if read.targets[0] is not read.tokens:
            sources, targets = self._compared(read.targets[0])
        if not np.array_equal(samples, targets):
            common = np.minimum(*(np.bincount(each, minlength=len(read.request)) for each in (samples, targets)))
            places, samples = _first_of_each(places, samples, common)
            sources, _ = _first_of_each(sources, targets, common)
        rows = places + (samples * padded - read.tokens.cu_seqlens[samples])
        return torch.from_numpy(rows), torch.from_numpy(sources)

    def _compared(self, tokens: TokenBatch) -> tuple[Int64[np.ndarray, "compared"], Int64[np.ndarray, "compared"]]:
        """Packed positions that are learnt from, have keys and values, and are no attention sinks, and the sample of each."""
        lengths = np.diff(tokens.cu_seqlens)
        samples = np.repeat(np.arange(len(lengths)), lengths)
        place = np.arange(len(samples)) - tokens.cu_seqlens[samples]
        kept = np.flatnonzero(tokens.compared & (place >= self._sink_tokens))
        return kept, samples[kept]


def _first_of_each(
    places: Int64[np.ndarray, "place"], samples: Int64[np.ndarray, "place"], counts: Int64[np.ndarray, "sample"]
) -> tuple[Int64[np.ndarray, "kept"], Int64[np.ndarray, "kept"]]:
    """Of places in order of their samples, so many of each sample."""
    rank = np.arange(len(samples)) - np.searchsorted(samples, samples)
    kept = rank < counts[samples]
    return places[kept], samples[kept]


def _select(values: np.ndarray, rows: Tensor) -> Tensor:
    """Those tokens of packed keys or values, without a copy where it is all of them."""
    packed = torch.from_numpy(values)
    return packed if len(rows) == packed.shape[1] else packed.index_select(1, rows)


class KVDataLoader(DataLoader[Any]):
    """A DataLoader whose batch sampler learns the epoch from `transformers.Trainer`, which asks the loader to pass it on."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]  # always a KVBatchSampler here


class ReadAhead:
    """Takes a known number of batches from an iterator, fetching the next in a thread while the caller uses the present one.

    Two batches are in memory at a time. The iterator is only ever advanced by one thread at once.
    """

    def __init__(self, batches: Iterator[TrainBatch], count: int, executor: ThreadPoolExecutor) -> None:
        self._batches, self._executor = batches, executor
        self._pending: Future[TrainBatch] | None = None
        self.left = count
        """Batches still to be taken; none is fetched beyond them."""

    def next(self) -> TrainBatch:
        """The next batch; an error of its reading appears here."""
        assert self.left > 0
        batch = (self._pending or self._submit()).result()
        self.left -= 1
        self._pending = self._submit() if self.left else None
        return batch

    def _submit(self) -> Future[TrainBatch]:
        return self._executor.submit(next, self._batches)
