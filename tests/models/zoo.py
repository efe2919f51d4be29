"""A tiny config for every model type transformers has a causal language model for.

Fields every family shares are filled in wherever a config class declares them, in its sub-configs too; `SPECIAL` holds what is
left to say. Sizes are chosen so that no two of them are equal where confusing them would go unnoticed: 4 query heads over 2 KV
heads, a window of 8, latents of 24 channels beside rotary keys of 8.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.checkpoints import randomised

MODEL_TYPES: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Class name by model type, all that transformers knows."""

MAX_PARAMETERS = 4_000_000
"""More means that a config field was not shrunk, and the next version of a family might not fit into memory."""

TEXT: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # ten times the usual: rotation and attention then matter in every layer
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 257,
    "sliding_window": 8,
}
SHARED: dict[str, Any] = {
    **TEXT,
    "init_std": 0.2,
    "is_decoder": True,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1,
    # latent attention and its indexers
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 16,
    # linear attention and state spaces
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    # decoders of encoder-decoder models
    "encoder_layers": 1,
    "decoder_layers": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "ffn_dim": 128,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    # what else a text model or the image tower beside it may have
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 272,
    "backbone_hidden_size": 64,
    "depth": 1,
    "num_heads": 4,
    "out_hidden_size": 64,
    "image_size": 32,
    "patch_size": 8,
}

ALTERNATING = ["sliding_attention", "full_attention"] * 2
HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
EXPANDED = {"num_key_value_heads": 4}
"""Latent attention expands its latents to all query heads."""
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
DOTS3 = {
    **EXPANDED,
    "head_dim": 24,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 20,
    "swa_kv_lora_rank": 32,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
    "moe_shared_expert_intermediate_size": 32,
}
QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
    "hc_count": 2,
    "hc_lowrank": 8,
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 2,
    "heads_per_ngram": 2,
    "ple_layer_ids": [1],
    "ple_embed_dim": 16,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 32,
    "indexer_compress_ratio": 4,
}
INKLING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "sliding_window_size": 8}
DECODER_ONLY = {"is_encoder_decoder": False}
"""What the decoder classes of such models write into the config of their checkpoints."""

SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        [
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "minicpm3",
            "youtu",
            "hy_v4",
        ],
        EXPANDED,
    ),
    **dict.fromkeys(["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "minimax"], HYBRID),
    **{key: {"text_config": HYBRID} for key in ["qwen3_5", "qwen3_5_moe"]},
    **dict.fromkeys(["lfm2", "lfm2_moe", "lfm3"], CONVOLUTIONS),
    **dict.fromkeys(
        ["bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart", "whisper"],
        DECODER_ONLY,
    ),
    "bailing_hybrid": {**EXPANDED, **HYBRID},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE}},
    "cpmant": {"dim_head": 16, "dim_ff": 128, "prompt_length": 4, "segment_types": 4},
    "ctrl": {"dff": 128},
    "dbrx": {
        "d_model": 64,  # by its own name, or its experts take the default
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"num_key_value_heads": 1, "o_lora_rank": 16, "o_groups": 2, "hc_mult": 2},
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {
            "num_hidden_layers": 42,  # it names layers 25 to 41; the causal model leaves the tower out
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "adapter_in_dim": 64,
            "adapter_out_dim": 64,
        },
        "audio_config": {"downsample_hidden_size": 16, "adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": DOTS3,
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon_h1": {"mamba_d_ssm": 128},
    "fuyu": {"text_config": {**TEXT, "model_type": "persimmon"}},
    "gemma3": {
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "image_size": 32,
            "patch_size": 8,
        },
        "mm_tokens_per_image": 4,
        "text_config": {"layer_types": ALTERNATING},
    },
    "gemma3_text": {"layer_types": ALTERNATING},
    "gemma3n_text": {
        "layer_types": ALTERNATING,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4": {"text_config": {"layer_types": ALTERNATING}},
    "gemma4_assistant": {
        "text_config": {**TEXT, "model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
        "num_centroids": 16,
        "centroid_intermediate_top_k": 2,
    },
    "gemma4_text": {"layer_types": ALTERNATING, "num_kv_shared_layers": 2},
    "gemma4_unified": {
        "text_config": {"layer_types": ALTERNATING},
        "vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32, "patch_size": 2},
        "audio_config": {"audio_embed_dim": 32},
    },
    "gemma4_unified_assistant": {
        "text_config": {**TEXT, "model_type": "gemma4_unified_text"},
        "num_centroids": 16,
        "centroid_intermediate_top_k": 2,
    },
    "gemma4_unified_text": {"layer_types": ALTERNATING},
    "got_ocr2": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {
            "hidden_size": 32,
            "output_channels": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 64,
            "mlp_dim": 32,
            "global_attn_indexes": [0],
        },
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {**HYBRID, "shared_intermediate_size": 32},
    "inkling2_text": {**INKLING, "n_layers_per_attn_res_block": 2, "unpadded_vocab_size": 272},
    "inkling_text": INKLING,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**EXPANDED, **HYBRID, "linear_head_dim": 16, "linear_num_heads": 4},
    "longcat_flash": {**EXPANDED, "num_layers": 2, "zero_expert_num": 2, "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "moshi": {"audio_vocab_size": 64},
    "moss_transcribe_diarize": {"text_config": {**TEXT, "model_type": "qwen3"}},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention"] * 2, "mamba_num_heads": 8, "mamba_head_dim": 16},
    "phi4_multimodal": {
        "audio_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 8,
        },
        "vision_config": {"hidden_size": 32, "num_hidden_layers": 2, "crop_size": 32, "image_size": 32, "patch_size": 8},
    },
    "prophetnet": {
        **DECODER_ONLY,
        "num_encoder_layers": 4,  # a cache of its config has as many layers
        "num_decoder_layers": 4,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
    },
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {
        "attention_head_size": 16,
        "axial_pos_shape": (16, 32),
        "axial_pos_embds_dim": (32, 32),
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 4,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 272,
        "shape_embed_dim": 8,
        "shape_vocab_size": 272,
    },
    "xlnet": {"d_head": 16, "d_inner": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "adapter_rank": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def zoo_config(model_type: str, **over: Any) -> Any:
    """The config of a tiny model of that type; `over` are fields of its text part."""
    return AutoConfig.for_model(model_type, **_shrunk(CONFIG_MAPPING[model_type], {**SPECIAL.get(model_type, {}), **over}))


def zoo_model(model_type: str, dtype: torch.dtype = torch.float32, **over: Any) -> Any:
    """Such a model with random weights, the same every time, in evaluation mode."""
    config = zoo_config(model_type, **over)
    with torch.device("meta"):
        num_parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    assert num_parameters < MAX_PARAMETERS, f"{model_type}: {num_parameters} parameters; shrink its config"
    return randomised(config, dtype=dtype)


def full_length_cache(model: Any, kind: type[DynamicCache] = DynamicCache) -> Any:
    """The cache the model would make itself, but one that forgets nothing outside a sliding window."""
    if model.config.model_type == "minimax":
        from transformers.models.minimax.modeling_minimax import MiniMaxCache

        return MiniMaxCache()
    cache = kind(config=model.config)
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.sliding_window = 1000
    return cache


def _shrunk(kind: Any, over: dict[str, Any]) -> dict[str, Any]:
    declared = {field.name for field in dataclasses.fields(kind)} | kind.attribute_map.keys()
    fields = {name: value for name, value in SHARED.items() if name in declared}
    over = dict(over)
    for name, part in kind.sub_configs.items():
        if dataclasses.is_dataclass(part):  # the others can be of several types and are given whole
            fields[name] = part(**_shrunk(part, over.pop(name, {})))
    return {**fields, **over}
