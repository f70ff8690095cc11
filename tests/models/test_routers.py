"""The router of every family is found, and its weight times its input ranks the experts as the model does."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch

from moeq.models.adapter import Adapter
from moeq.models.experts import expert_modules
from tests.tiny import FAMILIES, tiny_model

OF_ANOTHER_FORM = {"zaya": "a network of several layers", "inkling_text": "it scores shared experts, too"}
# Experts are looked up by token; the router's weight only weighs them.
LOOKED_UP = {("deepseek_v4", 0)}
CHANCE = 1 / 28  # two of eight


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_the_weight_of_the_router_ranks_the_experts(family: str) -> None:
    model = tiny_model(family)
    adapter = Adapter(model)
    for block in range(len(adapter.blocks)):
        routed = [site for site in adapter.sites(block) if site.kind == "routed"]
        routers = adapter.routers(block)
        assert len(routers) == (bool(routed) and family not in OF_ANOTHER_FORM)
        for name, router in routers.items():
            seen: dict[str, Any] = {}
            experts = expert_modules(model)[routed[0].modules[0]]
            with ExitStack() as stack:
                for key, module, index in (("x", router, 0), ("ids", experts, 1)):

                    def hook(_: Any, args: Any, key: str = key, index: int = index, seen: Any = seen) -> None:
                        seen[key] = args[index]

                    stack.callback(module.register_forward_pre_hook(hook).remove)
                model(torch.arange(1, 60)[None], use_cache=False)
            logits_TE = seen["x"].flatten(0, -2).float() @ model.get_parameter(f"{name}.weight").float().mT
            chosen_TK = logits_TE.topk(seen["ids"].shape[-1]).indices.sort(-1).values
            same = float((chosen_TK == seen["ids"].sort(-1).values).all(-1).float().mean())
            # Biases and groups of experts change some choices, but not most of the order.
            assert same > 5 * CHANCE or (family, block) in LOOKED_UP, same
