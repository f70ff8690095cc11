import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moeq.allocation.allocate import predicted_cost
from moeq.allocation.constraints import Floor
from moeq.allocation.decide import AllocationSpec, decide
from moeq.allocation.dry_run import rehearse
from moeq.allocation.evidence import Evidence, Promise
from moeq.allocation.patterns import Pattern
from moeq.allocation.plan import Choice, plan_cost, plan_from_json, uniform_plan
from moeq.allocation.plan_report import allocation_report, allocation_to_json, cost_summary, describe
from moeq.allocation.price import file_cost
from moeq.allocation.rules import make_rule
from moeq.allocation.runtime import find_runtime
from moeq.quant.spec import GridSpec
from tests.allocation.toy import toy_costs, toy_evidence, toy_weights

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


def test_a_plan_for_a_runtime_is_reported_at_the_size_of_its_files() -> None:
    weights = toy_weights(hidden=128, inner=64)
    grid, choices = GridSpec(bits=2, group_size=64, symmetric=True), [Choice(bits, 64) for bits in (2, 3, 4, 8)]
    evidence = Evidence(costs={"fisher": toy_costs(weights, choices=choices)})
    spec = allocate_spec(runtime="llama.cpp", budget=4.0, budget_unit="average_bits", choices=(2, 3, 4, 8))
    decision = decide(spec, weights, grid, evidence)
    data, report = allocation_to_json(decision, weights), allocation_report(decision, weights)
    plain, files = plan_cost(decision.plan, weights), file_cost(decision.plan, weights, find_runtime("llama.cpp"))
    assert 3.9 < files.average_bits <= 4.0
    assert (data["average_bits"], data["bytes"]) == (plain.average_bits, plain.bytes)
    assert (data["file"]["runtime"], data["file"]["carrier"]) == ("llama.cpp", "exact")
    assert (data["file"]["average_bits"], data["file"]["bytes"]) == (files.average_bits, files.bytes)
    assert sum(data["file"]["types"].values()) == len(weights)
    assert f"| all | {plain.code_bits:.3f} | {plain.average_bits:.3f} | {plain.bytes} |" in report
    row = f"| all, in files for llama.cpp | {files.code_bits:.3f} | {files.average_bits:.3f} | {files.bytes} |"
    assert row in report
    assert f"{data['file']['types']['Q2_0']} Q2_0" in report
    assert f"in files for llama.cpp (exact) {files.average_bits:.3f}" in cost_summary(decision, weights)
    prices = {price["runtime"]: price for price in data["allocation"]["runtimes"]}
    assert all("below the smallest plan in files for" in prices.pop(name)["reason"] for name in ("vllm", "sglang"))
    for price in prices.values():
        assert price["average_bits"] == pytest.approx(price["used"])
        assert f"| {price['runtime']} | {price['predicted']:.6g} | " in report
    assert "Note" not in report


def test_asymmetric_grids_that_need_wider_types_are_noted_in_log_and_report() -> None:
    weights = toy_weights(hidden=128, inner=64)
    decision = decide(AllocationSpec(runtime="llama.cpp"), weights, GridSpec(bits=4, group_size=64))
    note = "in files for llama.cpp (exact): 4g64 5.5 (symmetric 4.5)"
    assert note in cost_summary(decision, weights)
    assert f"Note: {decision.note}." in allocation_report(decision, weights)
    assert not decide(AllocationSpec(), weights, GridSpec(bits=4, group_size=64)).note
    even = GridSpec(bits=4, group_size=64, symmetric=True)
    assert not decide(AllocationSpec(runtime="llama.cpp"), weights, even).note


def test_patterns_that_a_runtime_cannot_read_are_refused_before_a_survey() -> None:
    grid = GridSpec(bits=2, group_size=32, symmetric=True)
    promised = Promise(costs=("fisher",), choices=(Choice(2, 32), Choice(4, 32)))
    experts = "model.layers.0.mlp.experts"
    for pattern, message in (
        (Pattern(f"{experts}.1.up_proj", keep=True), "1.up_proj is kept as it is, and llama.cpp reads these 4 weights"),
        (Pattern(f"{experts}.1.up_proj", bits=8), "0.up_proj: none of the choices 2g32, 4g32 .* must be Q8_0"),
        (Pattern("*.self_attn.q_proj", bits=4, group_size=16), "q_proj: llama.cpp cannot read 4g16"),
    ):
        spec = allocate_spec(runtime="llama.cpp", choices=(2, 4), budget=6.0, patterns=(pattern,))
        with pytest.raises(ValueError, match=message):
            rehearse(spec, WEIGHTS, grid, promised)


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
        ({"runtime": "mlx", "carrier": "lossy"}, r"carrier \(lossy\) must be one of exact, native"),
        ({"carrier": "native"}, r"carrier \(native\) is about files of a runtime; give runtime"),
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
    with pytest.raises(ValueError, match=rf"{name} has 8g32 .* gptqmodel reads one type"):
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
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.k_proj: bits \(9\) must be between 1 and 8"):
        decide(AllocationSpec(plan=str(path)), WEIGHTS, GRID)


def test_a_cost_that_was_not_gathered_names_those_that_were() -> None:
    with pytest.raises(ValueError, match=r"no cost 'luck' \(it has: fisher\); add luck to costs"):
        decide(allocate_spec(cost="luck"), WEIGHTS, GRID, EVIDENCE)
    with pytest.raises(ValueError, match=r"no cost 'fisher' \(it has: none\)"):
        decide(allocate_spec(), WEIGHTS, GRID, Evidence())
    with pytest.raises(ValueError, match=r"no 5g16 for model\.layers\.0\.self_attn\.q_proj; add it to choices"):
        decide(allocate_spec(choices=(2, 5)), WEIGHTS, GRID, EVIDENCE)
