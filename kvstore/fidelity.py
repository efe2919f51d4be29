"""Whether codes keep the values they were made from: the error of a typical token, which no outlier can hide or excuse.

A root mean square says little here, because one enormous value widens the step of its layer, so that every other value is rounded
away, and then is most of the sum that their errors are compared with. Knows numbers and layers; neither files
nor models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from kvstore.calibration import Calibration, calibration_mask, channels_of
from kvstore.codec import Kind, Quantizer, encode_measured
from kvstore.errors import FidelityError
from kvstore.manifest import Manifest

_TIMES_NOMINAL, _MOST = 4.0, 0.9
"""Typical tokens of trained models are at most twice as quiet as the root mean square of their layer, that of lost ones is 1."""
_MIN_TOKENS = 64
"""Of fewer, what is typical is chance; a store of fewer is measured as a whole."""


def typical_error(measures: Float[np.ndarray, "3 token"]) -> float:
    """Median over tokens of the error relative to the distance from the centre of all; 0 where all tokens are there.

    Args:
        measures: as `codec.encode_measured` gives them.
    """
    squared, squared_error = measures[0].astype(np.float64), measures[1].astype(np.float64)
    told = squared > 0
    return float(np.median(np.sqrt(squared_error[told] / squared[told]))) if told.any() else 0.0


def error_limit(quantizer: Quantizer) -> float:
    """Largest error of typical tokens that a codec may have: some times what its step makes of tokens like the others."""
    if quantizer.form == "e4m3":
        nominal = 2.0**-4 / math.sqrt(3)
    else:
        reach = 10 / 127 if quantizer.form == "int8" else 4 / 8  # what `calibration` widens the steps of loud channels to
        nominal = max(quantizer.step_sigmas, reach) / math.sqrt(12)
    return min(_TIMES_NOMINAL * nominal, _MOST)


class Trial:
    """The round trip of all samples that a calibration was fitted on, before anything is written."""

    def __init__(self, manifest: Manifest, calibration: Calibration) -> None:
        self._manifest, self._calibration = manifest, calibration
        self._measures: dict[tuple[int, Kind], list[np.ndarray]] = {}
        self._centres: dict[tuple[int, Kind], np.ndarray] = {}
        """Median of each channel in the first samples."""
        self._counted: list[np.ndarray] = []
        self._samples: list[tuple[str, int]] = []

    def add(self, layer: int, kind: Kind, values: Float[np.ndarray, "token kv_head dim"]) -> None:
        """Encode one layer's keys or values of some samples."""
        group, slot = self._manifest.group_of(layer)
        if group.quantizer(kind) is None:
            return
        mean, step = channels_of(self._calibration, group, kind, slot)
        measures = encode_measured(group.quantizer(kind), values, mean, step).measures.astype(np.float64)
        # An enormous value has moved the mean, too: beside that every token would look as if it were far from the others.
        centre = self._centres.setdefault((layer, kind), np.median(values, axis=0))
        measures[0] = np.square(values - centre, dtype=np.float64).sum(axis=(1, 2))
        self._measures.setdefault((layer, kind), []).append(measures)

    def end(self, counted: Bool[np.ndarray, "token"], samples: Sequence[tuple[str, int]]) -> None:
        """Say which tokens those of all layers were, and of which samples."""
        self._counted.append(counted)
        self._samples += samples

    def refuse_lossy(self) -> None:
        """Raises:
        FidelityError: a layer's typical token is lost.
        """
        if self._counted:
            measures = {where: np.concatenate(parts, axis=1) for where, parts in self._measures.items()}
            refuse_lossy(self._manifest, measures, np.concatenate(self._counted), self._samples, min_tokens=1)


def refuse_lossy(
    manifest: Manifest,
    measures: Mapping[tuple[int, Kind], Float[np.ndarray, "3 token"]],
    counted: Bool[np.ndarray, "token"],
    samples: Sequence[tuple[str, int]],
    *,
    min_tokens: int = _MIN_TOKENS,
) -> None:
    """Make sure that the typical token of each layer survives its codec.

    Args:
        measures: by layer and kind, of tokens laid end to end.
        counted: tokens with keys and values of their own.
        samples: id and number of tokens of each sample that the tokens are of.
        min_tokens: of fewer nothing is said.

    Raises:
        FidelityError: that of one does not.
    """
    lengths = [num_tokens for _, num_tokens in samples]
    usual = counted & calibration_mask(lengths)
    if usual.sum() < min_tokens:
        return
    for (layer, kind), measured in measures.items():
        quantizer = manifest.group_of(layer)[0].quantizer(kind)
        if quantizer is None:
            continue
        error, limit = typical_error(measured[:, usual]), error_limit(quantizer)
        if error > limit:
            loudest = int(np.argmax(np.where(usual, measured[0], -1.0)))
            asked = manifest.signal.get("codec", manifest.codec_of(layer).name)
            identity, _ = samples[int(np.searchsorted(np.cumsum(lengths), loudest, side="right"))]
            raise FidelityError(
                f"layer {layer}, {kind}: the codec changes a typical token by {error:.0%} of what sets it apart, expected at most "
                f"{limit:.0%} (median of {int(usual.sum()):,} tokens). The largest, in sample {identity[:12]}, is "
                f"{_times(measured[0, usual]):,.3g} times as large: such values take the steps from all others. Take that sample out "
                f"with 'kvpipe drop', use --codec '{asked},{layer}=raw', or --accept-fidelity to store it all the same"
            )


def _times(squared: Float[np.ndarray, "token"]) -> float:
    """How much larger the largest token is than the typical one."""
    return float(np.sqrt(squared.max() / np.maximum(np.median(squared), np.finfo(np.float32).tiny)))
