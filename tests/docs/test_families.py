"""docs/families.md says what the tests run."""

import pytest
from transformers import CONFIG_MAPPING

from docs import families
from tests.families import FAMILIES


@pytest.mark.skipif(not set(FAMILIES) <= set(CONFIG_MAPPING), reason="needs a transformers that has all families")
def test_the_table_of_families_is_current() -> None:
    text = (families.ROOT / "docs" / "families.md").read_text(encoding="utf8")
    assert families.document() == text, "out of date; run: python docs/families.py"


def test_a_row_tells_what_differs_and_what_is_kept() -> None:
    line, kept = families.row("gpt_oss")
    assert "stored transposed, gate and up rows in turn, biases, own gate function" in line
    assert not kept
    line, kept = families.row("nemotron_h")
    assert "no gate" in line
    assert "`mixer.experts`" in line
    assert set(families.row("jamba")[1]) == {"A_log", "x_proj", "dt_proj"}


def test_a_row_of_a_wrapper_tells_what_opens_it_and_what_stays_beside_its_language_model() -> None:
    line, kept = families.wrapper_row("qwen3_5_moe")
    assert line.startswith("| qwen3_5_moe | AutoModelForImageTextToText | `qwen3_5_moe_text` | `visual` |")
    assert "`mtp.*` | FP8 in blocks |" in line
    assert set(kept) == {"in_proj_a", "in_proj_b"}
