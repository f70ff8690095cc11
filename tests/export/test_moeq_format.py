import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeq.disk.folder import MANIFEST, atomic_folder
from moeq.export import layout
from moeq.export.moeq_format import check_integrity, read_quantized, write_checkpoint
from moeq.quant.spec import QuantizedWeight
from tests.export.rounding import real_weight, round_model
from tests.tiny import tiny_model, tiny_tokenizer

FAMILIES = {
    "qwen2_moe": torch.bfloat16,
    "mixtral": torch.float32,
    "qwen3_moe": torch.bfloat16,
    "deepseek_v3": torch.float32,
    "olmoe": torch.bfloat16,
}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, dict[str, QuantizedWeight], Path]]:
    """Dense model, codes and packed checkpoint of each family; tests change copies only."""
    root = tmp_path_factory.mktemp("exports")
    made = {}
    for family, dtype in FAMILIES.items():
        model = tiny_model(family, dtype=dtype)
        quantized = round_model(model)
        write_checkpoint(model, tiny_tokenizer(), quantized, root / family, metadata={"seed": 7})
        made[family] = (model, quantized, root / family)
    return made


@pytest.fixture
def small(tmp_path: Path) -> tuple[nn.Module, dict[str, QuantizedWeight], Path]:
    model = tiny_model("mixtral", num_hidden_layers=1)
    quantized = round_model(model)
    return model, quantized, tmp_path / "export"


def write(small: tuple[nn.Module, dict[str, QuantizedWeight], Path], **arguments: object) -> Path:
    model, quantized, folder = small
    write_checkpoint(model, None, quantized, folder, metadata={}, **arguments)
    return folder


@pytest.mark.slow
def test_a_fresh_process_gets_the_logits_of_the_dense_model(exports: dict, tmp_path: Path) -> None:
    ids = torch.randint(0, 264, (2, 19))
    torch.save(ids, tmp_path / "ids.pt")
    folders = [str(folder) for _, _, folder in exports.values()]
    script = str(Path(__file__).with_name("reload.py"))
    command = [sys.executable, script, str(tmp_path / "ids.pt"), *folders]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    for model, _, folder in exports.values():
        model.set_experts_implementation("eager")
        reloaded = torch.load(folder.with_name(f"{folder.name}.logits.pt"))
        assert torch.equal(model(input_ids=ids).logits, reloaded), folder.name


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_are_read_back_as_they_were_written(exports: dict, family: str) -> None:
    _, quantized, folder = exports[family]
    read = read_quantized(folder)
    assert set(read) == set(quantized)
    for name, weight in quantized.items():
        assert torch.equal(read[name].codes_OI, weight.codes_OI)
        assert torch.equal(read[name].scale_OG, weight.scale_OG)
        assert torch.equal(real_weight(read[name]), real_weight(weight))
        assert (read[name].bits, read[name].group_size) == (weight.bits, weight.group_size)


