"""Rows of QuantMoE-Bench on a toy model: what each of them raises first, and that all take the same bits."""

import random
from collections.abc import Iterable
from dataclasses import replace

import pytest

from benchmarks.studies.allocation_rows import COSTS, SCORES, Plan, Setting, fill, make_plan, pmq, rows
from moeq.allocation.evidence import Evidence
from moeq.allocation.plan import plan_cost
from moeq.quant.spec import GridSpec
from tests.allocation.toy import toy_costs, toy_evidence, toy_weights

WEIGHTS = toy_weights(num_blocks=4, num_experts=8)
NUMEL = {w.name: w.numel for w in WEIGHTS}
TOTAL = sum(NUMEL.values())
ROUTED = [w for w in WEIGHTS if w.expert is not None]
GRID = GridSpec(bits=2, group_size=16)
BUDGETS = (2.1, 2.5, 3.0, 3.5)


def survey(seed: int = 0) -> Evidence:
    generator = random.Random(seed)
    return replace(
        toy_evidence(WEIGHTS, seed),
        scores={score: {name: generator.random() for name in NUMEL} for score in SCORES},
        costs={cost: toy_costs(WEIGHTS, number) for number, cost in enumerate((*COSTS, "pmq"))},
    )


EVIDENCE = survey()
SETTING = Setting(WEIGHTS, EVIDENCE, GRID, seed=0)


def size(names: Iterable[str]) -> int:
    return sum(NUMEL[name] for name in names)


def raised(plan: Plan | None, bits: int = 4) -> set[str]:
    assert plan is not None
    return {name for name, grid in plan.items() if grid.bits == bits}


def raised_by(row: str, expected: set[str], setting: Setting = SETTING) -> set[str]:
    """What a row raises with a budget that just holds ``expected``."""
    return raised(make_plan(row, 2 + 2 * size(expected) / TOTAL, setting))


def experts(chosen: Iterable[tuple[int, int]]) -> set[str]:
    wanted = set(chosen)
    return {w.name for w in ROUTED if (w.block, w.expert) in wanted}


def mlp(blocks: Iterable[int]) -> set[str]:
    wanted = set(blocks)
    return {w.name for w in WEIGHTS if w.block in wanted and w.kind != "attention"}


def most_used(by: str, num: int) -> set[str]:
    chosen = []
    for block in range(4):
        usage = getattr(EVIDENCE, by)[f"model.layers.{block}.mlp.experts"].tolist()
        chosen += [(block, expert) for expert in sorted(range(8), key=lambda e: usage[e])[-num:]]
    return experts(chosen)


@pytest.mark.parametrize("budget", [2.0, 2.013, 2.1, 2.5, 3.21, 3.99, 4.0])
def test_fill_keeps_the_budget_and_leaves_nothing_that_a_weight_could_take(budget: float) -> None:
    for seed in range(5):
        generator = random.Random(seed)
        groups = [set(generator.sample(sorted(NUMEL), generator.randrange(20))) for _ in range(4)]
        plan = fill(replace(SETTING, seed=seed), groups, budget, 2, 4)
        assert list(plan) == list(NUMEL)
        spare = (budget - 2) * TOTAL - 2 * size(raised(plan))
        assert spare >= -0.5  # half a bit: a budget is a rounded number of bits
        assert all(2 * NUMEL[name] > spare for name in NUMEL.keys() - raised(plan))


def test_fill_spends_on_a_later_group_only_what_an_earlier_one_cannot_take() -> None:
    first, second = {w.name for w in WEIGHTS if w.kind == "shared"}, experts([(2, 3)])
    for share, expected in ((0.5, first), (1.0, first), (1.1, first | second)):
        plan = fill(SETTING, [first, second], 2 + share * 2 * size(first) / TOTAL, 2, 4)
        assert raised(plan) <= expected
    assert first < raised(plan)


@pytest.mark.parametrize(
    ("row", "part"),
    [("attention", "q_proj k_proj v_proj o_proj"), ("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")],
)
def test_a_structure_row_raises_its_linears_first(row: str, part: str) -> None:
    members = WEIGHTS if row == "attention" else ROUTED
    expected = {w.name for w in members if w.linear in part.split()}
    assert raised_by(row, expected) == expected


def test_the_shared_row_raises_shared_experts_first() -> None:
    expected = {w.name for w in WEIGHTS if w.kind == "shared"}
    assert raised_by("shared", expected) == expected


@pytest.mark.parametrize("num", [1, 2, 5, 8])
@pytest.mark.parametrize("by", ["tokens", "affinity"])
def test_rows_of_used_experts_raise_the_most_used_of_every_block_first(by: str, num: int) -> None:
    expected = most_used(by, num)
    assert raised_by(f"most used experts ({by})", expected) == expected


@pytest.mark.parametrize("num", [1, 2, 3])
def test_rows_of_blocks_raise_the_blocks_of_their_name_first(num: int) -> None:
    assert EVIDENCE.similarity_L is not None
    assert EVIDENCE.predicted_similarity_L is not None
    measured, predicted = EVIDENCE.similarity_L.argsort().tolist(), EVIDENCE.predicted_similarity_L.argsort().tolist()
    orders = {
        "first blocks": [0, 1, 2, 3],
        "last blocks": [3, 2, 1, 0],
        "least similar blocks (measured)": measured,
        "least similar blocks (predicted)": predicted,
    }
    for row, order in orders.items():
        expected = mlp(order[:num])
        assert raised_by(row, expected) == expected, row


