"""Linear maps between head counts and head dims fitted to a teacher's keys and values, and how much they keep.

A key map acts on the teacher's heads of one rotary pair at a time, as complex numbers: that is what commutes with RoPE
(TransMLA, arXiv 2502.07864). A map over raw channels that retains more does not, and its student rotates the wrong planes. Knows
no store and no model.

Suffixes: H heads, S heads wanted, D channels of a head, n channels that are projected together.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear, scaled_dot_product_attention

from kvstore.spec import LayerSpec, RopeSpec
from pipeline.align.heads import head_map, key_channels, spread_channels
from pipeline.align.rope import rotate
from pipeline.align.sums import CrossSums, Moments, QuerySums, Sums, resting_channels, rotated_pairs

Method = Literal["group-mean", "procrustes", "complex-pca", "query-pca", "ridge"]
METHODS: tuple[Method, ...] = get_args(Method)
_PROCRUSTES_ROUNDS = 30
_RIDGE = 1e-3
"""Of the mean variance of a teacher channel, added to all of them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Retained:
    """Share of the teacher's centred variance in the directions a map keeps, between 0 and 1.

    Compare it among maps that commute with RoPE, and for values; it does not say how well a student will learn.
    """

    key: float
    value: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FittedMap:
    """The map of one teacher layer; means are not subtracted from what is projected."""

    key: Float32[Tensor, "student_head student_dim teacher_head teacher_dim"]
    value: Float32[Tensor, "student_head student_dim teacher_head teacher_dim"]

    def project(
        self, key: Float[Tensor, "..."], value: Float[Tensor, "..."]
    ) -> tuple[Float[Tensor, "*lead token S Dk"], Float[Tensor, "*lead token S Dv"]]:
        """Bring keys before rotation, and values, to the student's geometry; differentiable, in at least fp32, rounded once.

        Args:
            key: [..., token, kv_head, key_dim] in the teacher's geometry; `value` [..., token, kv_head, value_dim].

        Raises:
            ValueError: tensors of another geometry.
        """
        for name, x, weight in (("key", key, self.key), ("value", value, self.value)):
            if x.ndim < 3 or x.shape[-2:] != weight.shape[2:]:
                raise ValueError(
                    f"fitted map: got {name} {list(x.shape)}, expected [..., token, {weight.shape[2]}, {weight.shape[3]}], the "
                    "teacher's kv heads and head dim"
                )
        return _apply(self.key, key), _apply(self.value, value)

    def to(self, device: torch.device | str) -> FittedMap:
        """The same on a device, to save `project` a copy at every call."""
        return FittedMap(key=self.key.to(device), value=self.value.to(device))


