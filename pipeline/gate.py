"""The gate run: does the teacher still predict the same when its keys and values have been through the codec?

A teacher that reads its own text over decoded keys and values gives other next-token distributions; how far they are from its
own is the one fidelity number that means something before there is a student (research/codecs.md 4). Works in the teacher's
geometry. Knows no command line and no scheduling, and does not decide what happens when a gate fails.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvstore import Store
from kvstore.calibration import Calibration, Channel, ChannelMoments, calibration_mask, channels_of, fit_quantizer
from kvstore.codec import CODECS, KINDS, Codec, Kind, codec_named, decode, encode, format_codecs
from kvstore.errors import CodecError
from kvstore.groups import plan_groups
from kvstore.spec import KVSpec
from pipeline.models.capture import KeyValue, KVTap, capture_kv, evaluation_mode
from pipeline.models.substitute import Replace, substituted

GATE_TOKENS = 4096
"""Tokens a gate run reads: a few thousand distributions to average over, little beside an extraction."""
SLICE_TOKENS = 256
"""Positions compared at once: two float32 distributions over 152k tokens are then 0.3 GB."""

Geometry = Literal["stored", "teacher's, before projection"]
Fit = tuple[Channel, Channel] | tuple[None, None]
"""Mean and step of one layer's keys or values; None for raw."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """How much a codec changes what the teacher predicts."""

    codec: str
    """As `format_codecs` writes it."""
    geometry: Geometry
    """Whether what lies on disk was tried, or, for a baked store, the same codec on the teacher's own keys and values."""
    num_samples: int
    num_tokens: int
    """Positions whose next-token distributions were compared."""
    kl: float
    """Mean KL(base || codec) of next-token distributions, in nats per token."""
    perplexity_change: float
    """Perplexity with the codec over that without, less 1."""
    top1_agreement: float
    """Share of positions where both hold the same token for the likeliest."""

    def passes(self, limit: float) -> bool:
        """Whether the KL is at most `limit` nats per token; NaN never is."""
        return self.kl <= limit

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> GateResult:
        """Parse what `to_json` gave.

        Raises:
            ValueError: a field is missing or unknown.
        """
        try:
            return cls(**record)
        except TypeError as error:
            raise ValueError(f"gate: {error}; expected {', '.join(f.name for f in dataclasses.fields(cls))}") from error


class BadSequenceError(CodecError):
    """The teacher gives values of one sequence that are not finite: leave it out, or name its sample."""

    def __init__(self, number: int, reason: str) -> None:
        """
        Args:
            number: its place among the sequences of the gate.
        """
        super().__init__(number, reason)
        self.number, self.reason = number, reason

    def __str__(self) -> str:
        return f"sequence {self.number} of the gate, {self.reason}"


def run_gate(
    model: Any,
    spec: KVSpec,
    sequences: Iterable[np.ndarray],
    replace: Replace,
    *,
    layers: Sequence[int],
    codec: str,
    geometry: Geometry,
) -> GateResult:
    """Read every sequence twice, over the teacher's own keys and values and over what `replace` makes of them.

    `replace` is given what the unchanged teacher computes, as a store would hold it, not what follows from replacements below.

    Args:
        sequences: token ids, each read alone and unpadded.
        layers: teacher layers that go through `replace`.

    Raises:
        ValueError: no sequence has a next token to predict.
        CodecError: the teacher gave values that cannot be encoded.
    """
    pairs = ((input_ids, replace) for input_ids in sequences)
    return _compare(model, spec.select(layers), pairs, codec=codec, geometry=geometry)


def run_stored_gate(model: Any, spec: KVSpec, store: Store, sample_indices: Sequence[int], layers: Sequence[int]) -> GateResult:
    """The same with the keys and values that lie in a store: proves that they are those of this teacher and text.

    Raises:
        ValueError: whatever `run_gate` refuses, or a layer the store has not.
        CorruptShardError: a shard is missing or damaged.
    """
    codecs = {layer: codec_named(store.manifest.group_of(layer)[0].codec) for layer in sorted(layers)}
    pairs = (_stored_sample(store, index, layers) for index in sample_indices)
    in_its_domain = dataclasses.replace(spec.select(layers), key_domain=store.spec.key_domain)
    return _compare(model, in_its_domain, pairs, codec=format_codecs(codecs), geometry="stored")


def _stored_sample(store: Store, index: int, layers: Sequence[int]) -> tuple[np.ndarray, Replace]:
    """Token ids of a sample, and a `replace` that gives its stored keys and values whatever it is given."""
    stored: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    tokens = store.read([index], layers=())
    # Of a response-only store the teacher keeps its own keys and values where there are none.
    missing = torch.from_numpy(~tokens.learnt & store.manifest.is_response_only)[:, None]
    for group in store.manifest.groups:
        if wanted := [layer for layer in group.layers if layer in layers]:
            batch = store.read([index], layers=wanted)
            stored.update({layer: (batch.key[slot], batch.value[slot]) for slot, layer in enumerate(wanted)})

    def replace(layer: int, key: Tensor, value: Tensor) -> KeyValue:
        def like(array_THD: np.ndarray, tensor: Tensor) -> Tensor:
            known = torch.from_numpy(array_THD).transpose(0, 1)[None].to(tensor.device, tensor.dtype)
            return torch.where(missing.to(tensor.device), tensor, known)

        return like(stored[layer][0], key), like(stored[layer][1], value)

    return tokens.input_ids, replace


