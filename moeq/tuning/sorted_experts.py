"""Routed experts whose backward pass is as cheap as their forward pass.

Tokens are sorted by expert once, and the stacked weights are taken apart once.  Autograd of the library's loop fills a
gradient of the whole stack with zeros for every expert that is hit.

Shapes: N tokens, K experts of each, E experts, R = N K rows, D width.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeq.models.experts import activate, canonical, parameter_name, project_down, project_in
from moeq.models.observe import experts_run_by


@contextmanager
def sorted_experts(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Within, these experts modules run sorted.

    Yields:
        Tokens that each expert had in the last forward pass of its module, int64 [E] on the CPU, by path.
    """
    counts: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for path, module in modules.items():
            stack.enter_context(experts_run_by("moeq_sorted", module))
            module.moeq_counts = (counts, path)  # type: ignore[assignment]
            stack.callback(delattr, module, "moeq_counts")
        yield counts


def _sorted_forward(module: Any, hidden_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    expert_R, order_R = ids_NK.flatten().sort(stable=True)
    # Ids beyond the experts, which families use for "none", come last and are left out.
    counts_E = torch.bincount(expert_R, minlength=module.num_experts)[: module.num_experts].cpu()
    counts, path = module.moeq_counts
    counts[path] = counts_E
    order_R = order_R[: int(counts_E.sum())]
    token_R = order_R // ids_NK.shape[1]
    into, down = (getattr(module, parameter_name(module, part)).unbind() for part in ("into", "down"))
    outputs = []
    for expert, x_ND in enumerate(hidden_ND.index_select(0, token_R).split(counts_E.tolist())):
        if len(x_ND):
            inner = activate(module, project_in(module, expert, x_ND, canonical(module, "into", into[expert])))
            outputs.append(project_down(module, expert, inner, canonical(module, "down", down[expert])))
    out_ND = torch.zeros_like(hidden_ND)
    if not outputs:
        return out_ND
    y_RD = torch.cat(outputs) * weights_NK.flatten().index_select(0, order_R).unsqueeze(-1)
    return out_ND.index_add(0, token_R, y_RD.to(out_ND.dtype))


ALL_EXPERTS_FUNCTIONS.register("moeq_sorted", _sorted_forward)
