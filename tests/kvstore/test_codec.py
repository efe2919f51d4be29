"""Codecs: error bounds, equal bits from numpy and torch, packing, calibration, and bytes that must never change."""

from __future__ import annotations

import hashlib
from typing import Any

import ml_dtypes
import numcodecs
import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import CodecError
from kvstore.calibration import ChannelMoments, fit_quantizer
from kvstore.codec import (
    CODECS,
    E4M3_VALUES,
    KINDS,
    Encoded,
    Quantizer,
    code_dim,
    codec_named,
    decode,
    encode,
    encode_measured,
    format_codecs,
    parse_codecs,
    saturated,
    storage_dtype,
)

INT8 = Quantizer(form="int8", step_sigmas=0.25)
NIBBLE = Quantizer(form="nibble", step_sigmas=0.5)
E4M3 = Quantizer(form="e4m3", step_sigmas=8 / 448)
RANGE = {"int8": (-127.5, 127.5), "nibble": (-8.5, 7.5), "e4m3": (-448.0, 448.0)}
"""Scaled values that no form clips."""
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

quantizers = st.sampled_from([INT8, NIBBLE, E4M3])
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def moments_of(values: np.ndarray) -> ChannelMoments:
    moments = ChannelMoments.zeros(*values.shape[1:])
    moments.add(values)
    return moments