def fit_map(
    method: Method,
    sums: Sums,
    student: LayerSpec,
    teacher_rope: RopeSpec | None,
    student_rope: RopeSpec | None,
    *,
    cross: CrossSums | None = None,
    queries: QuerySums | None = None,
) -> FittedMap:
    """Fit one layer.

    `group-mean` pools heads as `head_map` does (GQA, arXiv 2305.13245). `procrustes` turns the heads of a group towards each other
    first, keys by one angle per rotary pair, by generalised Procrustes on the second moments (arXiv 2412.20677). `complex-pca` takes
    principal components of the centred covariance over heads, for each rotary pair; for values, and key channels that do not rotate,
    over heads and channels. `query-pca` does so for keys weighted by the second moments of the teacher's queries, so that the
    error of attention scores is least, not that of keys (KQ-SVD, arXiv 2512.05916); sizes are kept on average, and values mapped as by
    `complex-pca`. `ridge` is the regression of a pretrained student's own keys and values, W = S_st (S_tt + rho I)^-1 with
    rho = 1e-3 tr(S_tt) / n, for each rotary pair over complex numbers. Where head dims differ, rotary pairs are matched as in
    `key_channels`. If either side does not rotate, keys are mapped as values are. What has no counterpart is zero.

    Args:
        cross: for `ridge`, as `cross_sums` makes them.
        queries: for `query-pca`, of the same teacher layer.

    Raises:
        ValueError: no tokens were counted, sums that the method needs are missing, or components of more heads than the teacher has.
    """
    _refuse_inputs(method, sums, student, cross, queries)
    heads, key_dim, value_dim = sums.geometry
    if not teacher_rope or not student_rope:
        teacher_rope = student_rope = None
    if sums.pairs != rotated_pairs(teacher_rope):
        raise ValueError(f"fit: the sums were taken for rotary pairs {sums.pairs}, expected {rotated_pairs(teacher_rope)}")
    wanted, count = student.num_kv_heads, sums.count
    key = np.zeros((wanted, student.key_dim, heads, key_dim))
    query_weights = None if queries is None else _QueryWeights(queries)
    for number, ((a, b), pair) in enumerate(_matched_pairs(key_dim, student.key_dim, teacher_rope, student_rope)):
        beside = cross.turning[number] / cross.count if cross else query_weights.of_pair(pair) if query_weights else None
        weight = _fit_block(method, sums.turning, pair, count, (wanted, 1), (heads, 1), beside)[:, 0, :, 0]
        c, d = sums.pairs[pair]
        key[:, a, :, c] = key[:, b, :, d] = weight.real
        key[:, b, :, c], key[:, a, :, d] = weight.imag, -weight.imag
    rest = resting_channels(student.key_dim, student_rope)
    if rest and sums.rest:
        beside = cross.resting / cross.count if cross else query_weights.of_resting() if query_weights else None
        weight = _fit_block(method, sums.resting, 0, count, (wanted, len(rest)), (heads, len(sums.rest)), beside)
        key[np.ix_(range(wanted), rest, range(heads), sums.rest)] = weight
    beside = None if cross is None else cross.values / cross.count
    of_values: Method = "complex-pca" if method == "query-pca" else method
    value = _fit_block(of_values, sums.values, 0, count, (wanted, student.value_dim), (heads, value_dim), beside)
    return FittedMap(key=torch.from_numpy(key).float(), value=torch.from_numpy(value).float())


def _refuse_inputs(method: Method, sums: Sums, student: LayerSpec, cross: CrossSums | None, queries: QuerySums | None) -> None:
    if sums.count == 0:
        raise ValueError("fit: got 0 tokens, expected at least one; twenty for each dimension are a good number")
    if (method == "ridge") != (cross is not None) or (method == "query-pca") != (queries is not None):
        got = (
            " and ".join(name for name, given in (("cross sums", cross), ("query sums", queries)) if given is not None)
            or "neither"
        )
        raise ValueError(
            f"{method}: got {got}, expected cross sums for ridge, query sums for query-pca, and neither for the others"
        )
    if method in ("complex-pca", "query-pca") and student.num_kv_heads > sums.geometry[0]:
        raise ValueError(
            f"{method}: got {sums.geometry[0]} teacher heads for {student.num_kv_heads} student heads, expected no more student heads; "
            "components cannot be made up. Use group-mean, which repeats heads"
        )


def retained_variance(fitted: FittedMap, sums: Sums) -> Retained:
    """How much of the variance in these sums, of the fit's or of other tokens, the map keeps.

    Raises:
        ValueError: no tokens were counted.
    """
    if sums.count == 0:
        raise ValueError("retained_variance: got 0 tokens, expected at least one")
    heads = sums.geometry[0]
    key = fitted.key.double().numpy()
    turning = sums.turning.covariance(sums.count)
    resting = sums.resting.covariance(sums.count)[0]
    kept = _kept(key[..., list(sums.rest)].reshape(key.shape[0] * key.shape[1], -1), resting) if sums.rest else 0.0
    for (c, d), covariance in zip(sums.pairs, turning, strict=True):
        # Rows of first channels hold Re W at c and -Im W at d, those of second channels -j times that: the same row space.
        kept += _kept((key[..., c] - 1j * key[..., d]).reshape(-1, heads), covariance)
    total = float(np.trace(resting)) + float(np.trace(turning, axis1=1, axis2=2).real.sum())
    values = sums.values.covariance(sums.count)[0]
    kept_values = _kept(fitted.value.double().flatten(2).flatten(0, 1).numpy(), values)
    return Retained(key=_share(kept, total), value=_share(kept_values, float(np.trace(values))))


