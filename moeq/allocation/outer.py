"""Search around an allocated plan, judged on the assembled quantized model.

A plan of the program (``problem.py``) is as good as its cost table, which takes the errors of different weights for
uncorrelated and knows nothing of the others' widths.  Around the plan that stands, the KL of the assembled model is

    KL(plan') = KL(plan) + sum_w [ slope_w(c') + t (cost_w(c) + cost_w(c')) ]    over weights w that go from c to c'

slope_w is its measured first-order change (``Judge.slopes``), which holds the errors of all other weights; what is left
is of second order in the two errors of the weight itself, as they are nearly uncorrelated, and that the cost table has.
The program over this table, under the same constraints, gives the next plan: the budget is kept exactly.  t is what a
cost is worth in measured nats, and how far a step goes: plans of several t are measured, and the best stands if it is
better than the last; if none is, many changes at once go too far, and all t are doubled.  Costs must be in nats per
token (``fisher``, ``fisher_kl``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from moeq.allocation.allocate import Allocation, allocate
from moeq.allocation.constraints import Constraints
from moeq.allocation.evidence import CostTable
from moeq.allocation.plan import Choice
from moeq.allocation.solver import SolverName
from moeq.quant.spec import GridSpec, WeightShape

Plan = Mapping[str, GridSpec]
# From steps that trust the slopes most to the most careful ones.
TRUST = (1.2, 1.5, 2.0)


@dataclass(frozen=True)
class SearchSpec:
    """How much a search may measure.

    Attributes:
        num_rounds: At most; each measures at most 3 plans, and the slopes of the one that stands where it is new.
        num_batches: Batches, of all ranks together, that it measures on; the survey finds nothing on them.
    """

    num_rounds: int = 4
    num_batches: int = 4

    def __post_init__(self) -> None:
        for what, number in (("num_rounds", self.num_rounds), ("num_batches", self.num_batches)):
            if number < 1:
                raise ValueError(f"{what} ({number}) of search must be positive; choose 4")


class Judge(Protocol):
    """Measures plans on the assembled quantized model, on tokens that no weight was solved on."""

    def measure(self, plans: Sequence[Plan]) -> list[float]:
        """KL to the original of every plan, in nats per token."""

    def slopes(self, plan: Plan) -> CostTable:
        """First-order change of the KL of a plan by weight and choice, in nats per token."""


@dataclass(frozen=True)
class SearchRound:
    """What one round found.

    Attributes:
        measured: KL by t, of the plans that differ from the one that stood.
        num_changed: Weights of the best of them that differ; 0 where none was better.
    """

    measured: Mapping[float, float]
    num_changed: int


@dataclass(frozen=True)
class Searched:
    """How a search went.

    Attributes:
        kl_before: Measured KL of the plan of the program.
        kl_after: That of the plan that was found.
        num_slopes: Plans whose slopes were taken.
        rounds: In their order.
    """

    kl_before: float
    kl_after: float
    num_slopes: int
    rounds: tuple[SearchRound, ...]

    @property
    def num_measured(self) -> int:
        """Plans that were measured."""
        return 1 + sum(len(each.measured) for each in self.rounds)


def search(
    weights: Sequence[WeightShape], costs: CostTable, constraints: Constraints, judge: Judge, num_rounds: int,
    solver: SolverName = "auto",
) -> tuple[Allocation, Searched]:  # fmt: skip
    """The plan of least measured KL that a few rounds reach from the plan of the program.

    Args:
        weights: All quantizable weights.
        costs: Predicted damage by weight and choice, in nats per token.
        constraints: What every plan has to keep to.
        judge: Measures.
        num_rounds: At most.
        solver: Of the program.

    Raises:
        ValueError: As of ``allocate``.
    """
    stands = allocate(weights, costs, constraints, solver)
    (kl,) = judge.measure([stands.plan])
    before, rounds, scale = kl, list[SearchRound](), 1.0
    slopes, num_slopes = judge.slopes(stands.plan), 1
    for last in (number == num_rounds for number in range(1, num_rounds + 1)):
        proposed = _proposals(weights, costs, slopes, constraints, stands, scale, solver)
        if not proposed:
            break
        measured = dict(zip(proposed, judge.measure([each.plan for each in proposed.values()]), strict=True))
        best = min(measured, key=measured.__getitem__)
        if measured[best] >= kl:
            rounds.append(SearchRound(measured, 0))
            scale *= 2
            continue
        changed = sum(grid != stands.plan[name] for name, grid in proposed[best].plan.items())
        rounds.append(SearchRound(measured, changed))
        stands, kl = proposed[best], measured[best]
        if not last:
            slopes, num_slopes = judge.slopes(stands.plan), num_slopes + 1
    return _in_costs(stands, costs, constraints), Searched(before, kl, num_slopes, tuple(rounds))


def _proposals(
    weights: Sequence[WeightShape], costs: CostTable, slopes: CostTable, constraints: Constraints, stands: Allocation,
    scale: float, solver: SolverName,
) -> dict[float, Allocation]:  # fmt: skip
    """Plans around one, by t; none twice, and not itself."""
    proposed: dict[float, Allocation] = {}
    for trust in (scale * trust for trust in TRUST):
        found = allocate(weights, local_costs(stands.plan, costs, slopes, trust), constraints, solver)
        if found.plan not in [stands.plan, *(other.plan for other in proposed.values())]:
            proposed[trust] = found
    return proposed


def _in_costs(found: Allocation, costs: CostTable, constraints: Constraints) -> Allocation:
    """An allocation with the predicted damage of its plan by the cost table, not by one around another plan."""
    chosen = {name: Choice.of(grid) for name, grid in found.plan.items() if name not in constraints.fixed}
    return replace(found, predicted=sum(costs[name][choice] for name, choice in chosen.items()))


def local_costs(plan: Plan, costs: CostTable, slopes: CostTable, trust: float) -> CostTable:
    """Change of the KL of a plan by weight and choice, as the head of this file has it; 0 for what it has already.

    Args:
        plan: The plan that stands.
        costs: Predicted damage, in nats per token; weights whose grid it does not know (fixed ones) are left out.
        slopes: Of the plan.
        trust: t.
    """
    table: dict[str, dict[Choice, float]] = {}
    for name, grid in plan.items():
        now, row = Choice.of(grid), costs[name]
        if now in row:
            table[name] = {
                choice: 0.0 if choice == now else slopes[name][choice] + trust * (row[now] + cost)
                for choice, cost in row.items()
            }
    return table
