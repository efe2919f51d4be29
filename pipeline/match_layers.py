"""Which layers of a raw store's teacher are most like each layer of a pretrained student, on the store's own tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from kvstore import open_store
from kvstore.calibration import SINK_TOKENS
from kvstore.compose import Progress
from kvstore.reader import Store
from pipeline.align.layers import monotone_match
from pipeline.align.similarity import LayerSimilarity
from pipeline.align.spans import TextChangedError, align_sample
from pipeline.align.token_bytes import TokenBytes
from pipeline.models.capture import capture_kv
from pipeline.models.load import build_student, load_tokenizer
from pipeline.models.probe import probe_kv_spec

CKA_TOKENS = 16_384
_BATCH_TOKENS = 512


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerMatch:
    """What was found."""

    layer_map: str
    """The best map whose teacher layers never decrease, as `--layer-map` takes it."""
    student_layers: tuple[int, ...]
    teacher_layers: tuple[int, ...]
    cka: tuple[tuple[float, ...], ...]
    """Of every student layer with every teacher layer."""
    num_tokens: int


def match_layers(source: str, student: str, tokens: int, progress: Progress = lambda *_: None) -> LayerMatch:
    """Run the student on the store's first tokens and compare its keys and values with the teacher's.

    Raises:
        ValueError: a fresh student, which is like no layer, or tokenizers that cannot be aligned.
        KVStoreError: the store is damaged or baked.
    """
    store = open_store(source)
    if store.tokenizer_path is None or (store.manifest.alignment or {}).get("baked"):
        raise ValueError(
            f"{store.location}: expected a raw store with its tokenizer, as 'kvpipe extract' without --student makes"
        )
    theirs = TokenBytes(load_tokenizer(store.tokenizer_path))
    model, tokenizer = build_student(student, vocab_size=len(theirs.tokenizer), seed=0)
    if tokenizer is None:
        raise ValueError(
            f"--student: {student} is a fresh model, about equally unlike every layer of the teacher; expected a pretrained one. For a fresh "
            "student use last_aligned or uniform"
        )
    ours = TokenBytes(tokenizer)
    spec = probe_kv_spec(model.eval(), key_domain=store.spec.key_domain)
    found = LayerSimilarity(len(spec.layers), len(store.spec.layers))
    total = min(tokens, int(store.samples.num_tokens.sum()))
    done = 0
    for index in range(len(store)):
        if done >= total:
            break
        progress(done, total)
        _compare(store, index, theirs, ours, model, spec, found)
        done += int(store.samples.num_tokens[index])
    if found.num_tokens == 0:
        raise ValueError(f"{store.location}: no sample has four tokens or more that both models read; nothing can be compared")
    progress(total, total)
    cka = found.cka()
    pairs = zip(spec.layer_numbers, monotone_match(cka), strict=True)
    return LayerMatch(
        layer_map=",".join(f"{layer}={store.spec.layer_numbers[slot]}" for layer, slot in pairs),
        student_layers=spec.layer_numbers,
        teacher_layers=store.spec.layer_numbers,
        cka=tuple(tuple(float(value) for value in row) for row in cka),
        num_tokens=found.num_tokens,
    )


def written_out(layer_map: str, source: str, student: str, say: Callable[[str], None]) -> str:
    """A layer map as it is, but for `cka`, which becomes the pairs found on the store's first tokens.

    Raises:
        ValueError, KVStoreError: as `match_layers`.
    """
    if layer_map != "cka":
        return layer_map
    found = match_layers(source, student, CKA_TOKENS).layer_map
    say(f"layer map by CKA: {found}")
    return found


def _compare(
    store: Store, index: int, theirs: TokenBytes, ours: TokenBytes, model: Any, spec: Any, found: LayerSimilarity
) -> None:
    """Add one sample, in batches of tokens that both have."""
    tokens = store.read([index], layers=())
    try:
        sample = align_sample(theirs, ours, tokens.input_ids)
    except TextChangedError:
        return
    usable = np.arange(len(tokens.input_ids)) >= SINK_TOKENS
    if store.manifest.is_response_only:
        usable &= tokens.learnt
    spans = sample.spans.within(usable)
    kept = torch.from_numpy(np.flatnonzero(spans.kept))
    if len(kept) < 4:
        return
    captured = capture_kv(model, spec, torch.from_numpy(sample.input_ids)[None])
    student = [tuple(side[0].transpose(0, 1)[kept] for side in captured[layer]) for layer in spec.layer_numbers]
    teacher = []
    for layer in store.spec.layer_numbers:
        batch = store.read([index], [layer])
        teacher.append(tuple(spans.apply(torch.from_numpy(side[0]))[kept] for side in (batch.key, batch.value)))
    for first in range(0, len(kept), _BATCH_TOKENS):
        part = slice(first, first + _BATCH_TOKENS)
        if len(kept[part]) >= 4:
            found.add(_cut(student, part), _cut(teacher, part))


def _cut(layers: Sequence[Sequence[torch.Tensor]], part: slice) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(key[part], value[part]) for key, value in layers]
