"""Real, tiny checkpoints for tests: random weights in safetensors, a byte-level fast tokenizer, a hub cache to hold them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

VOCAB_SIZE = 272
"""256 bytes, end of text, padding and, as in published checkpoints, some rows no token uses."""
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"

_GENERIC = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # ten times the usual: rotation and attention then matter in every layer
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 257,
}
_GROUPED = {"num_key_value_heads": 2, "intermediate_size": 128}
_OF_TYPE: dict[str, dict[str, Any]] = {
    "qwen3": {**_GROUPED, "head_dim": 16},
    "gemma3_text": {**_GROUPED, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gpt2": {},
    "bloom": {},
    "gptj": {"rotary_dim": 8},
    "gpt_neox": {"intermediate_size": 128},
    "bert": {"intermediate_size": 128},
    "t5": {},
}


def tiny_config(model_type: str, **over: Any) -> Any:
    """A transformers config of four small layers; `over` are fields under transformers' own names."""
    return AutoConfig.for_model(model_type, **{**_GENERIC, **_OF_TYPE.get(model_type, _GROUPED), **over})


def tiny_model(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **over: Any) -> Any:
    """A causal language model with random weights, the same for the same seed; biases and norms are random too."""
    return randomised(tiny_config(model_type, **over), seed, dtype)


def randomised(config: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a config with random weights, biases and norms, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer with one token per UTF-8 byte, an end of text (256) and a padding token (257)."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PADDING)


def save_tokenizer(directory: Path, model_type: str = "qwen2") -> Path:
    """Write that tokenizer as an extraction keeps it in a store: of the class transformers chooses for the teacher's type."""
    byte_tokenizer().save_pretrained(directory)
    tiny_config(model_type).save_pretrained(directory)
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    (directory / "config.json").unlink()
    return directory


def save_checkpoint(
    directory: Path, model_type: str = "qwen2", seed: int = 0, dtype: torch.dtype = torch.float32, **over: Any
) -> Path:
    """Write such a model and its tokenizer as `save_pretrained` does."""
    tiny_model(model_type, seed, dtype, **over).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def lay_out_hub_cache(hf_home: Path, repo_id: str, checkpoint: Path, revision: str = "main") -> str:
    """Put a checkpoint into a hub cache as a download would (blobs, a snapshot of links to them, a ref); its commit."""
    repository = hf_home / "hub" / f"models--{repo_id.replace('/', '--')}"
    blobs = repository / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    commit = hashlib.sha1(b"".join(path.read_bytes() for path in files)).hexdigest()
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in files:
        content = path.read_bytes()
        # The hub names large files by sha256 and small ones by their git object id.
        large = path.suffix == ".safetensors"
        name = (hashlib.sha256(content) if large else hashlib.sha1(b"blob %d\0" % len(content) + content)).hexdigest()
        shutil.copyfile(path, blobs / name)
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / name)
    ref = repository / "refs" / revision
    ref.parent.mkdir(exist_ok=True)
    ref.write_text(commit)
    return commit
