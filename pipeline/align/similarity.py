"""How alike two models' layers are on the same tokens: linear CKA (Kornblith et al., arXiv 1905.00414), summed over batches.

Of a pretrained student only: a fresh one is about equally unlike every layer. Knows features, not where they come from.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor


class LayerSimilarity:
    """Linear CKA of every student layer with every teacher layer, from Gram matrices of batches of tokens.

    HSIC is estimated without bias (Nguyen et al., arXiv 2010.15327), so batches add up to what one of all tokens would give. Keys and
    values count alike. Memory is that of the layers' Gram matrices of one batch, whatever the number of heads.
    """

    def __init__(self, num_student: int, num_teacher: int) -> None:
        self._cross = np.zeros((2, num_student, num_teacher))
        self._student = np.zeros((2, num_student))
        self._teacher = np.zeros((2, num_teacher))
        self.num_tokens = 0

    def add(
        self,
        student: list[tuple[Float[Tensor, "token ..."], Float[Tensor, "token ..."]]],
        teacher: list[tuple[Float[Tensor, "token ..."], Float[Tensor, "token ..."]]],
    ) -> None:
        """Add a batch: keys and values of every layer for the same tokens.

        Raises:
            ValueError: fewer than four tokens, of which HSIC has no estimate.
        """
        num_tokens = len(student[0][0])
        if num_tokens < 4:
            raise ValueError(f"LayerSimilarity: got a batch of {num_tokens} tokens, expected at least 4")
        for kind in (0, 1):
            ours, theirs = (torch.stack([_gram(layer[kind]) for layer in side]) for side in (student, teacher))
            self._cross[kind] += _hsic(ours[:, None], theirs[None]).cpu().numpy()
            self._student[kind] += _hsic(ours, ours).cpu().numpy()
            self._teacher[kind] += _hsic(theirs, theirs).cpu().numpy()
        self.num_tokens += num_tokens

    def cka(self) -> Float64[np.ndarray, "student teacher"]:
        """Mean over keys and values of HSIC(s, t) / sqrt(HSIC(s, s) HSIC(t, t)), about 0 to 1."""
        scale = np.sqrt(np.maximum(self._student[:, :, None] * self._teacher[:, None, :], 1e-300))
        return np.asarray((self._cross / scale).mean(axis=0))


def _gram(features: Tensor) -> Tensor:
    """X X^T of centred features, its diagonal zero; in float64 for it takes differences of large sums."""
    flat = features.flatten(1).to(torch.float64)
    flat = flat - flat.mean(dim=0)
    gram = flat @ flat.T
    return gram.fill_diagonal_(0.0)


def _hsic(one: Tensor, other: Tensor) -> Tensor:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion of Gram matrices with zero diagonals."""
    size = one.shape[-1]
    product = (one * other).sum(dim=(-2, -1))
    sums = one.sum(dim=(-2, -1)) * other.sum(dim=(-2, -1)) / ((size - 1) * (size - 2))
    rows = (one.sum(dim=-1) * other.sum(dim=-1)).sum(dim=-1) * 2 / (size - 2)
    return (product + sums - rows) / (size * (size - 3))
