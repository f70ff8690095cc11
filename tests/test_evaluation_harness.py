"""What validate writes to results.json equals lm-evaluation-harness on the same rows and model."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from benchmarks.harness.tasks import harness_task
from tests.evaluation_data import PAGES, documents_of, write_evaluation_data
from tests.test_main import validate
from tests.tiny import save_tiny

pytestmark = pytest.mark.slow
CHOICES = ("arc_easy", "piqa")


def harness_results(model: Path, tasks: dict[str, Any]) -> dict[str, Any]:
    """The harness's own evaluation with its own model class."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=4)
    results: dict[str, Any] = evaluate(
        lm, {"tasks": tasks, "groups": {}, "group_map": {}}, bootstrap_iters=10_000, log_samples=False
    )
    return results["results"]


def test_results_equal_the_harness_s(tmp_path: Path) -> None:
    model = save_tiny("qwen2_moe", tmp_path / "model", dtype=torch.float32)
    data = write_evaluation_data(tmp_path / "data")
    pages = [{"text": f"{line}\n" if line.strip() else ""} for line in PAGES.split("\n")[:-1]]
    theirs = harness_results(
        model,
        {
            **{name: harness_task(name, documents_of(name)) for name in CHOICES},
            "wikitext": harness_task("wikitext", pages),
        },
    )
    names = f"--data.tasks=[{','.join(theirs)}]"
    options = [f"--data.data_dir={data}", "--data.domains=null", "--model.reference=null", names]
    ours = validate(Path("configs/eval.yaml"), model, tmp_path / "run", *options)
    shares = []
    for task in ours["tasks"]:
        expected = theirs[task["task"]]
        for metric, found in task["metrics"].items():
            assert found["value"] == pytest.approx(expected[f"{metric},none"], rel=1e-5), (task["task"], metric)
            if task["task"] in CHOICES:  # of a perplexity of words the harness states no error
                assert found["stderr"] == pytest.approx(expected[f"{metric}_stderr,none"], rel=1e-9)
                shares.append(found["value"])
        assert task["num_documents"] == expected.get("sample_len", task["num_documents"])
    assert len(shares) == 4
    assert any(0 < share < 1 for share in shares)
