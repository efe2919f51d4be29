"""The student to train: built, and shown to fit the store's tokens. Knows models and the store's tokenizer; no losses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.align.same_tokens import tokenizer_differences
from pipeline.models.attention import attention_modules
from pipeline.models.load import build_student, load_tokenizer
from pipeline.models.resolve import one_line
from training.mixture import Readable


def store_tokenizer(store: Readable) -> PreTrainedTokenizerBase:
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


def prepare_student(
    name: str, store: Readable, tokenizer: PreTrainedTokenizerBase, seed: int, lora_rank: int | None = None
) -> PreTrainedModel:
    """Build the student in float32 and make sure it can read every sample of the store.

    Args:
        lora_rank: what `add_lora` is to be called with; None where it is not.

    Raises:
        ValueError: another tokenizer than the store's, too small an embedding, too few positions, or LoRA on fresh weights.
    """
    model, own_tokenizer = build_student(name, vocab_size=len(tokenizer), seed=seed)
    if lora_rank is not None and own_tokenizer is None:
        raise ValueError(
            f"lora_rank: got {lora_rank}, but the student {name} has fresh weights, expected a pretrained one; leave lora_rank out"
        )
    if own_tokenizer is not None and (differences := tokenizer_differences(own_tokenizer, tokenizer)):
        raise ValueError(
            f"student: {name} has another tokenizer ({len(own_tokenizer)} tokens) than the store ({len(tokenizer)} tokens, "
            f"{store.tokenizer_path}); token ids would mean other text (student against store: {'; '.join(differences)}). Choose a student of the "
            f"teacher's family, or a fresh one, or make a store in its tokens: 'kvpipe align {store.location} --student {name} --out ALIGNED'"
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


def add_lora(model: PreTrainedModel, rank: int, seed: int) -> None:
    """Freeze a model and add low-rank layers to its linear ones in place (LoRA, arXiv 2106.09685), scaled by 2; the same for equal seeds.

    Raises:
        ValueError: the package `peft` is not installed, or the layers cannot be merged into the model's own again.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("lora_rank: the package peft is not installed; run pip install 'kvpipe[lora]'") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), model)
    try:
        for _, layer in _lora_layers(model):
            layer.merge()  # they start as zero, so this changes no weight
            layer.unmerge()
    except Exception as error:  # whatever goes wrong here would go wrong after hours
        raise ValueError(
            f"lora_rank: the layers of {type(model).__name__} cannot be merged ({one_line(error)}), expected a student that transformers alone loads; "
            "leave lora_rank out"
        ) from error


def merge_lora(model: PreTrainedModel) -> None:
    """Add what LoRA learnt to the model's own weights and take its layers out, so that transformers alone loads it."""
    for name, module in _lora_layers(model):
        module.merge()
        model.set_submodule(name, module.get_base_layer())
    del model.peft_config
    model.requires_grad_(True)


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def compile_around_attention(model: nn.Module) -> None:
    """Compile in place every part of a model that holds no attention module: its layers in between stay as they are.

    Attention modules are tapped anew in every step, for which a compiled one would be compiled anew.
    """
    attention = {id(found.module) for found in attention_modules(model)}

    def visit(module: nn.Module) -> None:
        if not any(id(part) in attention for part in module.modules()):
            module.compile()
        elif id(module) not in attention:
            for child in module.children():
                visit(child)

    visit(model)


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
