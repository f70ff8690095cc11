import json
import math
from pathlib import Path

import pytest
import torch

from moeq.allocation.evidence import Evidence, check_evidence, read_evidence
from moeq.allocation.plan import Choice
from tests.allocation.toy import toy_evidence, toy_weights

FOUND = Evidence(
    tokens={"layers.1.mlp.experts": torch.tensor([3, 0])},
    affinity={"layers.1.mlp.experts": torch.tensor([1.25, 0.0], dtype=torch.float64)},
    similarity_L=torch.tensor([math.nan, 0.5], dtype=torch.float64),
    predicted_similarity_L=None,
    scores={"kurtosis": {"a": 3.1}},
    costs={"fisher": {"a": {Choice(2, 64): 0.5, Choice(4): 0.125}}},
)


def test_a_written_survey_reads_back_the_same_and_is_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "survey.json"
    path.write_text(json.dumps(FOUND.to_json(), allow_nan=False))
    read = read_evidence(path)
    assert read.costs == FOUND.costs
    assert read.scores == FOUND.scores
    assert read.predicted_similarity_L is None
    for field in ("tokens", "affinity"):
        for key, value in getattr(FOUND, field).items():
            torch.testing.assert_close(getattr(read, field)[key], value, rtol=0, atol=0)
    torch.testing.assert_close(read.similarity_L, FOUND.similarity_L, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"version": 0}, "version"),
        ({"tokens": None}, "make the survey again"),
        ({"costs": {"x": {"a": {"4z": 1}}}}, "4z"),
    ],
)
def test_a_survey_of_another_kind_is_refused_with_its_path(
    change: dict[str, object], complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "survey.json"
    path.write_text(json.dumps(FOUND.to_json() | change))
    with pytest.raises(ValueError, match=complaint) as raised:
        read_evidence(path)
    assert "survey.json" in str(raised.value)


def test_a_missing_survey_says_who_writes_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the callback Survey"):
        read_evidence(tmp_path / "survey.json")


def test_findings_about_other_weights_are_refused() -> None:
    weights = toy_weights()
    check_evidence(toy_evidence(weights), weights)
    check_evidence(Evidence(), weights)
    deeper = toy_evidence(toy_weights(num_blocks=4))
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp\.experts has 0 experts and 4 in the survey"):
        check_evidence(deeper, weights)
    with pytest.raises(ValueError, match=r"experts has 4 experts and 6 in the survey"):
        check_evidence(toy_evidence(toy_weights(num_experts=6)), weights)
    with pytest.raises(ValueError, match=r"the model lacks model\.layers\.3\.mlp"):
        check_evidence(Evidence(costs=deeper.costs), weights)
    with pytest.raises(ValueError, match=r"the survey lacks model\.layers\.2\.mlp"):
        check_evidence(Evidence(scores=toy_evidence(toy_weights(num_blocks=2)).scores), weights)
