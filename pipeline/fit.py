"""Fit projections for one student on the keys and values of a raw store, one sample in memory at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from kvstore import KVStoreError
from kvstore.batches import KVBatch
from kvstore.calibration import calibration_mask, refuse_broken_sample
from kvstore.codec import KINDS
from kvstore.compose import Progress
from kvstore.reader import Store
from kvstore.spec import KVSpec, format_layers
from pipeline.align.alignment import Alignment
from pipeline.align.fit import Fit, student_side
from pipeline.align.fitted import FittedMap, Method, attention_cosine, cross_sums, fit_map, retained_variance
from pipeline.align.sums import CrossSums, QuerySums, Sums

FIT_TOKENS = 262_144
"""As many as head alignment was shown to work with (arXiv 2412.20677); at least twenty for each kv head times head dim are wanted."""
_ATTENTION_SAMPLES, _ATTENTION_TOKENS = 8, 512

StudentKV = Callable[[np.ndarray], Mapping[int, tuple[np.ndarray, np.ndarray]]]
"""Keys, before rotation, and values of each student layer, [token, kv_head, dim], of the tokens given."""
TeacherQueries = Callable[[np.ndarray], Mapping[int, np.ndarray]]
"""Queries of each teacher layer, [token, head, dim], of the tokens given."""


def fit_store(
    store: Store,
    student: KVSpec,
    method: Method = "complex-pca",
    *,
    layer_map: str = "last_aligned",
    student_layers: Sequence[int] | None = None,
    tokens: int = FIT_TOKENS,
    held_out: float = 0.1,
    student_kv: StudentKV | None = None,
    teacher_queries: TeacherQueries | None = None,
    progress: Progress = lambda *_: None,
) -> Fit:
    """Fit a map for every teacher layer in use.

    Samples are taken in the store's order. Of their tokens the first, attention sinks with extreme values, do not count, nor do
    those of prompts in a response-only store, which have no keys.

    Args:
        student_layers: the student's layers to fit for, None for all.
        tokens: stop once so many tokens are counted; the last sample counts whole.
        held_out: share of samples, spread evenly, which the fit does not see. Retained variance is measured on them, and on the
            first tokens of a few of them attention.
        student_kv: for `ridge`, the pretrained student; where several student layers share a teacher layer, the map fits all of them.
        teacher_queries: for `query-pca`, the teacher of the store.

    Raises:
        ValueError: no such layers, or geometry that the method cannot map.
        KVStoreError: the store is baked, lacks layers, holds rotated keys or MLA latents, or has no tokens to count.
    """
    _refuse_store(store)
    if not 0 <= held_out < 1 or tokens < 1:
        raise ValueError(
            f"fit: got held_out {held_out}, tokens {tokens}, expected a share from 0 to below 1 and at least 1 token"
        )
    alignment = _plan(store, student, layer_map, student_layers)
    beside = _Beside(alignment, student_kv, teacher_queries)
    seen, unseen, held_out_samples = _count(store, alignment, beside, tokens, held_out, progress)
    maps = {}
    for layer, sums in seen.items():
        side, student_rope = student_side(alignment, layer)
        maps[layer] = fit_map(
            method,
            sums,
            side,
            alignment.teacher.rope_of(layer),
            student_rope,
            cross=beside.cross.get(layer),
            queries=beside.queries.get(layer),
        )
    return Fit(
        method=method,
        alignment=alignment,
        store=store.manifest.fingerprint,
        num_tokens=next(iter(seen.values())).count,
        num_held_out_tokens=next(iter(unseen.values())).count,
        maps=maps,
        retained={layer: retained_variance(maps[layer], sums) for layer, sums in seen.items()},
        retained_held_out={layer: retained_variance(maps[layer], sums) for layer, sums in unseen.items() if sums.count},
        attention_cosine=_attention_cosines(store, held_out_samples[:_ATTENTION_SAMPLES], maps),
    )


def _plan(store: Store, student: KVSpec, layer_map: str, student_layers: Sequence[int] | None) -> Alignment:
    alignment = Alignment.plan(store.manifest.teacher, student, layer_map, student_layers)
    missing = sorted(set(alignment.teacher_layers) - set(store.spec.layer_numbers))
    if missing:
        raise KVStoreError(
            f"fit: {layer_map} needs teacher layers {format_layers(alignment.teacher_layers)}, {store.location} lacks "
            f"{format_layers(missing)}; choose another --layer-map, or extract them"
        )
    return alignment


def _count(
    store: Store, alignment: Alignment, beside: _Beside, tokens: int, held_out: float, progress: Progress
) -> tuple[dict[int, Sums], dict[int, Sums], list[int]]:
    """Sums of the tokens that are fitted to and of those held out, by teacher layer, and which samples these are of."""
    seen, unseen = _empty_sums(alignment), _empty_sums(alignment)
    held_out_samples = []
    counted, total = 0, min(tokens, int(store.samples.num_tokens.sum()))
    for index in range(len(store)):
        is_held_out = int((index + 1) * held_out) > int(index * held_out)
        if is_held_out:
            held_out_samples.append(index)
        counted += _count_sample(store, index, unseen if is_held_out else seen, None if is_held_out else beside)
        progress(min(counted, total), total)
        if counted >= tokens:
            break
    progress(total, total)
    if next(iter(seen.values())).count == 0:
        raise KVStoreError(
            f"fit: {store.location} has no tokens to fit on; got {len(store)} samples, expected longer or more ones"
        )
    return seen, unseen, held_out_samples


def _refuse_store(store: Store) -> None:
    manifest = store.manifest
    if (manifest.alignment or {}).get("baked") or "kv_mask" in manifest.token_arrays:
        raise KVStoreError(
            f"fit: {store.location} is already aligned to a student; expected a raw store, as 'kvpipe extract' without --student makes"
        )
    rotated = set(store.spec.layer_numbers) - set(store.spec.unrotated_layers)
    if store.spec.key_domain == "post_rope" and rotated:
        raise KVStoreError(
            f"fit: {store.location} holds keys after rotation, whose heads cannot be told from positions; got key_domain post_rope, "
            "expected pre_rope. Extract again with keys before rotation, the default"
        )
    latent = [layer.layer for layer in store.spec.layers if layer.latent]
    if latent:
        raise KVStoreError(
            f"fit: layers {format_layers(latent)} of {store.location} hold MLA latents, which have no heads to project; expected "
            "keys and values of heads"
        )


def _empty_sums(alignment: Alignment) -> dict[int, Sums]:
    sums = {}
    for layer in alignment.teacher_layers:
        turns = student_side(alignment, layer)[1] is not None
        sums[layer] = Sums(alignment.teacher.layer(layer), alignment.teacher.rope_of(layer) if turns else None)
    return sums


class _Beside:
    """Sums that need a model to run over the tokens, of those methods that have any."""

    def __init__(self, alignment: Alignment, student_kv: StudentKV | None, teacher_queries: TeacherQueries | None) -> None:
        self._alignment, self._student_kv, self._teacher_queries = alignment, student_kv, teacher_queries
        self.cross: dict[int, CrossSums] = {}
        self.queries: dict[int, QuerySums] = {}
        for layer in alignment.teacher_layers:
            theirs, rope = alignment.teacher.layer(layer), alignment.teacher.rope_of(layer)
            ours, own_rope = student_side(alignment, layer)
            if student_kv is not None:
                self.cross[layer] = cross_sums(theirs, ours, rope, own_rope)
            if teacher_queries is not None:
                self.queries[layer] = QuerySums(theirs, rope if own_rope is not None else None)

    def of(self, input_ids: np.ndarray) -> Callable[[int, np.ndarray, np.ndarray, np.ndarray], None]:
        """Runs the models over one sample, once, when its first layer is counted."""
        student = functools.cache(lambda: self._student_kv(input_ids) if self._student_kv else {})
        teacher = functools.cache(lambda: self._teacher_queries(input_ids) if self._teacher_queries else {})

        def add(layer: int, counts: np.ndarray, key: np.ndarray, value: np.ndarray) -> None:
            for own, theirs in self._alignment.layer_map:
                if theirs == layer and layer in self.cross:
                    ours = student()[own]
                    self.cross[layer].add((ours[0][counts], ours[1][counts]), (key, value))
            if layer in self.queries:
                self.queries[layer].add(teacher()[layer][counts])

        return add


def _count_sample(store: Store, index: int, sums: dict[int, Sums], beside: _Beside | None) -> int:
    """Add a sample to every layer; returns how many tokens counted. One layer at a time: head dims may differ among layers."""
    num_tokens, add = 0, None
    for layer, of_layer in sums.items():
        batch = store.read([index], [layer])
        counts = _counting(store, batch)
        for kind, values in zip(KINDS, (batch.key[0], batch.value[0]), strict=True):
            refuse_broken_sample(values, [(store.samples.ids[index], len(values))], layer, kind, store.location)
        key, value = batch.key[0][counts], batch.value[0][counts]
        of_layer.add(key, value)
        num_tokens = int(counts.sum())
        if beside is not None and num_tokens:
            add = add or beside.of(batch.input_ids)
            add(layer, counts, key, value)
    return num_tokens


def _counting(store: Store, batch: KVBatch) -> np.ndarray:
    counts = calibration_mask(np.diff(batch.cu_seqlens).tolist())
    return counts & batch.learnt if store.manifest.is_response_only else counts


def _attention_cosines(store: Store, samples: Sequence[int], maps: Mapping[int, FittedMap]) -> dict[int, float]:
    """Mean over samples, by layer; of a sample its first tokens that have keys."""
    cosines = {}
    for layer, fitted in maps.items():
        found = []
        for index in samples:
            batch = store.read([index], [layer])
            has_keys = batch.learnt if store.manifest.is_response_only else np.ones(len(batch.input_ids), dtype=np.bool_)
            positions = np.flatnonzero(has_keys)[:_ATTENTION_TOKENS]
            if len(positions):
                key, value = (torch.from_numpy(side[0][positions]) for side in (batch.key, batch.value))
                found.append(attention_cosine(fitted, key, value, torch.from_numpy(positions), store.spec.rope_of(layer)))
        if found:
            cosines[layer] = sum(found) / len(found)
    return cosines
