"""The losses: cross-entropy, the distances between a student's and a teacher's keys and values, and the weight between them.

Knows tensors only. Sums are divided by counts over the whole optimizer step, so that accumulation and ranks change nothing.
A sample of weight n counts as n copies of it would. Without weights nothing is multiplied: that is the sum it always was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

KVLoss = Literal["mse", "smooth_l1", "cosine", "relation"]

KVSchedule = Literal["constant", "linear", "cosine"]

IGNORED = -100
"""Label of a position that predicts nothing."""


def cross_entropy(
    logits: Float[Tensor, "batch token vocab"],
    labels: Int64[Tensor, "batch token"],
    num_predicted: int,
    weights: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Sum of -log p(next token) in nats over positions with a label, divided by `num_predicted`.

    Args:
        num_predicted: weighted positions of the whole optimizer step.
        weights: of each sample; None for one each.
    """
    shifted, following = logits[:, :-1].float().flatten(0, 1), labels[:, 1:]
    reduction = "sum" if weights is None else "none"
    losses = nn.functional.cross_entropy(shifted, following.flatten(), ignore_index=IGNORED, reduction=reduction)
    total = losses if weights is None else (losses.reshape(following.shape) * weights[:, None]).sum()
    return total / max(num_predicted, 1)


def kv_weight_at(step: int, steps: int, weight: float, schedule: KVSchedule) -> float:
    """Weight lambda of the KV loss in a step, counted from 0, of the `steps` that have it; falling, it would be 0 in the step after the
    last."""
    left = 1.0 - step / steps
    shape = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
    return weight * shape[schedule]


def take_rows(values: Float[Tensor, "batch kv_head token dim"], rows: Int64[Tensor, "row"]) -> Float[Tensor, "row kv_head dim"]:
    """Pick positions `batch * num_tokens + token` out of a padded tensor.

    Everything not picked stays out of the loss and gets a gradient of exactly 0, whatever it holds: a multiplied mask would
    let NaN through, 0 * NaN being NaN.
    """
    return values.transpose(1, 2).flatten(0, 1).index_select(0, rows)


def kv_errors(
    student: Sequence[tuple[Float[Tensor, "row _ _"], Float[Tensor, "row _ _"]]],
    teacher: Sequence[tuple[Float[Tensor, "row _ _"], Float[Tensor, "row _ _"]]],
    variances: Float[Tensor, "layer 2"],
    num_targets: int,
    weights: Float[Tensor, "row"] | None = None,
    loss: KVLoss = "mse",
    samples: Int64[Tensor, "row"] | None = None,
) -> Float[Tensor, "layer 2"]:
    """Mean distance of keys and of values in each layer; the KV loss is its mean.

    With `mse`, in units of the target's variance, that mean is 1/|M| sum_l 1/2 [mse(K_l) / var(K_l) + mse(V_l) / var(V_l)]: KaVa's
    loss (arXiv 2510.02312), its per-batch scale replaced by variances frozen before training. `smooth_l1` is the same with Huber's
    distance beyond one standard deviation, for keys with outlier channels. `cosine` is 1 - cosine of each head, which a length does
    not change. `relation` compares how tokens of a sample attend to each other, see `relation_errors`; heads and dims may differ.

    Args:
        student: keys and values of each layer, `[row, kv_head, dim]`.
        teacher: what they should be, the same shapes but for `relation`; gets no gradient.
        variances: of the targets' keys and values.
        num_targets: weighted rows of the whole optimizer step.
        weights: of each row; None for one each.
        samples: for `relation`, the sample of each row; rows of one sample follow each other in order.
    """
    totals, numbers = list[Tensor](), list[int]()
    for ours, theirs, of_layer in zip(student, teacher, variances, strict=True):
        for own, target, variance in zip(ours, theirs, of_layer, strict=True):
            each = _row_errors(loss, own.float(), target.detach().float(), variance, samples)
            totals.append(each.sum() if weights is None else (each.flatten(1).sum(dim=1) * weights).sum())
            numbers.append(max(num_targets, 1) * math.prod(each.shape[1:]))
    divisors = variances.new_tensor(numbers).reshape(variances.shape)
    return torch.stack(totals).reshape(variances.shape) / (divisors * variances if loss == "mse" else divisors)


def _row_errors(
    loss: KVLoss, ours: Tensor, theirs: Tensor, variance: Tensor, samples: Int64[Tensor, "row"] | None
) -> Float[Tensor, "row ..."]:
    """Distances with the row as first axis; `mse` is still to be divided by the variance."""
    if loss == "mse":
        return (ours - theirs).square()
    if loss == "smooth_l1":
        deviation = variance.sqrt()
        return nn.functional.smooth_l1_loss(ours / deviation, theirs / deviation, reduction="none")
    if loss == "cosine":
        return 1.0 - nn.functional.cosine_similarity(ours, theirs, dim=-1)
    if samples is None:
        raise ValueError("kv_errors: the relation loss got no samples, expected the sample of each row")
    return relation_errors(ours, theirs, samples)


def relation_errors(
    student: Float[Tensor, "row Hs Ds"], teacher: Float[Tensor, "row Ht Dt"], samples: Int64[Tensor, "row"]
) -> Float[Tensor, "row relation_head"]:
    """KL(teacher || student) of how each row attends to those before it in its sample, softmax(x x^T / sqrt(d)) (MiniLMv2,
    arXiv 2012.15828), in nats.

    All heads together are cut into as many relation heads as both sides' head counts have in common, so no map between geometries is
    needed, and an orthogonal change of basis within a relation head changes nothing. Memory is rows x longest sample per relation head.
    """
    num_heads = math.gcd(student.shape[1], teacher.shape[1])
    _, counts = torch.unique_consecutive(samples, return_counts=True)
    longest = int(counts.max()) if len(counts) else 0
    place = torch.arange(longest, device=samples.device)
    filled = place < counts[:, None]
    causal = place <= place[:, None]
    logs = []
    for side in (student, teacher):
        grouped = side.new_zeros(len(counts), longest, side[0].numel() if len(side) else 1)
        grouped = grouped.masked_scatter(filled[..., None], side.flatten(1))
        heads = torch.unflatten(grouped, -1, (num_heads, -1)).transpose(1, 2)
        scores = heads @ heads.transpose(-1, -2) / math.sqrt(heads.shape[-1])
        logs.append(scores.masked_fill(~causal, float("-inf")).log_softmax(dim=-1).masked_fill(~causal, 0.0))
    ours, theirs = logs
    each: Tensor = (theirs.exp() * causal * (theirs - ours)).sum(dim=-1)
    return each.transpose(1, 2)[filled]
