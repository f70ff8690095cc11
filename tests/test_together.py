"""What a GPU computes for all experts together, run on a CPU: the codes and costs of one expert after another.

Differences are ties: a last bit of a Hessian turns one, and the feedback carries it on.
"""

import sys
from pathlib import Path

import pytest
import torch

from callbacks.bit_allocation import BitAllocation
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from moeq.allocation.plan import Choice
from moeq.module import MoEQuantModule
from moeq.survey.survey_spec import SurveySpec
from moeq.survey.surveyor import survey_model
from tests.own_fit import fit_own
from tests.tiny import save_tiny, tiny_model


def take_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every module that asks take the experts together."""
    found = [module for name, module in sys.modules.items() if name.startswith("moeq.")]
    asking = [module for module in found if hasattr(module, "taken_together")]
    assert {"moeq.fit.hessians", "moeq.quant.factor", "moeq.quant.gptq"} <= {module.__name__ for module in asking}
    for module in asking:
        monkeypatch.setattr(module, "taken_together", lambda _: True)


def fit(model: Path, folder: Path) -> MoEQuantModule:
    return fit_own([BitAllocation(), HessianCalibration(), GPTQ()], model, folder, bits=3, group_size=16)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_a_fit_that_takes_experts_together_has_the_codes_of_one_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny("qwen2_moe", tmp_path / "model", dtype=torch.float32)
    apart = fit(model, tmp_path / "apart")
    take_together(monkeypatch)
    together = fit(model, tmp_path / "together")
    sites = apart.adapter.all_sites()
    pairs = [(together.adapter.get_weight(site), apart.adapter.get_weight(site)) for site in sites]
    different = sum(int((one != other).sum()) for one, other in pairs)
    assert different <= 1e-3 * sum(one.numel() for one, _ in pairs)
    assert together.run.fallbacks == apart.run.fallbacks
    for one, other in zip(together.run.errors, apart.run.errors, strict=True):
        assert one["weight"] == other["weight"]
        assert one["relative_error"] == pytest.approx(other["relative_error"], rel=1e-2)


def test_a_survey_that_takes_experts_together_has_the_costs_of_one_that_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = torch.randint(1, 257, (6, 12), generator=torch.Generator().manual_seed(5)).split(3)
    spec = SurveySpec(choices=(Choice(2, 16), Choice(4, 16)), costs=("hessian",))
    expected = survey_model(tiny_model("mixtral"), ids, spec).costs
    take_together(monkeypatch)
    found = survey_model(tiny_model("mixtral"), ids, spec).costs
    for cost, table in expected.items():
        for name, costs in table.items():
            for choice, value in costs.items():
                assert found[cost][name][choice] == pytest.approx(value, rel=1e-2), (cost, name)
