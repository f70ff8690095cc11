"""Batches of documents of every kind of task become results, on tiny random models."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from moeq.evaluation.evaluator import Evaluator
from moeq.evaluation.reference_logits import LiveOriginal
from moeq.evaluation.task_evaluation import Sampling
from moeq.scoring.finite import NonFiniteError
from moeq.scoring.scorer import Scorer
from moeq.tasks.documents import Document
from moeq.tasks.encode import Encoder
from moeq.tasks.registry import find_task
from moeq.tasks.rows import Rows
from moeq.tasks.task import DataRow, Task
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PIQA = [
    {"goal": f"Open a jar number {i}", "sol1": "Turn its lid.", "sol2": "Wait for a while" + "." * i, "label": i % 2}
    for i in range(5)
]
TEXT = [{"text": "The quick brown fox jumps over the lazy dog. " * 12}]
PROGRAMS = [
    {
        "task_id": f"T/{i}", "prompt": f"def add_{i}(a):\n", "canonical_solution": f"    return a + {i}\n",
        "test": f"def check(f):\n    assert f(1) == {1 + i}\n", "entry_point": f"add_{i}",
    }
    for i in range(2)
]  # fmt: skip
SUMS = [{"text": f"{a} + {b} = {a + b}\n"} for a in range(5) for b in range(40)]


def documents_of(task: Task, rows: Sequence[DataRow], length: int = 512) -> list[Document]:
    found = Encoder(TOKENIZER, length).documents(
        task, Rows(list(rows), [], "test", "here", ""), window_length=32, num_documents=None
    )
    return found.documents


def perturbed(model: nn.Module, generator: torch.Generator) -> nn.Module:
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return other


def evaluator(model: nn.Module, original: nn.Module | None = None, **settings: Any) -> Evaluator:
    live = None if original is None else LiveOriginal(Scorer(original))
    return Evaluator(Scorer(model), TOKENIZER, live, **settings)


def reference_loglikelihood(model: Any, context: Sequence[int], continuation: Sequence[int]) -> float:
    """One token at a time, without batch or cache."""
    total, ids = 0.0, list(context)
    for token in continuation:
        total += float(model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token])
        ids.append(token)
    return total


def test_choices_are_judged_by_what_each_token_alone_gets() -> None:
    model, task = tiny_model("mixtral"), find_task("piqa")
    documents = documents_of(task, PIQA)
    results = evaluator(model).run(task, documents)
    assert [result.index for result in results] == [0, 1, 2, 3, 4]
    for document, result, row in zip(documents, results, PIQA, strict=True):
        expected = [reference_loglikelihood(model, r.context, r.continuation) for r in document.requests]
        assert result.details["loglikelihoods"] == pytest.approx(expected, rel=1e-5)
        by_length = [x / len(row[name]) for x, name in zip(expected, ("sol1", "sol2"), strict=True)]
        assert result.values["acc"] == (float(expected.index(max(expected)) == row["label"]), 1.0)
        assert result.values["acc_norm"] == (float(by_length.index(max(by_length)) == row["label"]), 1.0)


def test_windows_have_the_loss_of_the_library_and_their_number_of_scored_tokens() -> None:
    model, task = tiny_model("qwen2_moe"), replace(find_task("wikitext2"), length=32)
    documents = documents_of(task, TEXT)
    results = evaluator(model).run(task, documents)
    assert len(results) == len(documents) == 540 // 32
    for document, result in zip(documents, results, strict=True):
        (request,) = document.requests
        ids = torch.tensor([[*request.context, *request.continuation]])
        total, weight = result.values["perplexity"]
        assert total / weight == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-5)
        assert weight == 31


def test_a_page_counts_its_words_and_bytes() -> None:
    model, task = tiny_model("qwen2_moe"), find_task("wikitext")
    rows = [{"text": "" if not line else f" {line} \n"} for line in ("", "= One =", "", "A page .", "", "= Two =")]
    documents = documents_of(task, rows)
    results = evaluator(model).run(task, documents)
    assert len(results) == 2
    for document, result in zip(documents, results, strict=True):
        expected = -sum(reference_loglikelihood(model, r.context, r.continuation) for r in document.requests)
        assert result.values["byte_perplexity"][0] == pytest.approx(expected, rel=1e-5)
        assert result.values["byte_perplexity"][1] == len(document.row["page"].encode())


@pytest.mark.parametrize("name", ["piqa", "wikitext2", "sums"])
def test_a_model_equals_itself_and_differs_from_another(name: str, generator: torch.Generator) -> None:
    task, rows = find_task(name), {"piqa": PIQA, "wikitext2": TEXT, "sums": SUMS}[name]
    task = replace(task, length=32) if name == "wikitext2" else task
    model, documents = tiny_model("qwen2_moe"), documents_of(task, rows)[:6]
    for result in evaluator(model, tiny_model("qwen2_moe")).run(task, documents):
        shares = {key: total / weight for key, (total, weight) in result.values.items()}
        assert shares["kl"] == pytest.approx(0, abs=1e-9)
        assert shares["top1_agreement"] == shares["router_agreement"] == 1
    changed = evaluator(perturbed(model, generator), model).run(task, documents)
    assert all(result.values["kl"][0] > 0 for result in changed)
    agreed, pairs = map(sum, zip(*(result.values["router_agreement"] for result in changed), strict=True))
    assert 0 < agreed < pairs
    tokens = sum(len(r.context) + len(r.continuation) - (not r.open_end) for d in documents for r in d.requests)
    assert pairs == 2 * tokens  # two blocks; every token of every request once


@pytest.mark.parametrize("name", ["piqa", "sums"])
def test_results_do_not_depend_on_the_batch(name: str) -> None:
    task, model = find_task(name), tiny_model("qwen2_moe")
    documents = documents_of(task, PIQA if name == "piqa" else SUMS)[:5]
    together = evaluator(model).run(task, documents)
    alone = [evaluator(model).run(task, [document])[0] for document in reversed(documents)]
    assert [(r.values, r.key) for r in together] == [(r.values, r.key) for r in reversed(alone)]


def test_programs_are_run_and_samples_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    task, model = find_task("humaneval"), tiny_model("qwen2_moe")
    documents = documents_of(task, PROGRAMS, length=2048)
    solutions = [["    return a + 0\n", "    return 0\n", "    return a\n"], ["    return a +\n"] * 3]
    monkeypatch.setattr(
        "moeq.evaluation.evaluator.generate", lambda *_, num_samples, **__: solutions[: num_samples - 1]
    )
    sampling = Sampling(num_samples=3, temperature=0.8, k=(1, 2))
    first, second = evaluator(model, sampling=sampling).run(task, documents)
    assert first.values == {"pass@1": (pytest.approx(2 / 3), 1.0), "pass@2": (1.0, 1.0)}
    assert second.values == {"pass@1": (0.0, 1.0), "pass@2": (0.0, 1.0)}
    assert first.details["verdicts"][0] == "passed"
    assert second.details["verdicts"][0].startswith("failed: SyntaxError")
    assert first.details["texts"] == solutions[0]


def test_non_finite_logits_name_task_document_and_module() -> None:
    model = tiny_model("qwen2_moe")
    model.get_parameter("model.layers.1.mlp.experts.down_proj")[:, 3] = float("nan")
    for name, rows in (("piqa", PIQA), ("sums", SUMS)):
        task = find_task(name)
        documents = documents_of(task, rows)[2:4]
        with pytest.raises(NonFiniteError, match=rf"{name}, document 2.* model\.layers\.1\.mlp\.experts"):
            evaluator(model).run(task, documents)


def test_values_are_finite_numbers() -> None:
    task, models = find_task("piqa"), (tiny_model("qwen2_moe"), tiny_model("qwen2_moe", seed=1))
    for result in evaluator(*models).run(task, documents_of(task, PIQA)):
        assert all(math.isfinite(total) and weight > 0 for total, weight in result.values.values())
