"""What a survey gathers of one block: sums over tokens, which add up over batches and over ranks.

Shapes: E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moeq.distributed import sum_over_ranks
from moeq.models.adapter import Site
from moeq.quant.hessian import HessianState, empty_state
from moeq.survey.damage import DamageState, empty_damage
from moeq.survey.fisher import GradientState
from moeq.survey.survey_spec import FISHER, MEASURED, SOLVED, SurveySpec


@dataclass
class BlockFindings:
    """Sums over all tokens of one block.

    Attributes:
        sites: Its sites.
        solver: Hessians with the solver's affinity weights, by site name.
        plain: Hessians without; the same where the solver has none.
        gradients: Squared gradients by site name, over all ranks from the start.
        damage: Measured changes of the block's output; None where none were asked for.
        tokens: Tokens of each expert, by path of the experts module.
        affinity: Summed routing weights, same keys.
        num_tokens: Tokens of the calibration data.
    """

    sites: tuple[Site, ...]
    solver: dict[str, HessianState]
    plain: dict[str, HessianState]
    gradients: dict[str, GradientState]
    damage: DamageState | None
    tokens: dict[str, Tensor]
    affinity: dict[str, Tensor]
    num_tokens: Tensor

    def add_up_ranks(self) -> None:
        """Sums over the tokens of all ranks."""
        tensors = [*self.tokens.values(), *self.affinity.values()]
        for site in self.sites if self.solver else ():
            states = [self.solver[site.name]]
            if self.plain[site.name] is not states[0]:
                states.append(self.plain[site.name])
            tensors += [part for state in states for part in state.tensors()]
        if self.damage is not None:
            tensors += self.damage.tensors()
        sum_over_ranks([*tensors, self.num_tokens])


def empty_findings(
    spec: SurveySpec, sites: tuple[Site, ...], gradients: dict[str, GradientState], device: torch.device
) -> BlockFindings:
    """Sums over no token, as far as the costs of a spec need them; sites of one block, with their gradients."""
    experts = {site.modules[0]: site.num_experts for site in sites if site.kind == "routed"}
    solver: dict[str, HessianState] = {}
    plain: dict[str, HessianState] = {}
    for site in sites if spec.wants(SOLVED) else ():
        solver[site.name] = plain[site.name] = empty_state(site.num_experts, site.in_features, device)
        if spec.affinity_power and site.kind in ("routed", "shared") and spec.wants(FISHER):
            plain[site.name] = empty_state(site.num_experts, site.in_features, device)
    return BlockFindings(
        sites=sites, solver=solver, plain=plain, gradients=gradients,
        damage=empty_damage(sites, len(spec.choices), device) if spec.wants(MEASURED) else None,
        tokens={path: torch.zeros(n, dtype=torch.int64, device=device) for path, n in experts.items()},
        affinity={path: torch.zeros(n, dtype=torch.float64, device=device) for path, n in experts.items()},
        num_tokens=torch.zeros((), dtype=torch.float64, device=device),
    )  # fmt: skip
