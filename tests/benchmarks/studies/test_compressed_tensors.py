"""Which folders the study of compressed-tensors asks for, and whose values it measures."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.studies.compressed_tensors import BUDGETS, GROUPS, OWN, OWN_LEARNED, THEIRS, CompressedTensors
from benchmarks.studies.compressed_tensors import write_values as write
from moeq.checkpoint.loading import load_model
from moeq.formats.convert import convert
from tests.formats.packed import GRIDS, logits_of, write_tiny_packed


def cases(*args: str) -> Counter[tuple[str, str]]:
    study = CompressedTensors(CompressedTensors.parser().parse_args(args))
    return Counter((case.quantizer, case.kind) for case in study.cases())


def test_what_uses_data_comes_for_every_seed_and_rounding_to_nearest_once() -> None:
    found = cases("--llmcompressor", "python")
    uniform = [f"W4 g{group}" for group in GROUPS]
    assert found == {
        **{(name, kind): 1 if "RTN" in name else 3 for name in THEIRS for kind in uniform},
        **{(OWN, kind): 3 for kind in (*uniform, *(f"{budget:g}" for budget in BUDGETS))},
        (OWN_LEARNED, "W4 g64"): 3, (OWN_LEARNED, "4.25"): 3,
    }  # fmt: skip
    assert not any(name in THEIRS for name, _ in cases())


@pytest.mark.parametrize("grids", ["3 bits", "mixed"])
def test_values_are_what_the_configuration_says_of_each_weight(grids: str, tmp_path: Path) -> None:
    made = write_tiny_packed("qwen2_moe", tmp_path, GRIDS[grids])
    convert(made.folder, "compressed-tensors", tmp_path / "packed_ct")
    opened = load_model(str(write(tmp_path / "packed_ct", tmp_path / "source", tmp_path / "values")), "auto")
    assert torch.equal(logits_of(opened), logits_of(made.model))
