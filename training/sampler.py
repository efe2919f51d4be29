"""Which samples make a batch: a pure function of the store's sample table.

Numpy only: no torch, no files. Every stored sample is seen once per epoch; how often the data had it is its weight.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, Int64

from training.order import Shards, Shuffle, cut_by_tokens, epoch_order, mixed_order

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
    batch_tokens: int | None = None
    """Most tokens of an optimizer step, in place of `batch_size`; a longer sample comes alone. Every sample comes, so there is no tail."""
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


def weights_of(count: Int[np.ndarray, "sample"]) -> list[int] | None:
    """Counts as weights; None for ones, which the loss then leaves out of its arithmetic."""
    return None if (count == 1).all() else count.tolist()


class KVBatchSampler:
    """Micro-batches of one rank: any number of ranks and any micro-batch size cut the same global batches.

    Serves as `batch_sampler` of a torch DataLoader over a map-style dataset; batches are skipped without a read. What becomes of
    samples that fill no whole global batch is the plan's `tail`; `dropped` and `padded` say how many they are.

    With a budget of tokens, passes over the samples differ in their number of steps, but loops such as the Trainer's count epochs of
    equal length: iterated, an epoch has the steps of the first pass, and passes follow each other whatever the epochs.
    """

    def __init__(
        self,
        table: SampleTable | Callable[[], SampleTable],
        plan: BatchPlan,
        *,
        shards: Shards | None = None,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Plan over the samples of a table, which are in order of their shards.

        Args:
            table: or what gives it when the first batch is made: with `shards` nothing else is needed to plan.
            micro_batch_size: samples per batch yielded; None for the rank's share of a global batch.
            micro_batch_tokens: about how many tokens per batch yielded, where the plan has a budget of them.

        Raises:
            ValueError: the batch does not divide over ranks and micro-batches, or there are fewer samples than one batch.
        """
        self._given, self._plan, self._rank, self._world_size = table, plan, rank, world_size
        self._shards = shards or Shards.of(self._table.shard, self._table.num_tokens)
        self.drop_last = plan.batch_tokens is None and plan.tail == "drop"
        self.epoch = 0
        if len(self._shards) == 0 or (self.drop_last and len(self._shards) < plan.batch_size):
            raise ValueError(
                f"batch_size: got {plan.batch_size}, but there are {len(self._shards)} training samples; "
                "lower --batch-size, hold out fewer with --set eval_fraction=0, or extract more data"
            )
        if plan.batch_tokens is None:
            self.batch_size = micro_batch_size or max(plan.batch_size // world_size, 1)
            """Samples per batch yielded, under the name torch and accelerate look for; with a budget of tokens a rough mean."""
            if plan.batch_size % (self.batch_size * world_size):
                raise ValueError(
                    f"batch_size: got {plan.batch_size}, expected a multiple of micro_batch_size x ranks = "
                    f"{self.batch_size} x {world_size}; change one of them"
                )
            self.micro_batches_per_step = plan.batch_size // (self.batch_size * world_size)
            """Batches this rank yields for one optimizer step: the gradient accumulation."""
        else:
            self.micro_batches_per_step = -(-plan.batch_tokens // ((micro_batch_tokens or plan.batch_tokens) * world_size))
            self.batch_size = max(plan.batch_tokens * len(self._shards) // int(self._shards.num_tokens.sum()) // self._slots, 1)
        self._first_steps = [0]

    @functools.cached_property
    def _table(self) -> SampleTable:
        return self._given() if callable(self._given) else self._given

    @property
    def _slots(self) -> int:
        """Micro-batches of one optimizer step over all ranks; none of them is ever empty."""
        return self.micro_batches_per_step * self._world_size

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return len(self.cuts(0)) - 1

    @property
    def dropped(self) -> int:
        """Samples left out of each epoch because they fill no whole global batch."""
        return len(self._shards) - int(self.cuts(0)[-1])

    @property
    def padded(self) -> int:
        """Samples that come once more in the first epoch, with weight 0, so that batches are as large as they have to be."""
        return int(np.maximum(self._least_samples - np.diff(self.cuts(0)), 0).sum())

    @property
    def _least_samples(self) -> int:
        whole = self._plan.batch_tokens is None and self._plan.tail != "short"
        return self._plan.batch_size if whole else self._slots

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch the next iteration yields."""
        self.epoch = epoch

    @property
    def sampler(self) -> KVBatchSampler:
        """Itself: Lightning tells the epoch to a batch sampler's sampler alone."""
        return self

    def __len__(self) -> int:
        return self.steps_per_epoch * self.micro_batches_per_step

    def __iter__(self) -> Iterator[SampleBatch]:
        done = self.epoch * self.steps_per_epoch
        number = next(number for number in itertools.count() if self._first_step(number + 1) > done)
        stream = itertools.chain(
            self.batches_of(number, done - self._first_step(number)),
            itertools.chain.from_iterable(map(self.batches_of, itertools.count(number + 1))),
        )
        return itertools.islice(stream, len(self))

    def batches_of(self, number: int, step: int = 0) -> Iterator[SampleBatch]:
        """Batches of one pass over the samples, from one of its steps on."""
        order, cuts = self._order(number), self.cuts(number)
        for at in range(step, len(cuts) - 1):
            yield from self._step(self._first_step(number) + at, order[cuts[at] : cuts[at + 1]], order)

    def cuts(self, number: int) -> Int64[np.ndarray, "boundary"]:
        """Where in the order of a pass its global batches begin, and where the last one ends."""
        plan, num_samples = self._plan, len(self._shards)
        if plan.batch_tokens is not None:
            return cut_by_tokens(self._table.num_tokens[self._order(number)], plan.batch_tokens)
        steps = num_samples // plan.batch_size if self.drop_last else -(-num_samples // plan.batch_size)
        return np.minimum(np.arange(steps + 1) * plan.batch_size, num_samples)

    def _first_step(self, number: int) -> int:
        """The optimizer step that a pass over the samples begins with."""
        if self._plan.batch_tokens is None:
            return number * self.steps_per_epoch
        while len(self._first_steps) <= number:
            self._first_steps.append(self._first_steps[-1] + len(self.cuts(len(self._first_steps) - 1)) - 1)
        return self._first_steps[number]

    def _order(self, epoch: int) -> Int64[np.ndarray, "sample"]:
        plan = self._plan
        if not plan.shares:
            return epoch_order(self._shards, **self._how(epoch))
        table = self._table
        assert table.store is not None, "shares are of several stores"
        members = [np.flatnonzero(table.store == number) for number in range(len(plan.shares))]
        orders = [(len(rows), functools.partial(self._order_of, rows)) for rows in members]
        return mixed_order(orders, plan.shares, total=len(table), epoch=epoch)

    def _order_of(self, rows: Int64[np.ndarray, "sample"], epoch: int) -> Int64[np.ndarray, "sample"]:
        shards = Shards.of(self._table.shard[rows], self._table.num_tokens[rows])
        ordered: np.ndarray = rows[epoch_order(shards, **self._how(epoch))]
        return ordered

    def _how(self, epoch: int) -> dict[str, Any]:
        plan = self._plan
        return {"seed": plan.seed, "epoch": epoch, "window_tokens": plan.window_tokens, "shuffle": plan.shuffle}

    def _step(self, step: int, rows: Int64[np.ndarray, "row"], order: Int64[np.ndarray, "sample"]) -> Iterator[SampleBatch]:
        """This rank's micro-batches of one global batch."""
        plan, table = self._plan, self._table
        targets = np.roll(rows, -1) if plan.shuffle_targets else rows
        count, predicted = table.count[rows].astype(np.int64), table.predicted[rows]
        compared = np.minimum(table.compared[rows], table.compared[targets])
        num_predicted, num_computed, num_targets = ((count * predicted).sum(), predicted.sum(), (count * compared).sum())
        if len(rows) < self._least_samples:
            extra = np.resize(order, self._least_samples - len(rows))
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
                weights=weights_of(count[micro]),
            )

    def _cut(self, num_tokens: Int[np.ndarray, "sample"], step: int) -> list[Int64[np.ndarray, "micro"]]:
        """Places of a global batch in each micro-batch of every rank, ranks taking turns."""
        places, budget = np.arange(len(num_tokens)), self._plan.batch_tokens is not None
        slots = self._slots
        if not (self._plan.balance or budget):
            return np.array_split(places, slots)
        room = [len(places) if budget else len(part) for part in np.array_split(places, slots)]
        filled = [0] * slots
        members: list[list[int]] = [[] for _ in range(slots)]
        for place in np.argsort(-num_tokens, kind="stable").tolist():
            slot = min((at for at in range(slots) if room[at]), key=lambda at: (filled[at], at))
            members[slot].append(place)
            filled[slot] += int(num_tokens[place])
            room[slot] -= 1
        # Whoever gets the longest sample would always be the same rank.
        return [np.array(sorted(members[(slot + step) % slots]), dtype=np.int64) for slot in range(slots)]
