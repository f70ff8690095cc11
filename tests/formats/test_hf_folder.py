"""What all folders have in common: files split as others split them, companions, a manifest, one piece at a time."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from moeq.disk.folder import INDEX, check_integrity
from moeq.disk.tensor_file import Declared
from moeq.export import layout
from moeq.formats.card import Card
from moeq.formats.convert import convert
from moeq.formats.hf_folder import Piece, fill_folder
from moeq.formats.source import open_packed
from tests.formats.packed import Tiny, config_of, logits_of, tensors_of

LIBRARIES = {"compressed-tensors": "transformers", "mlx": "mlx", "gptq": "gptqmodel"}
CARD = Card("mlx", "mlx", "Open it.", {"4 bits": 3})


def test_large_folders_are_several_files_with_an_index_and_open_as_one(
    tiny: Callable[..., Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny("qwen2_moe", "3 bits")
    monkeypatch.setattr(layout, "MAX_SHARD", "60KB")
    convert(made.folder, "compressed-tensors", tmp_path / "ct")
    files = sorted(path.name for path in (tmp_path / "ct").glob("*.safetensors"))
    index = json.loads((tmp_path / "ct" / INDEX).read_text())
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert index["weight_map"].keys() == tensors_of(tmp_path / "ct").keys()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.bfloat16)
    assert torch.equal(logits_of(opened), logits_of(made.model))


@pytest.mark.parametrize("name", ["compressed-tensors", "mlx", "gptq"])
def test_a_folder_has_companions_a_card_and_a_manifest_of_its_files(
    name: str, tiny: Callable[..., Tiny], tmp_path: Path
) -> None:
    made = tiny("qwen2_moe", "3 bits")
    report = convert(made.folder, name, tmp_path / name)
    check_integrity(tmp_path / name)
    manifest = json.loads((tmp_path / name / "moeq_manifest.json").read_text())
    assert (manifest["kind"], manifest["metadata"]["seed"]) == (name, 1)
    companions = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert companions <= manifest["files"].keys()
    card = (tmp_path / name / "README.md").read_text()
    assert f"| {name} | {', '.join(f'{n} weights as {kind}' for kind, n in report.types.items())} |" in card
    assert ModelCard.load(tmp_path / name / "README.md").data.library_name == LIBRARIES[name]
    assert "moeq.checkpoint.quantizer" not in card
    assert "do not open it" not in card
    assert report.num_bytes == sum(path.stat().st_size for path in (tmp_path / name).iterdir())
    source = config_of(made.folder.parent / "source")
    assert source.items() <= config_of(tmp_path / name).items()


def test_pieces_are_made_one_after_another_and_no_key_twice(tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    export = open_packed(tiny("qwen2_moe", "3 bits").folder)
    alive: list[int] = []

    def make(index: int) -> dict[str, torch.Tensor]:
        alive.append(index)
        return {f"tensor.{index}": torch.full((2,), float(index))}

    def pieces(names: list[int]) -> list[Piece]:
        return [Piece({f"tensor.{i}": Declared(torch.float32, (2,))}, lambda i=i: make(i)) for i in names]

    seen = []
    (tmp_path / "once").mkdir()

    def progress(items: range, label: str) -> object:
        for item in items:
            seen.append((label, item, len(alive)))
            yield item

    fill_folder(export, tmp_path / "once", pieces([0, 1, 2]), {}, CARD, progress)
    assert seen == [("writing", i, i) for i in range(3)]
    assert {key: tensor[0].item() for key, tensor in tensors_of(tmp_path / "once").items()} == {
        f"tensor.{i}": float(i) for i in range(3)
    }
    (tmp_path / "twice").mkdir()
    with pytest.raises(ValueError, match=r"tensor\.1 would be written twice"):
        fill_folder(export, tmp_path / "twice", pieces([1, 1]), {}, CARD, progress)
