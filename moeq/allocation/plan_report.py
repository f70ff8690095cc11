"""Allocation reports: who got how many bits and why, as Markdown and as JSON.

Everything in them comes from a ``Decision``; nothing is computed here but counts and shares.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from moeq.allocation.decide import Decision
from moeq.allocation.outer import Searched
from moeq.allocation.plan import Choice, PlanCost, plan_cost, plan_to_json, planned
from moeq.allocation.price import file_cost, file_types
from moeq.allocation.rules import RuleEffect
from moeq.allocation.runtime import find_runtime
from moeq.allocation.time_table import plan_milliseconds
from moeq.quant.spec import WeightShape


def allocation_to_json(decision: Decision, weights: Sequence[WeightShape]) -> dict[str, Any]:
    """A plan as JSON, which ``plan_from_json`` reads, with the runtime's files, and what rules and allocator did."""
    data = plan_to_json(decision.plan, plan_cost(decision.plan, weights), decision.kept)
    runtime = find_runtime(decision.runtime)
    if runtime.format is not None:
        takes = asdict(file_cost(decision.plan, weights, runtime, decision.carrier))
        types = file_types(decision.plan, weights, runtime, decision.carrier)
        data["file"] = {"runtime": runtime.name, "carrier": decision.carrier, **takes, "types": types}
    if decision.times is not None:
        milliseconds = plan_milliseconds(decision.plan, weights, decision.times)
        data["time"] = {"milliseconds": milliseconds, "machine": asdict(decision.times.machine)}
    if decision.effects:
        data["rules"] = [
            {"rule": effect.rule, "selected": list(effect.selected), "raised": list(effect.raised)}
            for effect in decision.effects
        ]
    if decision.allocation is not None:
        found = asdict(decision.allocation)
        found.pop("plan")
        data["allocation"] = found | {"runtimes": [asdict(price) for price in decision.prices]}
    if decision.searched is not None:
        data["search"] = asdict(decision.searched)
    return data


def allocation_report(decision: Decision, weights: Sequence[WeightShape]) -> str:
    """Markdown: cost of the plan, what rules and allocator did, price of runtimes, widths by structure and block."""
    lines = ["# Bit allocation", "", *_cost_table(plan_cost(decision.plan, weights)), *_file_lines(decision, weights)]
    if decision.times is not None:
        lines += ["", f"Time: {_time(decision, weights)}; measured on {decision.times.machine}."]
    shapes = {weight.name: weight for weight in weights}
    if decision.kept:
        kept = f"{len(decision.kept)} of {len(shapes)} weights are kept as they are, and are part of no average"
        lines += ["", "## Kept", "", f"{kept}: {describe(shapes[name] for name in decision.kept)}."]
    if decision.effects:
        lines += ["", "## Rules", "", *_rules_table(decision.effects), ""]
        lines += [f"- {e.rule}: {describe(shapes[name] for name in e.selected)}" for e in decision.effects]
    if decision.allocation is not None:
        lines += ["", "## Allocator", "", *_allocator_lines(decision)]
    if decision.searched is not None:
        lines += ["", "## Search", "", *_search_lines(decision.searched)]
    lines += ["", "## Widths by linear", "", *_widths_table(decision, weights, lambda w: (w.kind, w.linear))]
    lines += ["", "## Widths by block", "", *_widths_table(decision, weights, lambda w: ("block", w.block))]
    return "\n".join(lines) + "\n"


def cost_summary(decision: Decision, weights: Sequence[WeightShape]) -> str:
    """What a plan takes, and its runtime's files, for the log."""
    cost, runtime = plan_cost(decision.plan, weights), find_runtime(decision.runtime)
    text = (
        f"{cost.code_bits:.3f} bits per quantized weight, {cost.average_bits:.3f} with scales and zero points "
        f"({cost.active_average_bits:.3f} over active weights), {cost.bytes / 1e6:.2f} MB"
    )
    if runtime.format is not None:
        takes = file_cost(decision.plan, weights, runtime, decision.carrier)
        text += (
            f"; in files for {runtime.name} ({decision.carrier}) {takes.average_bits:.3f} "
            f"({takes.active_average_bits:.3f}), {takes.bytes / 1e6:.2f} MB"
        )
    if decision.times is not None:
        text += f"; {_time(decision, weights)}"
    if decision.kept:
        text += f"; {len(decision.kept)} weights kept as they are"
    return text + (f"\n{decision.note}" if decision.note else "")


def describe(weights: Iterable[WeightShape]) -> str:
    """Weights in words: linears of routed experts are joined to experts, and experts are listed by block."""
    by_block: dict[int, dict[str, list[int]]] = {}
    for weight in weights:
        groups = by_block.setdefault(weight.block, {})
        key = f"{weight.kind} {weight.linear}"
        groups.setdefault(key, []).extend([] if weight.expert is None else [weight.expert])
    lines = []
    for block, groups in by_block.items():
        linears: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
        for key, experts in groups.items():
            kind, linear = key.split()
            linears[kind, tuple(experts)].append(linear)
        parts = [
            f"{kind} {'+'.join(names)}" + (f" of experts {', '.join(map(str, experts))}" if experts else "")
            for (kind, experts), names in linears.items()
        ]
        lines.append(f"block {block}: {'; '.join(parts)}")
    return ". ".join(lines) or "nothing"


