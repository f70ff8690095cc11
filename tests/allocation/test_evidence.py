import json
import math
from pathlib import Path

import pytest
import torch

from moeq.allocation.evidence import Evidence, read_evidence
from moeq.allocation.plan import Choice

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
    with pytest.raises(ValueError, match=r"callbacks\.survey\.Survey"):
        read_evidence(tmp_path / "survey.json")
