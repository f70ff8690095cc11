"""Decisions that wait for a survey, rehearsed on made-up findings: mistakes show before the first pass.

A survey promises which costs, scores and choices it will hold.  Findings of that form, all zero, show whether every
rule finds what it selects by, whether the allocator has a cost for every choice, and whether its budget can be reached.
What depends on real findings, such as which experts a rule makes larger, is left to the decision itself.
"""

from collections.abc import Sequence

import torch

from moeq.allocation.constraints import Constraints
from moeq.allocation.decide import AllocationSpec, base_plan, least_bits, make_constraints
from moeq.allocation.evidence import Evidence, Promise, find_costs, num_experts_by_path
from moeq.allocation.plan import Choice, planned
from moeq.allocation.problem import build_problem
from moeq.allocation.rules import apply_rules
from moeq.allocation.solver import check_reachable
from moeq.quant.spec import GridSpec, WeightShape


def rehearse(spec: AllocationSpec, weights: Sequence[WeightShape], grid: GridSpec, promised: Promise) -> None:
    """Raise ValueError where a survey will not hold what a decision needs, or no findings make the decision possible.

    Args:
        spec: What the run asks for.
        weights: All quantizable weights.
        grid: Base width, group size and symmetry.
        promised: What the survey will hold.
    """
    findings = placeholder(promised, weights)
    base, _ = base_plan(spec, weights, grid)
    quantized = planned(base, weights)
    apply_rules(base, spec.parsed_rules, quantized, findings)
    if spec.cost is None or spec.budget is None:
        return
    certain = [rule for rule in spec.parsed_rules if not rule.needs_evidence]
    constraints = make_constraints(spec, weights, grid, least_bits(certain, quantized, None))
    check_reachable(build_problem(quantized, find_costs(findings, spec.cost), constraints))
    if spec.search is not None:
        _check_candidates(constraints, promised)


def _check_candidates(constraints: Constraints, promised: Promise) -> None:
    """A search assembles fixed weights, too: a survey has to solve their grids."""
    for name, grid in constraints.fixed.items():
        if Choice.of(grid) not in promised.choices:
            label = Choice.of(grid).label
            raise ValueError(
                f"search needs {name} at {label}, which the survey does not solve; add {label} to choices of Survey"
            )


def placeholder(promised: Promise, weights: Sequence[WeightShape]) -> Evidence:
    """Findings of the promised form, all zero."""
    names = [w.name for w in weights]
    experts = num_experts_by_path(weights)
    zeros_L = torch.zeros(1 + max(w.block for w in weights), dtype=torch.float64)
    table = {name: dict.fromkeys(promised.choices, 0.0) for name in names}
    return Evidence(
        tokens={path: torch.zeros(number, dtype=torch.int64) for path, number in experts.items()},
        affinity={path: torch.zeros(number, dtype=torch.float64) for path, number in experts.items()},
        similarity_L=zeros_L,
        predicted_similarity_L=zeros_L if promised.predictor else None,
        scores={score: dict.fromkeys(names, 0.0) for score in promised.scores},
        costs=dict.fromkeys(promised.costs, table),
    )
