"""Evaluation loaders: what the batches hold, how ranks share them, what is resumed, and what is refused."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datamodules.evaluation import EvaluationDataModule
from moeq.checkpoint.placement import Placement
from moeq.evaluation.placing import Places
from moeq.evaluation.task_evaluation import Sampling
from moeq.tasks.documents import Document, Result
from tests.tiny import tiny_tokenizer

DOMAINS = {"prose": "prose.txt", "answers": "answers.jsonl"}


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no model whose files could be read."""
    monkeypatch.setattr(
        "datamodules.evaluation.result_fingerprint", lambda _, sampling, device: json.dumps(asdict(sampling))
    )
    places = Places(Placement("memory", "it fits"), None, None)
    monkeypatch.setattr("datamodules.evaluation.choose_places", lambda *_: places)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data_dir with two texts and two data sets."""
    data = tmp_path / "data"
    (data / "piqa").mkdir(parents=True)
    (data / "prose.txt").write_text(" = Title = \n\n Some prose about nothing .\n" * 20)
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40)]
    (data / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    choices = [
        {"goal": f"Open jar {i}", "sol1": "Turn." * (1 + i % 7), "sol2": "Wait.", "label": i % 2} for i in range(23)
    ]
    (data / "piqa" / "validation.jsonl").write_text("\n".join(map(json.dumps, choices)))
    (data / "arithmetic_sums.txt").write_text("".join(f"{a} + {b} = {a + b}\n" for a in range(40) for b in range(10)))
    return data


def opened(folder: Path, rank: int = 0, world_size: int = 1, restart: bool = False, **settings: Any) -> Any:
    """A datamodule whose loaders a Trainer has asked for."""
    options = {"tasks": ["piqa"], "domains": DOMAINS, "window_length": 32, "batch_tokens": 512, **settings}
    data = EvaluationDataModule(data_dir=str(folder), **options)
    module = SimpleNamespace(
        tokenizer=tiny_tokenizer(), run_dir=folder.parent / "run", hparams={"restart": restart, "reference": None},
        config=SimpleNamespace(max_position_embeddings=512),
    )  # fmt: skip
    barriers: list[str] = []
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=module, global_rank=rank, world_size=world_size, is_global_zero=rank == 0,
        limit_val_batches=1.0,
        strategy=SimpleNamespace(barrier=barriers.append, root_device=torch.device("cpu")),
    )  # fmt: skip
    data.loaders = data.val_dataloader()  # type: ignore[attr-defined]
    return data


def documents(data: Any, index: int) -> list[Document]:
    return [document for batch in data.loaders[index] for document in batch]


def test_one_loader_per_domain_and_task_in_their_order(folder: Path) -> None:
    data = opened(folder, tasks=["piqa", "sums"])
    assert [evaluation.task.name for evaluation in data.evaluations] == ["prose", "answers", "piqa", "sums"]
    text = tiny_tokenizer().decode(
        [*documents(data, 0)[0].requests[0].context, *documents(data, 0)[0].requests[0].continuation]
    )
    assert text.startswith(" = Title = \n\n Some prose")
    assert len(documents(data, 2)) == 23
    assert len(documents(data, 3)) == 200
    assert tiny_tokenizer().decode(documents(data, 3)[0].requests[0].context).endswith(" =")


def test_batches_are_sorted_by_length_within_the_budget(folder: Path) -> None:
    data = opened(folder, batch_tokens=300)
    batches = data.evaluations[2].batches
    assert len(batches) > 3
    lengths = [document.num_tokens for batch in batches for document in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert [count for count, _ in data.batch_costs[2]] == list(map(len, batches))
    assert sum(cost for _, cost in data.batch_costs[2]) >= sum(lengths) / 2


@pytest.mark.parametrize("world_size", [2, 3, 40])
def test_ranks_share_the_documents_without_duplicates(folder: Path, world_size: int) -> None:
    alone = opened(folder)
    ranks = [opened(folder, rank, world_size) for rank in range(world_size)]
    for index in range(3):
        shared = [document.index for data in ranks for document in documents(data, index)]
        assert sorted(shared) == sorted(document.index for document in documents(alone, index))
        # Lightning skips validation altogether where a rank has no batch at all.
        assert all(len(data.loaders[index]) >= 1 for data in ranks)


def test_fewer_documents_are_evenly_spread_and_keep_their_number(folder: Path) -> None:
    data = opened(folder, num_documents=5, num_windows=4)
    assert sorted(document.index for document in documents(data, 2)) == [0, 4, 9, 13, 18]
    assert data.evaluations[2].num_available == 23
    assert data.evaluations[2].description()["partial"] == "num_documents"
    assert len(documents(data, 0)) == data.evaluations[0].num_available == 4


def test_finished_documents_are_not_batched_again_and_count_once(folder: Path) -> None:
    data = opened(folder)
    finished = documents(data, 2)[:6]
    results = [Result(d.index, d.key, (), {"acc": (1.0, 1.0), "acc_norm": (0.0, 1.0)}) for d in finished]
    data.evaluations[2].add(results, 1.0)
    ranks = [opened(folder, rank, 2) for rank in range(2)]
    left = [document.index for again in ranks for document in documents(again, 2)]
    assert sorted(left + [document.index for document in finished]) == list(range(23))
    counts = [again.evaluations[2].metrics.compute().get("", {}) for again in ranks]
    assert counts[0]["acc"].num_documents == 6
    assert counts[1] == {}
    assert len(documents(opened(folder, sampling=Sampling(seed=1)), 2)) == 23
    assert len(documents(opened(folder, restart=True), 2)) == 23


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": None, "domains": None}, "nothing to evaluate"),
        ({"window_length": 1}, r"window_length \(1\) must be at least 2"),
        ({"num_windows": 0}, r"num_windows \(0\) must be positive"),
        ({"num_documents": 0}, r"num_documents \(0\) must be positive"),
        ({"batch_tokens": 0}, r"batch_tokens \(0\) must be positive"),
        ({"domains": {"piqa": "prose.txt"}}, r"\['piqa'\] are named more than once"),
        ({"domains": {"prose": "prose.pdf"}}, r"file prose.pdf must end in .txt or .jsonl"),
        ({"num_shots": {"mmlu": 0}}, r"num_shots names \['mmlu'\]"),
        ({"tasks": ["humaneval"]}, "docs/code_execution.md"),
        ({"tasks": ["hellaswagg"]}, "did you mean hellaswag"),
    ],
)
def test_settings_that_make_no_sense_are_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationDataModule(**{"tasks": ["piqa"], "data_dir": str(folder), **settings})


def test_a_missing_file_says_which_where_and_what_to_download(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no file validation.jsonl .* in folder .*copa.* download .*super_glue"):
        opened(folder, tasks=["copa"])


def test_a_text_shorter_than_a_window_names_its_task_and_file(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"task prose \(.*prose.txt\): .*100000"):
        opened(folder, window_length=100_000)
