"""What a file takes in a process of its own."""

from pathlib import Path

import pytest
import torch

from benchmarks.speed.plan_memory import measure, memory_of

MIB = 1 << 20


def test_what_stays_is_resident_and_what_goes_is_in_the_peak() -> None:
    def take() -> tuple[object, dict[str, int]]:
        kept = torch.ones(48 * MIB, dtype=torch.uint8)
        torch.ones(96 * MIB, dtype=torch.uint8)  # pages that are written, and given back at once
        return kept, {"file": 7}

    found = measure(take)
    assert found["resident"] / MIB == pytest.approx(48, abs=8)
    assert found["peak"] / MIB == pytest.approx(144, abs=8)
    assert found["file"] == 7


@pytest.mark.slow
def test_a_folder_that_cannot_be_opened_is_told_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1: .*Error: .*export"):
        memory_of("moeq", tmp_path, tmp_path)
