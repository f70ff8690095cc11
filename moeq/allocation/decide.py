"""Decision on a run's plan: structures, rules, an allocator or a given plan, turned into checked bits of each weight.

given plan                     read, checked against the model, the runtime and the budget
method "rules"                 base width by structure, then every rule raises what it selects
method "allocate"              the program of ``problem.py``; structures with bits of their own are fixed, and what
                               the rules select is a least width
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moeq.allocation.allocate import Allocation, RuntimePrice, allocate, runtime_prices
from moeq.allocation.evidence import CostTable, Evidence
from moeq.allocation.plan import check_plan, parse_choices, plan_cost, plan_from_json, uniform_plan
from moeq.allocation.problem import Budget, Floor
from moeq.allocation.rules import Rule, RuleEffect, apply_rules
from moeq.allocation.runtime import RuntimeName, check_runtime, find_runtime
from moeq.quant.spec import GridSpec, WeightShape

Method = Literal["rules", "allocate"]


@dataclass(frozen=True)
class AllocationSpec:
    """What a run asks for.

    Attributes:
        bits_by_kind: Bits of some structures: "attention", "shared", "dense", "routed".
        plan: File of a plan, or None.
        rules: Rules, in order.
        method: "rules" or "allocate".
        cost: Name of the survey's cost table that the allocator minimises.
        budget: Limit; needed by the allocator, checked for rules and given plans.
        choices: Bits, or labels such as "4g64", that the allocator may give.
        runtime: Which runtime must be able to read the plan.
        floors: Experts of each block that must stay wide.
    """

    bits_by_kind: Mapping[str, int]
    plan: Path | None = None
    rules: tuple[Rule, ...] = ()
    method: Method = "rules"
    cost: str | None = None
    budget: Budget | None = None
    choices: tuple[int | str, ...] = (2, 3, 4, 8)
    runtime: RuntimeName = "research"
    floors: tuple[Floor, ...] = ()

    def __post_init__(self) -> None:
        find_runtime(self.runtime)
        if self.plan is not None and (self.bits_by_kind or self.rules or self.method == "allocate"):
            asked = [*self.bits_by_kind, *(["rules"] if self.rules else []), *(["method"] if self.cost else [])]
            raise ValueError(f"plan ({self.plan}) already states all bits; leave out {', '.join(asked) or 'method'}")
        if self.method == "allocate" and (self.cost is None or self.budget is None):
            raise ValueError(
                f"method allocate needs cost ({self.cost}) and budget ({self.budget}); "
                "give for example cost: fisher and budget: 2.5"
            )
        if self.method == "rules" and (self.cost is not None or self.floors):
            raise ValueError(f"cost ({self.cost}) and floors belong to the allocator; set method: allocate")
        if self.floors and "routed" in self.bits_by_kind:
            raise ValueError(f"floors and routed ({self.bits_by_kind['routed']}) both decide experts; leave out one")

    @property
    def needs_evidence(self) -> bool:
        """Whether a survey must come before the decision."""
        return self.method == "allocate" or any(rule.needs_evidence for rule in self.rules)


@dataclass(frozen=True)
class Decision:
    """A plan, and how it came about: what rules did, what the allocator found, what runtimes cost."""

    plan: dict[str, GridSpec]
    effects: tuple[RuleEffect, ...] = ()
    allocation: Allocation | None = None
    prices: tuple[RuntimePrice, ...] = ()


def decide(
    spec: AllocationSpec, weights: Sequence[WeightShape], grid: GridSpec, evidence: Evidence | None = None
) -> Decision:
    """The plan that a run asks for.

    Args:
        spec: What is asked for.
        weights: All quantizable weights.
        grid: Base width, group size and symmetry.
        evidence: Findings of the survey, where rules or the allocator need them.

    Raises:
        ValueError: Names, widths, budget, evidence or runtime do not fit; the message says what does.
    """
    if spec.method == "allocate":
        return _allocate(spec, weights, grid, evidence)
    if spec.plan is not None:
        plan = plan_from_json(spec.plan)
        check_plan(plan, weights)
        decision = Decision(plan)
    else:
        base = uniform_plan(weights, grid, spec.bits_by_kind)
        plan, effects = apply_rules(base, spec.rules, weights, evidence)
        decision = Decision(plan, tuple(effects))
    check_runtime(plan, weights, find_runtime(spec.runtime))
    if spec.budget is not None:
        check_budget(plan, weights, spec.budget)
    return decision


def check_budget(plan: Mapping[str, GridSpec], weights: Sequence[WeightShape], budget: Budget) -> None:
    """Raise ValueError where a plan takes more than a budget."""
    takes = getattr(plan_cost(plan, weights), budget.unit)
    if takes > budget.value * (1 + 1e-12):
        raise ValueError(
            f"the plan takes {takes:.6g} {budget.unit} where the budget is {budget.value:.6g}; "
            f"give some weights fewer bits, or a budget of {takes:.6g}"
        )


def find_costs(evidence: Evidence | None, name: str) -> CostTable:
    """A cost table of the survey; raises ValueError where it was not gathered, naming those that were."""
    tables = {} if evidence is None else evidence.costs
    if name not in tables:
        raise ValueError(
            f"the survey holds no cost {name!r} (it has: {', '.join(tables) or 'none'}); "
            f"add {name} to costs of the callback Survey"
        )
    return tables[name]


def fixed_and_least(
    spec: AllocationSpec, weights: Sequence[WeightShape], grid: GridSpec, evidence: Evidence | None
) -> tuple[dict[str, GridSpec], dict[str, int]]:
    """What bounds the allocator: grids of structures with bits of their own, and the least widths that rules state."""
    base = uniform_plan(weights, grid, spec.bits_by_kind)
    minimum: dict[str, int] = {}
    for rule in spec.rules:
        for name in rule.apply(weights, evidence):
            minimum[name] = max(rule.bits, minimum.get(name, 0))
    return {w.name: base[w.name] for w in weights if w.kind in spec.bits_by_kind}, minimum


def _allocate(
    spec: AllocationSpec, weights: Sequence[WeightShape], grid: GridSpec, evidence: Evidence | None
) -> Decision:
    assert spec.cost is not None
    assert spec.budget is not None
    fixed, minimum = fixed_and_least(spec, weights, grid, evidence)
    given = (find_costs(evidence, spec.cost), parse_choices(spec.choices, grid.group_size), spec.budget, grid)
    found = allocate(weights, *given, runtime=spec.runtime, floors=spec.floors, minimum_bits=minimum, fixed=fixed)
    check_runtime(found.plan, weights, find_runtime(spec.runtime))
    prices = runtime_prices(weights, *given, floors=spec.floors, minimum_bits=minimum, fixed=fixed)
    return Decision(found.plan, allocation=found, prices=tuple(prices))
