"""Evaluation loaders: what the batches hold, how ranks share them, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from datamodules.evaluation import ARITHMETIC_SET, EvaluationDataModule, EvaluationSpec, RankSampler
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SHIPPED = Path(__file__).parents[2] / "assets/reference-moe/texts"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with the files of the default domains, small."""
    lines = [f"{a} + {b} = {a + b}" for a in range(30) for b in range(10)]
    rows = [{"question": f"What is {line.split('=')[0]}?", "answer": line} for line in lines]
    (tmp_path / "wikitext2_test.txt").write_text(" = Title = \n\n Some prose about nothing .\n" * 40)
    (tmp_path / "python_heldout.jsonl").write_text(json.dumps({"path": "a.py", "text": "import os\n" * 200}))
    (tmp_path / "gsm8k_test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "arithmetic.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "arithmetic_sums.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def datamodule(folder: Path, rank: int = 0, world_size: int = 1, **settings: Any) -> EvaluationDataModule:
    spec = {"window_length": 32, "num_windows": 6, "batch_size": 4, "num_arithmetic": 10, "num_shots": 2}
    data = EvaluationDataModule(EvaluationSpec(data_dir=str(folder), **{**spec, **settings}))
    module = SimpleNamespace(tokenizer=TOKENIZER)
    data.trainer = SimpleNamespace(lightning_module=module, global_rank=rank, world_size=world_size)
    return data


def test_one_loader_per_set_in_the_order_of_the_names(texts: Path) -> None:
    data = datamodule(texts)
    assert data.set_names == ["prose", "python", "gsm8k", "arithmetic", ARITHMETIC_SET]
    loaders = data.val_dataloader()
    for loader in loaders[:4]:
        assert [tuple(batch["input_ids"].shape) for batch in loader] == [(4, 32), (2, 32)]
    assert [len(batch["answers"]) for batch in loaders[4]] == [4, 4, 2]


def test_windows_are_text_of_their_domain(texts: Path) -> None:
    loaders = dict(zip((data := datamodule(texts)).set_names, data.val_dataloader(), strict=True))
    first = {name: TOKENIZER.decode(next(iter(loaders[name]))["input_ids"][0]) for name in list(loaders)[:4]}
    assert first["prose"].startswith(" = Title = \n\n Some prose")
    assert first["python"].startswith("import os\nimport os\n")
    assert first["gsm8k"].startswith("Question: What is 0 + 0 ?\nAnsw")
    assert first["arithmetic"].startswith("0 + 0 = 0\n0 + 1 = 1\n")


def test_prompts_start_like_a_document_and_end_with_the_equals_sign(texts: Path) -> None:
    batch = next(iter(datamodule(texts).val_dataloader()[4]))
    for ids_P, mask_P, answer in zip(batch["prompt_ids"], batch["attention_mask"], batch["answers"], strict=True):
        prompt = ids_P[mask_P.bool()].tolist()
        assert prompt[0] == TOKENIZER.bos_token_id
        *shots, question = TOKENIZER.decode(prompt[1:]).split("\n")
        assert len(shots) == 2
        assert question.endswith(" =")
        assert eval(question.removesuffix("=")) == int(answer)
        assert not mask_P[: len(mask_P) - len(prompt)].any()


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_share_the_windows_without_duplicates(texts: Path, world_size: int) -> None:
    def windows(loaders: list[Any], index: int) -> list[list[int]]:
        return [row.tolist() for batch in loaders[index] for row in batch["input_ids"]]

    alone = datamodule(texts).val_dataloader()
    ranks = [datamodule(texts, rank, world_size).val_dataloader() for rank in range(world_size)]
    for index in range(4):
        shared = [window for loaders in ranks for window in windows(loaders, index)]
        assert sorted(shared) == sorted(windows(alone, index))
    answers = [answer for loaders in ranks for batch in loaders[4] for answer in batch["answers"]]
    assert sorted(answers) == sorted(answer for batch in alone[4] for answer in batch["answers"])


def test_sampler_gives_every_item_to_one_rank_in_order() -> None:
    shares = [list(RankSampler(range(8), rank, 3)) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert [len(RankSampler(range(8), rank, 3)) for rank in range(3)] == [3, 3, 2]


def test_sets_can_be_chosen(texts: Path) -> None:
    data = datamodule(texts, domains={"code": "python_heldout.jsonl"}, num_arithmetic=0, num_windows=None)
    assert data.set_names == ["code"]
    (loader,) = data.val_dataloader()
    assert sum(len(batch["input_ids"]) for batch in loader) == 2001 // 32


def test_a_missing_file_is_named_with_its_folder(texts: Path) -> None:
    (texts / "gsm8k_test.jsonl").unlink()
    with pytest.raises(ValueError, match=rf"no file gsm8k_test.jsonl in folder {texts}; it should contain one JSON"):
        datamodule(texts).val_dataloader()


def test_short_texts_are_refused_with_the_domain_and_both_numbers(texts: Path) -> None:
    (texts / "wikitext2_test.txt").write_text("short")
    with pytest.raises(ValueError, match=r"domain prose .*has 6 tokens, fewer than one window of 32"):
        datamodule(texts).val_dataloader()
    with pytest.raises(ValueError, match=r"arithmetic_exact_match .*has 300 lines, fewer than the 301 needed"):
        datamodule(texts, domains={"code": "python_heldout.jsonl"}, num_arithmetic=301).val_dataloader()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_length": 1}, r"window_length \(1\) must be at least 2"),
        ({"num_windows": 0}, r"num_windows \(0\) must be positive"),
        ({"batch_size": 0}, r"batch_size \(0\) must be positive"),
        ({"num_arithmetic": -1}, r"num_arithmetic \(-1\)"),
        ({"domains": {ARITHMETIC_SET: "a.txt"}}, "is taken"),
        ({"domains": {}, "num_arithmetic": 0}, "nothing to evaluate"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationSpec(**settings)


def test_a_trainer_runs_all_loaders_in_order(texts: Path) -> None:
    seen: dict[int, list[str]] = {}

    class Recorder(L.LightningModule):
        tokenizer = TOKENIZER

        def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
            seen.setdefault(dataloader_idx, []).extend(batch)

    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, use_distributed_sampler=False,
    )  # fmt: skip
    data = datamodule(texts, domains={"code": "python_heldout.jsonl"})
    trainer.validate(Recorder(), data, verbose=False)
    assert seen == {0: ["input_ids"] * 2, 1: ["prompt_ids", "attention_mask", "answers"] * 3}


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="the evaluation texts are not here")
def test_the_shipped_texts_fill_the_default_sets() -> None:
    data = datamodule(SHIPPED, window_length=256, num_windows=32, num_arithmetic=200, num_shots=4)
    loaders = data.val_dataloader()
    assert [len(loader.dataset) for loader in loaders] == [32, 32, 32, 32, 200]  # type: ignore[arg-type]
    assert torch.stack([window["input_ids"] for window in loaders[0].dataset]).unique(dim=0).shape == (32, 256)
