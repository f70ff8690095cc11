"""Effective sample size of an expert: how many equally weighted tokens its weighted ones are worth.

    n_eff = (sum_t c_t)^2 / sum_t c_t^2         c_t = affinity of token t to the expert (0 where it was not chosen)

the same number by which the Hessians of AGQ are judged; at most the number of tokens, and less where a few tokens with
a large affinity outweigh the rest.

Legend: N sequences, T tokens, L blocks with routed experts, E routed experts, K chosen per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeq.models.adapter import is_experts_module
from moeq.models.observe import observe_routing


@dataclass(frozen=True)
class ExpertEvidence:
    """Sums over tokens, float64 on the CPU: of the affinity and of its square, by block and expert."""

    affinity_LE: Tensor
    affinity_square_LE: Tensor

    def __add__(self, other: "ExpertEvidence") -> "ExpertEvidence":
        return ExpertEvidence(
            self.affinity_LE + other.affinity_LE, self.affinity_square_LE + other.affinity_square_LE
        )  # fmt: skip

    def effective_LE(self) -> Tensor:
        """Effective samples of every expert; 0 for one that no token chose."""
        return self.affinity_LE.square() / self.affinity_square_LE.clamp(min=torch.finfo(torch.float64).tiny)


@torch.no_grad()
def measure_evidence(model: nn.Module, ids_NT: Tensor, batch_size: int = 8) -> ExpertEvidence:
    """Affinities of all tokens of the sequences.

    Args:
        model: A causal LM in eval mode with routed experts.
        ids_NT: On the device of its embeddings.
        batch_size: Sequences per forward pass.
    """
    modules = {name: module for name, module in model.named_modules() if is_experts_module(module)}
    sums = {
        name: torch.zeros(2, int(module.num_experts), dtype=torch.float64, device=ids_NT.device)
        for name, module in modules.items()
    }

    def on_routing(path: str, ids_TK: Tensor, weights_TK: Tensor) -> None:
        affinity = weights_TK.flatten().double().to(ids_NT.device)
        expert = ids_TK.flatten().to(ids_NT.device, torch.int64)
        sums[path].index_add_(1, expert, torch.stack([affinity, affinity.square()]))

    with observe_routing(modules, on_routing):
        for ids_BT in ids_NT.split(batch_size):
            model(input_ids=ids_BT, use_cache=False, logits_to_keep=1)
    affinity_LE, square_LE = torch.stack([both.cpu() for both in sums.values()], 1)
    return ExpertEvidence(affinity_LE, square_LE)
