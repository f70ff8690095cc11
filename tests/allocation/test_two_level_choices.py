"""Two-level grids as patterns, choices and plans: what they cost, where they fit, and who reads them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moeq.allocation.allocate import allocate
from moeq.allocation.constraints import Budget, Constraints
from moeq.allocation.decide import AllocationSpec, decide
from moeq.allocation.evidence import Evidence
from moeq.allocation.patterns import Pattern, match_patterns
from moeq.allocation.plan import Choice, parse_choices, plan_cost, plan_from_json, plan_to_json, uniform_plan
from moeq.allocation.price import file_cost
from moeq.allocation.problem import build_problem
from moeq.allocation.runtime import RUNTIMES, check_runtime
from moeq.quant.carrier import FORMATS, choose_carrier
from moeq.quant.spec import GridSpec
from tests.allocation.toy import toy_costs, toy_weights

Q3, Q4 = GridSpec.of_kind("q3_k"), GridSpec.of_kind("q4_k")
WEIGHTS = toy_weights(num_blocks=1, hidden=256, inner=128)  # down projections are narrow


def test_a_choice_is_its_name_and_fits_whole_super_blocks() -> None:
    parsed = parse_choices(["q4_k", 4, "q2_k", "4g32", "q6_k"], 64)
    assert [choice.label for choice in parsed] == ["q2_k", "4g64", "q4_k", "4g32", "q6_k"]
    q4 = Choice.from_label("q4_k")
    assert (q4, q4.grid(GridSpec(2, 16, symmetric=True))) == (Choice.of(Q4), Q4)
    assert [q4.fits(size) for size in (128, 256, 384, 512)] == [False, True, False, True]
    assert Choice(4, 32).grid(Q3) == GridSpec(4, 32, symmetric=True)


def test_patterns_give_two_level_grids_and_take_them_back() -> None:
    patterns = [Pattern("*", grid="q3_k"), Pattern("*.q_proj", grid="q6_k"), Pattern("*.down_proj", bits=4)]
    patterns.append(Pattern("*.o_proj", group_size=64))
    wishes = match_patterns(patterns, [weight.name for weight in WEIGHTS])
    plan = uniform_plan(WEIGHTS, Q4, wishes=wishes)
    leaf = {name.rpartition(".")[2]: grid for name, grid in plan.items()}
    assert leaf["k_proj"] == Q3
    assert leaf["q_proj"] == GridSpec.of_kind("q6_k")
    # What is told in bits is on the symmetric groups that llama.cpp reads.
    assert leaf["down_proj"] == GridSpec(4, 32, symmetric=True, kind="full_range")
    assert leaf["o_proj"] == GridSpec(4, 64, symmetric=True, kind="full_range")
    with pytest.raises(ValueError, match=r"grid \(q3_k\) must be one of q2_k, .*without bits"):
        Pattern("*", bits=3, grid="q3_k")


def test_all_weights_whose_rows_are_no_super_blocks_are_named_with_a_way_out() -> None:
    with pytest.raises(
        ValueError,
        match=r"grid \(q3_k\) needs in_features in multiples of 256, which are not 128 of .*down_proj.*give these "
        r"weights .*\{pattern: '.*down_proj', bits: 4, group_size: 32\}",
    ):
        uniform_plan(WEIGHTS, Q3)
    odd = [replace(weight, in_features=80) for weight in WEIGHTS[:1]]
    with pytest.raises(ValueError, match=r"80 of .*q_proj; .*keep: true"):
        uniform_plan(odd, Q3)


def test_a_plan_costs_its_blocks_and_survives_json(tmp_path: Path) -> None:
    wide = [weight for weight in WEIGHTS if weight.in_features == 256]
    for kind, bits in (("q2_k", 2.625), ("q3_k", 3.4375), ("q4_k", 4.5), ("q5_k", 5.5), ("q6_k", 6.5625)):
        plan = uniform_plan(wide, GridSpec.of_kind(kind))  # type: ignore[arg-type]
        cost = plan_cost(plan, wide)
        assert cost.average_bits == bits
        assert file_cost(plan, wide, RUNTIMES["llama.cpp"]).bytes == cost.bytes
        path = tmp_path / "allocation.json"
        path.write_text(json.dumps(plan_to_json(plan, cost)))
        assert plan_from_json(path) == plan
    assert "kind" not in json.dumps(plan_to_json(uniform_plan(wide, GridSpec()), cost))


def test_tables_are_choices_for_rows_of_whole_groups_at_the_bits_of_their_blocks() -> None:
    parsed = parse_choices(["iq4_nl", "4g32", "mxfp4", 3], 64)
    assert sorted(choice.label for choice in parsed) == ["3g64", "4g32", "iq4_nl", "mxfp4"]
    table = Choice.from_label("iq4_nl")
    assert table.grid(Q3) == GridSpec.of_kind("iq4_nl")
    assert [table.fits(size) for size in (32, 48, 96)] == [True, False, True]
    wishes = match_patterns([Pattern("*.down_proj", grid="iq4_nl")], [weight.name for weight in WEIGHTS])
    plan = uniform_plan(WEIGHTS, Q3, wishes=wishes)
    assert {name.rpartition(".")[2] for name, grid in plan.items() if grid.kind == "iq4_nl"} == {"down_proj"}
    for kind, bits in (("iq4_nl", 4.5), ("mxfp4", 4.25)):
        every = uniform_plan(WEIGHTS, GridSpec.of_kind(kind))  # type: ignore[arg-type]
        assert file_cost(every, WEIGHTS, RUNTIMES["llama.cpp"]).average_bits == bits
    numel, bits = sum(weight.numel for weight in WEIGHTS), 4.5
    for runtime, kind, extra in (("vllm", "mxfp4", -0.25), ("vllm", "nvfp4", 32 * len(WEIGHTS) / numel)):
        every = uniform_plan(WEIGHTS, GridSpec.of_kind(kind))  # type: ignore[arg-type]
        assert file_cost(every, WEIGHTS, RUNTIMES[runtime]).average_bits == pytest.approx(bits + extra)  # type: ignore[index]
        with pytest.raises(ValueError, match=f"sglang was not seen to compute with {kind.upper()}"):
            check_runtime(every, WEIGHTS, RUNTIMES["sglang"])
    odd = [replace(weight, in_features=80) for weight in WEIGHTS[:1]]
    with pytest.raises(ValueError, match=r"grid \(mxfp4\) needs in_features in multiples of 32, .*80 of .*keep: true"):
        uniform_plan(odd, GridSpec.of_kind("mxfp4"))


def test_gguf_alone_has_types_for_them() -> None:
    for name in FORMATS:
        if name == "gguf":
            assert choose_carrier(name, Q4, 512).name == "Q4_K"
            with pytest.raises(ValueError, match="multiples of 256, not 320"):
                choose_carrier(name, Q4, 320)
        else:
            with pytest.raises(ValueError, match=f"{name} has no type that holds Q4_K.*a grid of gguf"):
                choose_carrier(name, Q4, 512)


def test_the_allocator_gives_them_where_rows_are_wide_and_pays_what_the_file_takes() -> None:
    choices = [*parse_choices(["q2_k", "q3_k", "q4_k", "4g32", "8g32"], None)]
    costs = toy_costs(WEIGHTS, 0, choices)
    like = GridSpec(4, 32, symmetric=True)
    plan = allocate(WEIGHTS, costs, Constraints(choices, Budget(4.0, "average_bits"), like, "llama.cpp")).plan
    assert {grid.kind for name, grid in plan.items() if name.endswith("down_proj")} == {"uniform"}
    assert {grid.kind for grid in plan.values()} > {"uniform", "q3_k"}
    takes = file_cost(plan, WEIGHTS, RUNTIMES["llama.cpp"])
    assert takes.average_bits <= 4.0
    assert takes.bytes == plan_cost(plan, WEIGHTS).bytes  # every type is the grid itself
    for runtime in ("mlx", "vllm"):
        offered = build_problem(WEIGHTS, costs, Constraints(choices, Budget(9.0, "average_bits"), like, runtime))
        assert {choice.kind for choice in offered.choices} == {"uniform"}


def test_a_pattern_with_a_two_level_grid_is_not_for_the_allocator_to_change() -> None:
    choices = parse_choices(["q2_k", "4g32"], None)
    evidence = Evidence(costs={"fisher": toy_costs(WEIGHTS, 0, list(choices))})
    spec = AllocationSpec(
        method="allocate", cost="fisher", budget=6.0, budget_unit="average_bits", choices=("q2_k", "4g32"),
        patterns=(Pattern("*.q_proj", grid="q6_k"),), runtime="llama.cpp",
    )  # fmt: skip
    plan = decide(spec, WEIGHTS, GridSpec(4, 32, symmetric=True), evidence).plan
    assert {grid.kind for name, grid in plan.items() if name.endswith("q_proj")} == {"q6_k"}
    assert {grid.kind for grid in plan.values()} <= {"q6_k", "q2_k", "uniform"}
