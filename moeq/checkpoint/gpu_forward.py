"""Routed experts on prepared weights on a GPU: nothing is read back, so that the host runs ahead of the device.

Rows are sorted by expert on the device, and each projection is one launch for each width that its experts have
(``moeq.kernels.packed_triton``).  Which expert a row belongs to is known to the device alone.

Shapes: N tokens, K top-k, S = N K rows, D hidden, O outputs of a projection, E experts.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeq.checkpoint.gpu_forms import KernelForm, product_on, stacked
from moeq.checkpoint.packed import PackedExperts
from moeq.kernels.packed_products import PackedStack
from moeq.models.experts import ExpertSide, activate, projections, stacked_bias


@dataclass(frozen=True)
class Stacks:
    """The experts of one block by projection and width.

    Attributes:
        made_of: The form of the first expert's down projection: another one means that weights were moved or loaded.
        by_leaf: For each projection its stacks, each with the experts that are in it, int64 on the device.
    """

    made_of: KernelForm
    by_leaf: dict[str, list[tuple[Tensor, PackedStack]]]


def stacks_of(experts: PackedExperts) -> Stacks | None:
    """Those of a block, made at the first call; None where a weight of it has no form for the kernel."""
    first = getattr(experts[0].down_proj, "form", None)
    if experts.stacks is not None and experts.stacks.made_of is first:
        return experts.stacks
    experts.stacks = None
    forms = {
        leaf: [getattr(getattr(expert, leaf), "form", None) for expert in experts] for leaf in projections(experts)
    }
    if not isinstance(first, KernelForm) or not all(isinstance(f, KernelForm) for each in forms.values() for f in each):
        return None
    experts.stacks = Stacks(first, {leaf: _by_grid(each) for leaf, each in forms.items()})
    return experts.stacks


def _by_grid(forms: Sequence[Any]) -> list[tuple[Tensor, PackedStack]]:
    """One projection of all experts as one stack for each grid."""
    groups: dict[tuple[int, int | None, bool], list[int]] = defaultdict(list)
    for index, form in enumerate(forms):
        groups[form.frame.bits, form.frame.group_size, form.stack.symmetric].append(index)
    device = forms[0].matrix.packed_OW.device
    return [(torch.tensor(chosen, device=device), stacked([forms[e] for e in chosen])) for chosen in groups.values()]


def forward_by_kernel(
    experts: PackedExperts, stacks: Stacks, hidden_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor
) -> Tensor:
    """Weighted sum of the chosen experts' outputs, [N, D].

    Args:
        experts: Packed and prepared.
        stacks: Of these.
        hidden_ND: Inputs.
        ids_NK: int64; an index of E (a slot of another rank) is skipped.
        weights_NK: The multiplier of each expert's output.
    """
    num_experts, top_k = len(experts), ids_NK.shape[1]
    ids_S, order_S = ids_NK.flatten().sort(stable=True)
    experts_E = torch.arange(num_experts + 1, dtype=ids_S.dtype, device=ids_S.device)
    starts_E = torch.searchsorted(ids_S, experts_E, out_int32=True)
    bounds_E2 = torch.stack([starts_E[:-1], starts_E[1:]], 1)
    ids_S = ids_S.clamp_max(num_experts - 1)  # biases of rows that are not computed
    z_SO = _products(experts, stacks, "into", hidden_ND.contiguous(), order_S // top_k, bounds_E2, ids_S)
    y_SD = _products(experts, stacks, "down", activate(experts, z_SO).contiguous(), None, bounds_E2, ids_S)
    # Rows of other ranks were not written, and may be anything.
    here_S1 = (ids_NK.flatten()[order_S] < num_experts).unsqueeze(1)
    weighted_SD = torch.where(here_S1, y_SD * weights_NK.flatten()[order_S].unsqueeze(1), 0)
    sorted_back_SD = torch.empty_like(weighted_SD)
    sorted_back_SD[order_S] = weighted_SD
    return sorted_back_SD.unflatten(0, (-1, top_k)).sum(1).to(hidden_ND.dtype)


def _products(
    experts: PackedExperts, stacks: Stacks, part: ExpertSide, x: Tensor, tokens_S: Tensor | None, bounds_E2: Tensor,
    ids_S: Tensor,
) -> Tensor:  # fmt: skip
    """Products of all rows with a part of their experts, gate before up, and its biases; [S, O]."""
    leaves = ("down_proj",) if part == "down" else projections(experts)[:-1]
    sizes = [stacks.by_leaf[leaf][0][1].out_features for leaf in leaves]
    out_SO = x.new_empty(len(ids_S), sum(sizes))
    product = product_on(x.device)
    for leaf, columns_SO in zip(leaves, out_SO.split(sizes, 1), strict=True):
        for chosen_E, stack in stacks.by_leaf[leaf]:
            product(x, tokens_S, bounds_E2[chosen_E], stack, columns_SO)
    bias_EO = stacked_bias(experts, part)
    return out_SO if bias_EO is None else out_SO + bias_EO[ids_S]