def _compare(
    model: Any, spec: KVSpec, pairs: Iterable[tuple[np.ndarray, Replace]], *, codec: str, geometry: Geometry
) -> GateResult:
    num_samples, num_predicted, num_tokens = 0, 0, 0
    sums = np.zeros(4)
    with torch.inference_mode(), evaluation_mode(model):
        for number, (input_ids, replace) in enumerate(pairs):
            try:
                sums += _read_twice(model, spec, input_ids, replace)
            except CodecError as error:
                raise BadSequenceError(number, str(error)) from None
            num_samples += 1
            num_tokens += len(input_ids)
            num_predicted += len(input_ids) - 1
    if num_predicted == 0:
        raise ValueError(
            f"gate: got {num_samples} samples of {num_tokens} tokens, expected one of two tokens or more, so that there is a "
            "next token to predict"
        )
    kl, agreement, base_nll, changed_nll = sums
    return GateResult(
        codec=codec,
        geometry=geometry,
        num_samples=num_samples,
        num_tokens=num_tokens,
        kl=float(kl) / num_tokens,
        # Beyond 700 nats the ratio leaves float64; the record must stay a number.
        perplexity_change=math.expm1(min((changed_nll - base_nll) / num_predicted, 700.0)),
        top1_agreement=float(agreement) / num_tokens,
    )


def _read_twice(model: Any, spec: KVSpec, input_ids: Int[np.ndarray, " token"], replace: Replace) -> np.ndarray:
    """Sums of one sequence; its own keys and values of all layers are kept on the device between the two forwards."""
    ids = _batch_of_one(model, input_ids)
    with KVTap(model, spec) as tap:
        base = model(input_ids=ids, use_cache=False).logits[0]
    own = tap.kv
    with substituted(model, spec, lambda layer, *_: replace(layer, *own[layer])):
        changed = model(input_ids=ids, use_cache=False).logits[0]
    return _sums(base, changed, ids[0].to(base.device))


def _batch_of_one(model: Any, input_ids: Int[np.ndarray, " token"]) -> Int[Tensor, "1 token"]:
    return torch.from_numpy(input_ids.astype(np.int64))[None].to(model.device)


def _sums(
    base: Float[Tensor, "token vocab"], changed: Float[Tensor, "token vocab"], input_ids: Int[Tensor, " token"]
) -> np.ndarray:
    """KL(base || changed), equal likeliest tokens, and both negative log-likelihoods of the next tokens, summed in float64."""
    sums = torch.zeros(4, dtype=torch.float64, device=base.device)
    for first in range(0, len(base), SLICE_TOKENS):
        span = slice(first, first + SLICE_TOKENS)
        next_ids = input_ids[first + 1 : first + 1 + SLICE_TOKENS, None]
        p, q = (logits[span].float().log_softmax(-1) for logits in (base, changed))
        sums[0] += (p.exp() * (p - q)).sum(-1).double().sum()
        sums[1] += (p.argmax(-1) == q.argmax(-1)).sum()
        for row, logs in ((2, p), (3, q)):
            sums[row] -= logs[: len(next_ids)].gather(1, next_ids).double().sum()
    return np.asarray(sums.cpu().numpy())


def codec_round_trip(codecs: Mapping[int, Codec], calibration_of: Callable[[int, Kind], Fit]) -> Replace:
    """A `replace` that encodes and decodes on the device, and rounds the result to the dtype attention works in.

    Args:
        codecs: by teacher layer.
        calibration_of: mean and step for a teacher layer and kind, numpy arrays [kv_head, dim].
    """
    on_device: dict[tuple[int, Kind], tuple[Tensor, Tensor] | tuple[None, None]] = {}

    def channels(layer: int, kind: Kind, device: torch.device) -> tuple[Tensor, Tensor] | tuple[None, None]:
        if (layer, kind) not in on_device:
            mean, step = calibration_of(layer, kind)
            if mean is None or step is None:
                on_device[layer, kind] = None, None
            else:
                on_device[layer, kind] = torch.from_numpy(mean).to(device), torch.from_numpy(step).to(device)
        return on_device[layer, kind]

    def through(layer: int, kind: Kind, values: Tensor) -> Tensor:
        quantizer = codecs[layer].quantizer(kind)
        mean, step = channels(layer, kind, values.device)
        values_BTHD = values.transpose(1, 2)
        try:
            decoded = decode(quantizer, encode(quantizer, values_BTHD.flatten(0, 1), mean, step), mean, step)
        except CodecError as error:
            raise CodecError(f"layer {layer}, {kind}: {error}") from None
        rounded: Tensor = decoded.to(values.dtype).reshape(values_BTHD.shape)
        return rounded.transpose(1, 2)

    return lambda layer, key, value: (through(layer, "key", key), through(layer, "value", value))


