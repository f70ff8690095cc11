import json
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from transformers import Qwen2MoeConfig

from datamodules.calibration import BatchShare
from datamodules.text import TextDataModule
from tests.datamodules.stub import StubTrainer
from tests.tiny import tiny_tokenizer

CONFIG = Qwen2MoeConfig(vocab_size=264, max_position_embeddings=4096)


def attached(tmp_path: Path, rank: int = 0, world_size: int = 1, **settings: object) -> TextDataModule:
    datamodule = TextDataModule(**settings)
    datamodule.trainer = StubTrainer(tmp_path, global_rank=rank, world_size=world_size)
    datamodule.trainer.lightning_module.model = SimpleNamespace(config=CONFIG)
    return datamodule


def told(datamodule: TextDataModule) -> dict[str, str]:
    return {each.reason: each.detail for each in datamodule.trainer.lightning_module.run.fallbacks}


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + i * i % 26) for i in range(2000)))
    return str(path)


def test_batches_are_windows_of_the_text(tmp_path: Path, text: str) -> None:
    batches = list(attached(tmp_path, path=text, num_windows=7, length=16, batch_size=3).train_dataloader())
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(3, 16), (3, 16), (1, 16)]
    whole = Path(text).read_text()
    for window in torch.cat([batch["input_ids"] for batch in batches]):
        assert tiny_tokenizer().decode(window) in whole


@pytest.mark.parametrize(("num_windows", "batch_size"), [(10, 3), (8, 2), (5, 2)])
def test_two_ranks_share_the_batches_of_one_without_duplicates(
    tmp_path: Path, text: str, num_windows: int, batch_size: int
) -> None:
    settings = {"path": text, "num_windows": num_windows, "length": 16, "batch_size": batch_size}
    alone = [batch["input_ids"] for batch in attached(tmp_path, **settings).train_dataloader()]
    shares = [[b["input_ids"] for b in attached(tmp_path, rank, 2, **settings).train_dataloader()] for rank in (0, 1)]
    assert len(shares[0]) + len(shares[1]) == len(alone)
    for i, batch in enumerate(alone):
        assert torch.equal(batch, shares[i % 2][i // 2])


def test_fewer_batches_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"6 sequences in batches of 4 are 2 batches, fewer than the 3 ranks.*most 2"):
        BatchShare(6, 4, 0, 3)


def test_documents_of_json_lines_are_separated_by_the_end_of_text_token(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"body": body}) for body in ("ab", "cd")))
    datamodule = attached(tmp_path, path=str(path), field="body", num_windows=1, length=6)
    assert tiny_tokenizer().decode(datamodule.calibration_ids()[0]) == "ab<|endoftext|>cd<|endoftext|>"