def attention_cosine(
    fitted: FittedMap,
    key: Float[Tensor, "token H D"],
    value: Float[Tensor, "token H Dv"],
    positions: Int[Tensor, "token"],
    rope: RopeSpec | None,
    seed: int = 0,
) -> float:
    """Mean cosine of causal attention outputs: of the teacher's keys and values, and of what the map keeps of them.

    What is kept is carried back to the teacher's heads by the map's pseudo-inverse, so both have the same queries. Stores hold no
    queries: these are Gaussian, of variance 1 in each channel, drawn from `seed`. A real teacher's are not, so compare methods by it.

    Args:
        key: of one sample, before rotation, the attention sinks included.
    """
    sides = []
    generator = torch.Generator().manual_seed(seed)
    query = rotate(torch.randn(key.transpose(0, 1).shape, generator=generator, dtype=torch.float64), positions, rope)
    for keys, values in ((key, value), (_carry_back(fitted.key, key), _carry_back(fitted.value, value))):
        turned = rotate(keys.double().transpose(0, 1), positions, rope)
        sides.append(scaled_dot_product_attention(query, turned, values.double().transpose(0, 1), is_causal=True))
    theirs, kept = sides
    return float(cosine_similarity(theirs, kept, dim=-1).mean())


def _apply(weight: Tensor, x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    matrix = weight.to(x.device, dtype).flatten(2).flatten(0, 1)
    # Autocast would run this product in bf16 inside a training step.
    with torch.autocast(x.device.type, enabled=False):
        out = linear(x.to(dtype).flatten(-2), matrix)
    return out.reshape(*x.shape[:-2], *weight.shape[:2]).to(x.dtype)


def _carry_back(weight: Tensor, x: Tensor) -> Tensor:
    matrix = weight.double().flatten(2).flatten(0, 1)
    # Weights are fp32: directions below its rounding are none.
    back: Tensor = torch.linalg.pinv(matrix, rtol=1e-6)
    return linear(x.double().flatten(1), back @ matrix).reshape(x.shape)


def _matched_pairs(
    teacher_dim: int, student_dim: int, teacher: RopeSpec | None, student: RopeSpec | None
) -> list[tuple[tuple[int, int], int]]:
    """Channels of each student pair that has a counterpart, and which of the teacher's rotated pairs that is."""
    if teacher is None or student is None:
        return []
    sides = [dataclasses.replace(rope, inv_freq=tuple(abs(f) for f in rope.inv_freq)) for rope in (teacher, student)]
    channels = key_channels(teacher_dim, student_dim, *sides)
    pair_of = {channel: index for index, pair in enumerate(rotated_pairs(teacher)) for channel in pair}
    found = [(pair, channels[pair[0]]) for pair in rotated_pairs(student)]
    return [(pair, pair_of[source]) for pair, source in found if source is not None]


def cross_sums(
    teacher: LayerSpec, student: LayerSpec, teacher_rope: RopeSpec | None, student_rope: RopeSpec | None
) -> CrossSums:
    """Empty ones, of the channels a `ridge` of these layers regresses on each other."""
    if not teacher_rope or not student_rope:
        teacher_rope = student_rope = None
    pairs = rotated_pairs(teacher_rope)
    matched = [
        (ours, pairs[pair]) for ours, pair in _matched_pairs(teacher.key_dim, student.key_dim, teacher_rope, student_rope)
    ]
    rest = resting_channels(student.key_dim, student_rope), resting_channels(teacher.key_dim, teacher_rope)
    return CrossSums(teacher, student, matched, rest)


class _QueryWeights:
    """Square roots of query moments, their mean square over heads and channels 1."""

    def __init__(self, queries: QuerySums) -> None:
        self._queries = queries
        total = float(queries.turning.sum() + np.trace(queries.resting, axis1=1, axis2=2).sum())
        self._scale = 1.0 / max(total / (queries.heads * queries.dim), np.finfo(np.float64).tiny)

    def of_pair(self, pair: int) -> np.ndarray:
        return np.diag(np.sqrt(self._queries.turning[pair] * self._scale / 2))

    def of_resting(self) -> np.ndarray:
        heads, width = self._queries.resting.shape[:2]
        out = np.zeros((heads, width, heads, width))
        for head, second in enumerate(self._queries.resting * self._scale):
            sizes, basis = np.linalg.eigh(second)
            out[head, :, head] = (basis * np.sqrt(np.maximum(sizes, 0.0))) @ basis.T
        return out.reshape(heads * width, heads * width)


def _fit_block(
    method: Method,
    moments: Moments,
    block: int,
    count: int,
    student: tuple[int, int],
    teacher: tuple[int, int],
    beside: np.ndarray | None,
) -> np.ndarray:
    """Weights [student head, student channel, teacher head, teacher channel] of one block; `student` is (heads, channels).

    Args:
        beside: for `ridge` the cross moment [student, teacher], for `query-pca` the square root of the queries' moment.
    """
    if method == "complex-pca":
        return _principal(moments.covariance(count)[block], student[0] * student[1]).reshape(*student, *teacher)
    if method == "query-pca":
        assert beside is not None
        weighted = beside @ moments.covariance(count)[block] @ beside
        return np.asarray(_principal(weighted, student[0] * student[1]) @ beside).reshape(*student, *teacher)
    if method == "ridge":
        assert beside is not None
        second = moments.second[block] / count
        second = second + _RIDGE * np.trace(second).real / len(second) * np.eye(len(second))
        return np.linalg.solve(second.T, beside.T).T.reshape(*student, *teacher)
    select = np.zeros((student[1], teacher[1]))
    for target, source in enumerate(spread_channels(teacher[1], student[1])):
        if source is not None:
            select[target, source] = 1.0
    pool = head_map(teacher[0], student[0]).numpy()
    if method == "group-mean":
        return np.asarray(np.einsum("st,ab->satb", pool, select))
    second = (moments.second[block] / count).reshape(*teacher, *teacher)
    turned = [np.einsum("t,tcb->ctb", weights, _procrustes(second, weights)) for weights in pool]
    return np.asarray(np.einsum("ac,sctb->satb", select, np.stack(turned)))


def _principal(covariance: np.ndarray, wanted: int) -> np.ndarray:
    """Rows u^H of the `wanted` leading components, zero beyond full rank; the largest entry of each u is real and positive."""
    rows = np.zeros((wanted, len(covariance)), covariance.dtype)
    _, vectors = np.linalg.eigh(covariance)
    for row, vector in enumerate(vectors.T[::-1][:wanted]):
        largest = vector[np.argmax(np.abs(vector))]
        rows[row] = (vector * (np.abs(largest) / largest)).conj()
    return rows


def _procrustes(second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A unitary matrix for each head that brings the heads of a group together; the first of the group stays as it is.

    Each step is the best turn of one head towards the others, so the weighted mean only gains energy and what is lost of the
    heads by pooling never grows.

    Args:
        second: [head, channel, head, channel], E[x x^H].
        weights: of each head in the group, summing to 1.
    """
    turns = np.tile(np.eye(second.shape[1], dtype=second.dtype), (len(weights), 1, 1))
    members = np.flatnonzero(weights)
    for _ in range(_PROCRUSTES_ROUNDS):
        for head in members[1:]:
            others = members[members != head]
            towards = np.einsum("u,uab,ubc->ac", weights[others], turns[others], second[others, :, head])
            left, _, right = np.linalg.svd(towards)
            turns[head] = left @ right
    return turns


def _kept(rows: np.ndarray, covariance: np.ndarray) -> float:
    """Variance in the row space of a map."""
    if not rows.size:
        return 0.0
    _, scale, basis = np.linalg.svd(rows, full_matrices=False)
    basis = basis[scale > 1e-6 * max(scale[0], np.finfo(np.float32).tiny)]
    return float(np.einsum("ij,jk,ik->", basis, covariance, basis.conj(), optimize=True).real)


def _share(kept: float, total: float) -> float:
    """1 where there is no variance to lose."""
    return min(max(kept / total, 0.0), 1.0) if total > 0 else 1.0