def stored_calibration(spec: KVSpec, codecs: Mapping[int, Codec], calibration: Calibration) -> dict[tuple[int, Kind], Fit]:
    """Mean and step by layer and kind, from the arrays of a store of this spec and these codecs."""
    return {
        (layer, kind): channels_of(calibration, group, kind, slot)
        for group in plan_groups(spec, codecs)
        for slot, layer in enumerate(group.layers)
        for kind in KINDS
    }


def self_calibrated(
    model: Any, spec: KVSpec, sequences: Iterable[np.ndarray], codecs: Mapping[int, Codec], layers: Sequence[int]
) -> dict[tuple[int, Kind], Fit]:
    """Mean and step by layer and kind, fitted on these sequences themselves, in the teacher's own geometry.

    For baked stores, whose calibration is in the student's geometry, and for trying a codec the store was not calibrated for.
    Fitted on little: on tiny models the KL then was within a tenth of that with the store's own calibration.

    Raises:
        CodecError: the teacher gave values that are not finite.
    """
    chosen = spec.select(layers)
    moments = {
        (layer.layer, kind): ChannelMoments.zeros(layer.num_kv_heads, layer.key_dim if kind == "key" else layer.value_dim)
        for layer in chosen.layers
        for kind in KINDS
    }
    for number, input_ids in enumerate(sequences):
        wanted = calibration_mask([len(input_ids)])
        for layer, kv in capture_kv(model, spec, _batch_of_one(model, input_ids), layers=layers).items():
            for kind, values in zip(KINDS, kv, strict=True):
                if not torch.isfinite(values).all():
                    raise BadSequenceError(
                        number, f"layer {layer}, {kind}: got NaN or infinity from the teacher, expected finite values"
                    )
                moments[layer, kind].add(values[0].transpose(0, 1).float().cpu().numpy()[wanted])
    fits: dict[tuple[int, Kind], Fit] = {}
    for (layer, kind), seen in moments.items():
        quantizer = codecs[layer].quantizer(kind)
        fits[layer, kind] = (None, None) if quantizer is None else fit_quantizer(quantizer, seen)
    return fits


def gate_sequences(lengths: Sequence[int], max_tokens: int = GATE_TOKENS) -> list[int]:
    """Which samples to read: as many, evenly spread over all, as have `max_tokens` together; one at least.

    Samples of a single token predict nothing and are left out where there are others.

    Raises:
        ValueError: there are no samples.
    """
    if not lengths:
        raise ValueError("gate: got no samples, expected one at least")
    candidates = [index for index, length in enumerate(lengths) if length > 1] or list(range(len(lengths)))
    total = sum(lengths[index] for index in candidates)
    count = max(min(len(candidates), max_tokens * len(candidates) // total), 1)
    while True:
        chosen = [candidates[(2 * turn + 1) * len(candidates) // (2 * count)] for turn in range(count)]
        if count == 1 or sum(lengths[index] for index in chosen) <= max_tokens:
            return chosen
        count -= 1


def finer_codecs(codec: str) -> list[str]:
    """Rungs more faithful than the coarsest in a text such as `mix,0=raw`, the nearest first; none for exchange formats."""
    used = [CODECS[part.rpartition("=")[2]].nominal_bits for part in codec.split(",")]
    rungs = sorted((rung for rung in CODECS.values() if rung.name != "fp8"), key=lambda rung: rung.nominal_bits)
    return [rung.name for rung in rungs if rung.nominal_bits > min(used) and rung.key is not None]


def verdict(result: GateResult, limit: float, alternatives: Iterable[GateResult]) -> str:
    """What to tell a person whose gate failed, and what to do next.

    Args:
        limit: largest KL, in nats per token.
        alternatives: gates of other codecs, in the order in which they are to be recommended.
    """
    tried = list(alternatives)
    where = "" if result.geometry == "stored" else ", in the teacher's geometry, before projection"
    message = (
        f"codec {result.codec}: the teacher's predictions change by KL {result.kl:.3g} nats per token, expected at most "
        f"{limit:g} (perplexity {100 * result.perplexity_change:+.1f} %, top-1 agreement {result.top1_agreement:.2f}, "
        f"{result.num_tokens:,} tokens{where}); "
    )
    all_the_same = "or --accept-fidelity to store it all the same"
    if best := next((other for other in tried if other.passes(limit)), None):
        return f"{message}{best.codec} passes with {best.kl:.2g}: use --codec {best.codec}, {all_the_same}"
    if tried:
        message += f"{' and '.join(f'{other.codec} ({other.kl:.2g})' for other in tried)} do not pass either; "
    return f"{message}use a more faithful --codec, raw at the last, {all_the_same}"
