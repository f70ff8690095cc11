import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moeq.allocation.allocate import predicted_cost
from moeq.allocation.decide import AllocationSpec, decide
from moeq.allocation.evidence import Evidence
from moeq.allocation.plan import plan_cost, plan_from_json, uniform_plan
from moeq.allocation.plan_report import allocation_report, allocation_to_json, describe
from moeq.allocation.problem import Floor
from moeq.allocation.rules import make_rule
from moeq.quant.spec import GridSpec
from tests.allocation.toy import toy_evidence, toy_weights

WEIGHTS = toy_weights()
EVIDENCE = toy_evidence(WEIGHTS)
GRID = GridSpec(bits=2, group_size=16)


def allocate_spec(**changes: Any) -> AllocationSpec:
    given = {"method": "allocate", "cost": "fisher", "budget": 2.5}
    return AllocationSpec(**{**given, **changes})


def write_plan(folder: Path, plan: dict[str, GridSpec]) -> Path:
    path = folder / "plan.json"
    content = {"version": 1, "weights": {name: vars(grid) for name, grid in plan.items()}}
    path.write_text(json.dumps(content))
    return path


def test_allocated_plan_keeps_the_budget_and_predicts_less_error_than_a_uniform_one() -> None:
    decision = decide(allocate_spec(budget=3.0), WEIGHTS, GRID, EVIDENCE)
    assert plan_cost(decision.plan, WEIGHTS).code_bits <= 3.0
    assert decision.allocation is not None
    predicted = predicted_cost(decision.plan, EVIDENCE.costs["fisher"])
    assert predicted == pytest.approx(decision.allocation.predicted)
    uniform = predicted_cost(uniform_plan(WEIGHTS, replace(GRID, bits=3)), EVIDENCE.costs["fisher"])
    assert predicted is not None
    assert uniform is not None
    assert predicted < 0.9 * uniform
    assert predicted_cost(uniform_plan(WEIGHTS, replace(GRID, bits=5)), EVIDENCE.costs["fisher"]) is None


def test_for_the_allocator_structures_are_fixed_and_rules_are_least_widths() -> None:
    rule = {"rule": "most_used_experts", "num": 1, "bits": 3}
    spec = allocate_spec(attention=8, rules=(rule,), budget=5.5, floors=(Floor(4, 1),))
    plan = decide(spec, WEIGHTS, GRID, EVIDENCE).plan
    assert {plan[w.name].bits for w in WEIGHTS if w.kind == "attention"} == {8}
    assert min(plan[name].bits for name in make_rule(rule).apply(WEIGHTS, EVIDENCE)) >= 3
    for block in range(3):
        experts = {w.expert for w in WEIGHTS if w.block == block and w.expert is not None}
        wide = [
            min(plan[w.name].bits for w in WEIGHTS if w.block == block and w.expert == expert) >= 4
            for expert in experts
        ]
        assert sum(wide) >= 1
    assert plan_cost(plan, WEIGHTS).code_bits <= 5.5


def test_report_prints_what_each_runtime_costs_and_the_json_reads_back(tmp_path: Path) -> None:
    decision = decide(allocate_spec(), WEIGHTS, GRID, EVIDENCE)
    report = allocation_report(decision, WEIGHTS)
    prices = {price.runtime: price for price in decision.prices}
    assert prices["research"].predicted == pytest.approx(decision.allocation.predicted)  # type: ignore[union-attr]
    assert "| research | " in report
    assert f"| gptqmodel | {prices['gptqmodel'].predicted:.6g} | " in report
    assert "vllm | not reachable: vllm reads none of the choices" in report  # groups of 16
    assert "Budget 2.5 code_bits, used 2.4" in report or "Budget 2.5 code_bits, used 2.5" in report
    path = tmp_path / "allocation.json"
    path.write_text(json.dumps(allocation_to_json(decision, WEIGHTS)))
    assert plan_from_json(path) == decision.plan


