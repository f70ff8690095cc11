"""Router ties: tokens whose last chosen expert and the next one score the same, to rounding.

Another order of summation sends such a token to another expert, and the log-likelihoods after it jump: they have two
values in float32, and neither side can be said to be wrong.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeq.models.adapter import Adapter, expert_modules


@torch.no_grad()
def router_gap(model: Any, sequences: Iterable[Sequence[int]]) -> float:
    """Smallest difference between the last chosen and the first other router logit over all tokens and blocks.

    Args:
        model: A causal LM whose routers choose by their logits, ``x weight^T`` (softmax routers), or one without any.
        sequences: Token ids; each is run on its own, without padding.

    Returns:
        The difference divided by ``max(1, |logit|)``; infinite without routers.
    """
    if not expert_modules(model):
        return math.inf
    adapter, gaps, num_chosen = Adapter(model), [], model.config.num_experts_per_tok

    def measure(router: nn.Module, args: tuple[Tensor, ...]) -> None:
        logits_TE = torch.nn.functional.linear(args[0], router.weight).flatten(0, -2)
        best_TE = logits_TE.topk(num_chosen + 1).values
        last_T, next_T = best_TE[:, -2], best_TE[:, -1]
        gaps.append(float(((last_T - next_T) / last_T.abs().clamp(min=1)).min()))

    routers = [router for block in range(len(adapter.blocks)) for router in adapter.routers(block).values()]
    handles = [router.register_forward_pre_hook(measure) for router in routers]
    try:
        for sequence in sequences:
            model(input_ids=torch.tensor([sequence]))
    finally:
        for handle in handles:
            handle.remove()
    return min(gaps)
