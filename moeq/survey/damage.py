"""Change of a block's output when one weight, or one whole expert, alone is rounded to nearest.

    error    = sum over tokens and outputs of dz^2,            dz = change of the output of the decoder block
    weighted = sum over tokens and outputs of g^2 dz^2,        g = d loss / d z     (GEMQ, arXiv 2605.23078)

What a routed expert changes is only the output of its own tokens, so its dz is computed from its inputs directly; for
every other weight the block is run again.

Shapes: N tokens of a batch, D width, E experts, J linears of a site, C choices, last dimension 2: error and weighted.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeq.allocation.plan import Choice
from moeq.models.adapter import Adapter, Site
from moeq.models.experts import activate, project_down, project_in
from moeq.models.routed_rows import routed_tokens

# Rounded weights [E, O, I] in the dtype that the model computes in, by site name and choice.
Rounded = Mapping[str, Mapping[Choice, Tensor]]


@dataclass(frozen=True)
class DamageState:
    """Running sums over the tokens of one block; they add up over batches and over ranks.

    Attributes:
        linears: By site name: float64 [C, E, J, 2], one weight alone rounded.
        experts: By path of the experts module: float64 [C, E, 2], one expert alone rounded.
        output: float64 [2]: sum of squares of the block's output, and number of tokens.
    """

    linears: dict[str, Tensor]
    experts: dict[str, Tensor]
    output: Tensor

    def tensors(self) -> list[Tensor]:
        """Everything that adds up, in a fixed order."""
        return [*self.linears.values(), *self.experts.values(), self.output]


@dataclass(frozen=True)
class RoutedCall:
    """What an experts module was called with: its tokens, who they chose and with which weight."""

    hidden_ND: Tensor
    ids_NK: Tensor
    weights_NK: Tensor


def empty_damage(sites: Sequence[Site], num_choices: int, device: torch.device | str) -> DamageState:
    """Sums over no token; sites of one block, with the same choices."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    routed = {site.modules[0]: site.num_experts for site in sites if site.kind == "routed"}
    return DamageState(
        linears={site.name: zeros(num_choices, site.num_experts, len(site.leaves), 2) for site in sites},
        experts={path: zeros(num_choices, num_experts, 2) for path, num_experts in routed.items()},
        output=zeros(2),
    )


@torch.no_grad()
def add_damage(
    state: DamageState, adapter: Adapter, sites: Sequence[Site], rounded: Rounded, choices: Sequence[Choice],
    rerun: Callable[[], Tensor], routed: RoutedCall | None, gradient_ND: Tensor | None, keep_N: Tensor | None,
) -> None:  # fmt: skip
    """Add one batch.

    Args:
        state: Sums to add to.
        adapter: The model, original weights in place.
        sites: Sites of the block.
        rounded: Their rounded weights; a choice that does not fit a site is missing and adds nothing.
        choices: In the order of the sums.
        rerun: Output [B, T, D] of the block on this batch with the weights as they then are.
        routed: Call of the block's experts on this batch; None in a block without.
        gradient_ND: g; None makes the weighted sums 0.
        keep_N: Which tokens are no padding; None is all.
    """
    output_ND = _flat(rerun())
    kept = slice(None) if keep_N is None else keep_N
    state.output[0] += output_ND[kept].double().square().sum()
    state.output[1] += len(output_ND[kept])
    for site in sites:
        if site.kind == "routed":
            continue
        for index, choice in enumerate(choices):
            if choice not in rounded[site.name]:
                continue
            for linear, weight_OI in enumerate(rounded[site.name][choice][0].split(site.rows)):
                module = adapter.model.get_submodule(site.modules[linear])
                with _swapped(module, weight_OI):
                    change_ND = _flat(rerun()) - output_ND
                gradient = None if gradient_ND is None else gradient_ND[kept]
                state.linears[site.name][index, 0, linear] += _sums(change_ND[kept], gradient)
    pair = {site.stage: site for site in sites if site.kind == "routed"}
    if pair and routed is not None:
        _add_routed(state, adapter, pair, rounded, choices, routed, gradient_ND, keep_N)


def _add_routed(
    state: DamageState, adapter: Adapter, pair: Mapping[str, Site], rounded: Rounded, choices: Sequence[Choice],
    call: RoutedCall, gradient_ND: Tensor | None, keep_N: Tensor | None,
) -> None:  # fmt: skip
    into, down = pair["mlp_in"], pair["mlp_down"]
    path = into.modules[0]
    module = adapter.model.get_submodule(path)
    for expert, tokens, slots in routed_tokens(call.ids_NK, into.num_experts, keep_N):
        x_ND, affinity_N1 = call.hidden_ND[tokens], call.weights_NK[tokens, slots, None].float()
        gradient = None if gradient_ND is None else gradient_ND[tokens]
        z_NO = project_in(module, expert, x_ND)
        inner = activate(module, z_NO)
        output_ND = project_down(module, expert, inner).float()

        def sums(
            new_ND: Tensor, output_ND: Tensor = output_ND, affinity: Tensor = affinity_N1, g: Tensor | None = gradient
        ) -> Tensor:
            return _sums((new_ND.float() - output_ND) * affinity, g)

        for index, choice in enumerate(choices):
            if choice not in rounded[into.name] or choice not in rounded[down.name]:
                continue
            new_down_OI = rounded[down.name][choice][expert]
            new_z_NO = project_in(module, expert, x_ND, rounded[into.name][choice][expert])
            for linear, new_columns in enumerate(new_z_NO.split(into.rows, -1)):
                alone = list(z_NO.split(into.rows, -1))
                alone[linear] = new_columns
                changed = project_down(module, expert, activate(module, torch.cat(alone, -1)))
                state.linears[into.name][index, expert, linear] += sums(changed)
            state.linears[down.name][index, expert, 0] += sums(project_down(module, expert, inner, new_down_OI))
            both = project_down(module, expert, activate(module, new_z_NO), new_down_OI)
            state.experts[path][index, expert] += sums(both)


def _sums(change_ND: Tensor, gradient_ND: Tensor | None) -> Tensor:
    square_ND = change_ND.float().square()
    weighted = square_ND.new_zeros(()) if gradient_ND is None else (square_ND * gradient_ND.float().square()).sum()
    return torch.stack([square_ND.sum(), weighted]).double()


def _flat(output: Tensor) -> Tensor:
    return output.reshape(-1, output.shape[-1])


@contextmanager
def _swapped(module: nn.Module, weight_OI: Tensor) -> Iterator[None]:
    """Put another weight into a linear for a while."""
    assert isinstance(module, nn.Linear)
    original = module.weight.data
    module.weight.data = weight_OI.to(original)
    try:
        yield
    finally:
        module.weight.data = original
