"""An export of an image-text wrapper is evaluated like any other: packed and dense, in memory and streamed."""

from pathlib import Path

import pytest

from tests.evaluation_data import documents_of, write_rows, write_text
from tests.test_main import validate
from tests.test_wrappers import quantize
from tests.tiny import save_tiny


@pytest.mark.slow
def test_an_export_of_a_wrapper_is_compared_with_its_original_on_tasks_of_text(tmp_path: Path) -> None:
    source = save_tiny("qwen3_vl_moe", tmp_path / "model")
    run = quantize(source, tmp_path / "run", "rtn", "memory")
    write_rows(tmp_path / "data/boolq/validation.jsonl", documents_of("boolq"))
    write_text(tmp_path / "data/text.txt", "The quick brown fox jumps over the lazy dog. " * 9)
    options = [
        "--data.tasks=[boolq]", "--data.domains={text: text.txt}", "--data.window_length=64", "--data.num_windows=3",
        f"--data.data_dir={tmp_path / 'data'}", f"--model.reference={source}",
    ]  # fmt: skip
    measured = {}
    for kind, placement in (("export", "auto"), ("dense", "stream")):
        config = Path("configs/eval.yaml")
        results = validate(config, run / kind, tmp_path / kind, *options, f"--model.placement={placement}")
        assert not any(task["fallbacks"] for task in results["tasks"])
        measured[kind] = {
            (task["task"], name): found["value"] for task in results["tasks"] for name, found in task["metrics"].items()
        }
    assert {("text", "perplexity"), ("text", "kl"), ("boolq", "acc")} < measured["export"].keys()
    assert all(measured["export"][task, "kl"] > 0 for task in ("text", "boolq"))
    # The same values of the weights: what is left is the rounding of bfloat16.
    assert measured["dense"] == pytest.approx(measured["export"], rel=1e-2)
