"""Fitted projections. Suffixes: T token, H heads, S student heads, D channels."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from kvstore.errors import FingerprintMismatchError, StoreFormatError
from kvstore.spec import LayerSpec, RopeKind, RopeSpec
from pipeline.align.alignment import Alignment
from pipeline.align.fit import Fit
from pipeline.align.fitted import (
    METHODS,
    FittedMap,
    Method,
    Retained,
    attention_cosine,
    cross_sums,
    fit_map,
    retained_variance,
)
from pipeline.align.heads import key_channels, project_geometry, spread_channels
from pipeline.align.rope import rotate
from pipeline.align.sums import QuerySums, Sums
from tests.align.cases import plain_rope, uniform_spec

NUM_TOKENS = 300
HEADS = [(4, 2), (12, 2), (12, 8), (1, 7), (8, 32), (3, 3)]
DIMS = [(16, 8), (8, 16), (8, 8)]


def layer(heads: int, dim: int) -> LayerSpec:
    return LayerSpec(layer=0, num_kv_heads=heads, key_dim=dim, value_dim=dim, rope=0)


def draw(heads: int, dim: int, seed: int = 0, num_tokens: int = NUM_TOKENS) -> tuple[np.ndarray, np.ndarray]:
    """Correlated heads with a loud mean."""
    rng = np.random.default_rng(seed)
    sides = []
    for _ in range(2):
        mixing = rng.normal(size=(heads * dim, heads * dim)) * rng.uniform(0.1, 2, size=heads * dim)
        x = rng.normal(size=(num_tokens, heads * dim)) @ mixing + 3 * rng.normal(size=heads * dim)
        sides.append(x.reshape(num_tokens, heads, dim))
    return sides[0], sides[1]


def sums_of(key: np.ndarray, value: np.ndarray, rope: RopeSpec | None) -> Sums:
    sums = Sums(layer(*key.shape[1:]), rope)
    sums.add(key, value)
    return sums


Ropes = tuple[RopeSpec | None, RopeSpec | None]
BARE: tuple[Method, ...] = ("group-mean", "procrustes", "complex-pca")
"""Methods that need nothing but the teacher's keys and values."""


def fit_data(method: Method, key: np.ndarray, value: np.ndarray, student: LayerSpec, ropes: Ropes) -> FittedMap:
    """Fit a map on these, for `ridge` to a student whose numbers follow from them, for `query-pca` to queries of two heads a key head."""
    theirs = layer(*key.shape[1:])
    sums = sums_of(key, value, ropes[0] if ropes[1] else None)
    if method == "ridge":
        cross = cross_sums(theirs, student, *ropes)
        cross.add(student_of(key, value, student), (key, value))
        return fit_map(method, sums, student, *ropes, cross=cross)
    if method == "query-pca":
        queries = QuerySums(theirs, ropes[0] if ropes[1] else None)
        queries.add(query_of(key))
        return fit_map(method, sums, student, *ropes, queries=queries)
    return fit_map(method, sums, student, *ropes)


def student_of(key: np.ndarray, value: np.ndarray, student: LayerSpec) -> tuple[np.ndarray, np.ndarray]:
    """What a student makes of the tokens: a linear map of the teacher's and some of its own, alike for keys and values."""
    rng = np.random.default_rng(7)
    mixing = rng.normal(size=(key.shape[1] * key.shape[2], student.num_kv_heads * student.key_dim))
    own = rng.normal(size=(student.num_kv_heads * student.key_dim))
    sides = [(x.reshape(len(x), -1) @ mixing + own).reshape(len(x), *student.geometry[:2]) for x in (key, value)]
    return sides[0], sides[1]


def query_of(key: np.ndarray) -> np.ndarray:
    """Some heads and channels much louder than others."""
    rng = np.random.default_rng(8)
    loudness = rng.uniform(0.05, 3, size=(1, key.shape[1], 1, key.shape[2]))
    return (rng.normal(size=(len(key), key.shape[1], 2, key.shape[2])) * loudness).reshape(len(key), -1, key.shape[2])


