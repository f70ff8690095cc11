"""What the study of one bit less runs, and what its tables say."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.studies.one_bit_less import BUDGETS, RECIPES, Case, OneBitLess, configuration
from benchmarks.studies.one_bit_less_report import BEST_BY_SIZE, bars, best_others, table
from moeq.allocation.plan import Choice, plan_cost
from moeq.quant.spec import GridSpec, WeightShape

PARSER = OneBitLess.parser()


def row(recipe: str, bits: float, kl: float, **values: Any) -> dict[str, Any]:
    domain = {"kl": kl, "nll": 0.0, "router_agreement": 0.9, "top1_agreement": 0.8}
    given = {
        "average_bits": bits + 0.3,
        "cpu_seconds": 50.0,
        "seconds": 60.0,
        "peak_mb": 900.0,
        "accuracy": {"sums": 1.0},
    }
    return {"recipe": recipe, "bits": bits, "seed": 0, "domains": {"a": domain}, **given, **values}


def peer(name: str, bits: int, kl: float, data: str = "mixture") -> dict[str, Any]:
    report = {"cpu_seconds": 5.0, "seconds": 6.0, "peak_mb": 7.0}
    return {"peer": name, "bits": bits, "data": data, "group": 64, "seed": 0, "domains": row("", bits, kl)["domains"],
            "report": report}  # fmt: skip


def test_uniform_recipes_exist_at_whole_bits_and_rounding_to_nearest_once() -> None:
    cases = OneBitLess(PARSER.parse_args([])).cases()
    assert not [case for case in cases if RECIPES[case.recipe].uniform and case.bits % 1]
    assert len([case for case in cases if case.recipe == "RTN"]) == 3  # at 2, 3 and 4 bits, of one seed
    assert len([case for case in cases if case.recipe == "moeq, best"]) == 3 * len(BUDGETS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_case_is_a_configuration_with_its_own_model_budget_seed_and_folder(recipe: str, tmp_path: Path) -> None:
    config = configuration(Case(7, "folder", 3.0, recipe), tmp_path, tmp_path / "kept")
    assert config["model"]["name"] == "folder"
    assert config["trainer"]["default_root_dir"] == str(tmp_path)
    assert config["data"]["init_args"]["seed"] == 7
    steps = {step["class_path"]: step.get("init_args", {}) for step in config["trainer"]["callbacks"]}
    if RECIPES[recipe].group_size is None:
        assert steps["BitAllocation"].get("budget", config["model"]["bits"]) == 3
    assert not steps.keys() & set(RECIPES[recipe].without)


def test_a_best_recipe_exists_for_every_budget(tmp_path: Path) -> None:
    for bits in BUDGETS:
        steps = configuration(Case(0, "folder", bits, "moeq, best"), tmp_path, tmp_path)["trainer"]["callbacks"]
        assert next(step for step in steps if step["class_path"] == "BitAllocation")["init_args"]["budget"] == bits


def test_groups_of_128_have_the_size_of_groups_of_64(tmp_path: Path) -> None:
    weight = WeightShape("w", "routed", 128, 256, 0, "up_proj", 1)
    as_large = plan_cost({"w": GridSpec(3, 64)}, [weight]).average_bits
    steps = configuration(Case(0, "folder", 3.0, BEST_BY_SIZE), tmp_path, tmp_path)["trainer"]["callbacks"]
    init_args = {step["class_path"]: step.get("init_args", {}) for step in steps}
    assert init_args["BitAllocation"]["budget"] == pytest.approx(as_large)
    assert init_args["BitAllocation"]["budget_unit"] == "average_bits"
    assert init_args["Survey"]["choices"] == init_args["BitAllocation"]["choices"]
    assert {Choice.from_label(label).group_size for label in init_args["Survey"]["choices"]} == {128}


def test_the_best_other_is_the_one_of_least_divergence_on_its_data() -> None:
    others = [peer("x", 3, 0.05), peer("y", 3, 0.04), peer("z", 3, 0.01, "corpus"), peer("moeq", 3, 0.001)]
    assert best_others(others, "mixture")[3].peer == "y"
    assert best_others(others, "corpus")[3].kl == 0.01


def test_the_bar_is_the_best_other_with_one_bit_more_and_in_between_the_mean_of_the_neighbours() -> None:
    others = [peer("x", 3, 0.04), peer("x", 4, 0.01)]
    own = [
        row("moeq, best", 2.0, 0.05),
        row("moeq, best", 2.5, 0.01),
        row("moeq, best", 3.0, 0.01),
        row("moeq, best, groups of 128", 3.0, 0.008),
        row("RTN", 3.0, 1.0),
    ]
    lines = bars(own, others).strip().splitlines()[4:]
    assert lines == [
        "| 2 | moeq, best | 1 | 0.0500 | 3 | 0.0400 | 1.25 | no |",
        "| 2.5 | moeq, best | 1 | 0.0100 | 3.5 | 0.0200 | 0.50 | yes |",
        "| 3 | moeq, best | 1 | 0.0100 | 4 | 0.0100 | 1.00 | yes |",
        "| 3 | moeq, best, groups of 128 | 1 | 0.0080 | 4 | 0.0100 | 0.80 | yes |",
    ]


def test_every_recipe_stands_beside_the_best_other_at_its_bits() -> None:
    lines = table([row("RTN", 3.0, 0.1)], [peer("x", 3, 0.04)]).strip().splitlines()[4:]
    assert lines == [
        "| 3 | 3.30 | RTN | 1 | 0.1000 | 0.1000 | 1.00 | 80.0 | 90.0 | 100.0 | 50 | 900 |",
        "| 3 | - | x, on the mixture of the evaluated domains | 1 | 0.0400 | 0.0400 | 1.00 | 80.0 | 90.0 | - | 5 | 7 |",
    ]


def test_seconds_of_fits_that_took_kept_factors_say_so() -> None:
    rows = [row("moeq, best", bits, 0.1, factors_seconds=seconds) for bits, seconds in ((2.0, 9.0), (3.0, None))]
    gathered, kept = table(rows, []).strip().splitlines()[4:]
    assert gathered.endswith("| 50 | 900 |")
    assert kept.endswith("| 50 + F | 900 |")
