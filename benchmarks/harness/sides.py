"""The two sides of a comparison with lm-evaluation-harness: the same model on the same rows, document by document."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness.files import HARNESS_NAMES, Files
from moeq.evaluation.batches import CPU_PASS_TOKENS, batches
from moeq.evaluation.evaluator import Evaluator
from moeq.scoring.scorer import Scorer
from moeq.tasks.documents import Document, Result
from moeq.tasks.encode import Encoder
from moeq.tasks.metrics import measurement, ratio_sums
from moeq.tasks.rows import load_rows
from moeq.tasks.task import Aggregate, MultipleChoice, Task, Values

# Of the bootstrap by which the harness finds the standard error of LAMBADA's perplexity.
BOOTSTRAP_SAMPLES = 1000


@dataclass(frozen=True)
class Scored:
    """What a side says of one document.

    Attributes:
        likelihoods: Of its choices, or of the whole text, in nats.
        values: Total and weight of each metric.
        lengths: Characters of each choice; empty where the side does not say.
        num_cut: Tokens that were cut off its left; 0 where the side does not say.
        sequences: The token ids that were scored, of each continuation; empty where the side does not say.
    """

    likelihoods: tuple[float, ...]
    values: Values
    lengths: tuple[int, ...] = ()
    num_cut: int = 0
    sequences: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Side:
    """What a side says of a task.

    Attributes:
        documents: By name of the harness's task (a subject of MMLU is one), in order.
        measured: Value and standard error (None: not stated) of each metric, by name of task or group.
    """

    documents: dict[str, list[Scored]]
    measured: dict[str, dict[str, tuple[float, float | None]]]


def run_moeq(model: Any, tokenizer: Any, files: Files, max_length: int, batch_tokens: int) -> Side:
    """A task as ``main.py validate`` evaluates it, without Lightning around it.

    Raises:
        ValueError: Contexts could not be shared on this model, so that it is not the usual path that was run.
    """
    task, rows = files.task, load_rows(files.task.source, files.data_dir)
    encoder = Encoder(tokenizer, max_length)
    documents, _ = encoder.documents(task, rows, window_length=max_length, num_documents=None)
    evaluator, scored = Evaluator(Scorer(model), tokenizer), {}
    for batch in batches(documents, batch_tokens, pass_tokens=CPU_PASS_TOKENS):
        results = evaluator.run(task, batch)
        scored |= {
            document.index: _of_result(task, document, result) for document, result in zip(batch, results, strict=True)
        }
    if evaluator.scorer.fallbacks:
        raise ValueError(f"{'; '.join(evaluator.scorer.fallbacks)}; choose another model")
    by_name: dict[str, list[Scored]] = {}
    members: dict[str, list[Scored]] = {}
    for document in documents:
        own = scored[document.index]
        name = f"{task.name}_{document.groups[-1]}" if document.groups else task.name
        by_name.setdefault(HARNESS_NAMES.get(name, name), []).append(own)
        for group in (task.name, *(f"{task.name}_{group}" for group in document.groups)):
            members.setdefault(HARNESS_NAMES.get(group, group), []).append(own)
    return Side(by_name, {name: _measured(own, task.metrics) for name, own in members.items()})


def _of_result(task: Task, document: Document, result: Result) -> Scored:
    details = result.details
    likelihoods = details["loglikelihoods"] if "loglikelihoods" in details else [details["loglikelihood"]]
    lengths = map(len, task.choices(document.row)) if isinstance(task, MultipleChoice) else ()
    sequences = tuple(request.context + request.continuation for request in document.requests)
    return Scored(tuple(likelihoods), result.values, tuple(lengths), document.num_cut, sequences)


def _measured(documents: Sequence[Scored], kinds: Mapping[str, Aggregate]) -> dict[str, tuple[float, float | None]]:
    found = {}
    for metric, kind in kinds.items():
        pairs = [document.values[metric] for document in documents]
        sums_S = ratio_sums(*torch.tensor(pairs, dtype=torch.float64).unbind(1))
        value, stderr, _, _ = measurement(sums_S, kind)
        found[metric] = value, stderr
    return found


def harness_tasks(files: Files) -> Any:
    """The harness's tasks and groups, with their data loaded."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(files.configurations), include_defaults=False)
    return manager.load(["mmlu"] if files.task.name == "mmlu" else list(files.names))


def harness_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """The harness's view of a model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def run_harness(model: Any, tokenizer: Any, files: Files, batch_size: int) -> Side:
    """A task as the harness evaluates it."""
    import lm_eval

    results = lm_eval.evaluate(
        harness_model(model, tokenizer, batch_size), harness_tasks(files), bootstrap_iters=BOOTSTRAP_SAMPLES
    )
    assert results is not None
    kinds = files.task.metrics
    documents = {
        name: [_of_sample(sample, kinds) for sample in sorted(results["samples"][name], key=lambda x: x["doc_id"])]
        for name in files.names
    }
    measured = {}
    for name, found in {**results["results"], **results.get("groups", {})}.items():
        errors = {metric: found.get(f"{metric}_stderr,none") for metric in kinds}
        measured[name] = {
            metric: (float(found[f"{metric},none"]), error if isinstance(error, float) else None)
            for metric, error in errors.items()
        }
    return Side(documents, measured)


def _of_sample(sample: Mapping[str, Any], kinds: Mapping[str, Aggregate]) -> Scored:
    """A logged sample: numbers of the harness as totals and weights."""
    values: Values = {}
    for metric, kind in kinds.items():
        found = sample[metric]
        total, weight = found if isinstance(found, tuple | list) else (found, 1)
        values[metric] = (float(total if kind == "mean" else -total), float(weight))
    responses = sample["filtered_resps"]
    likelihoods = tuple(float(x[0] if isinstance(x, tuple | list) else x) for x in responses)
    return Scored(likelihoods, values)