def test_a_data_set_is_loaded_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the loading code that opens data sets of the hub, from a folder in the same layout."""
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"line": line}) for line in ("ab", "cd", "ef")))
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datamodule = attached(tmp_path, dataset=str(folder), field="line", num_windows=1, length=10)
    assert tiny_tokenizer().decode(datamodule.calibration_ids()[0]) == "ab\n\ncd\n\nef"


def test_configuration_and_split_reach_the_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"text": ["some text"] * 9})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = {"dataset": "wikitext", "dataset_config": "wikitext-2-raw-v1", "split": "test"}
    assert attached(tmp_path, **settings, num_windows=2, length=20).calibration_ids().shape == (2, 20)
    assert asked == [("wikitext", "wikitext-2-raw-v1", "test")]
    with pytest.raises(ValueError, match=r"field 'body' is not one of the columns \['text'\]"):
        attached(tmp_path, **settings, field="body").calibration_ids()


def test_bad_input_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="give either path or dataset"):
        TextDataModule()
    with pytest.raises(ValueError, match="give either path or dataset"):
        TextDataModule(path="a.txt", dataset="wikitext")
    with pytest.raises(ValueError, match=r"batch_size \(0\) must be positive"):
        TextDataModule(path="a.txt", batch_size=0)
    with pytest.raises(ValueError, match=r"length \(0\) must be positive"):
        TextDataModule(path="a.txt", length=0)
    with pytest.raises(ValueError, match=r"text.txt: the text has 2001 tokens, fewer than one window of length 4000"):
        attached(tmp_path, path=text, length=4000).calibration_ids()
    with pytest.raises(ValueError, match=r"dataset 'no/such' .* could not be loaded"):
        attached(tmp_path, dataset="no/such").calibration_ids()


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def with_template(datamodule: TextDataModule, template: str | None) -> TextDataModule:
    datamodule.trainer.lightning_module.tokenizer.chat_template = template
    return datamodule


def test_a_text_shorter_than_asked_is_counted_with_how_often_its_tokens_count(tmp_path: Path) -> None:
    letters = torch.randint(97, 123, (2000,), generator=torch.Generator().manual_seed(0))
    text = tmp_path / "letters.txt"
    text.write_text("".join(map(chr, letters.tolist())))
    datamodule = attached(tmp_path, path=str(text), num_windows=20, length=400)
    ids_NL = datamodule.calibration_ids()
    ids_T = torch.tensor([*tiny_tokenizer().encode(text.read_text()), 0])
    starts = [next(i for i in range(2001) if torch.equal(ids_T[i : i + 400], window)) for window in ids_NL]
    counts = [sum(start <= token < start + 400 for start in starts) for token in range(2001)]
    average = 20 * 400 / sum(count > 0 for count in counts)
    expected = f"2001 tokens of text for 8000 asked: .* a token counts {average:.1f} times on average, {max(counts)} at"
    assert re.match(expected, told(datamodule)["calibration windows overlap"])
    enough = attached(tmp_path, path=str(text), num_windows=5, length=400)
    enough.calibration_ids()
    assert told(enough) == {}


def test_sequences_that_repeat_are_counted(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a" * 400)
    datamodule = attached(tmp_path, path=str(tmp_path / "one.txt"), num_windows=4, length=64)
    datamodule.calibration_ids()
    assert told(datamodule)["equal sequences"].startswith("3 of 4 repeat another one")


def test_windows_longer_than_the_positions_and_ids_beyond_the_vocabulary_are_refused(tmp_path: Path, text: str) -> None:
    long = attached(tmp_path, path=text, num_windows=1, length=1000)
    long.trainer.lightning_module.model.config = Qwen2MoeConfig(vocab_size=264, max_position_embeddings=512)
    with pytest.raises(ValueError, match=r"length \(1000\) must not exceed the 512 positions of the model; choose 512"):
        long.calibration_ids()
    small = attached(tmp_path, path=text, num_windows=1, length=10)
    small.trainer.lightning_module.model.config = Qwen2MoeConfig(vocab_size=50)
    with pytest.raises(
        ValueError, match=r"text\.txt has 10 ids that are no tokens of the model.*use the model's token"
    ):
        small.calibration_ids()


def test_chats_go_through_the_template_of_the_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": CHAT}) for _ in range(3)))
    given = {"path": str(path), "field": "messages", "num_windows": 1, "length": 30}
    ids_NL = with_template(attached(tmp_path, **given), TEMPLATE).calibration_ids()
    assert "hello<|endoftext|><user>hi<assistant>" in tiny_tokenizer().decode(ids_NL[0])
    with pytest.raises(ValueError, match=r"line 1: field 'messages' is a chat, and the tokenizer .* no chat template"):
        with_template(attached(tmp_path, **given), None).calibration_ids()
    picky = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"line 1: .* does not take \(roles must alternate\); leave it out"):
        with_template(attached(tmp_path, **given), picky).calibration_ids()
    with pytest.raises(ValueError, match=r"with a field 'text'; for its chats give the field messages"):
        attached(tmp_path, path=str(path), num_windows=1, length=30).calibration_ids()


def test_chats_of_a_data_set_are_documents_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"messages": [CHAT] * 3, "number": [1, 2, 3], "text": ["a", None, "c"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    given = {"dataset": "any", "num_windows": 1, "length": 30}
    ids_NL = with_template(attached(tmp_path, **given, field="messages"), TEMPLATE).calibration_ids()
    assert "hello<|endoftext|><user>hi<assistant>" in tiny_tokenizer().decode(ids_NL[0])
    with pytest.raises(ValueError, match=r"any: row 0, column 'number' is a int, not a text; leave such rows out"):
        attached(tmp_path, **given, field="number").calibration_ids()
    with pytest.raises(ValueError, match=r"any: row 1, column 'text' is null, not a text"):
        attached(tmp_path, **given).calibration_ids()