def _time(decision: Decision, weights: Sequence[WeightShape]) -> str:
    assert decision.times is not None
    milliseconds = plan_milliseconds(decision.plan, weights, decision.times)
    return f"{milliseconds:.4g} milliseconds of products with quantized weights for a token"


def _cost_table(cost: PlanCost) -> list[str]:
    active = f"{cost.active_code_bits:.3f} | {cost.active_average_bits:.3f} | {cost.active_bytes}"
    return [
        "| quantized weights | bits per weight, codes | with scales and zero points | bytes |",
        "|---|---|---|---|",
        f"| all | {cost.code_bits:.3f} | {cost.average_bits:.3f} | {cost.bytes} |",
        f"| active for one token | {active} |",
    ]


def _file_lines(decision: Decision, weights: Sequence[WeightShape]) -> list[str]:
    """Rows of the same table for the runtime's files, and their types; nothing for research."""
    runtime = find_runtime(decision.runtime)
    if runtime.format is None:
        return []
    cost = file_cost(decision.plan, weights, runtime, decision.carrier)
    types = file_types(decision.plan, weights, runtime, decision.carrier)
    active = f"{cost.active_code_bits:.3f} | {cost.active_average_bits:.3f} | {cost.active_bytes}"
    lines = [
        f"| all, in files for {runtime.name} | {cost.code_bits:.3f} | {cost.average_bits:.3f} | {cost.bytes} |",
        f"| active, in files for {runtime.name} | {active} |",
        "",
        f"Types of these files ({decision.carrier}): {', '.join(f'{num} {name}' for name, num in types.items())}.",
    ]
    return [*lines, "", f"Note: {decision.note}."] if decision.note else lines


def _rules_table(effects: Sequence[RuleEffect]) -> list[str]:
    lines = ["| rule | selects | raises | adds | bits after it | with overhead |", "|---|---|---|---|---|---|"]
    for effect in effects:
        added = effect.after.code_bits - effect.before.code_bits
        lines.append(
            f"| {effect.rule} | {len(effect.selected)} | {len(effect.raised)} | {added:.3f} | "
            f"{effect.after.code_bits:.3f} | {effect.after.average_bits:.3f} |"
        )
    return lines


def _allocator_lines(decision: Decision) -> list[str]:
    found = decision.allocation
    assert found is not None
    lines = [
        f"Budget {found.budget.value:.6g} {found.budget.unit}, used {found.used:.6g}; {found.num_units} decisions "
        f"({found.runtime}), {found.solver} solver, at most {found.gap:.2g} (relative) above the least damage.",
    ]
    if not decision.prices:
        return lines
    lines += [
        "",
        "| runtime | predicted error | relative to research | used | bits per weight in its files |",
        "|---|---|---|---|---|",
    ]
    least = next((p.predicted for p in decision.prices if p.runtime == "research"), None)
    for price in decision.prices:
        if price.predicted is None:
            lines.append(f"| {price.runtime} | not reachable: {price.reason} | | | |")
            continue
        ratio = f"{price.predicted / least:.3f}" if least else ""
        cells = f"{price.predicted:.6g} | {ratio} | {price.used:.6g} | {price.average_bits:.3f}"
        lines.append(f"| {price.runtime} | {cells} |")
    return lines


def _search_lines(searched: Searched) -> list[str]:
    lines = [
        f"KL of the assembled model, in nats per token, {searched.kl_before:.5f} with the plan of the program, "
        f"{searched.kl_after:.5f} after the search: {searched.num_measured} plans measured, slopes of "
        f"{searched.num_slopes}.",
        "",
        "| round | KL by what a cost is worth | weights changed |",
        "|---|---|---|",
    ]
    for number, each in enumerate(searched.rounds, 1):
        measured = ", ".join(f"{kl:.5f} ({trust:g})" for trust, kl in each.measured.items())
        lines.append(f"| {number} | {measured or 'the same plan'} | {each.num_changed} |")
    return lines


def _widths_table(decision: Decision, weights: Sequence[WeightShape], key: Any) -> list[str]:
    """Number of weights of each width, by a key of two parts."""
    counts: dict[tuple[str, object], Counter[Choice]] = defaultdict(Counter)
    numel, bits = Counter[tuple[str, object]](), Counter[tuple[str, object]]()
    for weight in planned(decision.plan, weights):
        grid = decision.plan[weight.name]
        counts[key(weight)][Choice.of(grid)] += 1
        numel[key(weight)] += weight.numel
        bits[key(weight)] += weight.numel * grid.bits
    widths = sorted({choice for counter in counts.values() for choice in counter})
    header = f"| | {' | '.join(choice.label for choice in widths)} | mean bits |"
    lines = [header, "|---" * (len(widths) + 2) + "|"]
    for group, counter in counts.items():
        cells = " | ".join(str(counter[choice]) for choice in widths)
        lines.append(f"| {group[0]} {group[1]} | {cells} | {bits[group] / numel[group]:.3f} |")
    return lines
