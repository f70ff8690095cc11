import json
from dataclasses import replace
from pathlib import Path

import pytest

from moeq.allocation.patterns import Wish
from moeq.allocation.plan import (
    Choice,
    check_plan,
    kept_from_json,
    parse_choices,
    plan_cost,
    plan_from_json,
    plan_to_json,
    storage_bits,
    uniform_plan,
)
from moeq.quant.spec import GridSpec, WeightShape

WEIGHTS = [
    WeightShape("a.q_proj", "attention", 64, 128, block=0, linear="q_proj"),
    WeightShape("a.experts.0.up_proj", "routed", 32, 128, block=0, linear="up_proj", expert=0, active_share=0.25),
    WeightShape("a.experts.1.up_proj", "routed", 32, 128, block=0, linear="up_proj", expert=1, active_share=0.25),
]
GRID = GridSpec(bits=3, group_size=64, symmetric=False)


def test_cost_equals_counting_every_code_scale_and_zero_point() -> None:
    plan = uniform_plan(WEIGHTS, GRID, {"attention": 8})
    bits = active_bits = numel = active_numel = codes = 0.0
    for weight in WEIGHTS:
        for _ in range(weight.out_features):
            row = 0
            for column in range(weight.in_features):
                row += plan[weight.name].bits
                codes += plan[weight.name].bits
                if column % 64 == 0:
                    row += 16 + plan[weight.name].bits
            bits += row
            active_bits += weight.active_share * row
        numel += weight.out_features * weight.in_features
        active_numel += weight.active_share * weight.out_features * weight.in_features
    cost = plan_cost(plan, WEIGHTS)
    assert cost.code_bits == pytest.approx(codes / numel)
    assert cost.average_bits == pytest.approx(bits / numel)
    assert cost.active_average_bits == pytest.approx(active_bits / active_numel)
    assert cost.bytes == -(-bits // 8)


def test_symmetric_grids_store_no_zero_points() -> None:
    weight = WEIGHTS[0]
    with_zero, without = (storage_bits(weight, replace(GRID, symmetric=s))[1] for s in (False, True))
    assert with_zero - without == weight.out_features * 2 * GRID.bits


def test_bits_by_kind_reach_only_their_kind() -> None:
    plan = uniform_plan(WEIGHTS, GRID, {"routed": 2})
    assert [plan[w.name].bits for w in WEIGHTS] == [3, 2, 2]


def test_plan_survives_json(tmp_path: Path) -> None:
    plan = uniform_plan(WEIGHTS, GRID, {"attention": 8})
    path = tmp_path / "allocation.json"
    path.write_text(json.dumps(plan_to_json(plan, plan_cost(plan, WEIGHTS))))
    assert plan_from_json(path) == plan


def test_full_range_grids_stay_so_through_choices_patterns_and_json(tmp_path: Path) -> None:
    grid = GridSpec(3, 64, symmetric=True, kind="full_range")
    wishes = {WEIGHTS[1].name: Wish(bits=2), WEIGHTS[2].name: Wish(group_size=32)}
    plan = uniform_plan(WEIGHTS, grid, {"attention": 8}, wishes)
    assert [(plan[w.name].bits, plan[w.name].group_size) for w in WEIGHTS] == [(8, 64), (2, 64), (3, 32)]
    assert {(plan[w.name].kind, plan[w.name].symmetric) for w in WEIGHTS} == {("full_range", True)}
    assert Choice.from_label("4g32").grid(grid) == replace(grid, bits=4, group_size=32)
    assert Choice.of(grid).label == "3g64"
    path = tmp_path / "allocation.json"
    path.write_text(json.dumps(plan_to_json(plan, plan_cost(plan, WEIGHTS))))
    assert plan_from_json(path) == plan
    ordinary = {name: replace(grid, kind="uniform") for name, grid in plan.items()}
    assert plan_cost(plan, WEIGHTS) == plan_cost(ordinary, WEIGHTS)
    with pytest.raises(ValueError, match=r"group_size \(48\) must divide"):
        uniform_plan(WEIGHTS, replace(grid, group_size=48))


@pytest.mark.parametrize("like", [GridSpec(4, 64), GridSpec(4, 64, symmetric=True, kind="full_range")], ids=str)
def test_one_bit_has_no_zero_points_whatever_the_other_widths_have(like: GridSpec, tmp_path: Path) -> None:
    signs = GridSpec(1, 64, symmetric=True)
    assert Choice.from_label("1g64").grid(like) == Wish(bits=1).grid(like) == signs
    assert Choice(2, 64).grid(like) == replace(like, bits=2)
    plan = uniform_plan(WEIGHTS, like, {"attention": 1}, {WEIGHTS[2].name: Wish(bits=1)})
    assert [plan[w.name] for w in WEIGHTS] == [signs, like, signs]
    path = tmp_path / "allocation.json"
    path.write_text(json.dumps(plan_to_json(plan, plan_cost(plan, WEIGHTS))))
    assert plan_from_json(path) == plan


def test_group_size_that_does_not_fit_names_the_weight_and_the_choices() -> None:
    with pytest.raises(
        ValueError,
        match=r"group_size \(48\) must divide in_features; it does not divide 128 of a\.q_proj, "
        r"a\.experts\.\*\.up_proj \(2 x\); choose one of .*: \[\{pattern: 'a\.q_proj', group_size: 128\}\]",
    ):
        uniform_plan(WEIGHTS, replace(GRID, group_size=48))


def test_unknown_and_missing_weights_are_named() -> None:
    plan = uniform_plan(WEIGHTS, GRID)
    with pytest.raises(ValueError, match=r"names 1 weights the model lacks, first 'b'"):
        check_plan({**plan, "b": GRID}, WEIGHTS)
    with pytest.raises(ValueError, match=r"lacks 2 weights of the model, first 'a.experts.0.up_proj'"):
        check_plan({"a.q_proj": GRID}, WEIGHTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not an allocation"),
        ('{"version": 99, "weights": {}}', r"version \(99\) must be 1"),
        ('{"version": 1, "weights": {"a": {"bits": 9}}}', r"bits \(9\) must be between 1 and 8"),
        ('{"version": 1, "weights": {"a": {"bit": 4}}}', "unexpected keyword"),
    ],
)
def test_damaged_plans_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        plan_from_json(path)


