"""Files of a source that are no weights arrive in its exports byte by byte."""

import hashlib
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from moeq.checkpoint.loading import load_model
from moeq.export import companions as module
from moeq.export.companions import companions, copy_companions
from moeq.export.dense import write_dense
from moeq.export.finished import held
from moeq.export.moeq_format import write_checkpoint
from moeq.export.origin import Origin
from moeq.export.source_report import source_fallbacks
from tests.export.rounding import round_model
from tests.tiny import save_tiny, tiny_tokenizer

# Names of a real repository: what is copied, and what is not.
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "LICENSE", "NOTICE.txt", "configuration_x.py", "modeling_x.py", "inference/model.py",
    "additional_chat_templates/tools.jinja", "figures/plot.png", "tiktoken.model",
)  # fmt: skip
LEFT = (
    "config.json", "README.md", "model.safetensors.index.json", "pytorch_model.bin.index.json", "moeq_manifest.json",
    "model-00001-of-00002.safetensors", "pytorch_model.bin", "consolidated.00.pth", "model.gguf", ".gitattributes",
    ".cache/huggingface/token", "original/params.json", "original/consolidated.00.pth", "onnx/model.onnx",
    "tf_model.h5", "export/config.json", "export/tokenizer.json", "flax_model.msgpack",
)  # fmt: skip


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_names_of_a_repository_are_told_apart(tmp_path: Path) -> None:
    for name in (*COPIED, *LEFT):
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    copy_companions(tmp_path / "source", tmp_path / "copy")
    found = {
        path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*") if path.is_file()
    }
    assert found == set(COPIED)


def test_links_as_in_the_cache_of_the_hub_are_followed(tmp_path: Path) -> None:
    for name in ("blobs", "snapshot", "copy"):
        (tmp_path / name).mkdir()
    (tmp_path / "blobs/abc").write_text("merges")
    (tmp_path / "snapshot/merges.txt").symlink_to("../blobs/abc")
    copy_companions(tmp_path / "snapshot", tmp_path / "copy")
    assert not (tmp_path / "copy/merges.txt").is_symlink()
    assert (tmp_path / "copy/merges.txt").read_text() == "merges"


def test_a_large_file_is_left_out_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 3)
    (tmp_path / "small.txt").write_text("abc")
    (tmp_path / "large.dat").write_text("abcd")
    assert [path.name for path in companions(tmp_path)[0]] == ["small.txt"]
    (report,) = source_fallbacks(Origin(tmp_path))
    assert (report.weight, report.reason) == ("large.dat", "large file of the source left out")


def test_a_run_folder_below_the_source_is_not_copied_into_itself(tmp_path: Path) -> None:
    (tmp_path / "merges.txt").write_text("")
    folder = tmp_path / "run/.export.partial"
    folder.mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text("")
    copy_companions(tmp_path, folder)
    assert [path.name for path in folder.iterdir()] == ["merges.txt"]


def test_both_exports_have_the_files_of_their_source(tmp_path: Path) -> None:
    folder = save_tiny("qwen3_moe", tmp_path / "model")
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast") + "\n\n")
    (folder / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": [0, 5]}')
    (folder / "LICENSE").write_text("Apache-2.0")
    model = load_model(str(folder))
    quantized = round_model(model)
    write_dense(held(model), None, tmp_path / "dense")
    write_checkpoint(model, None, quantized, tmp_path / "packed", metadata={})
    names = {path.name for path in folder.iterdir()} - {"config.json", "model.safetensors"}
    assert {"LICENSE", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    for kind in ("dense", "packed"):
        assert {name: sha256(tmp_path / kind / name) for name in names} == {n: sha256(folder / n) for n in names}
        assert AutoTokenizer.from_pretrained(tmp_path / kind)("a").input_ids == tiny_tokenizer()("a").input_ids
