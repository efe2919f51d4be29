"""In which order samples come: pure functions of a seed, an epoch and where samples lie; the same on every machine.

Numpy only, and of its random numbers only what it promises never to change. Knows no batches, no ranks, no files.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int, Int64

Shuffle = Literal["windowed", "global", "none"]
EpochOf = Callable[[int], Int64[np.ndarray, "sample"]]


def permutation(n: int, *key: object) -> Int64[np.ndarray, "n"]:
    """Permute 0..n-1 by a key, the same on every machine and numpy version.

    Only a bit generator's raw output is frozen by numpy (NEP 19); `Generator.permutation` may change.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    return np.argsort(generator.random_raw(n), kind="stable").astype(np.int64)


@dataclasses.dataclass(frozen=True, slots=True)
class Shards:
    """What lies in each shard, in the order of the samples: all that an order is made from."""

    num_samples: Int64[np.ndarray, "shard"]
    num_tokens: Int64[np.ndarray, "shard"]

    @staticmethod
    def of(shard: Int[np.ndarray, "sample"], num_tokens: Int[np.ndarray, "sample"]) -> Shards:
        """Of samples that are ordered by their shard."""
        starts = np.concatenate([[0], np.flatnonzero(np.diff(shard)) + 1]) if len(shard) else np.zeros(0, dtype=np.int64)
        sizes = np.diff(starts, append=len(shard)).astype(np.int64)
        return Shards(sizes, np.add.reduceat(num_tokens.astype(np.int64), starts) if len(shard) else sizes)

    def __len__(self) -> int:
        return int(self.num_samples.sum())


def epoch_order(
    shards: Shards, *, seed: int, epoch: int, window_tokens: int, shuffle: Shuffle = "windowed"
) -> Int64[np.ndarray, "sample"]:
    """Order the samples of one epoch: shards permuted, then samples permuted inside windows of whole shards.

    Args:
        window_tokens: a window takes shards until it has this many tokens; one shard at least.
        shuffle: `global` permutes all samples at once, `none` leaves them as they lie.
    """
    total = len(shards)
    if total == 0 or shuffle == "none":
        return np.arange(total, dtype=np.int64)
    if shuffle == "global":
        return permutation(total, seed, epoch, "global")
    order = permutation(len(shards.num_samples), seed, epoch, "shards")
    # Windows are cut greedily along the permuted shards, by running sums: a loop over them alone, not over samples.
    window_of = np.empty(len(order), dtype=np.int64)
    number = filled = 0
    for place, size in enumerate(shards.num_tokens[order].tolist()):
        if filled >= window_tokens:
            number, filled = number + 1, 0
        window_of[place] = number
        filled += size
    starts, lengths = (np.cumsum(shards.num_samples) - shards.num_samples)[order], shards.num_samples[order]
    members = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(total)
    firsts = np.searchsorted(np.repeat(window_of, lengths), np.arange(number + 1))
    windows = np.split(members, firsts[1:])
    return np.concatenate([window[permutation(len(window), seed, epoch, "window", at)] for at, window in enumerate(windows)])


def cut_by_tokens(num_tokens: Int[np.ndarray, "sample"], budget: int) -> Int64[np.ndarray, "boundary"]:
    """Cut samples, in their order, into runs of at most `budget` tokens, each as long as it can be; a longer sample is a run of its own.

    Run i has samples cuts[i]:cuts[i + 1].
    """
    ends = np.cumsum(num_tokens, dtype=np.int64)
    cuts = [0]
    while cuts[-1] < len(ends):
        before = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
        cuts.append(max(int(np.searchsorted(ends, before + budget, side="right")), cuts[-1] + 1))
    return np.array(cuts, dtype=np.int64)


def largest_remainder(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers that add up to `total` and are each within one of their share of it."""
    exact = np.array(shares, dtype=np.float64) / sum(shares) * total
    whole = np.floor(exact).astype(np.int64)
    for place in np.argsort(-(exact - whole), kind="stable")[: total - int(whole.sum())]:
        whole[place] += 1
    return [int(number) for number in whole]


def fair_turns(counts: Sequence[int]) -> Int64[np.ndarray, "turn"]:
    """Whose turn it is, each source as often as its count, so that in every prefix each has its proportion within less than one.

    Tijdeman's rule for the chairman assignment problem (Discrete Mathematics 32, 1980): of those far enough behind, whoever has to come
    soonest. In whole numbers, so it is the same everywhere; about a second for a million turns.
    """
    total, parts = sum(counts), max(2 * len(counts) - 2, 1)
    given = [0] * len(counts)
    turns = np.empty(total, dtype=np.int64)
    for turn in range(total):
        chosen, soonest = 0, None
        for source, count in enumerate(counts):
            behind = parts * (count * (turn + 1) - total * given[source])
            if count and behind >= (total if len(counts) > 1 else 0):
                slack = ((parts - 1) * total - behind) / count
                if soonest is None or slack < soonest:
                    chosen, soonest = source, slack
        given[chosen] += 1
        turns[turn] = chosen
    return turns


def mixed_order(
    orders: Sequence[tuple[int, EpochOf]], shares: Sequence[float], *, total: int, epoch: int
) -> Int64[np.ndarray, "drawn"]:
    """Draw `total` samples from several sources so that every prefix has the right proportions, each within one sample.

    Each source goes through epochs of its own, one after the other, and goes on in the next epoch where it stopped: what is drawn more
    often than it has samples is repeated evenly, what is drawn less often comes round later.

    Args:
        orders: of each source how many samples it has, and a function from its own epoch to their order.
        shares: of each source, in any unit.
    """
    counts = largest_remainder(shares, total)
    turns = fair_turns(counts)
    drawn = np.empty(total, dtype=np.int64)
    for source, ((size, order_of), count) in enumerate(zip(orders, counts, strict=True)):
        numbers = np.arange(epoch * count, (epoch + 1) * count)
        own_epochs = numbers // max(size, 1)
        parts = [order_of(int(own))[numbers[own_epochs == own] % size] for own in np.unique(own_epochs)]
        drawn[turns == source] = np.concatenate(parts) if parts else []
    return drawn