def test_report_says_what_each_rule_gave_to_whom() -> None:
    rules = ({"rule": "attention", "bits": 4}, {"rule": "first_blocks", "num": 1, "bits": 4, "part": "all"})
    spec = AllocationSpec(rules=rules)
    decision = decide(spec, WEIGHTS, GRID)
    report = allocation_report(decision, WEIGHTS)
    first, second = decision.effects
    assert f"| attention at 4 | 12 | 12 | {first.after.code_bits - 2:.3f} | {first.after.code_bits:.3f} |" in report
    assert (
        f"| first_blocks (num 1, part all) at 4 | 19 | 15 | {second.after.code_bits - first.after.code_bits:.3f} |"
        in report
    )
    assert "- attention at 4: block 0: attention q_proj+k_proj+v_proj+o_proj. block 1: attention" in report
    assert "routed gate_proj+up_proj+down_proj of experts 0, 1, 2, 3" in report
    data = allocation_to_json(decision, WEIGHTS)
    assert [len(rule["raised"]) for rule in data["rules"]] == [12, 15]
    assert data["code_bits"] == second.after.code_bits
    assert describe([]) == "nothing"


def test_counts_of_widths_in_the_report_cover_every_weight() -> None:
    report = allocation_report(decide(allocate_spec(), WEIGHTS, GRID, EVIDENCE), WEIGHTS)
    for title in ("## Widths by linear", "## Widths by block"):
        rows = report.split(title)[1].split("\n\n")[1].strip().split("\n")[2:]
        assert sum(sum(map(int, row.split("|")[2:-2])) for row in rows) == len(WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": "p.json", "rules": ({"rule": "shared", "bits": 4},)}, "leave out rules"),
        ({"method": "allocate", "cost": "fisher"}, r"method allocate needs cost \(fisher\) and budget \(None\)"),
        ({"cost": "fisher"}, "belong to the allocator; set method: allocate"),
        ({"floors": (Floor(4, 1),)}, "belong to the allocator; set method: allocate"),
        ({"runtime": "tgi"}, r"runtime \(tgi\) must be one of"),
        (
            {
                "routed": 2,
                "method": "allocate",
                "cost": "x",
                "budget": 2.0,
                "floors": (Floor(4, 1),),
            },
            r"floors and routed \(2\) both decide experts",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AllocationSpec(**changes)


def test_a_plan_by_hand_is_checked_for_names_runtime_and_budget(tmp_path: Path) -> None:
    plan = uniform_plan(WEIGHTS, replace(GRID, group_size=32))
    name = "model.layers.1.mlp.experts.2.up_proj"
    plan[name] = replace(plan[name], bits=8)
    path = write_plan(tmp_path, plan)
    assert decide(AllocationSpec(plan=str(path)), WEIGHTS, GRID).plan == plan
    with pytest.raises(ValueError, match=rf"{name} has 8g32, .* gptqmodel reads one width"):
        decide(AllocationSpec(plan=str(path), runtime="gptqmodel"), WEIGHTS, GRID)
    takes = plan_cost(plan, WEIGHTS).code_bits
    with pytest.raises(ValueError, match=rf"the plan takes {takes:.6g} code_bits where the budget is 2"):
        decide(AllocationSpec(plan=str(path), budget=2.0), WEIGHTS, GRID)
    plan[name.replace("up_proj", "upproj")] = plan.pop(name)
    with pytest.raises(ValueError, match=rf"first '.*upproj'; did you mean '{name}'\?"):
        decide(AllocationSpec(plan=str(write_plan(tmp_path, plan))), WEIGHTS, GRID)


def test_a_width_that_no_grid_has_names_the_weight(tmp_path: Path) -> None:
    path = write_plan(tmp_path, uniform_plan(WEIGHTS, GRID))
    content = json.loads(path.read_text())
    content["weights"]["model.layers.0.self_attn.k_proj"]["bits"] = 9
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.k_proj: bits \(9\) must be between 2 and 8"):
        decide(AllocationSpec(plan=str(path)), WEIGHTS, GRID)


def test_a_cost_that_was_not_gathered_names_those_that_were() -> None:
    with pytest.raises(ValueError, match=r"no cost 'luck' \(it has: fisher\); add luck to costs"):
        decide(allocate_spec(cost="luck"), WEIGHTS, GRID, EVIDENCE)
    with pytest.raises(ValueError, match=r"no cost 'fisher' \(it has: none\)"):
        decide(allocate_spec(), WEIGHTS, GRID, Evidence())
    with pytest.raises(ValueError, match=r"no 5g16 for model\.layers\.0\.self_attn\.q_proj; add it to choices"):
        decide(allocate_spec(choices=(2, 5)), WEIGHTS, GRID, EVIDENCE)