def test_files_use_the_names_the_family_was_published_with(exports: dict) -> None:
    keys = {family: set(load_file(folder / "model.safetensors")) for family, (_, _, folder) in exports.items()}
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight_packed" in keys["mixtral"]
    assert "model.layers.0.block_sparse_moe.gate.weight" in keys["mixtral"]
    assert not any("gate_proj" in key or ".mlp." in key for key in keys["mixtral"])
    for family in ("qwen2_moe", "qwen3_moe", "deepseek_v3", "olmoe"):
        assert "model.layers.1.mlp.experts.3.gate_proj.weight_packed" in keys[family]
        assert not any("gate_up_proj" in key for key in keys[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_is_saved_again_with_the_same_tensors(exports: dict, family: str, tmp_path: Path) -> None:
    _, quantized, folder = exports[family]
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    first, second = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    check_integrity(tmp_path)
    assert set(read_quantized(tmp_path)) == set(quantized)


def test_the_report_counts_what_is_on_disk(exports: dict, tmp_path: Path) -> None:
    model, quantized, _ = exports["qwen2_moe"]
    report = write_checkpoint(model, tiny_tokenizer(), quantized, tmp_path / "a", metadata={"note": "b"})
    files = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    assert report.num_files == len(files)
    assert report.bytes_total == sum(path.stat().st_size for path in files)
    assert report.num_tensors == len(tensors)
    assert report.num_quantized == len(quantized)
    assert report.bytes_quantized == sum(t.nbytes for key, t in tensors.items() if key.endswith(parts))
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    assert manifest["metadata"] == {"note": "b"}
    assert set(manifest["files"]) == {path.name for path in files} - {MANIFEST, "README.md"}
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "moeq"
    assert config["quantization_config"]["metadata"] == {"note": "b"}
    assert AutoTokenizer.from_pretrained(tmp_path / "a").decode([5]) == tiny_tokenizer().decode([5])


def test_the_model_that_was_exported_is_not_changed(small: tuple) -> None:
    model, _, _ = small
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write(small)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert getattr(model.config, "quantization_config", None) is None


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", tie_word_embeddings=True)
    write_checkpoint(model, None, round_model(model), tmp_path / "a", metadata={})
    keys = set(load_file(tmp_path / "a" / "model.safetensors"))
    assert "model.embed_tokens.weight" in keys
    assert "lm_head.weight" not in keys
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight


def test_large_checkpoints_are_split(small: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_SHARD", "40KB")
    folder = write(small)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert set(read_quantized(folder)) == set(small[1])
    next(folder.glob("model-00002-of-*.safetensors")).unlink()
    (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-.*missing, truncated or damaged"):
        check_integrity(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [("flip", "SHA-256 .* content changed"), ("truncate", r"bytes where the manifest says"), ("delete", "missing|no")],
)
def test_damage_is_named(small: tuple, name: str, damage: str, message: str) -> None:
    path = write(small) / name
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif damage == "truncate":
        path.write_bytes(content[:-8])
    else:
        path.unlink()
    with pytest.raises(ValueError, match=message) as error:
        read_quantized(path.parent)
    assert name in str(error.value)


def test_truncation_is_found_without_a_manifest(small: tuple) -> None:
    folder = write(small)
    (folder / MANIFEST).unlink()
    check_integrity(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors has .* truncated"):
        check_integrity(folder)


def test_an_existing_folder_is_refused_and_left_alone(small: tuple) -> None:
    folder = small[2]
    folder.mkdir()
    write(small)  # an empty folder is no obstacle
    (folder / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"exists and is not empty; choose another folder, or set overwrite"):
        write(small)
    assert (folder / "mine.txt").read_text() == "kept"
    write(small, overwrite=True)
    assert not (folder / "mine.txt").exists()
    check_integrity(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_a_failure_leaves_the_old_folder_and_nothing_else(small: tuple) -> None:
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError("disk full")

    model, quantized, folder = small
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(model, Broken(), quantized, folder, metadata={})
    assert list(folder.parent.iterdir()) == []
    write(small)
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(model, Broken(), quantized, folder, metadata={}, overwrite=True)
    check_integrity(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_what_a_killed_run_left_behind_is_cleaned_up(small: tuple) -> None:
    folder = write(small)
    partial, previous = (folder.with_name(f".export.{state}") for state in ("partial", "previous"))
    partial.mkdir()
    folder.rename(previous)  # killed between moving the old folder away and moving the new one in
    with pytest.raises(ValueError, match="exists and is not empty"), atomic_folder(folder):
        pass
    check_integrity(folder)
    write(small, overwrite=True)
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_codes_that_do_not_belong_to_the_model_are_refused(small: tuple) -> None:
    model, quantized, folder = small
    name, weight = next(iter(quantized.items()))
    wrong = {
        "model.layers.7.self_attn.q_proj": ("is not a linear of Mixtral", weight),
        name: ("the weight is torch.float32", replace(weight, scale_OG=weight.scale_OG.half())),
        "model.layers.0.mlp.experts.0.up_proj": (r"have shape \(3, 3\)", replace(weight, codes_OI=torch.zeros(3, 3))),
    }
    for key, (message, value) in wrong.items():
        with pytest.raises(ValueError, match=message):
            write_checkpoint(model, None, {key: value}, folder, metadata={})
    too_high = replace(weight, codes_OI=torch.full_like(weight.codes_OI, 200))
    with pytest.raises(ValueError, match=r"has code 200, but \d bits hold at most"):
        write_checkpoint(model, None, {name: too_high}, folder, metadata={})
    with pytest.raises(ValueError, match="no weight is quantized"):
        write_checkpoint(model, None, {}, folder, metadata={})
    assert list(folder.parent.iterdir()) == []


def test_a_family_that_cannot_be_expressed_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.get_submodule("model.layers.0.mlp.experts").has_post_expert_norm = True
    with pytest.raises(ValueError, match=r"mixtral is not supported because .* has a norm after each expert"):
        write_checkpoint(model, None, {}, tmp_path / "a", metadata={})
    assert list(tmp_path.iterdir()) == []


def test_a_dense_folder_is_not_a_packed_checkpoint(tmp_path: Path) -> None:
    tiny_model("olmoe", num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a packed checkpoint of moeq"):
        read_quantized(tmp_path)
