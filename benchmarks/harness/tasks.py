"""Tasks of lm-evaluation-harness on rows in memory: the other side of every comparison of strings and of scores.

The harness's own configuration files and functions are used; only where its rows come from is replaced, so that nothing
is downloaded.  ``lm_eval`` is no dependency of moeq: this module is for tests and benchmarks.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from moeq.tasks.pages import pages
from moeq.tasks.task import DataRow

# Configuration files below lm_eval/tasks, by the name of the same task here.
CONFIGS = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "c4": "c4/c4.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "copa": "super_glue/copa/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "humaneval": "humaneval/humaneval.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "mathqa": "mathqa/mathqa.yaml",
    "mbpp": "mbpp/mbpp.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "sciq": "sciq/sciq.yaml",
    "wikitext": "wikitext/wikitext.yaml",
    "winogrande": "winogrande/default.yaml",
}


def harness_task(name: str, rows: Sequence[DataRow], shots: Sequence[DataRow] = (), num_shots: int = 0) -> Any:
    """The harness's task on given rows, with its requests built; "mmlu_<subject>" is a subject of MMLU.

    Args:
        name: A key of ``CONFIGS``, or a subject of MMLU.
        rows: Rows of the evaluated split, as they are stored here.
        shots: Rows of the split of the examples.
        num_shots: Examples per prompt.
    """
    import lm_eval.tasks
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.tasks._yaml_loader import load_yaml

    path = CONFIGS.get(name, f"mmlu/default/{name}.yaml")
    # The programs of HumanEval and MBPP are run by a module of the hub, loaded when their configuration is.
    with mock.patch("evaluate.load", return_value=mock.MagicMock()):
        config = load_yaml(Path(lm_eval.tasks.__file__).parent / path, resolve_func=True)
    splits = {"test": Dataset.from_list([_stored_there(name, row) for row in _documents(name, rows)])}
    if shots:
        splits["shots"] = Dataset.from_list(list(shots))
        config["fewshot_split"] = "shots"
    config.update(
        custom_dataset=lambda **_: DatasetDict(splits),
        dataset_kwargs=None,
        training_split=None,
        validation_split=None,
        test_split="test",
        num_fewshot=num_shots,
    )
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    task.build_all_requests(rank=0, world_size=1)
    return task


def requests_by_document(task: Any) -> list[list[tuple[Any, ...]]]:
    """Arguments of the requests of each document, in its order."""
    found: dict[int, list[tuple[Any, ...]]] = {}
    for instance in task.instances:
        found.setdefault(instance.doc_id, []).append(instance.args)
    return [found[index] for index in sorted(found)]


def _documents(name: str, rows: Sequence[DataRow]) -> Sequence[DataRow]:
    return pages(rows) if name == "wikitext" else rows


def _stored_there(name: str, row: DataRow) -> Mapping[str, Any]:
    """A row with the fields that the harness expects of its copy."""
    if name == "boolq" and "title" in row:
        return {**row, "passage": f"{row['title']} -- {row['passage']}", "label": int(row["answer"])}
    return row
