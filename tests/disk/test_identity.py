"""A model is told from its files: a copy is the same model, a changed weight is another one."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moeq.disk import identity
from moeq.disk.identity import file_digest, folder_digest, model_identity
from tests.tiny import save_tiny


def large_file(path: Path, change: tuple[str, int] | None = None, num: int = 3_000_000) -> Path:
    tensors = {name: torch.arange(num, dtype=torch.float32) for name in ("a", "b")}
    tensors["small"] = torch.ones(5)
    if change is not None:
        tensors[change[0]][change[1]] = -1
    save_file(tensors, path)
    return path


def test_a_copy_is_the_same_model_and_a_changed_file_another(tmp_path: Path) -> None:
    folder = save_tiny("mixtral", tmp_path / "model")
    before = model_identity(str(folder))
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(tmp_path / "copy/model.safetensors", (1, 1))
    assert model_identity(str(tmp_path / "copy")) == before
    (folder / "README.md").write_text("a card")
    assert model_identity(str(folder)) == before
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 1'))
    assert model_identity(str(folder)) != before
    (folder / "config.json").write_text(config)
    assert model_identity(str(folder)) == before
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert model_identity(str(folder)) != before


def test_a_file_under_another_name_counts(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.safetensors").write_bytes(b"weights")
    assert folder_digest(tmp_path / "one") != folder_digest(tmp_path / "two")


def test_of_a_large_file_every_tensor_and_the_size_count(tmp_path: Path) -> None:
    before = file_digest(large_file(tmp_path / "w"))
    assert (tmp_path / "w").stat().st_size > identity.WHOLE_BYTES
    assert file_digest(large_file(tmp_path / "w")) == before
    # Each of three blocks of a tensor of 12 MB, and a tensor that is smaller than a block.
    for change in (("a", 0), ("b", 3), ("b", 1_000_000), ("a", 2_000_000), ("small", 4)):
        assert file_digest(large_file(tmp_path / "w", change)) != before, change
    assert file_digest(large_file(tmp_path / "w", num=3_000_001)) != before


def test_a_large_file_of_another_format_is_sampled(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    content = bytearray(b"PK\3\4" * 3_000_000)
    path.write_bytes(content)
    before = file_digest(path)
    content[4_000_000:8_100_000] = bytes(4_100_000)
    path.write_bytes(content)
    assert file_digest(path) != before


def test_a_hub_id_is_its_commit_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo, commit = tmp_path / "models--org--moe", "c" * 40
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    assert model_identity("org/moe") == f"org/moe@{commit}"
    (repo / "refs/old").write_text("d" * 40)
    shutil.copytree(repo / "snapshots" / commit, repo / "snapshots" / ("d" * 40))
    assert model_identity("org/moe", "old") == f"org/moe@{'d' * 40}"
    for absent in ("org/other", "no/such/folder"):
        with pytest.raises(ValueError, match=f"no model found at '{absent}'"):
            model_identity(absent)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no model files"):
        model_identity(str(tmp_path))
