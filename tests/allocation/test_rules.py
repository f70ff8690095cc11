import re
from typing import Any

import pytest

from moeq.allocation.evidence import Evidence
from moeq.allocation.heuristics import NEED_EVIDENCE, RULES
from moeq.allocation.plan import plan_cost, uniform_plan
from moeq.allocation.rules import apply_rules, make_rule
from moeq.quant.spec import GridSpec
from tests.allocation.toy import toy_evidence, toy_weights

WEIGHTS = toy_weights()
EVIDENCE = toy_evidence(WEIGHTS)
GRID = GridSpec(bits=2, group_size=16)


def select(**spec: Any) -> set[str]:
    return make_rule({"bits": 4, **spec}).apply(WEIGHTS, EVIDENCE)


def matching(pattern: str) -> set[str]:
    return {w.name for w in WEIGHTS if re.search(pattern, w.name)}


@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        ({"rule": "attention"}, r"self_attn"),
        ({"rule": "shared"}, r"shared_expert\."),
        ({"rule": "dense"}, r"never"),
        ({"rule": "linear", "linear": "down_proj"}, r"\.experts\.\d+\.down_proj"),
        ({"rule": "linear", "linear": "q_proj", "kind": "attention"}, r"q_proj"),
        ({"rule": "first_blocks", "num": 2}, r"layers\.[01]\.mlp"),
        ({"rule": "last_blocks", "num": 1, "part": "all"}, r"layers\.2\."),
        ({"rule": "first_blocks", "share": 0.34, "part": "all"}, r"layers\.0\."),
    ],
)
def test_a_structure_rule_selects_exactly_its_weights(spec: dict[str, Any], pattern: str) -> None:
    assert select(**spec) == matching(pattern)


@pytest.mark.parametrize("by", ["tokens", "affinity"])
def test_most_used_experts_are_found_in_each_block_or_in_the_whole_model(by: str) -> None:
    usage = {
        (int(path.split(".")[2]), expert): float(value)
        for path, values in getattr(EVIDENCE, by).items()
        for expert, value in enumerate(values)
    }
    in_blocks = {pair for block in range(3) for pair in sorted((p for p in usage if p[0] == block), key=usage.get)[-2:]}
    everywhere = set(sorted(usage, key=usage.get)[-5:])
    for scope, num, expected in (("block", 2, in_blocks), ("model", 5, everywhere)):
        chosen = select(rule="most_used_experts", num=num, by=by, scope=scope)
        assert chosen == {n for block, e in expected for n in matching(rf"layers\.{block}\.mlp\.experts\.{e}\.")}


def test_both_ways_of_counting_usage_differ() -> None:
    assert select(rule="most_used_experts", num=1, by="tokens") != select(
        rule="most_used_experts", num=1, by="affinity"
    )


@pytest.mark.parametrize("by", ["measured", "predicted"])
def test_blocks_are_ranked_by_similarity_in_either_direction(by: str) -> None:
    values = (EVIDENCE.similarity_L if by == "measured" else EVIDENCE.predicted_similarity_L).tolist()
    order = sorted(range(3), key=values.__getitem__)
    assert select(rule="least_similar_blocks", num=1, by=by) == matching(rf"layers\.{order[0]}\.mlp")
    assert select(rule="most_similar_blocks", num=2, by=by) == matching(rf"layers\.[{order[1]}{order[2]}]\.mlp")


def test_a_block_without_routed_experts_has_no_similarity_and_is_never_drawn() -> None:
    weights = [w for w in WEIGHTS if not (w.block == 0 and w.kind in ("routed", "shared"))]
    evidence = Evidence(similarity_L=EVIDENCE.similarity_L * 0 + float("nan"))
    evidence.similarity_L[1:] = EVIDENCE.similarity_L[1:]
    for spec in ({"rule": "least_similar_blocks"}, {"rule": "random_blocks", "seed": 0}):
        chosen = make_rule({**spec, "bits": 4, "num": 2, "part": "all"}).apply(weights, evidence)
        assert chosen == {w.name for w in weights if w.block > 0}


def test_top_scored_takes_the_largest_scores_of_the_structure() -> None:
    routed = [w.name for w in WEIGHTS if w.kind == "routed"]
    scores = EVIDENCE.scores["outlier"]
    expected = set(sorted(routed, key=scores.__getitem__)[-9:])
    assert select(rule="top_scored", score="outlier", share=0.25) == expected
    assert select(rule="top_scored", score="outlier", num=9) == expected


