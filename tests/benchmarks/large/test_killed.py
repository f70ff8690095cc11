"""Run folders are compared byte for byte, but for times; what a killed run had done is read off its folder."""

import json
from pathlib import Path

import pytest

from benchmarks.large.killed import differing_files, has_ended, phase_of, without_seconds


def folder(path: Path, seconds: float = 1.0, weights: bytes = b"weights", blocks: bytes = b"codes") -> Path:
    for name in ("blocks", "export"):
        (path / name).mkdir(parents=True)
    (path / "blocks/block_000.safetensors").write_bytes(blocks)
    (path / "export/model.safetensors").write_bytes(weights)
    config = {"hidden_size": 64, "quantization_config": {"bits": 4, "metadata": {"seconds": seconds}}}
    (path / "export/config.json").write_text(json.dumps(config))
    files = {"config.json": {"sha256": f"of {seconds}"}, "model.safetensors": {"sha256": "same"}}
    (path / "export/moeq_manifest.json").write_text(json.dumps({"metadata": {"seconds": seconds}, "files": files}))
    (path / "errors.csv").write_text("weight\n")
    (path / "manifest.json").write_text(json.dumps({"seconds": {"export": seconds}}))
    return path


def test_times_do_not_count_and_bytes_do(tmp_path: Path) -> None:
    one = folder(tmp_path / "one")
    assert differing_files(one, folder(tmp_path / "slower", seconds=2.0)) == []
    assert differing_files(one, folder(tmp_path / "weights", weights=b"others")) == ["export/model.safetensors"]
    assert differing_files(one, folder(tmp_path / "blocks", blocks=b"others")) == ["blocks/block_000.safetensors"]


def test_a_file_of_one_folder_alone_differs(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "one"), folder(tmp_path / "other")
    (other / "errors.csv").unlink()
    (other / "export/added.json").write_text("{}")
    assert differing_files(one, other) == ["errors.csv", "export/added.json"]


def test_seconds_are_left_out_at_any_depth() -> None:
    assert without_seconds({"seconds": 1, "a": [{"seconds": 2, "b": 3}], "c": "seconds"}) == {
        "a": [{"b": 3}], "c": "seconds"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("files", "phase", "ended"),
    [
        ([], "0 blocks", False),
        (["blocks/block_000.safetensors"], "1 blocks", False),
        (["blocks/block_000.safetensors", "export.unfinished"], "1 blocks, exporting", False),
        (["export.unfinished", "export/config.json"], "0 blocks, exporting, export/ written", False),
        (["export.unfinished", "verification.json"], "exports were verified", False),
        (["export.unfinished", "verification.json", "manifest.json"], "all was written", False),
        (["verification.json", "manifest.json"], "all was written", True),
    ],
)
def test_phases_are_read_off_a_folder(files: list[str], phase: str, ended: bool, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert phase_of(tmp_path) == phase
    assert has_ended(tmp_path) == ended
