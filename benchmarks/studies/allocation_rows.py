"""The rows of ``allocation.py``: how each way to give bits fills a budget.

Heuristics of QuantMoE-Bench mix 2 and 4 bits, as the paper does: all weights have 2, and weights get 4 in the order of
the heuristic while the budget lasts.  Where a heuristic has no more to say (attention is a tenth of a model) the rest
follows at random, and weights that no longer fit are passed over, so that every row takes the same bits.  Allocators
choose among 2, 3, 4 and 8 bits with a cost table of the survey.

Legend: names are canonical weight names; budgets are code bits per weight.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from moeq.allocation.allocate import allocate
from moeq.allocation.constraints import Budget, Constraints
from moeq.allocation.evidence import Evidence
from moeq.allocation.heuristics import RULES
from moeq.allocation.plan import Choice
from moeq.quant.spec import GridSpec, WeightShape

Plan = dict[str, GridSpec]
Weights = Sequence[WeightShape]
WIDTHS = (2, 3, 4, 8)
COSTS = ("hessian", "block_output", "gemq", "alphaq", "fisher", "fisher_kl")
SCORES = ("outlier", "outlier_group", "kurtosis", "spectral_tail")


@dataclass(frozen=True)
class Setting:
    """What a row decides from: the model's weights, the survey on this seed's data, the grid and the seed."""

    weights: Weights
    evidence: Evidence
    grid: GridSpec
    seed: int

    def select(self, rule: str, **options: object) -> set[str]:
        """Names that a rule of the library selects."""
        return RULES[rule](self.weights, self.evidence, **options)


Order = Callable[[Setting], Iterable[set[str]]]


def _structure(rule: str, **options: object) -> Order:
    return lambda s: [s.select(rule, **options)]


def _growing(rule: str, unit: str, **options: object) -> Order:
    """Ever more blocks, experts or linears: the rule with num 1, 2, ..."""
    return lambda s: (s.select(rule, num=num, **options) for num in range(1, _count(s, unit) + 1))


def _random(rule: str, unit: str) -> Order:
    """The same for a control."""
    return lambda s: (s.select(rule, num=num, seed=s.seed) for num in range(1, _count(s, unit) + 1))


def _count(s: Setting, unit: str) -> int:
    routed = [w for w in s.weights if w.kind == "routed"]
    if unit == "experts":
        return 1 + max(w.expert for w in routed if w.expert is not None)
    if unit == "linears":
        return len(routed)
    return len({w.block for w in (routed if unit == "routed blocks" else s.weights)})


def _combination(s: Setting) -> Iterable[set[str]]:
    """Attention, shared experts, first block, then the most used experts of every block (+Attn+Shared+FirstL+Freq)."""
    yield s.select("attention")
    yield s.select("shared")
    yield s.select("first_blocks", num=1)
    yield from _growing("most_used_experts", "experts", by="affinity")(s)


HEURISTICS: dict[str, Order] = {
    "random linears": lambda s: [s.select("random_linears", seed=s.seed, share=1.0)],
    "random experts": _random("random_experts", "experts"),
    "random blocks": _random("random_blocks", "routed blocks"),
    "attention": _structure("attention"),
    "shared": _structure("shared"),
    "gate": _structure("linear", linear="gate_proj"),
    "up": _structure("linear", linear="up_proj"),
    "down": _structure("linear", linear="down_proj"),
    "most used experts (tokens)": _growing("most_used_experts", "experts", by="tokens"),
    "most used experts (affinity)": _growing("most_used_experts", "experts", by="affinity"),
    "first blocks": _growing("first_blocks", "blocks"),
    "last blocks": _growing("last_blocks", "blocks"),
    "least similar blocks (measured)": _growing("least_similar_blocks", "routed blocks", by="measured"),
    "least similar blocks (predicted)": _growing("least_similar_blocks", "routed blocks", by="predicted"),
    **{f"{score} score": _growing("top_scored", "linears", score=score) for score in SCORES},
    "combination of the paper": _combination,
}


def rows(weights: Weights) -> list[str]:
    """Names of all rows that make sense for a model."""
    kinds = {w.kind for w in weights}
    heuristics = [name for name in HEURISTICS if name not in {"attention", "shared"} or name in kinds]
    return ["uniform", "depth split", *heuristics, "PMQ", *(f"allocator, {cost}" for cost in COSTS)]


def make_plan(row: str, budget: float, setting: Setting) -> Plan | None:
    """The plan of a row under a budget; None where it has none (uniform bits that are not whole)."""
    weights, grid = setting.weights, setting.grid
    if row == "uniform":
        return {w.name: replace(grid, bits=int(budget)) for w in weights} if budget == int(budget) else None
    if row == "depth split":
        blocks = ({w.name for w in weights if w.block == block} for block in range(len(weights)))
        return None if budget == int(budget) else fill(setting, blocks, budget, int(budget), int(budget) + 1)
    if row == "PMQ":
        return pmq(setting, budget)
    if row.startswith("allocator, "):
        costs = setting.evidence.costs[row.removeprefix("allocator, ")]
        return allocate(weights, costs, Constraints(_choices(grid, WIDTHS), Budget(budget), grid)).plan
    return fill(setting, HEURISTICS[row](setting), budget, 2, 4)


def fill(setting: Setting, groups: Iterable[set[str]], budget: float, low: int, high: int) -> Plan:
    """Raise weights from low to high bits, group by group, the rest at random, while the budget lasts."""
    weights = setting.weights
    generator = random.Random(setting.seed)
    order: dict[str, None] = {}
    names = [w.name for w in weights]
    for group in (*groups, set(names)):
        new = [name for name in names if name in group and name not in order]
        # Within a group no weight comes before another for its place in the model.
        order |= dict.fromkeys(generator.sample(new, len(new)))
    numel = {w.name: w.numel for w in weights}
    spare = round((budget - low) * sum(numel.values()))
    plan = {name: replace(setting.grid, bits=low) for name in names}
    for name in order:
        if (high - low) * numel[name] <= spare:
            spare -= (high - low) * numel[name]
            plan[name] = replace(setting.grid, bits=high)
    return plan


def pmq(setting: Setting, budget: float) -> Plan:
    """MC-MoE's allocation: one width per expert, an equal budget for every block, its cost table; the rest at 4 bits.

    Where 4 bits for the rest leave less than 2 for the experts, the rest has 2.
    """
    weights, grid = setting.weights, setting.grid
    routed = [w for w in weights if w.kind == "routed"]
    rest = [w for w in weights if w.kind != "routed"]
    total, rest_size = sum(w.numel for w in weights), sum(w.numel for w in rest)
    fits = [bits for bits in (4, 2) if budget * total - bits * rest_size >= 2 * (total - rest_size)]
    plan = {w.name: replace(grid, bits=fits[0]) for w in rest}
    share = (budget * total - fits[0] * rest_size) / (total - rest_size)
    for block in sorted({w.block for w in routed}):
        members = [w for w in routed if w.block == block]
        constraints = Constraints(_choices(grid, (2, 3, 4)), Budget(share), grid, runtime="gptqmodel")
        plan |= allocate(members, setting.evidence.costs["pmq"], constraints).plan
    return {w.name: plan[w.name] for w in weights}


def _choices(grid: GridSpec, widths: Sequence[int]) -> list[Choice]:
    return [Choice(bits, grid.group_size) for bits in widths]


def bits_by_structure(plan: Mapping[str, GridSpec], weights: Weights) -> dict[str, float]:
    """Mean bits of each kind of weight."""
    kinds = dict.fromkeys(w.kind for w in weights)
    return {
        kind: sum(plan[w.name].bits * w.numel for w in weights if w.kind == kind)
        / sum(w.numel for w in weights if w.kind == kind)
        for kind in kinds
    }
