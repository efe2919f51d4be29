"""The losses: cross-entropy, and the distance between a student's and a teacher's keys and values.

Knows tensors only. Sums are divided by counts over the whole optimizer step, so that accumulation and ranks change nothing.
A sample of weight n counts as n copies of it would. Without weights nothing is multiplied: that is the sum it always was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

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
) -> Float[Tensor, "layer 2"]:
    """Mean squared error of keys and of values in each layer, in units of the target's variance; the KV loss is its mean.

    That mean is 1/|M| sum_l 1/2 [mse(K_l) / var(K_l) + mse(V_l) / var(V_l)]: KaVa's loss (arXiv 2510.02312), its per-batch
    scale replaced by variances frozen before training.

    Args:
        student: keys and values of each layer, `[row, kv_head, dim]`.
        teacher: what they should be, the same shapes; gets no gradient.
        variances: of the targets' keys and values.
        num_targets: weighted rows of the whole optimizer step.
        weights: of each row; None for one each.
    """
    errors = []
    for layer, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        for kind in range(2):
            difference = ours[kind].float() - theirs[kind].detach().float()
            numbers = max(num_targets, 1) * difference.shape[1] * difference.shape[2]
            squares = difference.square()
            total = squares.sum() if weights is None else (squares.sum(dim=(1, 2)) * weights).sum()
            errors.append(total / (numbers * variances[layer, kind]))
    return torch.stack(errors).reshape(len(variances), 2)
