"""The state of a task in a run, and how generation is set."""

import re
from pathlib import Path
from typing import Any

import pytest

from moeq.evaluation.records import Records
from moeq.evaluation.task_evaluation import Sampling, TaskEvaluation, metric_kinds
from moeq.tasks.registry import find_task
from moeq.tasks.rows import Rows
from tests.scoring.requests import random_documents


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples (0) must be positive"),
        ({"temperature": -1.0}, "temperature (-1.0) must not be negative"),
        ({"top_p": 0.0}, "top_p (0.0) must be in (0, 1]"),
        ({"num_samples": 5}, "num_samples (5) above 1 needs a temperature above 0"),
        (
            {"num_samples": 5, "temperature": 0.8, "k": (1, 10)},
            "k [1, 10] of pass@k must lie between",
        ),
        ({"k": ()}, "k [] of pass@k"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampling(**settings)


def test_programs_have_pass_at_the_ks_asked_for_and_comparisons_come_last() -> None:
    sampling = Sampling(num_samples=20, temperature=0.8, k=(1, 10))
    assert list(metric_kinds(find_task("humaneval"), sampling, compared=False)) == ["pass@1", "pass@10"]
    kinds = metric_kinds(find_task("wikitext"), sampling, compared=True)
    assert list(kinds) == [
        "word_perplexity", "byte_perplexity", "bits_per_byte", "kl", "top1_agreement", "router_agreement",
    ]  # fmt: skip
    assert set(list(kinds.values())[3:]) == {"mean"}


@pytest.mark.parametrize(("limit", "num_batches"), [(1.0, 4), (0.5, 2), (1, 1), (9, 4), (0.0, 0)])
def test_the_batches_that_run_are_those_within_the_limit(limit: int | float, num_batches: int, tmp_path: Path) -> None:
    documents = random_documents(1, 4)
    rows = Rows([], [], "test", "here", "")
    records = Records(tmp_path, "piqa", "{}", 0)
    evaluation = TaskEvaluation(find_task("piqa"), rows, documents, 4, {"acc": "mean"}, records, 0)
    evaluation.batches, evaluation.limit = [[document] for document in documents], limit
    assert evaluation.expected == evaluation.batches[:num_batches]
    evaluation.batches = [[]]
    assert evaluation.expected == []
