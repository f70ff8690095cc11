"""Shapes of all quantizable weights of a model, and how often a token uses each: what plans and budgets are made of."""

from typing import Any

from moeq.models.adapter import Adapter
from moeq.quant.spec import WeightShape

# Names under which families give the number of routed experts that a token uses.
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token")


def weight_shapes(adapter: Adapter) -> list[WeightShape]:
    """Every quantizable weight with its shape, its place and the share of tokens that use it."""
    shapes = []
    for site in adapter.all_sites():
        routed = site.kind == "routed"
        share = experts_per_token(adapter.model.config) / site.num_experts if routed else 1.0
        for expert in range(site.num_experts):
            for rows, leaf in zip(site.rows, site.leaves, strict=True):
                shapes.append(
                    WeightShape(
                        site.weight_name(expert, leaf), site.kind, rows, site.in_features, block=site.block,
                        linear=leaf, expert=expert if routed else None, active_share=share,
                    )
                )  # fmt: skip
    return shapes


def experts_per_token(config: Any) -> int:
    """Routed experts that a token uses, from the model's config; 1 where it does not say."""
    text = config.get_text_config()
    return int(next((value for name in EXPERTS_PER_TOKEN if isinstance(value := getattr(text, name, None), int)), 1))
