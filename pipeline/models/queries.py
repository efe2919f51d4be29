"""The queries of a model while it runs, for maps weighted by what attention reads. Knows transformers' attention interface; no store."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.models.attention import CaptureError

_NAME = "kvpipe_queries"


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kvpipe_queries: dict[int, Tensor] | None = None,
    **how: Any,
) -> Any:
    if kvpipe_queries is not None:
        kvpipe_queries[module.layer_idx] = query
    return sdpa_attention_forward(module, query, key, value, attention_mask, **how)


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)


def capture_queries(
    model: PreTrainedModel, input_ids: Int[Tensor, "batch token"]
) -> dict[int, Float[Tensor, "batch head token dim"]]:
    """Queries of every layer as attention uses them, so after rotation.

    Raises:
        CaptureError: this model's attention does not go through transformers' attention interface.
    """
    before = model.config._attn_implementation
    found: dict[int, Tensor] = {}
    try:
        model.set_attn_implementation(_NAME)
        with torch.inference_mode():
            model(input_ids=input_ids, use_cache=False, kvpipe_queries=found)
    except (TypeError, ValueError) as error:
        raise CaptureError(_REFUSED.format(name=type(model).__name__, why=f": {error}")) from error
    finally:
        model.set_attn_implementation(before)
    if not found:
        raise CaptureError(_REFUSED.format(name=type(model).__name__, why=""))
    return found


_REFUSED = "{name}: its attention hands no queries over{why}; expected a model on transformers' attention interface. Use --method complex-pca"
