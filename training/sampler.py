"""Which samples make a batch, and which are held out: pure functions of the store's sample table.

Numpy only: no torch, no files. Every stored sample is seen once per epoch; how often the data had it is its weight.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, Int64

from training.order import Shuffle, epoch_order, mixed_order

Tail = Literal["drop", "pad", "short"]
"""What becomes of samples that fill no whole global batch: left out; filled up with samples of weight 0; or a smaller batch, filled up
only so far that no micro-batch is empty."""


@dataclasses.dataclass(frozen=True, slots=True)
class SampleTable:
    """The samples a run draws from: parallel columns."""

    index: Int64[np.ndarray, "sample"]
    """Number of the sample in its store."""
    shard: Int[np.ndarray, "sample"]
    num_tokens: Int[np.ndarray, "sample"]
    count: Int[np.ndarray, "sample"]
    """How often the data had the sample: its weight in every loss."""
    predicted: Int64[np.ndarray, "sample"]
    """Tokens that are predicted: those to be learnt from, but never the first of a sample."""
    compared: Int64[np.ndarray, "sample"]
    """Tokens whose keys and values are compared: those to be learnt from that have some and are no attention sinks."""
    store: Int[np.ndarray, "sample"] | None = None
    """Number of its store, where there are several."""

    def __len__(self) -> int:
        return len(self.index)

    def select(self, rows: Int64[np.ndarray, "chosen"]) -> SampleTable:
        """Some of the samples."""
        chosen: dict[str, Any] = {
            field.name: None if (column := getattr(self, field.name)) is None else column[rows]
            for field in dataclasses.fields(self)
        }
        return SampleTable(**chosen)


def split_held_out(
    ids: Sequence[str],
    source: Sequence[str],
    num_tokens: Int[np.ndarray, "sample"],
    *,
    fraction: float,
    max_tokens: int,
) -> tuple[Int64[np.ndarray, "train"], Int64[np.ndarray, "held_out"]]:
    """Split samples by document, so that no document has pieces on both sides; by sample where there is one document.

    Documents come in the order of their smallest sample id, which is a hash of content, so names and places of files play no
    part; they are held out as long as they fit, and if none fits, the smallest is.

    Args:
        fraction: largest share of all tokens to hold out.
        max_tokens: largest number of tokens to hold out.

    Raises:
        ValueError: something is to be held out of fewer than two samples.
    """
    everything = np.arange(len(ids), dtype=np.int64)
    if fraction == 0:
        return everything, everything[:0]
    if len(ids) < 2:
        raise ValueError(
            f"eval_fraction: got {fraction}, but the store has {len(ids)} sample(s); hold out none with --set eval_fraction=0"
        )
    names = ids if len(set(source)) < 2 else source
    smallest: dict[str, str] = {}
    for name, identity in zip(names, ids, strict=True):
        smallest[name] = min(identity, smallest.get(name, identity))
    documents = sorted(smallest, key=smallest.__getitem__)
    number = {name: index for index, name in enumerate(documents)}
    group = np.fromiter((number[name] for name in names), dtype=np.int64, count=len(names))
    tokens = np.bincount(group, weights=num_tokens).astype(np.int64)
    budget = min(fraction * int(tokens.sum()), max_tokens)
    chosen: list[int] = []
    for index in range(len(documents)):
        if tokens[index] <= budget and len(chosen) < len(documents) - 1:
            chosen.append(index)
            budget -= int(tokens[index])
    held_out = np.isin(group, chosen or [int(np.argmin(tokens))])
    return everything[~held_out], everything[held_out]


class SampleBatch(list[int]):
    """Store indices of one micro-batch, with what the loader and the loss must know about it; to torch a plain list."""

    def __init__(
        self,
        samples: Iterable[int],
        *,
        step: int,
        num_predicted: int,
        targets: Sequence[int] | None,
        num_targets: int,
        num_computed: int,
        weights: Sequence[int] | None = None,
    ) -> None:
        super().__init__(samples)
        self.step = step
        """The optimizer step, from 0, that this micro-batch belongs to."""
        self.num_predicted = num_predicted
        """Weighted tokens predicted in that whole step, of all micro-batches and ranks: the denominator of its cross-entropy."""
        self.targets = targets
        """Samples whose keys and values are the targets, one for each here; None where none are wanted, so none are read."""
        self.num_targets = num_targets
        """Weighted positions compared in that whole step: the one denominator of its KV loss."""
        self.num_computed = num_computed
        """Tokens predicted in that whole step, unweighted: the work done."""
        self.weights = weights
        """How many samples each one here stands for; None where that is one each."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """What shapes the batches of a run besides the samples; equal for every rank."""

    batch_size: int
    """Samples per optimizer step, over all ranks and micro-batches."""
    seed: int
    window_tokens: int
    """Samples are shuffled inside windows of whole shards of at least this many tokens."""
    kv_steps: int
    """Steps, from the first on, that need keys and values."""
    shuffle_targets: bool = False
    """Compare every sample with the next one of its global batch: the control with wrong targets."""
    shuffle: Shuffle = "windowed"
    tail: Tail = "drop"
    balance: bool = False
    """Give every micro-batch about as many tokens, the same samples in every global batch."""
    shares: tuple[float, ...] = ()
    """How much of each store is drawn, by its number; empty draws every sample once."""


def held_out_batches(table: SampleTable, batch_size: int, *, rank: int = 0, world_size: int = 1) -> list[SampleBatch]:
    """One rank's batches of one pass in store order, without keys and values; the last may be short."""
    batches = []
    for first in range(rank * batch_size, len(table), world_size * batch_size):
        rows = slice(first, first + batch_size)
        batches.append(
            SampleBatch(
                table.index[rows].tolist(),
                step=0,
                num_predicted=int((table.count[rows] * table.predicted[rows]).sum()),
                targets=None,
                num_targets=0,
                num_computed=int(table.predicted[rows].sum()),
                weights=_weights(table.count[rows]),
            )
        )
    return batches


