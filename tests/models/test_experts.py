"""One layout for the experts of every family, against the family's own loop."""

import pytest
import torch
from torch import Tensor, nn

from moeq.models.adapter import Adapter
from moeq.models.experts import (
    ExpertSide,
    activate,
    as_stored,
    canonical,
    expert_weight,
    project_down,
    project_in,
    projections,
    stacked_weight,
)
from tests.tiny import tiny_model

FAMILIES = ("mixtral", "gpt_oss", "aria_text", "nemotron_h", "hy_v4")


def experts_of(family: str) -> nn.Module:
    model = tiny_model(family)
    model.set_experts_implementation("eager")
    return next(iter(Adapter(model).expert_modules().values()))


def reference_output(module: nn.Module, hidden: Tensor, expert: int) -> Tensor:
    """What the family's own loop makes of every token in one expert."""
    return module(hidden, torch.full((len(hidden), 1), expert), torch.ones(len(hidden), 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_steps_of_one_expert_are_those_of_the_familys_own_loop(family: str) -> None:
    module = experts_of(family)
    hidden = torch.randn(5, stacked_weight(module, "into").shape[-1])
    for expert in (0, 5):
        inner = activate(module, project_in(module, expert, hidden))
        torch.testing.assert_close(project_down(module, expert, inner), reference_output(module, hidden, expert))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["into", "down"])
def test_the_layout_of_the_family_and_ours_are_inverse(family: str, part: ExpertSide) -> None:
    module = experts_of(family)
    weight = stacked_weight(module, part)
    assert torch.equal(canonical(module, part, as_stored(module, part, weight)), weight)
    assert torch.equal(canonical(module, part, as_stored(module, part, weight[3])), weight[3])


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_of_an_expert_are_views_that_stack_to_the_weight(family: str) -> None:
    module = experts_of(family)
    *into, down = projections(module)
    stacked = torch.cat([expert_weight(module, 5, leaf) for leaf in into])
    assert torch.equal(stacked, stacked_weight(module, "into")[5])
    assert torch.equal(expert_weight(module, 5, down), stacked_weight(module, "down")[5])
    expert_weight(module, 5, into[-1]).zero_()
    assert (stacked_weight(module, "into")[5, -1] == 0).all()
    assert (stacked_weight(module, "into")[4, -1] != 0).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_another_weight_takes_the_place_of_the_modules_own(family: str) -> None:
    module = experts_of(family)
    hidden = torch.randn(3, stacked_weight(module, "into").shape[-1])
    other = stacked_weight(module, "into")[2]
    bias = 0 if not module.has_bias else project_in(module, 1, torch.zeros_like(hidden))
    torch.testing.assert_close(project_in(module, 1, hidden, other), hidden @ other.T + bias)
