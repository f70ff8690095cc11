from typing import Any

import pytest

from moeq.allocation.constraints import Floor
from moeq.allocation.decide import AllocationSpec, decide
from moeq.allocation.dry_run import placeholder, rehearse
from moeq.allocation.evidence import Promise, check_evidence
from moeq.quant.spec import GridSpec
from tests.allocation.toy import CHOICES, toy_evidence, toy_weights

WEIGHTS = toy_weights()
EVIDENCE = toy_evidence(WEIGHTS)
GRID = GridSpec(bits=2, group_size=16)
PROMISED = Promise(costs=("fisher",), scores=("outlier",), choices=tuple(CHOICES))
BUDGET = {"method": "allocate", "cost": "fisher", "budget": 2.5}


def spec(rules: list[dict[str, Any]], given: dict[str, Any]) -> AllocationSpec:
    return AllocationSpec(**given, rules=tuple({"bits": 4, **rule} for rule in rules))


@pytest.mark.parametrize(
    ("rules", "given"),
    [
        ([{"rule": "most_used_experts", "num": 2}, {"rule": "top_scored", "score": "outlier", "share": 0.5}], {}),
        ([{"rule": "least_similar_blocks", "num": 1}], {}),
        ([], BUDGET),
        ([{"rule": "attention"}], {**BUDGET, "budget": 4.0, "floors": (Floor(4, 1),)}),
        # A choice that fits no weight is never looked up, nor is one that the runtime cannot read.
        ([], {**BUDGET, "choices": (2, 4, "4g48")}),
        ([], {**BUDGET, "runtime": "gptqmodel", "choices": (2, 4, "4g8")}),
    ],
)
def test_what_can_be_decided_with_findings_can_be_rehearsed_without(
    rules: list[dict[str, Any]], given: dict[str, Any]
) -> None:
    rehearse(spec(rules, given), WEIGHTS, GRID, PROMISED)
    decide(spec(rules, given), WEIGHTS, GRID, EVIDENCE)


@pytest.mark.parametrize(
    ("rules", "given", "message"),
    [
        ([{"rule": "most_used_experts", "num": 5}], {}, "must be between 1 and 4"),
        ([{"rule": "top_scored", "score": "kurtosis", "num": 1}], {}, r"no score 'kurtosis' \(it has: outlier\)"),
        ([{"rule": "most_similar_blocks", "num": 1, "by": "predicted"}], {}, "set predictor: true"),
        ([], {**BUDGET, "cost": "hessian"}, r"no cost 'hessian' \(it has: fisher\); add hessian to costs of"),
        ([], {**BUDGET, "choices": (2, "4g32")}, r"no 4g32 for .*; add it to choices of"),
        ([], {**BUDGET, "budget": 1.5}, "below the smallest plan; the nearest reachable budgets are 2 and"),
        ([{"rule": "attention"}], {**BUDGET, "budget": 2.1}, "below the smallest plan"),
        ([], {**BUDGET, "floors": (Floor(4, 9),)}, "9 experts at 4 bits"),
    ],
)
def test_what_no_findings_could_make_possible_is_an_error(
    rules: list[dict[str, Any]], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rehearse(spec(rules, given), WEIGHTS, GRID, PROMISED)
    with pytest.raises(ValueError, match=message):
        decide(spec(rules, given), WEIGHTS, GRID, placeholder(PROMISED, WEIGHTS))


def test_placeholders_have_the_form_of_findings() -> None:
    made = placeholder(PROMISED, WEIGHTS)
    check_evidence(made, WEIGHTS)
    for field in ("tokens", "affinity", "scores", "costs"):
        assert getattr(made, field).keys() == getattr(EVIDENCE, field).keys()
    assert made.costs["fisher"].keys() == EVIDENCE.costs["fisher"].keys()
    assert set(made.costs["fisher"][WEIGHTS[0].name]) == set(EVIDENCE.costs["fisher"][WEIGHTS[0].name])
    assert {path: len(v) for path, v in made.tokens.items()} == {path: len(v) for path, v in EVIDENCE.tokens.items()}
    assert made.similarity_L is not None
    assert EVIDENCE.similarity_L is not None
    assert made.similarity_L.shape == EVIDENCE.similarity_L.shape
    assert made.predicted_similarity_L is None