def _weights(count: Int[np.ndarray, "sample"]) -> list[int] | None:
    """Counts as weights; None for ones, which the loss then leaves out of its arithmetic."""
    return None if (count == 1).all() else count.tolist()


class KVBatchSampler:
    """Micro-batches of one rank: any number of ranks and any micro-batch size cut the same global batches.

    Serves as `batch_sampler` of a torch DataLoader over a map-style dataset; batches are skipped without a read. What becomes of
    samples that fill no whole global batch is the plan's `tail`; `dropped` and `padded` say how many they are.
    """

    def __init__(
        self,
        table: SampleTable,
        plan: BatchPlan,
        *,
        micro_batch_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Plan over the samples of a table.

        Args:
            micro_batch_size: samples per batch yielded; None for the rank's share of a global batch.

        Raises:
            ValueError: the batch does not divide over ranks and micro-batches, or there are fewer samples than one batch.
        """
        self.batch_size = micro_batch_size or max(plan.batch_size // world_size, 1)
        """Samples per batch yielded, under the name torch and accelerate look for."""
        if plan.batch_size % (self.batch_size * world_size):
            raise ValueError(
                f"batch_size: got {plan.batch_size}, expected a multiple of micro_batch_size x ranks = "
                f"{self.batch_size} x {world_size}; change one of them"
            )
        if len(table) < plan.batch_size and (plan.tail == "drop" or len(table) == 0):
            raise ValueError(
                f"batch_size: got {plan.batch_size}, but there are {len(table)} training samples; "
                "lower --batch-size, hold out fewer with --set eval_fraction=0, or extract more data"
            )
        self.drop_last = plan.tail == "drop"
        self.epoch = 0
        self._table, self._plan, self._rank, self._world_size = table, plan, rank, world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        whole, rest = divmod(len(self._table), self._plan.batch_size)
        return whole + (rest > 0 and self._plan.tail != "drop")

    @property
    def micro_batches_per_step(self) -> int:
        """Batches this rank yields for one optimizer step: the gradient accumulation."""
        return self._plan.batch_size // (self.batch_size * self._world_size)

    @property
    def dropped(self) -> int:
        """Samples left out of each epoch because they fill no whole global batch."""
        return len(self._table) % self._plan.batch_size if self._plan.tail == "drop" else 0

    @property
    def padded(self) -> int:
        """Samples that come once more in each epoch, with weight 0, to fill its last batch."""
        rest = len(self._table) % self._plan.batch_size
        if rest == 0 or self._plan.tail == "drop":
            return 0
        wanted = self._plan.batch_size if self._plan.tail == "pad" else self.micro_batches_per_step * self._world_size
        return max(wanted - rest, 0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps_per_epoch * self.micro_batches_per_step

    def __iter__(self) -> Iterator[SampleBatch]:
        return self.batches_from(0)

    def batches_from(self, step: int) -> Iterator[SampleBatch]:
        """This epoch's batches from one of its steps on."""
        plan = self._plan
        order = self._order(self.epoch)
        for number in range(step, self.steps_per_epoch):
            rows = order[number * plan.batch_size : (number + 1) * plan.batch_size]
            yield from self._step(self.epoch * self.steps_per_epoch + number, rows, order)

    def _order(self, epoch: int) -> Int64[np.ndarray, "sample"]:
        plan, table = self._plan, self._table
        if not plan.shares:
            return self._order_of(np.arange(len(table)), epoch)
        assert table.store is not None, "shares are of several stores"
        members = [np.flatnonzero(table.store == number) for number in range(len(plan.shares))]
        orders = [(len(rows), functools.partial(self._order_of, rows)) for rows in members]
        return mixed_order(orders, plan.shares, total=len(table), epoch=epoch)

    def _order_of(self, rows: Int64[np.ndarray, "sample"], epoch: int) -> Int64[np.ndarray, "sample"]:
        plan, table = self._plan, self._table
        shard, num_tokens = table.shard[rows], table.num_tokens[rows]
        how: Any = {"seed": plan.seed, "epoch": epoch, "window_tokens": plan.window_tokens, "shuffle": plan.shuffle}
        ordered: np.ndarray = rows[epoch_order(shard, num_tokens, **how)]
        return ordered

    def _step(self, step: int, rows: Int64[np.ndarray, "row"], order: Int64[np.ndarray, "sample"]) -> Iterator[SampleBatch]:
        """This rank's micro-batches of one global batch."""
        plan, table = self._plan, self._table
        targets = np.roll(rows, -1) if plan.shuffle_targets else rows
        count, predicted = table.count[rows].astype(np.int64), table.predicted[rows]
        compared = np.minimum(table.compared[rows], table.compared[targets])
        num_predicted, num_computed, num_targets = ((count * predicted).sum(), predicted.sum(), (count * compared).sum())
        if len(rows) < plan.batch_size:
            extra = np.resize(order, self.padded)
            rows, targets = np.concatenate([rows, extra]), np.concatenate([targets, extra])
            count = np.concatenate([count, np.zeros(len(extra), dtype=np.int64)])
        with_kv = step < plan.kv_steps
        for micro in self._cut(table.num_tokens[rows], step)[self._rank :: self._world_size]:
            yield SampleBatch(
                table.index[rows[micro]].tolist(),
                step=step,
                num_predicted=int(num_predicted),
                targets=table.index[targets[micro]].tolist() if with_kv else None,
                num_targets=int(num_targets) if with_kv else 0,
                num_computed=int(num_computed),
                weights=_weights(count[micro]),
            )

    def _cut(self, num_tokens: Int[np.ndarray, "sample"], step: int) -> list[Int64[np.ndarray, "micro"]]:
        """Places of a global batch in each micro-batch of every rank, ranks taking turns."""
        places = np.arange(len(num_tokens))
        slots = self.micro_batches_per_step * self._world_size
        if not self._plan.balance:
            return np.array_split(places, slots)
        room = np.array([len(part) for part in np.array_split(places, slots)])
        filled = np.zeros(slots, dtype=np.int64)
        members: list[list[int]] = [[] for _ in range(slots)]
        for place in np.argsort(-num_tokens, kind="stable").tolist():
            slot = min(np.flatnonzero(room).tolist(), key=lambda at: (filled[at], at))
            members[slot].append(place)
            filled[slot] += num_tokens[place]
            room[slot] -= 1
        # Whoever gets the longest sample would always be the same rank.
        return [np.array(sorted(members[(slot + step) % slots]), dtype=np.int64) for slot in range(slots)]
