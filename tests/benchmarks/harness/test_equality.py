"""moeq and lm-evaluation-harness say the same of every document of every task; and a comparison sees what differs."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("lm_eval")

from benchmarks.harness.compare import Comparison, compare
from benchmarks.harness.files import Files, write_files
from benchmarks.harness.llama_like import llama_like
from benchmarks.harness.sides import Side, harness_model, run_harness, run_moeq
from moeq.checkpoint.loading import load_model, load_tokenizer
from moeq.tasks.encode import window_of
from moeq.tasks.registry import find_task
from moeq.tasks.task import DataRow, MultipleChoice, Outcome, Values
from tests.tasks.catalog.examples import ARC, ROWS, SHOTS
from tests.tiny import tiny_model, tiny_tokenizer

REFERENCE = str(Path(__file__).resolve().parents[3] / "assets/reference-moe")
# Shorter than some of the rows, so that they are cut.
WINDOW = 160
SUBJECTS = ("anatomy", "us_foreign_policy", "virology", "philosophy")


def _questions(rows: list[DataRow], count: int) -> list[DataRow]:
    """The same number of questions of four subjects, one of each category."""
    return [{**rows[i % len(rows)], "subject": subject, "answer": i % 4} for i in range(count) for subject in SUBJECTS]


LONG = "The ox sat by the wall, and the wall by the sea. " * 20
SAME = {"choices": {"text": ["salt"] * 4, "label": list("ABCD")}, "answerKey": "C"}
ARC_CHOICES = {"choices": ARC[0]["choices"], "answerKey": "B"}
# The best of these is another one without normalisation, by characters, and by bytes.
ENDINGS = ["\u4e2d\u6587\u4e2d\u6587", "no", "a much longer one, at long last", "\u00e9\u00e9\u00e9\u00e9 e"]
# Rows that are longer than the window, have no context, no text, or equal choices.
MORE: dict[str, list[DataRow]] = {
    "arc_easy": [{**ARC[0], **SAME}],
    "boolq": [
        {"question": "is it long", "passage": LONG, "title": "Ox", "answer": True, "label": 1},
        {"question": "is it odd", "passage": "Caf\u00e9\u2028\u4e2d.", "title": "N", "answer": False, "label": 0},
    ],
    "c4": [{"text": ""}, {"text": LONG * 2}, {"text": "\u00e9\u4e2d\u6587 = = =\r\n"}],
    "hellaswag": [
        {**ROWS["hellaswag"][0], "endings": ["Same."] * 4},
        *({**ROWS["hellaswag"][1], "endings": ENDINGS, "label": str(label)} for label in range(4)),
    ],
    "lambada_openai": [{"text": "Alone"}, {"text": LONG.strip()}],
    "openbookqa": [
        {"id": "3", "question_stem": "", **SAME},
        {"id": "4", "question_stem": "A fire ends with  ", **ARC_CHOICES},
    ],
    "piqa": [{"goal": LONG, "sol1": "sit", "sol2": "stand up", "label": 1}],
    "wikitext": [{"text": line} for line in (" = Long = \n", "", f" {LONG}\n", f" {LONG}\n")],
}  # fmt: skip
TASKS = (
    "winogrande", "copa", "openbookqa", "hellaswag", "piqa", "boolq", "arc_easy", "arc_challenge", "mathqa", "sciq",
    "lambada_openai", "mmlu", "wikitext", "c4_sample",
)  # fmt: skip
TIES = {"openbookqa", "hellaswag", "arc_easy"}
CUT = {"boolq", "lambada_openai", "mmlu", "piqa"}


class Run(NamedTuple):
    """A model, its tokenizer and the rows of all tasks."""

    model: Any
    tokenizer: Any
    data_dir: Path
    folder: Path

    def files(self, name: str) -> Files:
        return write_files(name, self.data_dir, self.folder)

    def ours(self, files: Files, window: int | None = None) -> Side:
        # Small enough for several batches.
        return run_moeq(self.model, self.tokenizer, files, window or window_of(self.model.config, self.tokenizer), 512)

    def theirs(self, files: Files) -> Side:
        return run_harness(self.model, self.tokenizer, files, batch_size=3)

    def compared(self, name: str) -> Comparison:
        files = self.files(name)
        return compare(files.task, self.ours(files), self.theirs(files))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of all tasks as a data folder."""
    folder = tmp_path_factory.mktemp("data")
    for name in TASKS:
        task, key = find_task(name), name.removesuffix("_sample")
        rows = [*ROWS[key], *MORE.get(key, [])]
        target = folder / task.source.folder
        target.mkdir(exist_ok=True)
        if name == "mmlu":
            rows = _questions(rows, 3)
            _write(target / "dev.jsonl", _questions(SHOTS["mmlu"], 6))
        if name == "boolq":
            rows = [row if "title" in row else {**row, "title": "T", "answer": bool(row["label"])} for row in rows]
        if name == "wikitext":
            (target / "test.txt").write_text("".join(row["text"] or " \n" for row in rows), encoding="utf8")
        else:
            _write(target / f"{task.source.splits[-1]}.jsonl", rows)
    return folder


def _write(path: Path, rows: list[DataRow]) -> None:
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf8")


