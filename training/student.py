"""The student to train: built, and shown to fit the store's tokens. Knows models and the store's tokenizer; no losses."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvstore.reader import Store
from pipeline.models.load import build_student, load_tokenizer


def store_tokenizer(store: Store) -> PreTrainedTokenizerBase:
    """The tokenizer the store's token ids belong to.

    Raises:
        ValueError: the store kept none.
    """
    if store.tokenizer_path is None:
        raise ValueError(
            f"store: {store.location} has no tokenizer/ folder, expected the tokenizer of its token ids; extract it again with "
            "its tokenizer"
        )
    return load_tokenizer(store.tokenizer_path)


def prepare_student(name: str, store: Store, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Build the student in float32 and make sure it can read every sample of the store.

    Raises:
        ValueError: another tokenizer than the store's, too small an embedding, or too few positions.
    """
    model, own_tokenizer = build_student(name, vocab_size=len(tokenizer), seed=seed)
    if own_tokenizer is not None and own_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"student: {name} has another tokenizer ({len(own_tokenizer)} tokens) than the store ({len(tokenizer)} tokens, "
            f"{store.tokenizer_path}); token ids would mean other text. Choose a student of the teacher's family, or a fresh one."
        )
    rows = model.get_input_embeddings().num_embeddings
    if rows < len(tokenizer):
        raise ValueError(
            f"student: {name} has vocab_size {rows}, expected at least the {len(tokenizer)} of the store's tokenizer "
            f"({store.tokenizer_path}); leave vocab_size out of a fresh student's config"
        )
    longest = int(np.max(store.samples.num_tokens, initial=0))
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions < longest:
        raise ValueError(
            f"student: {name} has max_position_embeddings {positions}, but the store has samples of {longest} tokens; "
            "raise it in the student's config, or extract with a smaller --seq-len"
        )
    return model.to(torch.float32)


def predicted_bytes(tokenizer: PreTrainedTokenizerBase, runs: Iterable[tuple[list[int], int]]) -> int:
    """UTF-8 bytes of text in the tokens that are predicted.

    Args:
        runs: tokens that follow each other and are predicted, all but the first, which is what comes before them; and how often
            each run counts.
    """

    def size(tokens: list[int]) -> int:
        text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text.encode())

    return sum(weight * (size(tokens) - size(tokens[:1])) for tokens, weight in runs)
