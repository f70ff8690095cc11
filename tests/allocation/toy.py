"""A toy model as the allocators see it: shapes, findings of a survey and costs, all made up from a seed."""

import numpy as np
import torch

from moeq.allocation.evidence import Evidence
from moeq.allocation.plan import Choice
from moeq.quant.spec import WeightShape

CHOICES = [Choice(bits, 16) for bits in (2, 3, 4, 8)]


def toy_weights(num_blocks: int = 3, num_experts: int = 4, hidden: int = 64, inner: int = 32) -> list[WeightShape]:
    """Attention (q, k, v, o), one shared expert and routed experts (top-2) in every block."""
    weights = []
    for block in range(num_blocks):
        path = f"model.layers.{block}"
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weights.append(WeightShape(f"{path}.self_attn.{leaf}", "attention", hidden, hidden, block, leaf))
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            shape = (hidden, inner) if leaf == "down_proj" else (inner, hidden)
            weights.append(WeightShape(f"{path}.mlp.shared_expert.{leaf}", "shared", *shape, block, leaf))
            for expert in range(num_experts):
                name = f"{path}.mlp.experts.{expert}.{leaf}"
                weights.append(WeightShape(name, "routed", *shape, block, leaf, expert, 2 / num_experts))
    return weights


def toy_costs(
    weights: list[WeightShape], seed: int = 0, choices: list[Choice] = CHOICES
) -> dict[str, dict[Choice, float]]:
    """Errors that fall about fourfold per bit, with noise, at very different levels by weight."""
    generator = np.random.default_rng(seed)
    level = np.exp(1.5 * generator.normal(size=len(weights)))
    return {
        w.name: {c: float(level[i] * w.numel * 4.0**-c.bits * np.exp(0.3 * generator.normal())) for c in choices}
        for i, w in enumerate(weights)
    }


def toy_evidence(weights: list[WeightShape], seed: int = 0) -> Evidence:
    """Usage, similarities, one score ("outlier") and one cost table ("fisher")."""
    generator = torch.Generator().manual_seed(seed)
    paths = sorted({w.name.rsplit(".", 2)[0] for w in weights if w.expert is not None})
    num_experts = 1 + max(w.expert for w in weights if w.expert is not None)
    num_blocks = 1 + max(w.block for w in weights)
    return Evidence(
        tokens={p: torch.randint(0, 1000, (num_experts,), generator=generator) for p in paths},
        affinity={p: 1000 * torch.rand(num_experts, generator=generator, dtype=torch.float64) for p in paths},
        similarity_L=torch.rand(num_blocks, generator=generator, dtype=torch.float64),
        predicted_similarity_L=torch.rand(num_blocks, generator=generator, dtype=torch.float64),
        scores={"outlier": {w.name: float(torch.rand((), generator=generator)) for w in weights}},
        costs={"fisher": toy_costs(weights, seed)},
    )