@pytest.mark.parametrize(
    ("spec", "control"),
    [
        ({"rule": "random_experts", "num": 2}, {"rule": "most_used_experts", "num": 2}),
        ({"rule": "random_blocks", "num": 1}, {"rule": "least_similar_blocks", "num": 1}),
        ({"rule": "random_linears", "share": 0.25}, {"rule": "top_scored", "score": "outlier", "share": 0.25}),
    ],
)
def test_random_controls_follow_their_seed_and_take_as_many_weights(
    spec: dict[str, Any], control: dict[str, Any]
) -> None:
    draws = [select(**spec, seed=seed) for seed in range(8)]
    assert select(**spec, seed=3) == draws[3]
    assert len({frozenset(draw) for draw in draws}) > 1
    assert {len(draw) for draw in draws} == {len(select(**control))}


@pytest.mark.parametrize("rule", ["random_experts", "random_blocks", "random_linears"])
def test_a_larger_random_control_holds_the_smaller_ones(rule: str) -> None:
    draws = [select(rule=rule, num=num, seed=5) for num in (1, 2, 3)]
    assert draws[0] < draws[1] < draws[2]


def test_rules_only_raise_and_their_order_does_not_change_the_plan() -> None:
    specs = [
        {"rule": "attention", "bits": 8},
        {"rule": "first_blocks", "num": 2, "bits": 4, "part": "all"},
        {"rule": "most_used_experts", "num": 1, "bits": 3},
    ]
    base = uniform_plan(WEIGHTS, GRID, {"shared": 4})
    plan, effects = apply_rules(base, [make_rule(spec) for spec in specs], WEIGHTS, EVIDENCE)
    backwards, _ = apply_rules(base, [make_rule(spec) for spec in specs[::-1]], WEIGHTS, EVIDENCE)
    assert plan == backwards
    for weight in WEIGHTS:
        expected = [base[weight.name].bits] + [s["bits"] for s in specs if weight.name in select(**s)]
        assert plan[weight.name].bits == max(expected)
    assert effects[0].before == plan_cost(base, WEIGHTS)
    assert effects[-1].after == plan_cost(plan, WEIGHTS)
    assert [name for name in effects[1].raised if "self_attn" in name or "shared" in name] == []
    assert set(effects[2].raised) < set(effects[2].selected)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"rule": "best"}, r"rule \(best\) must be one of attention, dense, first_blocks"),
        ({"rule": "attention"}, r"rule attention: bits \(None\) must be a whole number"),
        ({"rule": "attention", "bits": 4, "num": 1}, "rule attention has no option 'num'; it takes bits and: none"),
        ({"rule": "random_blocks", "bits": 4, "num": 1}, r"rule random_blocks needs seed \(a whole number\)"),
        ({"rule": "first_blocks", "bits": 4, "num": 1.5}, r"first_blocks: num \(1.5\) must be a whole number"),
        (
            {"rule": "most_used_experts", "bits": 4, "num": 1, "by": "luck"},
            r"by \('luck'\) must be one of tokens, affinity",
        ),
    ],
)
def test_a_mistake_in_a_rule_names_what_is_possible(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_rule(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"rule": "first_blocks", "num": 4}, r"first_blocks: num \(4\) must be between 1 and 3, as there are 3 blocks"),
        ({"rule": "first_blocks", "num": 1, "share": 0.5}, "give exactly one"),
        ({"rule": "first_blocks"}, "give exactly one"),
        ({"rule": "random_linears", "seed": 0, "share": 25}, r"share \(25\) must be above 0 and at most 1"),
        ({"rule": "linear", "linear": "w1"}, "must be one of the routed linears of the model: down_proj, gate_proj"),
        ({"rule": "top_scored", "score": "luck", "num": 1}, r"no score 'luck' \(it has: outlier\)"),
    ],
)
def test_a_rule_that_does_not_fit_the_model_says_what_would(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(**spec)


def test_rules_that_need_a_survey_say_so() -> None:
    options = {
        "most_used_experts": {"num": 1},
        "top_scored": {"score": "outlier", "num": 1},
        "least_similar_blocks": {"num": 1},
        "most_similar_blocks": {"num": 1, "by": "predicted"},
    }
    assert set(options) == NEED_EVIDENCE <= set(RULES)
    for name, given in options.items():
        rule = make_rule({"rule": name, "bits": 4, **given})
        assert rule.needs_evidence
        with pytest.raises(ValueError, match=f"rule {name} needs evidence; put the callback Survey"):
            rule.apply(WEIGHTS)
        with pytest.raises(ValueError, match=f"rule {name}: the survey (holds|has) no"):
            rule.apply(WEIGHTS, Evidence())
