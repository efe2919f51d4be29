"""What recoding and aligning refuse to lose: values that one enormous number takes the steps from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvstore import open_store
from kvstore.calibration import ChannelMoments, fit_quantizer
from kvstore.codec import CODECS, KINDS, encode_measured
from kvstore.commits import sample_id
from kvstore.errors import FidelityError
from kvstore.fidelity import error_limit, typical_error
from kvstore.rewrite import recode_store
from tests.stores import Source, random_source, small_spec, write_store

LENGTHS = [40, 50, 60, 70]


def with_outlier(value: float, layer: int = 1) -> Source:
    """A source in whose third sample one key is enormous."""
    source = random_source(small_spec(), LENGTHS)
    source.kv[2][layer][0][30, 1, 5] = value
    return source


@pytest.mark.parametrize(
    "codec", [pytest.param(name, marks=() if name == "q8z" else pytest.mark.slow) for name in CODECS if name != "raw"]
)
def test_one_enormous_key_is_refused_by_every_codec_with_layer_sample_measure_and_limit(codec: str, tmp_path: Path) -> None:
    source = with_outlier(1e4)
    raw = write_store(tmp_path / "raw", source, "raw")
    culprit = sample_id(source.input_ids[2])[:12]
    message = (
        rf"layer 1, key: the codec changes a typical token by \d+%.*at most \d+% \(median of \d+ tokens\)\..*sample {culprit}"
    )
    with pytest.raises(FidelityError, match=message):
        recode_store(str(raw), codec, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()
    recode_store(str(raw), codec, str(tmp_path / "accepted"), accept_fidelity=True)
    recode_store(str(raw), f"{codec},1=raw", str(tmp_path / "spared"))
    spared = open_store(tmp_path / "spared")
    batch = spared.read([spared.samples.ids.index(sample_id(source.input_ids[2]))], layers=[1])
    np.testing.assert_array_equal(batch.key[0], source.kv[2][1][0])


@pytest.mark.parametrize("codec", [name for name in CODECS if name != "raw"])
@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
def test_tokens_of_very_different_sizes_are_no_loss(codec: str, spread: float) -> None:
    """Sizes of tokens in trained models spread less than this."""
    rng = np.random.default_rng(0)
    values = (
        rng.normal(size=(4000, 2, 16)) * rng.lognormal(sigma=spread / 2, size=(4000, 1, 1)) * rng.uniform(0.05, 2, size=(2, 16))
    )
    values = (values + 3).astype(np.float32)
    moments = ChannelMoments.zeros(2, 16)
    moments.add(values)
    for kind in KINDS:
        quantizer = CODECS[codec].quantizer(kind)
        assert quantizer is not None
        mean, step = fit_quantizer(quantizer, moments)
        error = typical_error(encode_measured(quantizer, values, mean, step).measures)
        assert error < error_limit(quantizer), kind


def test_a_shard_unlike_what_was_calibrated_on_is_refused_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.rewrite.CALIBRATION_TOKENS", 100)
    source = random_source(small_spec(), [80] * 6)
    order = sorted(range(6), key=lambda index: sample_id(source.input_ids[index]))
    quiet = source.kv[order[-1]][2][1]
    quiet[:] = quiet / 1000
    raw = write_store(tmp_path / "raw", source, "raw")
    with pytest.raises(
        FidelityError, match=r"layer 2, value: the codec changes a typical token by 100%.* use --codec 'mix,0=q8,2=raw', or"
    ):
        recode_store(str(raw), "mix,0=q8", str(tmp_path / "out"))


def test_constants_are_no_loss(tmp_path: Path) -> None:
    source = random_source(small_spec(), LENGTHS)
    for sample in source.kv:
        for layer, (key, value) in sample.items():
            sample[layer] = (np.full_like(key, 2.0), np.zeros_like(value))
    raw = write_store(tmp_path / "raw", source, "raw")
    recode_store(str(raw), "q4z-min", str(tmp_path / "out"))
