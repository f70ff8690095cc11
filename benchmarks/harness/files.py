"""Rows of a comparison with lm-evaluation-harness, written out for both sides as files that mean the same.

``FOLDER/rows`` is a data folder of moeq.  ``FOLDER/harness`` has one configuration file per task of the harness: it
includes the harness's own and replaces the data set by a JSONL file (and the name of its split; MMLU's has its 5 shots,
too), so that the harness's command line reads it as well:

    lm_eval --include_path FOLDER/harness --tasks hellaswag --model hf --model_args pretrained=MODEL,dtype=float32

The rows are the same but for what the data sets' copies on the hub have otherwise than the files: BoolQ's passages
start with their titles and their answers are 0 and 1, MMLU is one file per subject, and WikiText is one row per
page.  ``sciq`` and other tasks whose split is not in the data folder take that of ``Source.splits`` which is, on both
sides.  Files are read and converted here without moeq's own readers, which are on trial.
"""

import gzip
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.tasks import CONFIGS
from moeq.tasks.registry import find_task
from moeq.tasks.rows import find_file, split_part
from moeq.tasks.task import Task

# Names of the harness's tasks where they differ from those here.
HARNESS_NAMES = {"c4_sample": "c4"}
MMLU_GROUPS = ("mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities")
_TITLE = re.compile(r"^(?= = [^=\n].* = $)", re.MULTILINE)


@dataclass(frozen=True)
class Files:
    """A task's files.

    Attributes:
        task: The task, whose data is in ``data_dir``.
        data_dir: Data folder of moeq.
        configurations: Folder of the harness's configuration files.
        names: Names of the harness's tasks: the task's, or those of its subjects.
    """

    task: Task
    data_dir: Path
    configurations: Path
    names: tuple[str, ...]


def write_files(name: str, data_dir: Path, folder: Path, num_documents: int | None = None) -> Files:
    """Write a task's rows for both sides.

    Args:
        name: Name of the task here.
        data_dir: Folder of all data sets.
        folder: Where to write.
        num_documents: So many rows, evenly spread (of MMLU an equal number of every subject, rounded up); None is all.
    """
    task = find_task(name)
    source = find_file(task.source, task.source.splits, data_dir)
    data, configurations = folder / "rows", folder / "harness" / name
    shutil.rmtree(configurations, ignore_errors=True)
    configurations.mkdir(parents=True)
    target = data / task.source.folder / source.name.removesuffix(".gz")
    target.parent.mkdir(parents=True, exist_ok=True)
    if name == "wikitext":
        text = _text(source)
        pages = _spread(_pages(text), num_documents)
        target.write_text(text if num_documents is None else "".join(pages), encoding="utf8")
        # The newline before a title separates two lines; that at the end of the file is the last page's.
        of_name = {name: [{"page": page.removesuffix("\n")} for page in pages[:-1]] + [{"page": pages[-1]}]}
    elif name == "mmlu":
        of_name = {
            f"mmlu_{subject}": _spread(rows, num_documents and -(-num_documents // len(subjects)))
            for subjects in [_by_subject(_jsonl(source))]
            for subject, rows in subjects.items()
        }
        _write_jsonl(target, [row for rows in of_name.values() for row in rows])
    else:
        rows = _spread(_jsonl(source), num_documents)
        _write_jsonl(target, rows)
        of_name = {HARNESS_NAMES.get(name, name): [_on_the_hub(name, row) for row in rows]}
    shots: dict[str, list[dict[str, Any]]] = {}
    if task.source.shots is not None:
        split, _ = split_part(task.source.shots)
        rows = _jsonl(find_file(task.source, (split,), data_dir))
        _write_jsonl(data / task.source.folder / f"{split}.jsonl", rows)
        shots = {f"mmlu_{subject}": own for subject, own in _by_subject(rows).items()}
    for each, rows in of_name.items():
        _write_task(configurations, each, rows, shots.get(each), task.num_shots)
    if name == "mmlu":
        for group in MMLU_GROUPS:
            path = _harness_folder() / "mmlu/default" / f"_{group}.yaml"
            (configurations / f"{group}.yaml").write_text(json.dumps({"include": str(path)}))
    return Files(task, data, configurations, tuple(of_name))


def _write_task(
    folder: Path, name: str, rows: Sequence[Mapping[str, Any]], shots: Sequence[Any] | None, num_shots: int
) -> None:
    """Data and configuration of one task of the harness; JSON is YAML, too."""
    from lm_eval.tasks._yaml_loader import load_yaml

    path = _harness_folder() / CONFIGS.get(name, f"mmlu/default/{name}.yaml")
    own = load_yaml(path, resolve_func=False)
    split = own.get("test_split") or own["validation_split"]
    files = {split: str(folder / f"{name}.jsonl")}
    _write_jsonl(folder / f"{name}.jsonl", rows)
    changed: dict[str, Any] = {"training_split": None, "validation_split": None, "test_split": split}
    if shots is not None:
        files[own["fewshot_split"]] = str(folder / f"{name}_shots.jsonl")
        _write_jsonl(folder / f"{name}_shots.jsonl", shots)
        changed["num_fewshot"] = num_shots
    changed |= {"dataset_path": "json", "dataset_name": None}
    changed["dataset_kwargs"] = {"data_files": files, "cache_dir": str(folder / "cache")}
    (folder / f"{name}.yaml").write_text(json.dumps({"include": str(path), **changed}, indent=1))


def _harness_folder() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def _on_the_hub(name: str, row: dict[str, Any]) -> dict[str, Any]:
    if name == "boolq" and "title" in row:
        return {**row, "passage": f"{row['title']} -- {row['passage']}", "label": int(row["answer"])}
    return row


def _by_subject(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    subjects: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        subjects.setdefault(row["subject"], []).append(row)
    return subjects


def _pages(text: str) -> list[str]:
    """Articles of WikiText, each with its title line and up to the next one's."""
    return [page for page in _TITLE.split(text) if page.strip()]


def _spread(rows: list[Any], count: int | None) -> list[Any]:
    if count is None or count >= len(rows):
        return rows
    return [rows[i * len(rows) // count] for i in range(count)]


def _text(path: Path) -> str:
    stored = path.read_bytes()
    return (gzip.decompress(stored) if path.suffix == ".gz" else stored).decode("utf8")


def _jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _text(path).split("\n") if line]


def _write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf8")