def fitted(method: Method, heads: tuple[int, int], dims: tuple[int, int], ropes: Ropes) -> FittedMap:
    return fit_data(method, *draw(heads[0], dims[0]), layer(heads[1], dims[1]), ropes)


def turn(key: torch.Tensor, rope: RopeSpec | None) -> torch.Tensor:
    """Rotate [token, head, dim]."""
    return rotate(key.transpose(0, 1), torch.arange(len(key)), rope).transpose(0, 1)


def ropes_of(kind: RopeKind, dims: tuple[int, int], partial: bool) -> tuple[RopeSpec, RopeSpec]:
    """Equal bases, so that matched pairs turn alike when the student's head dim is half, equal or double."""
    teacher, student = (plain_rope(dim // 2 if partial else dim, kind=kind, start=2 if partial else 0) for dim in dims)
    return teacher, student


@pytest.mark.parametrize("partial", [False, True], ids=["full", "partial"])
@pytest.mark.parametrize("kind", ["half", "interleaved"])
@pytest.mark.parametrize("dims", [(16, 8), (8, 8)], ids=str)
@pytest.mark.parametrize(
    ("method", "heads"),
    [(method, heads) for method in METHODS for heads in HEADS if not method.endswith("pca") or heads[1] <= heads[0]],
)
def test_key_maps_commute_with_rotation(
    method: Method, heads: tuple[int, int], dims: tuple[int, int], kind: RopeKind, partial: bool
) -> None:
    ropes = ropes_of(kind, dims, partial)
    found = fitted(method, heads, dims, ropes)
    key = torch.from_numpy(draw(heads[0], dims[0], seed=1)[0])
    turned_first, _ = found.project(turn(key, ropes[0]), key)
    turned_last = turn(found.project(key, key)[0], ropes[1])
    torch.testing.assert_close(turned_first, turned_last, rtol=0, atol=2e-5 * float(key.abs().max()))


@pytest.mark.parametrize("method", METHODS)
def test_key_maps_commute_with_rotation_going_up_in_dim_and_turning_the_other_way(method: Method) -> None:
    teacher, student = plain_rope(8), plain_rope(16)
    backwards = dataclasses.replace(teacher, inv_freq=tuple(-f for f in teacher.inv_freq))
    found = fitted(method, (4, 2), (8, 16), (backwards, student))
    key = torch.from_numpy(draw(4, 8)[0])
    torch.testing.assert_close(
        found.project(turn(key, backwards), key)[0], turn(found.project(key, key)[0], student), rtol=0, atol=1e-3
    )


def test_joint_pca_and_the_first_channels_do_not_commute_with_rotation() -> None:
    key = torch.from_numpy(draw(4, 16)[0])
    flat = key.flatten(1).numpy()
    joint = torch.from_numpy(np.linalg.eigh(np.cov(flat.T))[1][:, ::-1][:, :32].copy())

    def first_half(x: torch.Tensor) -> torch.Tensor:
        return x[..., :8]

    def pca(x: torch.Tensor) -> torch.Tensor:
        return (x.flatten(1) @ joint).unflatten(1, (2, 16))

    for project, student in ((pca, plain_rope(16)), (first_half, plain_rope(8))):
        assert (project(turn(key, plain_rope(16))) - turn(project(key), student)).abs().max() > 1


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_group_mean_is_the_map_that_nothing_was_fitted_for(heads: tuple[int, int], dims: tuple[int, int]) -> None:
    ropes = ropes_of("half", dims, partial=True)
    key, value = (torch.from_numpy(x) for x in draw(heads[0], dims[0]))
    found = fitted("group-mean", heads, dims, ropes).project(key, value)
    torch.testing.assert_close(found[0], project_geometry(key, heads[1], key_channels(*dims, *ropes)), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found[1], project_geometry(value, heads[1], spread_channels(*dims)), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("heads", [(4, 2), (12, 2), (12, 8), (3, 3)], ids=str)
def test_principal_components_are_those_of_the_covariance_in_one_shot(heads: tuple[int, int]) -> None:
    rope, dim = plain_rope(8), 8
    key, value = draw(heads[0], dim)
    sums = sums_of(key, value, rope)
    found = fit_map("complex-pca", sums, layer(heads[1], dim), rope, rope)
    kept = total = 0.0
    for pair in range(4):
        z = key[:, :, pair] + 1j * key[:, :, pair + 4]
        spectrum = np.linalg.svd(z - z.mean(axis=0), compute_uv=False) ** 2
        kept, total = kept + spectrum[: heads[1]].sum(), total + spectrum.sum()
    spectrum = np.linalg.svd((value - value.mean(axis=0)).reshape(len(value), -1), compute_uv=False) ** 2
    share = retained_variance(found, sums)
    assert share.key == pytest.approx(kept / total, abs=1e-6)
    assert share.value == pytest.approx(spectrum[: heads[1] * dim].sum() / spectrum.sum(), abs=1e-6)
    for weight in (found.key, found.value):
        rows = weight.flatten(2).flatten(0, 1).double()
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), rtol=0, atol=1e-6)
    out, _ = found.project(torch.from_numpy(key), torch.from_numpy(value))
    assert (out.flatten(1).norm(dim=1) <= torch.from_numpy(key).flatten(1).norm(dim=1) * (1 + 1e-6)).all()


def test_components_retain_at_least_what_other_maps_do_and_more_with_every_head() -> None:
    rope = plain_rope(8)
    sums = sums_of(*draw(6, 8), rope)
    shares = [retained_variance(fit_map("complex-pca", sums, layer(heads, 8), rope, rope), sums) for heads in range(1, 7)]
    assert [share.key for share in shares] == sorted(share.key for share in shares)
    assert shares[-1] == Retained(key=pytest.approx(1, abs=1e-6), value=pytest.approx(1, abs=1e-6))
    for heads, best in enumerate(shares, start=1):
        for method in BARE:
            other = retained_variance(fit_map(method, sums, layer(heads, 8), rope, rope), sums)
            assert other.key <= best.key + 1e-6
            assert other.value <= best.value + 1e-6


@given(seed=st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_no_orthonormal_map_retains_more_than_components(seed: int) -> None:
    rope, rng = plain_rope(8), np.random.default_rng(seed)
    sums = sums_of(*draw(4, 8), rope)
    best = retained_variance(fit_map("complex-pca", sums, layer(2, 8), rope, rope), sums)
    key = np.zeros((2, 8, 4, 8))
    for pair in range(4):
        rows = np.linalg.qr(rng.normal(size=(4, 2)) + 1j * rng.normal(size=(4, 2)))[0].conj().T
        key[:, pair, :, pair] = key[:, pair + 4, :, pair + 4] = rows.real
        key[:, pair + 4, :, pair], key[:, pair, :, pair + 4] = rows.imag, -rows.imag
    value = np.linalg.qr(rng.normal(size=(32, 16)))[0].T.reshape(2, 8, 4, 8)
    other = retained_variance(FittedMap(key=torch.from_numpy(key).float(), value=torch.from_numpy(value).float()), sums)
    assert other.key <= best.key + 1e-6
    assert other.value <= best.value + 1e-6


def test_going_up_in_dim_components_keep_norms_and_inner_products() -> None:
    key, value = (torch.from_numpy(x) for x in draw(4, 8))
    found = fitted("complex-pca", (4, 4), (8, 16), (plain_rope(8), plain_rope(16))).project(key, value)
    for before, after in zip((key.flatten(1), value.flatten(1)), (x.flatten(1) for x in found), strict=True):
        torch.testing.assert_close(after @ after.T, before @ before.T, rtol=0, atol=1e-5 * float((before**2).sum(1).max()))


@given(seed=st.integers(0, 99), heads=st.sampled_from([(4, 2), (12, 2), (12, 8), (5, 3)]))
@settings(deadline=None, max_examples=15)
def test_heads_turned_towards_each_other_pool_to_more_energy(seed: int, heads: tuple[int, int]) -> None:
    rope = plain_rope(8)
    key, value = draw(heads[0], 8, seed)
    sums = sums_of(key, value, rope)
    energy = {
        method: [
            float((x**2).sum())
            for x in fit_map(method, sums, layer(heads[1], 8), rope, rope).project(
                torch.from_numpy(key), torch.from_numpy(value)
            )
        ]
        for method in ("group-mean", "procrustes")
    }
    assert energy["procrustes"][0] >= energy["group-mean"][0] * (1 - 1e-6)
    assert energy["procrustes"][1] >= energy["group-mean"][1] * (1 - 1e-6)


def test_procrustes_finds_the_turns_that_made_one_head_of_another() -> None:
    rope, rng = plain_rope(8), np.random.default_rng(0)
    key, value = draw(1, 8)
    angles = rng.uniform(0, 2 * np.pi, size=4)
    z = (key[..., :4] + 1j * key[..., 4:]) * np.exp(1j * angles)
    turn_values, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    keys = np.concatenate([key, np.concatenate([z.real, z.imag], axis=-1)], axis=1)
    values = np.concatenate([value, value @ turn_values], axis=1)
    found = fit_map("procrustes", sums_of(keys, values, rope), layer(1, 8), rope, rope)
    out = found.project(torch.from_numpy(keys), torch.from_numpy(values))
    np.testing.assert_allclose(out[0].numpy(), key, atol=1e-4)
    np.testing.assert_allclose(out[1].numpy(), value, atol=1e-4)


@given(cuts=st.lists(st.integers(1, NUM_TOKENS - 1), max_size=6), shuffle=st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=20)
def test_sums_of_parts_in_any_order_are_the_sums_of_all(cuts: list[int], shuffle: random.Random) -> None:
    rope = plain_rope(4, start=2)
    key, value = draw(3, 8)
    whole = sums_of(key, value, rope)
    bounds = [0, *sorted(cuts), NUM_TOKENS]
    parts = [sums_of(key[a:b], value[a:b], rope) for a, b in itertools.pairwise(bounds)]
    shuffle.shuffle(parts)
    merged = Sums(layer(3, 8), rope)
    for part in parts:
        merged.merge(part)
    assert merged.count == NUM_TOKENS
    for name in ("turning", "resting", "values"):
        for field in ("total", "second"):
            one, other = getattr(getattr(whole, name), field), getattr(getattr(merged, name), field)
            np.testing.assert_allclose(other, one, rtol=1e-9, atol=1e-9 * np.abs(one).max())
    flat = value.reshape(NUM_TOKENS, -1)
    np.testing.assert_allclose(
        merged.values.covariance(merged.count)[0], np.cov(flat.T, bias=True), atol=1e-8 * np.abs(flat).max() ** 2
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_tokens_does_not_matter_to_a_map(method: Method) -> None:
    rope = plain_rope(8)
    key, value = draw(4, 8)
    order = np.random.default_rng(1).permutation(len(key))
    sums, parts = sums_of(key, value, rope), sums_of(key[order], value[order], rope)
    beside: list[dict[str, Any]] = [{}, {}]
    if method == "ridge":
        ours = student_of(key, value, layer(2, 8))
        for number, rows in enumerate((slice(None), order)):
            cross = cross_sums(layer(4, 8), layer(2, 8), rope, rope)
            for half in (slice(0, 100), slice(100, None)):
                part = cross_sums(layer(4, 8), layer(2, 8), rope, rope)
                part.add((ours[0][rows][half], ours[1][rows][half]), (key[rows][half], value[rows][half]))
                cross.merge(part)
            beside[number]["cross"] = cross
    if method == "query-pca":
        for number, rows in enumerate((slice(None), order)):
            queries = QuerySums(layer(4, 8), rope)
            for half in (slice(0, 100), slice(100, None)):
                some = QuerySums(layer(4, 8), rope)
                some.add(query_of(key)[rows][half])
                queries.merge(some)
            beside[number]["queries"] = queries
    one, other = (
        fit_map(method, counted, layer(2, 8), rope, rope, **more) for counted, more in zip((sums, parts), beside, strict=True)
    )
    torch.testing.assert_close(one.key, other.key, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.value, other.value, rtol=0, atol=1e-5)


def test_the_order_of_heads_does_not_matter_to_components() -> None:
    rope, order = plain_rope(8), np.array([2, 0, 3, 1])
    key, value = draw(4, 8)
    one = fit_map("complex-pca", sums_of(key, value, rope), layer(2, 8), rope, rope)
    other = fit_map("complex-pca", sums_of(key[:, order], value[:, order], rope), layer(2, 8), rope, rope)
    torch.testing.assert_close(other.key, one.key[:, :, order], rtol=0, atol=1e-5)
    torch.testing.assert_close(other.value, one.value[:, :, order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "query-pca"])
def test_without_a_rotation_on_either_side_keys_are_mapped_as_values_are(method: Method) -> None:
    x, _ = draw(4, 8)
    for ropes in ((None, None), (plain_rope(8), None), (None, plain_rope(8))):
        found = fit_data(method, x, x, layer(2, 8), ropes)
        assert torch.equal(found.key, found.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_projecting_keeps_the_dtype_and_takes_any_strides_and_leading_axes(dtype: torch.dtype) -> None:
    rope = plain_rope(8)
    found = fitted("complex-pca", (4, 2), (8, 8), (rope, rope))
    x = torch.randn(5, 4, 7, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    key, value = found.project(x.transpose(1, 2), x.transpose(1, 2)[:1].expand(5, 7, 4, 8))
    assert key.dtype == value.dtype == dtype
    assert key.shape == value.shape == (5, 7, 2, 8)
    assert key.isfinite().all()
    expected = torch.einsum("sdhc,bhtc->btsd", found.key.double(), x.double())
    torch.testing.assert_close(key.double(), expected, rtol=2e-2, atol=2e-2)


def test_projecting_is_differentiable() -> None:
    rope = plain_rope(8)
    found = fitted("procrustes", (4, 2), (8, 8), (rope, rope))
    x = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda t: found.project(t, t), (x,), atol=1e-5)


@pytest.mark.parametrize("partial", [False, True], ids=["full", "partial"])
def test_ridge_is_the_regression_written_out(partial: bool) -> None:
    ropes = ropes_of("half", (8, 8), partial)
    key, value = draw(3, 8)
    student = layer(2, 8)
    ours = student_of(key, value, student)
    found = fit_data("ridge", key, value, student, ropes)

    def regress(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """argmin over W of sum |y - W x|^2 + n rho |W|^2, by least squares on stacked rows."""
        rho = 1e-3 * float(np.mean(np.abs(x) ** 2)) * len(x)
        rows = np.concatenate([x, np.sqrt(rho) * np.eye(x.shape[1])])
        return np.linalg.lstsq(rows, np.concatenate([y, np.zeros((x.shape[1], y.shape[1]))]), rcond=None)[0].T

    flat = regress(ours[1].reshape(NUM_TOKENS, -1), value.reshape(NUM_TOKENS, -1))
    np.testing.assert_allclose(found.value.numpy().reshape(16, 24), flat, atol=1e-4 * np.abs(flat).max())
    a, b = (2, 4) if partial else (0, 4)
    z = [x[..., a] + 1j * x[..., b] for x in (ours[0], key)]
    weight = regress(*z)
    np.testing.assert_allclose(found.key[:, a, :, a].numpy(), weight.real, atol=1e-4 * np.abs(weight).max())
    np.testing.assert_allclose(found.key[:, b, :, a].numpy(), weight.imag, atol=1e-4 * np.abs(weight).max())


def test_ridge_onto_a_student_that_is_a_turned_teacher_finds_the_turn() -> None:
    rope, rng = plain_rope(8), np.random.default_rng(0)
    key, value = draw(2, 8)
    turned, angles = turn(torch.from_numpy(key), None).numpy(), rng.uniform(0, 2 * np.pi, size=4)
    z = (turned[..., :4] + 1j * turned[..., 4:]) * np.exp(1j * angles)
    ours = np.concatenate([z.real, z.imag], axis=-1)
    cross = cross_sums(layer(2, 8), layer(2, 8), rope, rope)
    cross.add((ours, value[:, ::-1]), (key, value))
    found = fit_map("ridge", sums_of(key, value, rope), layer(2, 8), rope, rope, cross=cross)
    projected = found.project(torch.from_numpy(key), torch.from_numpy(value))
    for side, expected in zip(projected, (ours, value[:, ::-1]), strict=True):
        assert np.linalg.norm(side.numpy() - expected) < 0.05 * np.linalg.norm(expected), "but for the ridge's shrinkage"


def test_weighted_by_queries_components_keep_attention_scores_that_plain_ones_lose() -> None:
    rope = plain_rope(8)
    key, value = draw(4, 8)
    query = query_of(key).reshape(NUM_TOKENS, 4, 2, 8)

    loud = (query[..., :4] ** 2 + query[..., 4:] ** 2).mean(axis=(0, 2))
    root = np.diag(np.sqrt(np.concatenate([loud, loud], axis=1)).reshape(-1))

    def lost(fit: FittedMap) -> float:
        """Mean square of q^H (k - k^), each head and pair on its own, as far positions see them; k^ the best of what the map keeps."""
        rows = fit.key.flatten(2).flatten(0, 1).double().numpy()
        back = np.linalg.inv(root) @ np.linalg.pinv(rows @ np.linalg.inv(root)) @ rows
        error = (key - key.mean(axis=0)).reshape(NUM_TOKENS, -1) @ (np.eye(len(back)) - back).T
        return float(((error @ root) ** 2).mean(axis=0).sum())

    plain, weighted = (fitted(method, (4, 2), (8, 8), (rope, rope)) for method in ("complex-pca", "query-pca"))
    assert lost(weighted) < 0.8 * lost(plain)
    assert torch.equal(weighted.value, plain.value)
    sums = sums_of(key, value, rope)
    assert retained_variance(weighted, sums).key < retained_variance(plain, sums).key


def test_what_query_components_give_are_the_leading_components_of_the_weighted_keys() -> None:
    """y = U^H S z of the eigenvectors U of S C S: its covariance is diagonal and holds the leading eigenvalues."""
    rope = plain_rope(8)
    key, value = draw(4, 8)
    query = query_of(key).reshape(NUM_TOKENS, 4, 2, 8)
    found, _ = fitted("query-pca", (4, 2), (8, 8), (rope, rope)).project(torch.from_numpy(key), torch.from_numpy(value))
    mean_square = float((query**2).mean(axis=(0, 2)).mean())
    for pair in range(4):
        weights = (query[..., pair] ** 2 + query[..., pair + 4] ** 2).mean(axis=(0, 2)) / 2 / mean_square
        z, y = (x[..., pair] + 1j * x[..., pair + 4] for x in (key, found.numpy()))
        weighted = (z - z.mean(axis=0)) * np.sqrt(weights)
        expected = np.linalg.svd(weighted, compute_uv=False)[:2] ** 2
        centred = y - y.mean(axis=0)
        np.testing.assert_allclose(centred.conj().T @ centred, np.diag(expected), rtol=1e-4, atol=1e-4 * expected[0])


def test_equally_loud_queries_change_nothing() -> None:
    rope = plain_rope(4, start=2)
    key, value = draw(4, 8)
    queries = QuerySums(layer(4, 8), rope)
    queries.add(np.concatenate([np.eye(8), -np.eye(8)])[:, None].repeat(4, axis=1))
    found = fit_map("query-pca", sums_of(key, value, rope), layer(2, 8), rope, rope, queries=queries)
    plain = fit_map("complex-pca", sums_of(key, value, rope), layer(2, 8), rope, rope)
    torch.testing.assert_close(found.key, plain.key, rtol=0, atol=1e-5)


def test_sums_of_another_geometry_are_refused() -> None:
    rope = plain_rope(8)
    key, value = draw(4, 8)
    with pytest.raises(ValueError, match=r"got student key \[300, 4, 8\], .* expected \[300, 2, 8\]"):
        cross_sums(layer(4, 8), layer(2, 8), rope, rope).add((key, value), (key, value))
    with pytest.raises(ValueError, match=r"query sums: got \[300, 3, 8\], expected \[token, a multiple of 4, 8\]"):
        QuerySums(layer(4, 8), rope).add(key[:, :3])
    with pytest.raises(ValueError, match=r"ridge: got neither, expected cross sums for ridge"):
        fit_map("ridge", sums_of(key, value, rope), layer(2, 8), rope, rope)
    with pytest.raises(ValueError, match=r"query-pca: got 4 teacher heads for 8"):
        fitted("query-pca", (4, 8), (8, 8), (rope, rope))


def test_what_cannot_be_fitted_is_refused() -> None:
    rope = plain_rope(8)
    with pytest.raises(ValueError, match=r"got 8 teacher heads for 32 student heads"):
        fit_map("complex-pca", sums_of(*draw(8, 8), rope), layer(32, 8), rope, rope)
    with pytest.raises(ValueError, match=r"fit: got 0 tokens"):
        fit_map("complex-pca", Sums(layer(4, 8), rope), layer(2, 8), rope, rope)
    with pytest.raises(ValueError, match=r"retained_variance: got 0 tokens"):
        retained_variance(fitted("complex-pca", (4, 2), (8, 8), (rope, rope)), Sums(layer(4, 8), rope))
    with pytest.raises(ValueError, match=r"sums were taken for rotary pairs"):
        fit_map("complex-pca", sums_of(*draw(4, 8), None), layer(2, 8), rope, rope)
    with pytest.raises(ValueError, match=r"got key \[3, 8, 4\]"):
        fitted("complex-pca", (4, 2), (8, 8), (rope, rope)).project(torch.zeros(3, 8, 4), torch.zeros(3, 4, 8))
    with pytest.raises(ValueError, match=r"got key \[300, 4, 8\].*expected \[token, 2, 8\]"):
        Sums(layer(2, 8), rope).add(*draw(4, 8))
    with pytest.raises(ValueError, match=r"not finite"):
        Sums(layer(1, 2), None).add(np.full((1, 1, 2), np.nan), np.zeros((1, 1, 2)))
    with pytest.raises(ValueError, match=r"sums: got geometry"):
        Sums(layer(2, 8), rope).merge(Sums(layer(2, 8), None))


@pytest.mark.parametrize("method", METHODS)
def test_attention_of_what_is_kept_is_that_written_out(method: Method) -> None:
    rope = plain_rope(8)
    key, value = draw(4, 8, num_tokens=9)
    found = fitted(method, (4, 2), (8, 8), (rope, rope))
    query = torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def kept(weight: torch.Tensor, x: np.ndarray) -> np.ndarray:
        rows = np.linalg.svd(weight.flatten(2).flatten(0, 1).double().numpy(), full_matrices=False)[2]
        return (x.reshape(9, -1) @ rows.T @ rows).reshape(x.shape)

    def turned(x: np.ndarray, position: int) -> np.ndarray:
        z = (x[:4] + 1j * x[4:]) * np.exp(1j * position * np.array(rope.inv_freq))
        return np.concatenate([z.real, z.imag])

    cosines = []
    for head in range(4):
        for last in range(9):
            outputs = []
            for k, v in ((key, value), (kept(found.key, key), kept(found.value, value))):
                q = turned(query[head, last].numpy(), last)
                logits = np.array([q @ turned(k[past, head], past) for past in range(last + 1)]) / np.sqrt(8)
                weights = np.exp(logits - logits.max())
                outputs.append(weights / weights.sum() @ v[: last + 1, head])
            one, other = outputs
            cosines.append(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    arguments = (torch.from_numpy(key), torch.from_numpy(value), torch.arange(9), rope)
    assert attention_cosine(found, *arguments, seed=3) == pytest.approx(np.mean(cosines), abs=1e-5)


def test_a_map_that_keeps_everything_keeps_attention() -> None:
    rope = plain_rope(8)
    key, value = (torch.from_numpy(x) for x in draw(4, 8, num_tokens=20))
    found = fitted("complex-pca", (4, 4), (8, 8), (rope, rope))
    assert attention_cosine(found, key, value, torch.arange(20), rope) == pytest.approx(1, abs=1e-6)


def whole_fit(**changed: Any) -> Fit:
    alignment = Alignment.plan(uniform_spec(3, 4, 8), uniform_spec(2, 2, 8))
    maps = {number: fitted("complex-pca", (4, 2), (8, 8), (plain_rope(8), plain_rope(8))) for number in (1, 2)}
    share = {number: Retained(key=0.5, value=0.25) for number in (1, 2)}
    fit = Fit(
        method="complex-pca",
        alignment=alignment,
        store="0" * 64,
        num_tokens=300,
        num_held_out_tokens=0,
        maps=maps,
        retained=share,
        retained_held_out={},
        attention_cosine={1: 0.75},
    )
    return dataclasses.replace(fit, **changed)


def test_a_saved_fit_comes_back_bit_for_bit(tmp_path: Path) -> None:
    fit = whole_fit()
    fit.save(tmp_path / "fit.safetensors")
    loaded = Fit.load(tmp_path / "fit.safetensors")
    assert loaded.fit_id == fit.fit_id
    assert (loaded.alignment, loaded.retained, loaded.retained_held_out) == (fit.alignment, fit.retained, {})
    assert loaded.attention_cosine == {1: 0.75}
    for number, fitted_map in fit.maps.items():
        assert torch.equal(loaded.maps[number].key, fitted_map.key)
        assert torch.equal(loaded.maps[number].value, fitted_map.value)
    assert [path.name for path in tmp_path.iterdir()] == ["fit.safetensors"]


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    whole_fit().save(path)
    with safe_open(str(path), "pt") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # as in Fit.load
    arrays["layer.1.key"][0, 0, 0, 0] += 1
    save_file(arrays, path, metadata)
    with pytest.raises(StoreFormatError, match=r"fit_id: got [0-9a-f]{64} from the content, expected [0-9a-f]{64}"):
        Fit.load(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(StoreFormatError, match=r"expected a file that 'kvpipe fit' made"):
        Fit.load(path)


def test_a_fit_is_used_only_for_what_it_was_made_for() -> None:
    fit = whole_fit()
    fit.require(fit.alignment, fit.fit_id)
    with pytest.raises(FingerprintMismatchError, match=r"fit_id: got [0-9a-f]{64}, expected 1111"):
        fit.require(fit.alignment, "1" * 64)
    with pytest.raises(FingerprintMismatchError, match=r"student\.geometry\[0\]: got 2, expected 1"):
        fit.require(Alignment.plan(uniform_spec(3, 4, 8), uniform_spec(2, 1, 8)))
    with pytest.raises(FingerprintMismatchError, match=r"teacher\.rope"):
        fit.require(Alignment.plan(uniform_spec(3, 4, 8, rope=plain_rope(8, base=500.0)), uniform_spec(2, 2, 8)))
    with pytest.raises(FingerprintMismatchError, match=r"got teacher layers \[1, 2\], expected \[0\] too"):
        fit.require(Alignment.plan(uniform_spec(3, 4, 8), uniform_spec(2, 2, 8), "uniform"))
    assert whole_fit(num_tokens=301).fit_id != fit.fit_id