@pytest.fixture(scope="module", params=["qwen2_moe", "llama-like"])
def run(request: pytest.FixtureRequest, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Both models, one after the other."""
    if request.param == "llama-like":
        model, tokenizer = llama_like(vocabulary=400, window=WINDOW)
    else:
        model, tokenizer = tiny_model("qwen2_moe", max_position_embeddings=WINDOW), tiny_tokenizer()
    return Run(model, tokenizer, data_dir, tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("name", TASKS)
def test_documents_and_metrics_are_the_harness_s(run: Run, name: str) -> None:
    found = run.compared(name)
    assert found.problems == ()
    assert found.documents == {"mmlu": 12, "wikitext": 3}.get(name, found.documents)
    assert bool(found.ties) == (name in TIES)
    assert all(tie.gap < 1e-5 for tie in found.ties)
    assert bool(found.num_cut) == (name in CUT)
    assert {group for group in found.measured if group.startswith("mmlu_")} == (
        {f"mmlu_{group}" for group in (*SUBJECTS, "stem", "other", "social_sciences", "humanities")}
        if name == "mmlu" else set()
    )  # fmt: skip


def test_the_window_is_the_harness_s(run: Run) -> None:
    assert window_of(run.model.config, run.tokenizer) == harness_model(run.model, run.tokenizer, 1).max_length == WINDOW


def test_greedy_words_are_the_harness_s(tmp_path: Path) -> None:
    # The bundled model can add.
    sums = "12 + 7 = 19\n30 + 4 = 34\n25 + 11 = 36\n8 + 41 = 49\n"
    _write(tmp_path / "test.jsonl", [{"text": f"{sums}40 + 7 = {word}"} for word in (47, 7, 46)])
    (tmp_path / "data/lambada").mkdir(parents=True)
    (tmp_path / "test.jsonl").rename(tmp_path / "data/lambada/test.jsonl")
    run = Run(load_model(REFERENCE, "float32"), load_tokenizer(REFERENCE), tmp_path / "data", tmp_path / "run")
    found = run.compared("lambada_openai")
    assert found.problems == ()
    assert found.measured["lambada_openai"]["acc"]["harness"][0] == pytest.approx(1 / 3)


class Unnormalised(MultipleChoice):
    """Both metrics by log-likelihood."""

    def score(self, row: DataRow, outcomes: Sequence[Outcome]) -> Values:
        right = super().score(row, outcomes)["acc"]
        return {"acc": right, "acc_norm": right}


class ByBytes(MultipleChoice):
    """Normalised by bytes instead of characters."""

    def score(self, row: DataRow, outcomes: Sequence[Outcome]) -> Values:
        sizes = [len(choice.encode()) for choice in self.choices(row)]
        by_size = [Outcome(x / size, greedy) for (x, greedy), size in zip(outcomes, sizes, strict=True)]
        return {**super().score(row, outcomes), "acc_norm": super().score(row, by_size)["acc"]}


@pytest.mark.parametrize("kind", [Unnormalised, ByBytes])
def test_another_normalisation_is_found(run: Run, kind: type[MultipleChoice]) -> None:
    files = run.files("hellaswag")
    wrong = replace(files, task=kind(**vars(files.task)))
    assert compare(files.task, run.ours(wrong), run.theirs(files)).problems


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("copa", {"delimiter": ""}),
        ("mmlu", {"num_shots": 4}),
        ("mmlu", {"shot_delimiter": ""}),
        ("mathqa", {"choices": lambda row: row["options"].split(" , ")}),
        ("arc_challenge", {"answer": lambda row: 0}),
        ("wikitext", {"original": lambda row: row["page"].strip()}),
        ("c4_sample", {"text": lambda row: row["text"]}),
    ],
)
def test_a_task_that_differs_is_found(run: Run, name: str, change: dict[str, Any]) -> None:
    files = run.files(name)
    wrong = replace(files, task=replace(files.task, **change))
    assert compare(files.task, run.ours(wrong), run.theirs(files)).problems


@pytest.mark.parametrize("name", sorted(CUT))
def test_a_window_that_differs_is_found(run: Run, name: str) -> None:
    files = run.files(name)
    assert compare(files.task, run.ours(files, WINDOW - 1), run.theirs(files)).problems


def test_a_document_whose_router_ties_is_listed_and_one_whose_router_does_not_is_found(run: Run) -> None:
    files = run.files("hellaswag")
    theirs, own = run.theirs(files), run.ours(files)
    ((name, documents),) = own.documents.items()
    moved = replace(documents[1], likelihoods=tuple(x - 0.01 for x in documents[1].likelihoods))
    other = replace(own, documents={name: [documents[0], moved, *documents[2:]]})
    assert compare(files.task, other, theirs, lambda _: 2e-5).problems
    asked: list[Sequence[Sequence[int]]] = []
    found = compare(files.task, other, theirs, lambda sequences: asked.append(sequences) or 0.0)
    assert found.problems == ()
    assert asked == [moved.sequences]
    assert found.relative < 1e-5
    assert [(tie.index, tie.difference) for tie in found.ties if tie.metric == "router"] == [
        (1, pytest.approx(0.01, rel=1e-3))
    ]


def test_a_router_tie_does_not_excuse_a_missing_continuation(run: Run) -> None:
    files = run.files("hellaswag")
    theirs, own = run.theirs(files), run.ours(files)
    ((name, documents),) = own.documents.items()
    fewer = replace(documents[0], likelihoods=documents[0].likelihoods[:-1])
    assert compare(files.task, replace(own, documents={name: [fewer, *documents[1:]]}), theirs, lambda _: 0.0).problems
