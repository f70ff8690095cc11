"""Decision on a run's plan: structures, rules, an allocator or a given plan, turned into checked bits of each weight.

given plan                     read, checked against the model, the runtime and the budget
method "rules"                 base width by structure, then every rule raises what it selects, but for patterns
method "allocate"              the program of ``problem.py``; structures with bits of their own are fixed, and what
                               the rules select is a least width
patterns                       say the bits or group size of single weights for good, or keep them out of the plan
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from moeq.allocation.allocate import Allocation, RuntimePrice, allocate, runtime_prices
from moeq.allocation.constraints import Budget, BudgetUnit, Constraints, Floor
from moeq.allocation.evidence import Evidence, find_costs
from moeq.allocation.outer import Judge, Searched, SearchSpec, search
from moeq.allocation.patterns import Pattern, Wish, match_patterns
from moeq.allocation.plan import (
    DEFAULT_CHOICES,
    check_plan,
    kept_from_json,
    parse_choices,
    plan_from_json,
    planned,
    uniform_plan,
)
from moeq.allocation.price import check_budget, symmetry_note
from moeq.allocation.rules import Rule, RuleEffect, apply_rules, make_rule
from moeq.allocation.runtime import RuntimeName, check_kept, check_runtime, find_runtime
from moeq.allocation.time_table import COMMAND, TimeTable, read_times
from moeq.quant.carrier import CarrierMode
from moeq.quant.spec import GridSpec, WeightShape

Method = Literal["rules", "allocate"]
# Costs that are in nats per token: a search adds them to measured ones.
IN_NATS = ("fisher", "fisher_kl")


@dataclass(frozen=True)
class AllocationSpec:
    """What a run asks for, in the words of its configuration.

    Attributes:
        attention: Bits of attention linears; null is ``--model.bits`` (or what the allocator chooses).
        shared: Bits of shared experts.
        dense: Bits of dense MLP blocks.
        routed: Bits of routed experts.
        plan: Path of an allocation.json; the other bits must then be left out.
        patterns: What weights of a name get: {pattern: "*.self_attn.*", bits: 8}, {pattern: "*.down_proj", group_size:
            32}, {pattern: "*.o_proj", grid: q6_k}, or {pattern: "model.layers.0.*", keep: true}, which leaves them as
            they are; the last that matches wins.
        rules: Rules such as {rule: first_blocks, num: 2, bits: 4}; each raises the bits of what it selects.  For the
            allocator they are least widths.
        method: "rules", or "allocate": the least predicted damage within a budget.
        cost: Cost table of the survey that the allocator minimises, for example fisher.
        budget: Limit of the allocator; of rules or a given plan, checked.
        budget_unit: "code_bits" per weight; what the runtime's files hold: "average_bits" per weight, "bytes", or
            "active_bytes" (of one token's weights); or "milliseconds" of one token's products, by ``times``.
        choices: What the allocator may give: bits (in groups of ``--model.group_size``), or labels such as "4g128",
            "4g0" (no groups) and "q3_k" (a two-level grid of llama.cpp).
        runtime: What must read the result, and whose files the budget is about: "research" (moeq's own), "llama.cpp",
            "mlx", "vllm", "sglang" or "gptqmodel"; docs/allocation.md says what they read.
        carrier: Types of those files: "exact" (every value is held, some by types wider than the grids) or "native" (of
            the grids' own widths where there are such, at the price of their rounding).
        floors: Experts of every block that must stay wide, as {bits: 4, num_experts: 1}.
        times: Path of a table that ``python -m moeq.timing`` measured: the milliseconds of moeq's own packed products.
        milliseconds: Limit of them beside a budget of bits or bytes.
        served_elsewhere: That the table may be of another machine, on which the result is served.
        search: Rounds of a search around the allocator's plan, on the assembled quantized model, as {num_rounds: 4}.
    """

    attention: int | None = None
    shared: int | None = None
    dense: int | None = None
    routed: int | None = None
    plan: str | None = None
    patterns: tuple[Pattern, ...] = ()
    rules: tuple[dict[str, Any], ...] = ()
    method: Method = "rules"
    cost: str | None = None
    budget: float | None = None
    budget_unit: BudgetUnit = "code_bits"
    choices: tuple[int | str, ...] = DEFAULT_CHOICES
    runtime: RuntimeName = "research"
    carrier: CarrierMode = "exact"
    floors: tuple[Floor, ...] = ()
    times: str | None = None
    milliseconds: float | None = None
    served_elsewhere: bool = False
    search: SearchSpec | None = None

    def __post_init__(self) -> None:
        if self.carrier not in get_args(CarrierMode):
            raise ValueError(f"carrier ({self.carrier}) must be one of {', '.join(get_args(CarrierMode))}")
        if find_runtime(self.runtime).format is None and self.carrier != "exact":
            raise ValueError(f"carrier ({self.carrier}) is about files of a runtime; give runtime, such as llama.cpp")
        bits, rules = self.bits_by_kind, self.parsed_rules
        if self.plan is not None and (bits or rules or self.patterns or self.method == "allocate"):
            lists = {"patterns": self.patterns, "rules": rules, "method": self.cost}
            asked = [*bits, *(name for name, given in lists.items() if given)]
            raise ValueError(f"plan ({self.plan}) already states all bits; leave out {', '.join(asked) or 'method'}")
        if self.method == "allocate" and (self.cost is None or self.budget is None):
            raise ValueError(
                f"method allocate needs cost ({self.cost}) and budget ({self.budget}); "
                "give for example cost: fisher and budget: 2.5"
            )
        if self.search is not None and (self.method != "allocate" or self.cost not in IN_NATS):
            raise ValueError(
                f"search starts from an allocated plan and adds nats; method ({self.method}) must be allocate and "
                f"cost ({self.cost}) {' or '.join(IN_NATS)}; give cost: {IN_NATS[0]}, or leave out search"
            )
        if self.method == "rules" and (self.cost is not None or self.floors):
            raise ValueError(f"cost ({self.cost}) and floors belong to the allocator; set method: allocate")
        if self.floors and self.routed is not None:
            raise ValueError(f"floors and routed ({self.routed}) both decide experts; leave out one")
        self._check_times()

    def _check_times(self) -> None:
        timed = self.budget_unit == "milliseconds" and self.budget is not None
        if timed and self.milliseconds is not None:
            raise ValueError(
                f"milliseconds ({self.milliseconds}) stand beside a budget of bits or bytes; leave one out"
            )
        if (timed or self.milliseconds is not None) and self.times is None:
            raise ValueError(f"a limit of milliseconds needs times, measured by {COMMAND} (--help says how)")
        if self.times is not None and self.runtime != "research":
            raise ValueError(
                f"times ({self.times}) are of moeq's own products, not of {self.runtime}; leave out times, or runtime"
            )

    @cached_property
    def bits_by_kind(self) -> dict[str, int]:
        """Bits of the structures that have their own."""
        kinds = {"attention": self.attention, "shared": self.shared, "dense": self.dense, "routed": self.routed}
        return {kind: bits for kind, bits in kinds.items() if bits is not None}

    @cached_property
    def parsed_rules(self) -> tuple[Rule, ...]:
        """The rules, checked; raises ValueError for one that does not exist or lacks an option."""
        return tuple(make_rule(rule) for rule in self.rules)

    @cached_property
    def time_table(self) -> TimeTable | None:
        """The table of ``times``; raises ValueError where it cannot be read, or is of another machine."""
        if self.times is None:
            return None
        return read_times(Path(self.times), served_elsewhere=self.served_elsewhere)

    @property
    def limit(self) -> Budget | None:
        """The budget with its unit."""
        return None if self.budget is None else Budget(self.budget, self.budget_unit)

    @property
    def needs_evidence(self) -> bool:
        """Whether a survey must come before the decision."""
        return self.method == "allocate" or any(rule.needs_evidence for rule in self.parsed_rules)


@dataclass(frozen=True)
class Decision:
    """A plan, and how it came about.

    Attributes:
        plan: Grids by name.
        kept: Names of weights that are kept as they are.
        effects: What rules did.
        allocation: What the allocator found.
        searched: How the search around it went.
        prices: What each runtime would cost.
        runtime: What must read the result.
        carrier: Types of its files.
        note: What would make these smaller, or nothing.
        times: Of products, where the run has a table.
    """

    plan: dict[str, GridSpec]
    kept: tuple[str, ...] = ()
    effects: tuple[RuleEffect, ...] = ()
    allocation: Allocation | None = None
    searched: Searched | None = None
    prices: tuple[RuntimePrice, ...] = ()
    runtime: RuntimeName = "research"
    carrier: CarrierMode = "exact"
    note: str = ""
    times: TimeTable | None = None


def decide(
    spec: AllocationSpec, weights: Sequence[WeightShape], grid: GridSpec, evidence: Evidence | None = None,
    judge: Judge | None = None,
) -> Decision:  # fmt: skip
    """The plan that a run asks for.

    Args:
        spec: What is asked for.
        weights: All quantizable weights.
        grid: Base width, group size and symmetry.
        evidence: Findings of the survey, where rules or the allocator need them.
        judge: Measures plans, where a search is asked for.

    Raises:
        ValueError: Names, widths, budget, evidence, judge or runtime do not fit; the message says what does.
    """
    if spec.method == "allocate":
        return _allocate(spec, weights, grid, evidence, judge)
    effects: Sequence[RuleEffect] = ()
    if spec.plan is not None:
        plan, kept = plan_from_json(Path(spec.plan)), kept_from_json(Path(spec.plan))
        check_plan(plan, weights, kept)
    else:
        base, wishes = base_plan(spec, weights, grid)
        told = {name for name, wish in wishes.items() if wish.bits is not None or wish.two_level is not None}
        plan, effects = apply_rules(base, spec.parsed_rules, planned(base, weights), evidence, told)
        kept = kept_names(wishes, weights)
    runtime = find_runtime(spec.runtime)
    check_runtime(plan, weights, runtime, spec.carrier)
    limits = [spec.limit, None if spec.milliseconds is None else Budget(spec.milliseconds, "milliseconds")]
    for limit in filter(None, limits):
        check_budget(plan, weights, limit, runtime, spec.carrier, spec.time_table)
    note = symmetry_note(((w, plan[w.name]) for w in planned(plan, weights)), runtime, spec.carrier)
    return Decision(
        plan, kept, tuple(effects), runtime=spec.runtime, carrier=spec.carrier, note=note, times=spec.time_table
    )


def base_plan(
    spec: AllocationSpec, weights: Sequence[WeightShape], grid: GridSpec
) -> tuple[dict[str, GridSpec], dict[str, Wish]]:
    """The plan before rules and evidence, and what patterns say; raises ValueError where either does not fit."""
    wishes = match_patterns(spec.patterns, [weight.name for weight in weights])
    return uniform_plan(weights, grid, spec.bits_by_kind, wishes), wishes


def kept_names(wishes: Mapping[str, Wish], weights: Sequence[WeightShape]) -> tuple[str, ...]:
    """Weights that patterns keep as they are, in the order of the model."""
    return tuple(weight.name for weight in weights if weight.name in wishes and wishes[weight.name].keep)


def make_constraints(
    spec: AllocationSpec, weights: Sequence[WeightShape], grid: GridSpec, minimum_bits: Mapping[str, int]
) -> Constraints:
    """What the allocator has to keep to: structures with bits of their own are fixed.

    Args:
        spec: What is asked for, with a budget.
        weights: All quantizable weights.
        grid: Base width, group size and symmetry.
        minimum_bits: What ``least_bits`` found.
    """
    assert spec.limit is not None
    base, wishes = base_plan(spec, weights, grid)
    check_kept(kept_names(wishes, weights), weights, find_runtime(spec.runtime))
    told = {name for name, wish in wishes.items() if wish.bits is not None or wish.two_level is not None}
    return Constraints(
        choices=parse_choices(spec.choices, grid.group_size),
        budget=spec.limit,
        like=grid,
        runtime=spec.runtime,
        floors=spec.floors,
        minimum_bits=minimum_bits,
        fixed={w.name: base[w.name] for w in planned(base, weights) if w.kind in spec.bits_by_kind or w.name in told},
        group_sizes={name: wish.group_size or None for name, wish in wishes.items() if wish.group_size is not None},
        carrier=spec.carrier,
        times=spec.time_table,
        milliseconds=spec.milliseconds,
    )


def least_bits(rules: Iterable[Rule], weights: Sequence[WeightShape], evidence: Evidence | None) -> dict[str, int]:
    """The least widths that rules state for the allocator, by name of weight."""
    minimum: dict[str, int] = {}
    for rule in rules:
        for name in rule.apply(weights, evidence):
            minimum[name] = max(rule.bits, minimum.get(name, 0))
    return minimum


def _allocate(
    spec: AllocationSpec, weights: Sequence[WeightShape], grid: GridSpec, evidence: Evidence | None, judge: Judge | None
) -> Decision:
    assert spec.cost is not None
    base, wishes = base_plan(spec, weights, grid)
    quantized, costs = planned(base, weights), find_costs(evidence, spec.cost)
    constraints = make_constraints(spec, weights, grid, least_bits(spec.parsed_rules, quantized, evidence))
    searched, runtime = None, find_runtime(spec.runtime)
    if spec.search is None:
        found = allocate(quantized, costs, constraints)
    elif judge is None:
        raise ValueError(
            "search measures plans on a survey of the same run; put Survey before BitAllocation, without survey: PATH"
        )
    else:
        found, searched = search(quantized, costs, constraints, judge, spec.search.num_rounds)
    check_runtime(found.plan, weights, runtime, spec.carrier)
    grids = ((weight, choice.grid(grid)) for weight in quantized for choice in constraints.choices)
    return Decision(
        found.plan,
        kept_names(wishes, weights),
        allocation=found,
        searched=searched,
        # Times are of moeq's own products: what others would cost in them means nothing.
        prices=() if spec.times is not None else tuple(runtime_prices(quantized, costs, constraints)),
        runtime=spec.runtime,
        carrier=spec.carrier,
        note=symmetry_note(grids, runtime, spec.carrier),
        times=spec.time_table,
    )
