"""The seeds of the tokens that backward passes score."""

import pytest
import torch

from moeq.models.adapter import Adapter
from moeq.survey import gradient_probe
from moeq.survey.gradient_probe import GradientProbe, batch_seed
from moeq.survey.survey_spec import SurveySpec
from tests.tiny import tiny_model


# Taken from ``printf 7,12 | sha256sum``.
@pytest.mark.parametrize(
    ("seed", "batch", "expected"),
    [
        (0, 0, 0x7334821429A99561),
        (0, 1, 0x83B97B859AA5F81B - 2**63),
        (7, 12, 0x49C11943DC5B88D7),
        (-1, 0, 0x7C1C7922A1C30CB2),
    ],
)
def test_the_seed_of_a_batch_is_the_documented_function_of_seed_and_number(
    seed: int, batch: int, expected: int
) -> None:
    assert batch_seed(seed, batch) == expected


def test_every_batch_is_scored_on_tokens_of_its_own_seed_as_long_as_batches_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter, seeds = Adapter(tiny_model("qwen2_moe")), []
    monkeypatch.setattr(gradient_probe, "backward", lambda _model, _inputs, g: seeds.append(g.initial_seed()))
    spec = SurveySpec(costs=("fisher",), num_gradient_batches=4, seed=7)
    probe = GradientProbe(adapter, spec, adapter.all_sites(), torch.device("cpu"))
    for batch in (3, 1, 4):  # as a rank of two may have them
        probe.run(batch, {"input_ids": torch.ones(1, 4, dtype=torch.int64)}, None)
    assert seeds == [batch_seed(7, 3), batch_seed(7, 1)]
