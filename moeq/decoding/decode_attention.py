"""Attention of one new token per row on a CPU: two batched products over the whole store of a ``GrowingLayer``.

    out = softmax(scaling Q K^T) V        Q [G, D] the queries of the G heads that share a key head, K and V [C, D]

The fused CPU kernel took 3 times as long in bfloat16 with so few queries on the processor that this was written on, and
0.35 to 1.4 times on a later one; batched products take 4 times as long on the first T positions of a larger store as on
all C of it (a strided batch leaves the fast path of the matrix library): so the products run over all C positions, and
positions T to C get probability 0. Scores are rounded to bfloat16 and the softmax is in float32, which is what eager
attention of transformers does. A mask says which positions a row sees, where prompts were padded. In every other case
(prefill, other masks, dtypes and devices, other caches) this is transformers' ``sdpa``, which in float32 takes 0.4 to
1.2 times as long as the two products.

Legend: R rows, H key-value heads, G query heads per key-value head, T positions, C of the store, D head size, B R * H.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moeq.decoding.cache import STORE

NAME = "moeq_decode"
_CHANGES_SCORES = ("softcap", "position_bias", "output_attentions", "cache")


@contextmanager
def decoding(model: Any) -> Iterator[None]:
    """Let a model that attends by ``sdpa`` throughout attend by ``decode_attention``; others stay as they are."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    # Attention with an indexer masks what was not chosen only where it is called "eager" or "sdpa".
    indexed = any(path.endswith(".indexer") for path, _ in model.named_modules())
    if indexed or any(getattr(config, "_attn_implementation", None) != "sdpa" for config in configs):
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query [R, H * G, 1, D], key and value [R, H, T, D] to [R, 1, H * G, D]."""
    store_RHCD, values_RHCD = getattr(key, STORE, None), getattr(value, STORE, None)
    if (
        store_RHCD is None
        or values_RHCD is None
        or not _one_row_each(attention_mask, query, key)
        or query.shape[2] != 1
        or query.dtype != torch.bfloat16
        or query.device.type != "cpu"
        or any(kwargs.get(name) is not None and kwargs[name] is not False for name in _CHANGES_SCORES)
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows, heads, room, size = store_RHCD.shape
    length = key.shape[2]
    scaling = size**-0.5 if scaling is None else scaling
    query_BGD = (query * scaling).reshape(rows * heads, -1, size)
    score_BGC = torch.bmm(query_BGD, store_RHCD.view(rows * heads, room, size).mT)
    score_BGT = score_BGC[..., :length]
    if attention_mask is not None:
        seen_B1T = attention_mask.expand(rows, heads, 1, length).reshape(-1, 1, length)
        score_BGT = score_BGT.masked_fill(~seen_B1T, -torch.inf)
    share_BGT = score_BGT.softmax(-1, dtype=torch.float32).to(query.dtype)
    out_BGD = torch.bmm(F.pad(share_BGT, (0, room - length)), values_RHCD.view(rows * heads, room, -1))
    return out_BGD.view(rows, 1, query.shape[1], -1), None


def _one_row_each(attention_mask: Tensor | None, query: Tensor, key: Tensor) -> bool:
    """Whether a mask, if there is one, tells each row which of its positions the new token sees."""
    if attention_mask is None:
        return True
    shape = (query.shape[0], 1, 1, key.shape[2])
    return attention_mask.dtype == torch.bool and attention_mask.shape == shape


ALL_ATTENTION_FUNCTIONS.register(NAME, decode_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
