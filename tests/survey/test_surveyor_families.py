"""Surveys of families whose experts or blocks are not the usual ones."""

import pytest
import torch

from moeq.allocation.evidence import Evidence
from moeq.allocation.plan import Choice
from moeq.quant.spec import GridSpec
from moeq.survey.survey_spec import SurveySpec
from moeq.survey.surveyor import survey_model
from tests.tiny import tiny_model


def surveyed(family: str, *costs: str) -> Evidence:
    spec = SurveySpec(costs=costs, choices=(Choice(2, 16), Choice(4, 16)), grid=GridSpec(group_size=16))
    return survey_model(tiny_model(family), torch.randint(1, 257, (4, 16)).split(2), spec)


@pytest.mark.parametrize(
    ("family", "costs"),
    [
        ("gpt_oss", ("fisher", "hessian", "gemq", "block_output")),
        ("aria_text", ("fisher", "block_output")),
        ("nemotron_h", ("fisher", "hessian")),
        ("glm_moe_dsa", ("hessian", "block_output")),
    ],
)
def test_more_bits_cost_less_in_every_layout_of_experts(family: str, costs: tuple[str, ...]) -> None:
    evidence = surveyed(family, *costs)
    for cost in costs:
        two, four = (sum(table[Choice(bits, 16)] for table in evidence.costs[cost].values()) for bits in (2, 4))
        assert 0 < four < two, cost


@pytest.mark.parametrize(
    ("family", "cost", "why"),
    [("qwen4_exp_text", "fisher", "several residual streams"), ("nemotron_h", "gemq", "choose fisher or hessian")],
)
def test_a_survey_that_cannot_be_made_is_refused_with_the_reason(family: str, cost: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"this survey cannot be made of .*{why}"):
        surveyed(family, cost)
