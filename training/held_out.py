"""Which samples are held out of training, and the batches they are evaluated in: pure functions of the store's sample table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int64

from training.sampler import SampleBatch, SampleTable, weights_of


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


def held_out_batches(table: SampleTable, batch_size: int, *, rank: int = 0, world_size: int = 1) -> list[SampleBatch]:
    """One rank's batches of one pass in store order, without keys and values; the last may be short.

    Every rank has as many: sharded weights are gathered for each forward pass, which all ranks must take part in. Where samples run
    out, a rank gets the first one again with weight 0.
    """
    batches = []
    for first in range(0, len(table), world_size * batch_size):
        rows = slice(first + rank * batch_size, min(first + (rank + 1) * batch_size, len(table)))
        if rows.start >= len(table):
            batches.append(_batch(table, slice(1), np.zeros(1, dtype=np.int64)))
        else:
            batches.append(_batch(table, rows, table.count[rows]))
    return batches


def _batch(table: SampleTable, rows: slice, weights: Int[np.ndarray, "sample"]) -> SampleBatch:
    return SampleBatch(
        table.index[rows].tolist(),
        step=0,
        num_predicted=int((weights * table.predicted[rows]).sum()),
        targets=None,
        num_targets=0,
        num_computed=int(table.predicted[rows][weights > 0].sum()),
        weights=weights_of(weights),
    )
