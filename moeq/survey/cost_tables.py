"""Cost tables of one block, made of what a survey gathered of it: Hessians, gradients, measured changes.

Equations and units of ``fisher``, ``hessian`` and ``pmq`` are in ``moeq.survey.sensitivity``.  From measured
changes, dz the change of the block's output when one weight or expert alone is rounded:

    block_output   sum dz^2 / sum z^2           share of the energy of the block's output
    gemq           mean over tokens of sum_o g_o^2 dz_o^2       squared nats per token

``gemq`` and ``pmq`` judge whole routed experts: the cost of one is spread over its linears by their size, so that an
expert at one width costs what was measured.  Weights that are no routed experts stand for themselves (share and routing
weight 1 in ``pmq``).

Shapes: E experts, C choices, J linears of a site, I in features, O out features.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moeq.allocation.plan import Choice
from moeq.models.adapter import Adapter, Site
from moeq.quant.coverage import regularize
from moeq.quant.hessian import HessianState
from moeq.survey.findings import BlockFindings
from moeq.survey.sensitivity import (
    fisher_costs,
    hessian_costs,
    mean_square_gradients,
    pmq_costs,
    round_trip,
    row_energies,
    token_hessians,
)
from moeq.survey.survey_spec import FISHER, SurveySpec

# Cost name -> weight name -> choice -> cost.
Tables = dict[str, dict[str, dict[Choice, float]]]
# Takes the weights [E, O, I] of a site at a choice.
Keep = Callable[[Site, Choice, Tensor], None]


def solved_costs(
    adapter: Adapter, spec: SurveySpec, found: BlockFindings, sites: Sequence[Site], keep: Keep | None = None
) -> Tables:
    """``fisher`` (also where ``fisher_kl`` needs it) and ``hessian``, as asked for, of some sites of a block.

    Args:
        adapter: The model; the block is resident, with original weights.
        spec: Costs and choices.
        found: What was gathered of the block, added up over ranks.
        sites: Of the block.
        keep: Takes the solved weights.
    """
    wanted = [*(["fisher"] if spec.wants(FISHER) else []), *(["hessian"] if "hessian" in spec.costs else [])]
    tables: Tables = {name: defaultdict(dict) for name in wanted}
    dtype = adapter.storage_dtype
    for site in sites:
        weight_EOI = adapter.get_weight(site).float()
        hessian_EII = None if spec.solver == "rtn" else _solver_hessians(site, spec, found)
        weighted_EII = plain_EII = output_EO = gradient_EO = None
        if "hessian" in tables:
            weighted_EII = _token_hessians(found.solver[site.name], found)
            output_EO = row_energies(weight_EOI, weighted_EII)
        if "fisher" in tables:
            plain_EII = _token_hessians(found.plain[site.name], found)
            state = found.gradients[site.name]
            gradient_EO = mean_square_gradients(state.sum_EO, state.num_tokens_E)
        for choice in spec.choices_of(site):
            quantized_EOI = round_trip(weight_EOI, choice.grid(spec.grid), dtype, hessian_EII, spec.solve)
            if keep is not None:
                keep(site, choice, quantized_EOI)
            delta_EOI = weight_EOI - quantized_EOI
            if weighted_EII is not None and output_EO is not None:
                row_EO = row_energies(delta_EOI, weighted_EII)
                for leaf, rows in _leaf_rows(site):
                    _enter(tables["hessian"], site, leaf, choice, hessian_costs(row_EO, output_EO, rows))
            if plain_EII is not None and gradient_EO is not None:
                row_EO = row_energies(delta_EOI, plain_EII)
                for leaf, rows in _leaf_rows(site):
                    costs_E = fisher_costs(row_EO, gradient_EO, rows, choice.bits)
                    _enter(tables["fisher"], site, leaf, choice, costs_E)
    return tables


def measured_costs(spec: SurveySpec, found: BlockFindings) -> Tables:
    """``block_output``, ``gemq`` and ``pmq``, as far as asked for, of a block."""
    tables: Tables = {name: defaultdict(dict) for name in ("block_output", "gemq", "pmq") if name in spec.costs}
    damage = found.damage
    if damage is None or not tables:
        return {}
    energy, num_tokens = damage.output.tolist()
    choices = sorted(spec.choices)
    for site in found.sites:
        fitting = set(spec.choices_of(site))
        for index, choice in enumerate(choices):
            if choice not in fitting:
                continue
            for linear, leaf in enumerate(site.leaves):
                own_E2 = damage.linears[site.name][index, :, linear]
                if "block_output" in tables:
                    _enter(tables["block_output"], site, leaf, choice, own_E2[:, 0] / energy)
                if site.kind == "routed":
                    own_E2 = damage.experts[site.modules[0]][index]
                part = _share_of_expert(found, site, linear)
                if "gemq" in tables:
                    _enter(tables["gemq"], site, leaf, choice, part * own_E2[:, 1] / num_tokens)
                if "pmq" in tables:
                    error_E = (own_E2[:, 0] / num_tokens).sqrt()
                    _enter(tables["pmq"], site, leaf, choice, part * pmq_costs(*_usage(found, site), error_E))
    return tables


def _solver_hessians(site: Site, spec: SurveySpec, found: BlockFindings) -> Tensor:
    """Hessians as the real solve takes them: shrunk for rare experts, the identity for those to be rounded."""
    names = [site.weight_name(expert, site.leaves[0]) for expert in range(site.num_experts)]
    hessian_EII, _ = regularize(found.solver[site.name], spec.coverage, names)
    return hessian_EII


def _token_hessians(state: HessianState, found: BlockFindings) -> Tensor:
    return token_hessians(state.sum_EII, state.num_tokens_E, float(found.num_tokens))


def _usage(found: BlockFindings, site: Site) -> tuple[Tensor, Tensor]:
    """Share of the tokens, and summed routing weight over all tokens, of each expert of a site."""
    if site.kind != "routed":
        return torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    path = site.modules[0]
    return found.tokens[path].double() / found.num_tokens, found.affinity[path] / found.num_tokens


def _share_of_expert(found: BlockFindings, site: Site, linear: int) -> float:
    """Share of a linear in the weights of its routed expert; 1 for a weight of its own."""
    if site.kind != "routed":
        return 1.0
    peers = [other for other in found.sites if other.modules == site.modules]
    return site.rows[linear] * site.in_features / sum(sum(peer.rows) * peer.in_features for peer in peers)


def _leaf_rows(site: Site) -> list[tuple[str, slice]]:
    """Name and rows of each linear of a stack."""
    parts, start = [], 0
    for leaf, num_rows in zip(site.leaves, site.rows, strict=True):
        parts.append((leaf, slice(start, start + num_rows)))
        start += num_rows
    return parts


def _enter(table: dict[str, dict[Choice, float]], site: Site, leaf: str, choice: Choice, costs_E: Tensor) -> None:
    for expert, cost in enumerate(costs_E.tolist()):
        table[site.weight_name(expert, leaf)][choice] = cost