def test_missing_plan_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no allocation file at"):
        plan_from_json(tmp_path / "none.json")


def test_choices_are_bits_in_the_groups_of_the_model_or_labels_each_once_from_small_to_large() -> None:
    parsed = parse_choices([4, "8g0", "3", 2, "4g128", "4g64"], 64)
    assert parsed == (Choice(2, 64), Choice(3, 64), Choice(4, 128), Choice(4, 64), Choice(8, None))
    assert sorted([Choice(4, 64), Choice(3, 16), Choice(4), Choice(4, 128)]) == [
        Choice(3, 16), Choice(4), Choice(4, 128), Choice(4, 64)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="write '4', '4g64', 'q4_k'"):
        parse_choices(["4x64"], 64)
    assert [Choice.from_label(choice.label) for choice in (Choice(4), Choice(3, 64))] == [Choice(4), Choice(3, 64)]


def test_what_is_kept_is_in_no_plan_and_in_no_average(tmp_path: Path) -> None:
    wishes = {"a.q_proj": Wish(keep=True), "a.experts.0.up_proj": Wish(bits=8, group_size=0)}
    plan = uniform_plan(WEIGHTS, GRID, {"routed": 2}, wishes)
    assert "a.q_proj" not in plan
    assert plan["a.experts.0.up_proj"] == replace(GRID, bits=8, group_size=None)
    rest = [weight for weight in WEIGHTS if weight.name != "a.q_proj"]
    assert plan_cost(plan, WEIGHTS) == plan_cost(plan, rest)
    path = tmp_path / "allocation.json"
    path.write_text(json.dumps(plan_to_json(plan, plan_cost(plan, WEIGHTS), ["a.q_proj"])))
    assert plan_from_json(path) == plan
    assert kept_from_json(path) == ("a.q_proj",)
    check_plan(plan, WEIGHTS, ["a.q_proj"])
    with pytest.raises(ValueError, match=r"has a grid for a\.experts\.0\.up_proj and keeps it, too"):
        check_plan(plan, WEIGHTS, ["a.q_proj", "a.experts.0.up_proj"])
    with pytest.raises(ValueError, match=r"lacks 1 weights of the model, first 'a\.q_proj'"):
        check_plan(plan, WEIGHTS)


def test_all_weights_that_a_group_size_does_not_fit_are_named_by_shape() -> None:
    odd = [replace(WEIGHTS[0], name=f"layers.{i}.down_proj", in_features=80) for i in range(3)]
    with pytest.raises(
        ValueError,
        match=r"it does not divide 80 of layers\.\*\.down_proj \(3 x\); choose one of \[16\] or null for the model, or "
        r"for these weights alone by patterns of BitAllocation: .*'layers\.\*\.down_proj', group_size: 16",
    ):
        uniform_plan([*WEIGHTS, *odd], replace(GRID, group_size=32))
    uniform_plan([*WEIGHTS, *odd], replace(GRID, group_size=32), wishes={w.name: Wish(group_size=16) for w in odd})
