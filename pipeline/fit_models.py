"""The models a fit may run over a store's tokens: a pretrained student, or the teacher for its queries."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvstore import KVStoreError
from kvstore.errors import FingerprintMismatchError
from kvstore.reader import Store
from kvstore.spec import KVSpec
from pipeline.align.same_tokens import tokenizer_differences
from pipeline.fit import StudentKV, TeacherQueries
from pipeline.models.capture import capture_kv
from pipeline.models.fingerprint import weights_fingerprint
from pipeline.models.load import load_causal_lm, load_tokenizer
from pipeline.models.queries import capture_queries
from pipeline.models.resolve import resolve_model


def pretrained_student(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, spec: KVSpec, store: Store, device: str
) -> StudentKV:
    """A student that reads the store's tokens.

    Raises:
        ValueError: its weights are fresh, or its tokens are others.
    """
    if tokenizer is None:
        raise ValueError(
            f"ridge: the student {name} has fresh weights, expected a pretrained one; what random layers make of a token is nothing to fit to"
        )
    if store.tokenizer_path is None:
        raise ValueError(f"ridge: {store.location} keeps no tokenizer, so its tokens cannot be compared; extract it again")
    if differences := tokenizer_differences(tokenizer, load_tokenizer(store.tokenizer_path)):
        raise ValueError(
            f"ridge: {name} has another tokenizer than {store.location}, expected the same tokens on both sides (student against store: "
            f"{'; '.join(differences)}); choose a student of the teacher's family, or another method"
        )
    model = model.to(device)

    def student_kv(input_ids: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        captured = capture_kv(model, spec, torch.from_numpy(input_ids.astype(np.int64))[None].to(device))
        return {layer: (_in_order(key), _in_order(value)) for layer, (key, value) in captured.items()}

    return student_kv


def teacher_queries(name: str, store: Store, device: str) -> TeacherQueries:
    """The store's own teacher.

    Raises:
        ModelLoadError: there is no such model.
        FingerprintMismatchError: it is another than the store's.
        KVStoreError: the store does not say which teacher it is of.
    """
    resolved = resolve_model(name)
    expected, found = store.manifest.signal.get("weights"), weights_fingerprint(resolved.path)
    if expected is None:
        raise KVStoreError(
            f"query-pca: {store.location} does not say which weights it is of, expected one that 'kvpipe extract' made"
        )
    if found != expected:
        raise FingerprintMismatchError(
            f"--teacher: {name} has weights {found[:16]}, but {store.location} is of {str(expected)[:16]}; name the teacher of this store"
        )
    model = load_causal_lm(resolved.path, device=device)

    def queries(input_ids: np.ndarray) -> dict[int, np.ndarray]:
        captured = capture_queries(model, torch.from_numpy(input_ids.astype(np.int64))[None].to(device))
        return {layer: _in_order(query) for layer, query in captured.items()}

    return queries


def _in_order(states: torch.Tensor) -> np.ndarray:
    """[token, head, dim] of a batch of one."""
    return np.asarray(states[0].transpose(0, 1).float().cpu().numpy())