def draw_values(seed: int, dtype: str = "float32", loud: float = 1.0, offset: float = 0.0, num_tokens: int = 50) -> np.ndarray:
    """Gaussian values with one loud channel, one that is constant, and some outliers far out of every code's range."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(num_tokens, 2, 6))
    values[:, 0, 0] *= loud
    values[:, 1, 5] = 0.25
    values += offset
    values[rng.integers(num_tokens, size=3), 0, 1] += 1000 * rng.normal(size=3)
    return np.asarray(values.astype(DTYPES[dtype]))


def on(device: str, values: np.ndarray) -> torch.Tensor:
    """The same bits as a torch tensor; torch does not take ml_dtypes arrays."""
    bfloat16 = values.dtype == ml_dtypes.bfloat16
    tensor = torch.from_numpy(values.view(np.uint16) if bfloat16 else values)
    return (tensor.view(torch.bfloat16) if bfloat16 else tensor).to(device)


def assert_same_bits(actual: torch.Tensor, expected: np.ndarray) -> None:
    array = actual.cpu().numpy()
    assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
    assert array.tobytes() == expected.tobytes()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    loud=st.floats(0.01, 100),
    offset=st.floats(-1000, 1000),
    quantizer=quantizers,
    dtype=st.sampled_from(list(DTYPES)),
)
def test_unclipped_values_come_back_within_the_error_bound(
    seed: int, loud: float, offset: float, quantizer: Quantizer, dtype: str
) -> None:
    values = draw_values(seed, dtype, loud, offset)
    mean, step = fit_quantizer(quantizer, moments_of(values))
    decoded = decode(quantizer, encode(quantizer, values, mean, step), mean, step)
    exact, mean64, step64 = values.astype(np.float64), mean.astype(np.float64), step.astype(np.float64)
    deviation = exact - mean64
    low, high = RANGE[quantizer.form]
    inside = (deviation >= low * step64) & (deviation <= high * step64)
    assert inside.mean() > 0.95
    bound = quantizer.error_bound(deviation.astype(np.float32), step).astype(np.float64)
    rounding = 2.0**-21 * (np.abs(exact) + np.abs(deviation))
    assert (np.abs(decoded - exact) <= bound + rounding)[inside].all()


@pytest.mark.parametrize("quantizer", [INT8, NIBBLE, E4M3], ids=lambda quantizer: quantizer.form)
def test_clipped_values_take_the_end_of_the_range_and_are_counted(quantizer: Quantizer) -> None:
    mean, step = np.full((1, 2), 3.0, np.float32), np.full((1, 2), 0.5, np.float32)
    values = np.array([[[1e30, 3.0]], [[-1e30, 3.5]]], dtype=np.float32)
    codes = encode(quantizer, values, mean, step)
    low, high = {"int8": (-127, 127), "nibble": (-8, 7), "e4m3": (-448, 448)}[quantizer.form]
    expected = [[[3 + high * 0.5, 3.0]], [[3 + low * 0.5, 3.5]]]
    np.testing.assert_array_equal(decode(quantizer, codes, mean, step), np.array(expected, np.float32))
    assert saturated(quantizer, codes) == 2


@devices
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    loud=st.floats(0.01, 100),
    offset=st.floats(-1000, 1000),
    quantizer=quantizers | st.none(),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_numpy_and_torch_give_the_same_bits(
    device: str, seed: int, loud: float, offset: float, quantizer: Quantizer | None, dtype: str
) -> None:
    values = draw_values(seed, dtype, loud, offset)
    mean, step = fit_quantizer(quantizer, moments_of(values)) if quantizer else (None, None)
    channels = [None if array is None else on(device, array) for array in (mean, step)]
    codes = encode(quantizer, values, mean, step)
    stored = np.asarray(codes, dtype=storage_dtype(quantizer, dtype))
    assert stored.tobytes() == codes.tobytes()
    torch_codes = encode(quantizer, on(device, values), *channels)
    assert_same_bits(torch_codes, codes)
    decoded = decode(quantizer, codes, mean, step)
    assert decoded.dtype == np.float32
    assert_same_bits(decode(quantizer, torch_codes, *channels), decoded)
    assert saturated(quantizer, torch_codes) == saturated(quantizer, codes)
    if quantizer is None:
        np.testing.assert_array_equal(decoded, values.astype(np.float32))


def float64_measures(quantizer: Quantizer | None, values: np.ndarray, mean: np.ndarray, step: np.ndarray) -> np.ndarray:
    """What `encode_measured` measures, from decoded codes and in float64."""
    exact = values.astype(np.float64)
    centred = exact if quantizer is None else exact - mean
    error = decode(quantizer, encode(quantizer, values, mean, step), mean, step) - exact
    return np.stack([(centred**2).sum((1, 2)), (error**2).sum((1, 2)), np.full(len(values), np.abs(error).max())])


@devices
@pytest.mark.parametrize("quantizer", [INT8, NIBBLE, E4M3, None], ids=lambda quantizer: quantizer.form if quantizer else "raw")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [6, 16], ids=lambda dim: f"dim{dim}")
@pytest.mark.parametrize("head_major", [False, True], ids=["token-major", "head-major"])
def test_encoding_measures_what_it_does_to_each_token(
    device: str, quantizer: Quantizer | None, dtype: str, dim: int, head_major: bool
) -> None:
    values = np.random.default_rng(0).normal(5.0, [[2.0]] * 3 + [[0.1]], size=(70, 4, dim)).astype(DTYPES[dtype])
    values[7, 1, 2] = 300.0  # far out of every code's range
    mean, step = fit_quantizer(quantizer or INT8, moments_of(values))
    expected = float64_measures(quantizer, values, mean, step)
    codes = encode(quantizer, values, mean, step)
    if head_major:
        values = np.ascontiguousarray(values.transpose(1, 0, 2)).transpose(1, 0, 2)
    there = encode_measured(quantizer, on(device, values), *(on(device, array) for array in (mean, step)))
    here = encode_measured(quantizer, values, mean, step)
    assert_same_bits(there.codes, codes)
    np.testing.assert_array_equal(here.codes, codes)
    for measures in (here.measures, there.measures.cpu().numpy()):
        np.testing.assert_allclose(measures, expected, rtol=2e-5, atol=1e-12)


@devices
@pytest.mark.parametrize("quantizer", [INT8, NIBBLE, E4M3, None], ids=lambda quantizer: quantizer.form if quantizer else "raw")
@pytest.mark.parametrize("large", [3e38, -3e38, 2e19])
def test_numbers_whose_squares_overflow_are_measured_as_finite(device: str, quantizer: Quantizer | None, large: float) -> None:
    values = draw_values(0, offset=3.0)
    mean, step = fit_quantizer(quantizer or INT8, moments_of(values))
    usual = encode_measured(quantizer, values, mean, step)
    values[7, 1, 2] = large
    channels = (on(device, array) for array in (mean, step))
    there = encode_measured(quantizer, on(device, values), *channels)
    for found in (
        encode_measured(quantizer, values, mean, step),
        Encoded(*(np.asarray(x.cpu()) for x in (there.codes, there.measures))),
    ):
        assert np.isfinite(found.measures).all()
        others = np.arange(len(values)) != 7
        np.testing.assert_array_equal(found.codes[others], usual.codes[others])
        np.testing.assert_allclose(found.measures[:2, others], usual.measures[:2, others], rtol=2e-5)
        assert found.measures[0, 7] >= np.float32(1e38)


@devices
@pytest.mark.parametrize("quantizer", [INT8, NIBBLE, E4M3, None], ids=lambda quantizer: quantizer.form if quantizer else "raw")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_measures_show_which_token_is_not_finite(device: str, quantizer: Quantizer | None, bad: float) -> None:
    values = draw_values(0, offset=3.0)
    mean, step = fit_quantizer(quantizer or INT8, moments_of(values))
    values[7, 1, 2] = bad
    channels = (on(device, array) for array in (mean, step))
    for measures in (
        encode_measured(quantizer, values, mean, step).measures,
        encode_measured(quantizer, on(device, values), *channels).measures.cpu().numpy(),
    ):
        assert np.flatnonzero(~np.isfinite(measures[0])).tolist() == [7]


@pytest.mark.parametrize("quantizer", [INT8, NIBBLE, E4M3], ids=lambda quantizer: quantizer.form)
def test_layers_together_are_the_layers_one_by_one(quantizer: Quantizer) -> None:
    layers = [draw_values(seed, num_tokens=3) for seed in range(3)]
    fits = [fit_quantizer(quantizer, moments_of(values)) for values in layers]
    mean, step = (np.stack(arrays) for arrays in zip(*fits, strict=True))
    codes = encode(quantizer, np.stack(layers), mean, step)
    np.testing.assert_array_equal(codes, np.stack([encode(quantizer, x, *fit) for x, fit in zip(layers, fits, strict=True)]))
    each = [decode(quantizer, code, *fit) for code, fit in zip(codes, fits, strict=True)]
    np.testing.assert_array_equal(decode(quantizer, codes, mean, step), np.stack(each))


def e4m3_cases() -> np.ndarray:
    """Every float8_e4m3fn number, every tie of neighbours and its float32 neighbours, zeros, subnormals, random numbers."""
    numbers = np.sort(E4M3_VALUES[np.isfinite(E4M3_VALUES)])
    ties = (numbers[1:] + numbers[:-1]) / 2
    rng = np.random.default_rng(0)
    random = (rng.normal(size=4000) * 2.0 ** rng.integers(-14, 9, size=4000)).astype(np.float32)
    tiny = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-38, 2**-10, 2**-11, 2**-9, 2**-6], np.float32)
    near = [np.nextafter(ties, np.float32(sign * np.inf)) for sign in (-1, 1)]
    cases = np.concatenate([numbers, ties, *near, random, tiny]).astype(np.float32)
    return cases[np.abs(cases) <= 448]


@devices
def test_e4m3_codes_are_those_of_ml_dtypes_and_of_torch(device: str) -> None:
    cases = e4m3_cases()
    values = cases.reshape(-1, 1, 1)
    mean, step = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)
    codes = encode(E4M3, values, mean, step)
    expected = cases.astype(ml_dtypes.float8_e4m3fn).view(np.uint8).reshape(values.shape)
    np.testing.assert_array_equal(codes, expected)
    assert_same_bits(encode(E4M3, on(device, values), on(device, mean), on(device, step)), expected)
    assert_same_bits(on(device, values).to(torch.float8_e4m3fn).view(torch.uint8), expected)
    assert not np.isin(codes, (0x7F, 0xFF)).any()


def test_e4m3_numbers_follow_from_their_bits() -> None:
    def number(code: int) -> float:
        sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
        if exponent == 15 and mantissa == 7:
            return float("nan")
        return sign * (2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8)

    expected = np.array([number(code) for code in range(256)], np.float32)
    np.testing.assert_array_equal(E4M3_VALUES, expected)
    assert np.signbit(E4M3_VALUES[0x80])
    assert (E4M3_VALUES[0x7E], E4M3_VALUES[0xFE], E4M3_VALUES[1]) == (448, -448, 2**-9)
    torch_values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    np.testing.assert_array_equal(torch_values.numpy(), expected)


GAUSSIAN = [  # research/codecs.md 2 and 6: centred errors of keys and of values
    ("raw", 0.0, 0.0),
    ("q8", 0.0136, 0.0136),
    ("fp8", 0.0265, 0.0265),
    ("q8z", 0.0260, 0.0361),
    ("mix", 0.0722, 0.1445),
    ("q4z", 0.1445, 0.2165),
    ("q4z-min", 0.2165, 0.2885),
]


@pytest.fixture(scope="module")
def gaussian() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(20_000, 2, 8)).astype(np.float32)


def encode_gaussian(values: np.ndarray, quantizer: Quantizer | None) -> tuple[Any, float]:
    """Codes and centred error."""
    mean, step = fit_quantizer(quantizer, moments_of(values)) if quantizer else (None, None)
    codes = encode(quantizer, values, mean, step)
    error = decode(quantizer, codes, mean, step) - values.astype(np.float32)
    return codes, float(np.linalg.norm(error) / np.linalg.norm(values - values.mean(axis=0)))


@pytest.mark.parametrize(("name", "key", "value"), GAUSSIAN)
def test_errors_of_gaussian_channels_are_those_of_the_design(gaussian: np.ndarray, name: str, key: float, value: float) -> None:
    assert [rung[0] for rung in GAUSSIAN] == list(CODECS)
    for kind, expected in zip(KINDS, (key, value), strict=True):
        _, error = encode_gaussian(gaussian, codec_named(name).quantizer(kind))
        assert error == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", CODECS)
def test_gaussian_channels_take_the_nominal_bits_after_compression(gaussian: np.ndarray, name: str) -> None:
    values = gaussian.astype(ml_dtypes.bfloat16)
    blosc = numcodecs.Blosc(cname="zstd", clevel=1, shuffle=numcodecs.Blosc.SHUFFLE)
    stored_bytes = 0
    for kind in KINDS:
        quantizer = codec_named(name).quantizer(kind)
        codes = encode_gaussian(values, quantizer)[0]
        stored_bytes += len(zstandard.compress(codes.tobytes(), level=1) if quantizer else blosc.encode(codes))
    assert 8 * stored_bytes / (2 * values.size) == pytest.approx(codec_named(name).nominal_bits, rel=0.04)


def test_a_loud_channel_widens_its_own_step_only() -> None:
    values = np.random.default_rng(0).normal(size=(5_000, 1, 64)).astype(np.float32)
    values[:, 0, 3] *= 50
    for quantizer in (INT8, NIBBLE):
        mean, step = fit_quantizer(quantizer, moments_of(values))
        quiet = np.delete(step[0], 3)
        assert (quiet == quiet[0]).all()
        assert step[0, 3] > quiet[0]
        assert saturated(quantizer, encode(quantizer, values, mean, step)) / values.size < 1e-3


def test_heavy_tails_get_a_longer_reach() -> None:
    rng = np.random.default_rng(0)
    heavy = rng.standard_t(4, size=(50_000, 1, 2)).astype(np.float32)
    q8 = codec_named("q8").key
    assert q8 is not None
    moments = moments_of(heavy)
    assert moments.kurtosis() > 6
    _, step = fit_quantizer(q8, moments)
    np.testing.assert_allclose(step, 10 * np.sqrt(moments.variance()) / 127, rtol=1e-6)


@pytest.mark.parametrize("constant", [3.25, 3.3, 0.0, -1e-42])
def test_a_constant_layer_decodes_exactly(constant: float) -> None:
    values = np.full((10, 1, 4), constant, dtype=np.float32)
    for quantizer in (INT8, NIBBLE, E4M3):
        mean, step = fit_quantizer(quantizer, moments_of(values))
        np.testing.assert_array_equal(decode(quantizer, encode(quantizer, values, mean, step), mean, step), values)


def test_a_spread_below_float32_does_not_divide_by_zero() -> None:
    values = np.array([0, 0, 1e-45, 1e-45] * 5, dtype=np.float32).reshape(10, 1, 2)
    for quantizer in (INT8, NIBBLE, E4M3):
        mean, step = fit_quantizer(quantizer, moments_of(values))
        decoded = decode(quantizer, encode(quantizer, values, mean, step), mean, step)
        assert np.abs(decoded - values).max() <= 1e-37


def test_moments_do_not_depend_on_how_the_data_was_cut() -> None:
    values = np.random.default_rng(0).normal(size=(300, 2, 4)).astype(np.float32) + 40
    parts = ChannelMoments.zeros(2, 4)
    for cut in np.split(values, [7, 100, 101]):
        parts.merge(moments_of(cut))
    whole = moments_of(values)
    np.testing.assert_allclose(parts.sums, whole.sums, rtol=1e-12)
    np.testing.assert_allclose(whole.variance(), values.astype(np.float64).var(axis=0), rtol=1e-9)
    assert (parts.count, whole.kurtosis()) == (300, pytest.approx(3, abs=0.5))


def test_four_bit_codes_need_an_even_dim() -> None:
    assert code_dim(NIBBLE, 6) == 3
    assert (code_dim(INT8, 7), code_dim(E4M3, 7), code_dim(None, 7)) == (7, 7, 7)
    with pytest.raises(CodecError, match="head dim: got 7, expected an even number"):
        code_dim(NIBBLE, 7)


@pytest.mark.parametrize("quantizer", [None, INT8, NIBBLE, E4M3], ids=lambda quantizer: quantizer and quantizer.form)
def test_values_that_are_not_finite_are_refused_with_their_place(quantizer: Quantizer | None) -> None:
    mean, step = np.zeros((2, 6), np.float32), np.ones((2, 6), np.float32)
    values = draw_values(0)
    values[7, 1, 2] = np.nan
    with pytest.raises(CodecError, match=r"NaN or infinity at \[token, kv_head, dim\] \[7, 1, 2\]"):
        encode(quantizer, values, mean, step)
    with pytest.raises(CodecError, match=r"NaN or infinity at \[token, kv_head, dim\] \[7, 1, 2\]"):
        encode(quantizer, on("cpu", values), on("cpu", mean), on("cpu", step))


def names(text: str, layers: range | list[int]) -> dict[int, str]:
    return {layer: codec.name for layer, codec in parse_codecs(text, layers).items()}


def test_codecs_are_chosen_for_all_layers_and_for_single_ones() -> None:
    assert names("mix", range(3)) == {0: "mix", 1: "mix", 2: "mix"}
    assert names("mix,0=raw,2-3=q8", range(5)) == {0: "raw", 1: "mix", 2: "q8", 3: "q8", 4: "mix"}
    assert names("q4z-min, 1 = fp8, -1=raw", [1, 4, 9]) == {1: "fp8", 4: "q4z-min", 9: "raw"}
    assert names("mix,0-2=q8z,1=raw", range(3)) == {0: "q8z", 1: "raw", 2: "q8z"}, "the later exception wins"


@given(chosen=st.dictionaries(st.integers(0, 60), st.sampled_from(list(CODECS)), min_size=1, max_size=20))
def test_written_out_codecs_are_read_back(chosen: dict[int, str]) -> None:
    codecs = {layer: codec_named(name) for layer, name in sorted(chosen.items())}
    text = format_codecs(codecs)
    assert parse_codecs(text, codecs) == codecs
    assert format_codecs(dict(reversed(codecs.items()))) == text, "one text for each choice"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("q9", f"got 'q9', expected one of {', '.join(CODECS)}", id="unknown codec"),
        pytest.param("", "got '', expected one of raw", id="nothing"),
        pytest.param("mix,1=q9", "codec 'mix,1=q9': codec: got 'q9', expected one of raw", id="unknown exception"),
        pytest.param("mix,3=raw", "codec 'mix,3=raw': layers: got '3', but the model has layers 0-2", id="no such layer"),
        pytest.param("mix,1-5=raw", "layers: got '1-5', but the model has layers 0-2", id="no such range"),
        pytest.param("mix,-4=raw", "layers: got '-4', expected .* for the last of 0-2", id="below the first"),
        pytest.param("mix,x=raw", "layers: got 'x', expected 'all' or a list", id="no number"),
        pytest.param("mix,0", "got '0', expected LAYERS=CODEC after the first comma", id="no equals sign"),
        pytest.param("mix,", "got '', expected LAYERS=CODEC after the first comma", id="empty exception"),
    ],
)
def test_a_codec_text_that_means_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        parse_codecs(text, range(3))


def test_calibration_on_nothing_or_on_infinity_is_refused() -> None:
    with pytest.raises(CodecError, match="got 0 tokens"):
        fit_quantizer(INT8, ChannelMoments.zeros(1, 2))
    with np.errstate(invalid="ignore"), pytest.raises(CodecError, match="not finite"):
        fit_quantizer(INT8, moments_of(np.full((3, 1, 2), np.inf, dtype=np.float32)))


def test_codes_are_pinned_byte_for_byte() -> None:
    values = (np.arange(48, dtype=np.float32).reshape(4, 2, 6) * 7 % 11 - 5) / 4
    mean, step = np.full((2, 6), 0.125, np.float32), np.full((2, 6), 0.25, np.float32)
    assert encode(INT8, values, mean, step)[0, 0].tolist() == [-6, 2, -2, 4, 0, -4]
    assert encode(NIBBLE, values, mean, step)[0, 0].tolist() == [194, 138, 70]
    assert encode(E4M3, values, mean, step)[0, 0].tolist() == [203, 60, 194, 73, 48, 198]
    digests = {
        quantizer.form: hashlib.sha256(encode(quantizer, values, mean, step).tobytes()).hexdigest()[:16]
        for quantizer in (INT8, NIBBLE, E4M3)
    }
    assert digests == {"int8": "19b480ea958aa8a7", "nibble": "84eb779d0e7d5dca", "e4m3": "b5fcb1426c2eeed7"}
    raw = {name: encode(None, values.astype(dtype), None, None)[0, 0, :2].tobytes().hex() for name, dtype in DTYPES.items()}
    assert raw == {"float32": "0000a0bf0000003f", "float16": "00bd0038", "bfloat16": "a0bf003f"}
