"""A runtime as the judge of its own files: divergence from its own logits of the unquantized model.

The runtime computes both sides, so that its arithmetic (llama.cpp rounds activations to 8 bits) is in every row alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moeq.scoring.divergence import kl_sum_and_agreement
from moeq.scoring.perplexity import nll_sum_and_count

Logits = Callable[[Tensor], Tensor]  # token ids of a window [L] to logits [L, V]


@dataclass(frozen=True)
class Judge:
    """Windows of each domain, [N, L], and the original's logits of them, N of [L, V]."""

    windows: Mapping[str, Tensor]
    original: Mapping[str, list[Tensor]]

    @classmethod
    def by(cls, logits: Logits, windows: Mapping[str, Tensor]) -> "Judge":
        """With the runtime's logits of the unquantized model."""
        return cls(windows, {domain: [logits(ids_L) for ids_L in ids_NL] for domain, ids_NL in windows.items()})

    @torch.no_grad()
    def measure(self, logits: Logits) -> dict[str, dict[str, float]]:
        """By domain: mean KL and nll in nats per token, share of positions with the same most likely token."""
        return {domain: self._measure(domain, logits) for domain in self.windows}

    def _measure(self, domain: str, logits: Logits) -> dict[str, float]:
        kl = nll = 0.0
        same = positions = scored = 0
        for ids_L, original_LV in zip(self.windows[domain], self.original[domain], strict=True):
            found_LV = logits(ids_L)
            kl_sum, num_same, num_positions = kl_sum_and_agreement(original_LV[None], found_LV[None])
            nll_sum, num_scored = nll_sum_and_count(found_LV[None], ids_L[None])
            kl, nll, same = kl + float(kl_sum), nll + float(nll_sum), same + int(num_same)
            positions, scored = positions + int(num_positions), scored + int(num_scored)
        return {"kl": kl / positions, "nll": nll / scored, "top1_agreement": same / positions}


def file_bits(num_bytes: int, dense_bytes: int, num_weights: int) -> float:
    """Bits of a quantized weight, scales included: what the file of 16-bit weights has more, and the rest is alike.

    Args:
        num_bytes: Of the file.
        dense_bytes: Of the file with these weights in 16 bits and everything else as it is there.
        num_weights: How many weights are quantized.
    """
    return 16 - 8 * (dense_bytes - num_bytes) / num_weights
