"""Codecs: error bounds, exactness, packing, calibration, and bytes that must never change."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import CodecError
from kvstore.calibration import ChannelMoments, fit_quantizer
from kvstore.codec import CODECS, Quantizer, code_dim, codec_named, decode, encode, saturated

INT8, NIBBLE = Quantizer(form="int8", step_sigmas=0.25), Quantizer(form="nibble", step_sigmas=0.5)


def moments_of(values: np.ndarray) -> ChannelMoments:
    moments = ChannelMoments.zeros(*values.shape[1:])
    moments.add(values)
    return moments


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), loud=st.floats(0.1, 100), offset=st.floats(-1000, 1000), bits=st.sampled_from([8, 4]))
def test_unclipped_values_come_back_within_half_a_step(seed: int, loud: float, offset: float, bits: int) -> None:
    rng = np.random.default_rng(seed)
    scale = np.ones((2, 6))
    scale[0, 0] = loud
    values = (rng.normal(size=(200, 2, 6)) * scale + offset).astype(np.float32)
    quantizer = INT8 if bits == 8 else NIBBLE
    mean, step = fit_quantizer(quantizer, moments_of(values))
    codes = encode(quantizer, values, mean, step)
    error = np.abs(decode(quantizer, codes, mean, step) - values)
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    inside = (values >= mean + low * step) & (values <= mean + high * step)
    assert (error[inside] <= np.broadcast_to(step, values.shape)[inside] / 2 + np.abs(values[inside]) * 1e-6 + 1e-6).all()
    assert inside.mean() > 0.95


def test_rates_and_errors_of_gaussian_channels_are_those_of_the_design() -> None:
    values = np.random.default_rng(0).normal(size=(20_000, 2, 8)).astype(np.float32)
    for name, kind, expected in (("q8", "key", 0.0136), ("mix", "key", 0.0722), ("mix", "value", 0.1445)):
        quantizer = codec_named(name).quantizer(kind)  # type: ignore[arg-type]  # literal in a tuple
        assert quantizer is not None
        mean, step = fit_quantizer(quantizer, moments_of(values))
        error = decode(quantizer, encode(quantizer, values, mean, step), mean, step) - values
        assert np.linalg.norm(error) / np.linalg.norm(values - mean) == pytest.approx(expected, rel=0.02)


def test_a_loud_channel_widens_its_own_step_only() -> None:
    values = np.random.default_rng(0).normal(size=(5_000, 1, 64)).astype(np.float32)
    values[:, 0, 3] *= 50
    for quantizer in (INT8, NIBBLE):
        _, step = fit_quantizer(quantizer, moments_of(values))
        quiet = np.delete(step[0], 3)
        assert (quiet == quiet[0]).all()
        assert step[0, 3] > quiet[0]
        mean, step = fit_quantizer(quantizer, moments_of(values))
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


def test_a_constant_layer_decodes_exactly() -> None:
    values = np.full((10, 1, 4), 3.25, dtype=np.float32)
    for quantizer in (INT8, NIBBLE):
        mean, step = fit_quantizer(quantizer, moments_of(values))
        np.testing.assert_array_equal(decode(quantizer, encode(quantizer, values, mean, step), mean, step), values)


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
    with pytest.raises(CodecError, match="head dim: got 7, expected an even number"):
        code_dim(NIBBLE, 7)


def test_an_unknown_codec_lists_the_known_ones() -> None:
    with pytest.raises(CodecError, match=f"got 'q9', expected one of {', '.join(CODECS)}"):
        codec_named("q9")


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
    digests = {
        quantizer.form: hashlib.sha256(encode(quantizer, values, mean, step).tobytes()).hexdigest()[:16]
        for quantizer in (INT8, NIBBLE)
    }
    assert digests == {"int8": "19b480ea958aa8a7", "nibble": "84eb779d0e7d5dca"}
