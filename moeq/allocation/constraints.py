"""What an allocation has to keep to: a budget, floors, a runtime, and what is settled already."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from moeq.allocation.plan import Choice
from moeq.allocation.time_table import TimeTable
from moeq.quant.carrier import CarrierMode
from moeq.quant.spec import GridSpec

BudgetUnit = Literal["code_bits", "average_bits", "bytes", "active_bytes", "milliseconds"]


@dataclass(frozen=True)
class Budget:
    """How much a plan may take.

    Attributes:
        value: The limit.
        unit: "code_bits": bits per weight, codes only.  Those of the runtime's files, scales and zero points included:
            "average_bits" per weight; "bytes" of all weights; "active_bytes" of the weights that one token uses.
            "milliseconds" of the products of one token, by a table of times.
    """

    value: float
    unit: BudgetUnit = "code_bits"


@dataclass(frozen=True)
class Floor:
    """In every block with routed experts, at least ``num_experts`` have ``bits`` or more in all their linears."""

    bits: int
    num_experts: int


@dataclass(frozen=True)
class Constraints:
    """What a plan is made of and has to keep to.

    Attributes:
        choices: Bits and group sizes that a weight may get; those that the runtime's files cannot hold are left out.
        budget: The limit, over all weights, fixed ones included.
        like: Grid whose symmetry (which decides the overhead) and clip search the chosen grids have.
        runtime: A name of ``runtime.RUNTIMES``: which weights share a type, and what it takes.
        floors: Experts of each block that must stay wide.
        minimum_bits: Least bits of some weights, by name.
        fixed: Grids of weights that are not to be chosen, by name.
        group_sizes: The only group size of some weights, by name; None is one scale per channel.
        carrier: Which types hold the grids, see ``moeq.quant.carrier``.
        times: Of products, where a limit is one of time.
        milliseconds: Limit of time beside a budget of another unit.
    """

    choices: Sequence[Choice]
    budget: Budget
    like: GridSpec
    runtime: str = "research"
    floors: Sequence[Floor] = ()
    minimum_bits: Mapping[str, int] = field(default_factory=dict)
    fixed: Mapping[str, GridSpec] = field(default_factory=dict)
    group_sizes: Mapping[str, int | None] = field(default_factory=dict)
    carrier: CarrierMode = "exact"
    times: TimeTable | None = None
    milliseconds: float | None = None