@pytest.mark.parametrize("score", SCORES)
def test_rows_of_scores_raise_the_routed_linears_of_largest_score_first(score: str) -> None:
    ordered = sorted((w.name for w in ROUTED), key=EVIDENCE.scores[score].__getitem__)
    for num in (1, 30):
        expected = set(ordered[-num:])
        assert raised_by(f"{score} score", expected) == expected


def test_controls_raise_whole_experts_and_blocks_that_change_with_the_seed() -> None:
    sizes = {
        "random experts": most_used("tokens", 2),
        "random blocks": mlp([0, 1]),
        "random linears": experts([(0, 0)]),
    }
    for row, like in sizes.items():
        drawn = [raised_by(row, like, replace(SETTING, seed=seed)) for seed in (0, 0, 1)]
        assert drawn[0] == drawn[1] != drawn[2], row
        assert {size(names) for names in drawn} == {size(like)}
        assert drawn[0] <= {w.name for w in (WEIGHTS if row == "random blocks" else ROUTED)}
    found = raised_by("random experts", sizes["random experts"])
    pairs = {(w.block, w.expert) for w in ROUTED if w.name in found}
    assert found == experts(pairs)
    assert sorted(block for block, _ in pairs) == [0, 0, 1, 1, 2, 2, 3, 3]
    found = raised_by("random blocks", sizes["random blocks"])
    assert found == mlp({w.block for w in WEIGHTS if w.name in found})


def test_the_combination_raises_attention_then_shared_then_the_first_block_then_used_experts() -> None:
    steps = [{w.name for w in WEIGHTS if w.kind == kind} for kind in ("attention", "shared")]
    steps += [mlp([0]), most_used("affinity", 1), most_used("affinity", 2)]
    for number in range(1, len(steps) + 1):
        expected = set().union(*steps[:number])
        assert raised_by("combination of the paper", expected) == expected


def test_uniform_bits_are_whole_and_the_depth_split_is_between_them() -> None:
    for budget in (2.0, 3.0, 4.0):
        plan = make_plan("uniform", budget, SETTING)
        assert plan is not None
        assert {grid.bits for grid in plan.values()} == {int(budget)}
        assert make_plan("depth split", budget, SETTING) is None
    for budget in (2.1, 2.5, 3.5):
        assert make_plan("uniform", budget, SETTING) is None
    for budget, num_blocks in ((2.25, 1), (3.5, 2)):
        plan = make_plan("depth split", budget, SETTING)
        wide = {w.name for w in WEIGHTS if w.block < num_blocks}
        assert raised(plan, int(budget) + 1) == wide
        assert raised(plan, int(budget)) == NUMEL.keys() - wide


@pytest.mark.parametrize("budget", BUDGETS)
def test_all_rows_take_the_same_bits(budget: float) -> None:
    # What is left is less than the next step: of one weight, for PMQ of one expert in every block.
    expert = size(experts([(0, 0)]))
    for row in rows(WEIGHTS):
        plan = make_plan(row, budget, SETTING)
        if plan is None:
            assert row == ("depth split" if budget == int(budget) else "uniform")
            continue
        assert list(plan) == list(NUMEL)
        assert {grid.group_size for grid in plan.values()} == {16}
        step = 4 * expert if row == "PMQ" else (4 if row.startswith("allocator") else 2) * max(NUMEL.values())
        bits = plan_cost(plan, WEIGHTS).code_bits
        assert budget - step / TOTAL < bits <= budget * (1 + 1e-12), row


@pytest.mark.parametrize("budget", BUDGETS)
def test_pmq_gives_blocks_equal_budgets_and_experts_one_width(budget: float) -> None:
    plan = pmq(SETTING, budget)
    by_expert: dict[tuple[int, int | None], set[int]] = {}
    for w in ROUTED:
        by_expert.setdefault((w.block, w.expert), set()).add(plan[w.name].bits)
    assert all(len(widths) == 1 and widths <= {2, 3, 4} for widths in by_expert.values())
    means = [sum(max(by_expert[block, expert]) for expert in range(8)) / 8 for block in range(4)]
    rest = {plan[name].bits for name in NUMEL.keys() - {w.name for w in ROUTED}}
    # 4 bits for the rest, which is three tenths of this model, would leave experts less than 2 of 2.5.
    assert rest == {4 if budget >= 3 else 2}
    rest_size = TOTAL - size(w.name for w in ROUTED)
    share = (budget * TOTAL - max(rest) * rest_size) / (TOTAL - rest_size)
    # Experts are of one size, so one step is an eighth of a bit of a block.
    assert all(share - 1 / 8 < mean <= share + 1e-9 for mean in means)


def test_rows_of_structures_that_a_model_lacks_are_left_out() -> None:
    assert {"attention", "shared"} <= set(rows(WEIGHTS))
    assert len(set(rows(WEIGHTS))) == len(rows(WEIGHTS))
    assert set(rows(WEIGHTS)) - set(rows([w for w in WEIGHTS if w.kind != "shared"])) == {"shared"}
