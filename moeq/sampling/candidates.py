"""Tokens that a sampled sequence may start with."""

from typing import Any

import torch
from torch import Tensor


def first_token_candidates(model: Any, tokenizer: Any) -> Tensor:
    """Ids that a sequence may start with: known to both tokenizer and model, no special tokens."""
    num_tokens = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    allowed_V = torch.ones(num_tokens, dtype=torch.bool)
    allowed_V[[i for i in tokenizer.all_special_ids if i < num_tokens]] = False
    return allowed_V.nonzero().squeeze(1)
