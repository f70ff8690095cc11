"""From sites and a plan to quantized weights: what is solved together, by which rank, and how results come together.

A *unit* is a stack of weights [E', O', I] that share one grid: experts of a site in which the same linears have the
same bits, as many as a fixed amount of work allows.  Units are divided over ranks by their cost (``moeq.fit.share``).
The result of a unit does not depend on which other units there are, so one rank and many give the same codes.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from moeq.distributed import rank_and_world
from moeq.fit.factors import Factors
from moeq.fit.run import Run
from moeq.fit.schedule import SitePart, whole
from moeq.fit.share import SolvedWeight, divide, experts_per_unit, gather_solved, solve_operations
from moeq.models.adapter import Adapter, Site
from moeq.models.storage import rounded_to_storage
from moeq.quant.coverage import CoverageSpec
from moeq.quant.factor import ATTEMPTS, retry_reason
from moeq.quant.grid import dequantize_weight
from moeq.quant.learned import level_offset
from moeq.quant.solution import Solution
from moeq.quant.spec import Fallback, GridSpec, QuantizedWeight

ONE_SIDED = "factor not positive definite"
# Solve a stack: (unit, weight_EOI float32) -> Solution.
Solver = Callable[["Unit", Tensor], Solution]


@dataclass(frozen=True)
class Unit:
    """Experts of a site, and the linears of them that are solved together on one grid."""

    site: Site
    experts: tuple[int, ...]
    leaves: tuple[int, ...]
    grid: GridSpec

    @property
    def shape(self) -> tuple[int, int]:
        """Out features of the linears together, and in features."""
        return sum(self.site.rows[leaf] for leaf in self.leaves), self.site.in_features

    @property
    def operations(self) -> int:
        """What its solve costs."""
        return len(self.experts) * solve_operations(*self.shape)


def quantize_sites(
    adapter: Adapter, run: Run, sites: Sequence[Site], solver: Solver, parts: Sequence[SitePart] | None = None
) -> None:
    """Solve the sites (units divided over ranks), record results and fallbacks, write the weights into the model.

    Args:
        adapter: The model.
        run: Its plan is read; quantized weights, errors and fallbacks are added.
        sites: Sites whose weights are written into the model: all of them are solved by now.
        solver: Solves a stack.
        parts: What is solved now; None is all experts of the sites.
    """
    parts = [whole(site) for site in sites] if parts is None else parts
    rank, world = rank_and_world()
    largest = max((len(part.experts) for part in parts), default=1)
    units = [piece for unit in make_units(parts, run.plan, largest) for piece in cut(unit)]
    owners = divide([unit.operations for unit in units], world)
    own = [unit for unit, owner in zip(units, owners, strict=True) if owner == rank]
    solved = [weight for unit in own for weight in solve_unit(adapter, unit, solver, run.needs.offsets)]
    by_name = {weight.name: weight for weight in gather_solved(solved)}
    for site, experts in ((part.site, part.experts) for part in parts):
        for expert in experts:
            for leaf in site.leaves:
                weight = by_name.get(site.weight_name(expert, leaf))
                if weight is None:
                    run.kept.add(site.weight_name(expert, leaf))
                    continue
                run.quantized[weight.name] = weight.weight
                if weight.offset_OI is not None:
                    run.offsets[weight.name] = weight.offset_OI
                run.fallbacks += weight.fallbacks
                run.errors.append(
                    {
                        "weight": weight.name, "block": site.block, "kind": site.kind, "linear": leaf, "expert": expert,
                        "bits": weight.weight.bits, "relative_error": weight.relative_error,
                    }
                )  # fmt: skip
    commit(adapter, sites, run.quantized)


def make_units(parts: Sequence[SitePart], plan: Mapping[str, GridSpec], max_experts: int) -> list[Unit]:
    """Units of the parts in a fixed order, at most ``max_experts`` experts each; weights without a grid are in none."""
    units = []
    for part in parts:
        site = part.site
        groups: dict[tuple[tuple[int, ...], GridSpec], list[int]] = defaultdict(list)
        for expert in part.experts:
            by_grid: dict[GridSpec, list[int]] = defaultdict(list)
            for index, leaf in enumerate(site.leaves):
                if (grid := plan.get(site.weight_name(expert, leaf))) is not None:
                    by_grid[grid].append(index)
            for grid, leaves in by_grid.items():
                groups[tuple(leaves), grid].append(expert)
        for (leaves_of_unit, grid), experts in groups.items():
            for start in range(0, len(experts), max_experts):
                units.append(Unit(site, tuple(experts[start : start + max_experts]), leaves_of_unit, grid))
    return units


def cut(unit: Unit) -> list[Unit]:
    """A unit in pieces of a fixed amount of work, so that ranks have something to divide; the same on every number."""
    size = experts_per_unit(*unit.shape)
    starts = range(0, len(unit.experts), size)
    return [replace(unit, experts=unit.experts[start : start + size]) for start in starts]


def factors_of(factors: Factors, unit: Unit, coverage: CoverageSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """H_O and H_I of a unit, on a device."""
    rows = torch.cat([torch.arange(rows.start, rows.stop) for rows in unit_rows(unit)])
    output_EOO, input_EII = factors.of(unit.site, unit.experts, rows, coverage)
    return output_EOO.to(device), input_EII.to(device)


def unit_rows(unit: Unit) -> list[slice]:
    """Rows of the stacked site weight that belong to each leaf of a unit."""
    ends = torch.tensor(unit.site.rows).cumsum(0).tolist()
    return [slice(ends[leaf] - unit.site.rows[leaf], ends[leaf]) for leaf in unit.leaves]


@torch.no_grad()
def solve_unit(adapter: Adapter, unit: Unit, solver: Solver, offsets: bool = False) -> list[SolvedWeight]:
    """Quantize the weights of one unit; results are on the CPU, with ``level_offset`` where it is asked for."""
    weight_EOI = adapter.get_weight(unit.site, unit.experts)
    stacked = torch.cat([weight_EOI[:, rows] for rows in unit_rows(unit)], 1).float()
    on_device = solver(unit, stacked)
    solution = on_device.on_cpu()
    solved, end = [], 0
    for leaf in unit.leaves:
        start, end = end, end + unit.site.rows[leaf]
        for position, expert in enumerate(unit.experts):
            name = unit.site.weight_name(expert, unit.site.leaves[leaf])
            rows = slice(start, end)
            weight, offset_OI = solution.expert(position, unit.grid, rows), None
            if offsets:
                real_OI = stacked[position, rows]
                offset_OI = level_offset(on_device.expert(position, unit.grid, rows), real_OI).cpu()
            error = float(solution.relative_error_E[position])
            fallbacks = _solver_fallbacks(name, solution, position)
            solved.append(SolvedWeight(name, weight.each(Tensor.contiguous), error, fallbacks, offset_OI))
    return solved


def _solver_fallbacks(name: str, solution: Solution, position: int) -> tuple[Fallback, ...]:
    retries = len(ATTEMPTS) if bool(solution.failed_E[position]) else int(solution.num_retries_E[position])
    found = [Fallback(name, *retry_reason(retries))] if retries else []
    if solution.one_sided_E is not None and bool(solution.one_sided_E[position]):
        found.append(Fallback(name, ONE_SIDED, "a Kronecker factor has no Cholesky factor; codes of one Hessian"))
    return tuple(found)


@torch.no_grad()
def change_parameters(adapter: Adapter, run: Run, values: Mapping[str, Tensor], reason: str = "") -> None:
    """Give parameters that are not quantized (norms, routers) new values, by name, and record them for resume.

    Args:
        adapter: The model.
        run: Takes values and reasons.
        values: By name.
        reason: What was done, for the ledger; nothing where that is recorded already.
    """
    for name, value in values.items():
        parameter = adapter.model.get_parameter(name)
        parameter.copy_(rounded_to_storage(adapter.model, name, value))
        run.changed[name] = parameter.detach().cpu().clone()
        if reason not in (earlier := run.reasons.get(name, "")):
            run.reasons[name] = f"{earlier}, {reason}" if earlier else reason


def commit(adapter: Adapter, sites: Sequence[Site], quantized: Mapping[str, QuantizedWeight]) -> None:
    """Write the dequantized weights of the sites into the model, rounded to its storage dtype; others stay.

    Codes go to the device of the weights and become values there: a byte for each, not two or four.
    """
    for site in sites:
        dtype, moved = adapter.dtype_of(site), partial(Tensor.to, device=adapter.device_of(site))
        for expert in range(site.num_experts):
            names = [site.weight_name(expert, leaf) for leaf in site.leaves]
            done = [name in quantized for name in names]
            if not any(done):
                continue
            kept = () if all(done) else adapter.get_weight(site, (expert,))[0].split(site.rows)
            rows = [
                dequantize_weight(quantized[name].each(moved), dtype) if here else kept[leaf]
                for leaf, (name, here) in enumerate(zip(names, done, strict=True))
            ]
            adapter.set_weight(site, torch.cat(rows).unsqueeze(0), (expert,))
