"""Every string of every task equals that of lm-evaluation-harness on the same rows, and so does every score."""

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from benchmarks.harness.tasks import CONFIGS, harness_task, requests_by_document
from moeq.tasks.prompts import shot_texts
from moeq.tasks.registry import find_task
from moeq.tasks.rows import Rows
from moeq.tasks.task import Code, Generation, LastWord, MultipleChoice, Outcome, Rolling, Task
from tests.tasks.catalog.examples import ROWS, SHOTS

pytestmark = pytest.mark.slow
SUBJECTS = ["mmlu_anatomy", "mmlu_us_foreign_policy"]
NAMES = [*(name for name in CONFIGS if name in ROWS), *SUBJECTS]


def both(name: str) -> tuple[Task, list[Any], list[str], Any]:
    """Our task, its documents and few-shot texts, and the harness's task."""
    task = find_task("mmlu" if name in SUBJECTS else name)
    rows, shots = ROWS[task.name], SHOTS.get(task.name, [])
    if name in SUBJECTS:
        rows, shots = ([row for row in part if f"mmlu_{row['subject']}" == name] for part in (rows, shots))
    theirs = harness_task(name, rows, [] if name == "mbpp" else shots, task.num_shots)
    documents = list(task.prepare(rows))
    if name == "mbpp":  # the harness has its three examples in its own code
        shots = list(theirs.sampler.df)
    return task, documents, shot_texts(task, Rows(rows, shots, "test", "", ""), documents), theirs


@pytest.mark.parametrize("name", NAMES)
def test_requests_are_the_harness_s(name: str) -> None:
    task, documents, texts, theirs = both(name)
    ours = []
    for document, text in zip(documents, texts, strict=True):
        if isinstance(task, (MultipleChoice, LastWord)):
            ours.append(task.pairs(document, text))
        elif isinstance(task, Rolling):
            ours.append([(task.text(document),)])
        else:
            assert isinstance(task, Generation)
            options = {"until": list(task.stop), "max_gen_toks": task.max_new_tokens}
            ours.append([(text + task.prompt(document), options)])
    expected = [
        [
            (*args[:-1], {"max_gen_toks": 256} | wanted(args[-1])) if isinstance(args[-1], dict) else args
            for args in of_one
        ]
        for of_one in requests_by_document(theirs)
    ]
    assert ours == expected


def wanted(options: dict[str, Any]) -> dict[str, Any]:
    """What the harness asks of a generation, without its ways of saying greedy."""
    return {key: value for key, value in options.items() if key in ("until", "max_gen_toks")}


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_harness_s(name: str) -> None:
    task, documents, _, theirs = both(name)
    for number, (document, their_document) in enumerate(zip(documents, theirs.eval_docs, strict=True)):
        if isinstance(task, MultipleChoice):
            for best in range(len(task.choices(document))):
                likelihoods = [-5.0 - 0.5 * ((i - best) % 5) for i in range(len(task.choices(document)))]
                expected = theirs.process_results(their_document, [(x, False) for x in likelihoods])
                values = task.score(document, [Outcome(x, False) for x in likelihoods])
                assert {key: total / weight for key, (total, weight) in values.items()} == expected
        elif isinstance(task, LastWord):
            expected = theirs.process_results(their_document, [(-2.5, bool(number))])
            values = task.score(document, [Outcome(-2.5, bool(number))])
            assert {"perplexity": -values["perplexity"][0], "acc": values["acc"][0]} == expected
        elif isinstance(task, Rolling):
            expected = theirs.process_results(their_document, [-7.5])
            assert {key: (-total, weight) for key, (total, weight) in task.score(document, -7.5).items()} == expected
        elif isinstance(task, Code):
            # The harness runs the completion (HumanEval: after the prompt), a newline and its target.
            completion = (document["prompt"] if name == "humaneval" else "") + "<code>"
            assert task.program(document, "<code>") == f"{completion}\n{theirs.doc_to_target(their_document)}"


@pytest.mark.parametrize(
    "text",
    [
        " 1200 + 34 = 1234.\n#### 1,234", " so it is $1,234.", "#### -2", "#### $2", "no", "", "12.", "#### 2.00",
        "#### ,", " 7\n#### 1234\n#### 9", "-2 apples and 2.", "....", "#### 1234.\nQ", "2 3 -2",
    ],
)  # fmt: skip
def test_answers_of_gsm8k_are_extracted_as_in_the_harness(text: str) -> None:
    task, documents, _, theirs = both("gsm8k")
    assert isinstance(task, Generation)
    for instance in theirs.instances:
        instance.resps = [text]
    theirs.apply_filters()
    for instance, document in zip(theirs.instances, documents, strict=True):
        expected = {}
        for key, name in {"strict-match": "strict", "flexible-extract": "flexible"}.items():
            score = theirs.process_results(instance.doc, [instance.filtered_resps[key]])
            expected[f"exact_match_{name}"] = (score["exact_match"], 1.0)
        assert task.score_text(document, text) == expected


@pytest.mark.parametrize("sampler", ["first", "random"])
def test_examples_from_the_evaluated_split_are_the_harness_s(sampler: Any) -> None:
    from lm_eval.api.samplers import get_sampler

    # Some documents are there several times, so that some draws fall short and are made again.
    documents = [{"question": str(number % 5), "answer": "a"} for number in range(9)]
    theirs = get_sampler("first_n" if sampler == "first" else "default")(documents, rnd=1234)
    drawn = [theirs.sample(3, eval_doc=document) for document in documents]
    task = find_task("gsm8k")
    task = replace(task, source=replace(task.source, shots="test"), num_shots=3, shot_sampler=sampler)
    expected = ["".join(task.shot(row) + "\n\n" for row in rows) for rows in drawn]
    assert shot_texts(task, Rows(documents, documents, "test", "", ""), documents) == expected
