"""What an export says of itself."""

import json
from pathlib import Path

import pytest

from tests.test_main import fit
from tests.tiny import save_tiny


@pytest.mark.parametrize("gap", [0.0, 3e-6])
def test_logits_that_are_equal_up_to_rounding_alone_are_on_record(
    gap: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeq.export.verify._compare_logits", lambda *_: (gap == 0.0, gap))
    model = save_tiny("qwen2_moe", tmp_path / "model")
    fit(Path("configs/rtn_w3.yaml"), model, tmp_path / "run")
    records = json.loads((tmp_path / "run/fallbacks.json").read_text())
    found = [record["weight"] for record in records if record["reason"] == "logits equal up to rounding"]
    assert found == (["checkpoint", "dense"] if gap else [])
