"""Files of runtimes: refused before the work, verified before they have their name, made of finished exports too."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moeq.export.compare import ExportMismatchError
from moeq.formats import __main__ as command
from moeq.formats import convert as module
from moeq.formats.convert import convert, find_format, proof
from moeq.formats.source import PackedExport
from moeq.quant.carrier import FORMATS
from tests.formats.packed import Tiny


@pytest.fixture
def export(tiny: Callable[..., Tiny]) -> Path:
    folder: Path = tiny("qwen2_moe", "3 bits").folder
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_the_command_writes_each_format_beside_the_export_and_says_how_to_serve_it(
    name: str, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(export), "--to", name, "--output", str(tmp_path / name), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert str(find_format(name).serve(tmp_path / name)) in said
    assert "equal bit for bit" in said
    assert any((tmp_path / name).iterdir())


def test_help_names_formats_and_carriers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in (*FORMATS, "exact", "native", "--overwrite"))


def test_a_folder_that_is_taken_is_refused_in_one_line(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("mine")
    assert command.main([str(export), "--to", "mlx", "--output", str(tmp_path), "--quiet"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("moeq: ")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_is_no_packed_export_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(tmp_path), "--to", "gguf", "--output", str(tmp_path / "out"), "--quiet"]) == 1
    assert "config.json" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"format \(onnx\) must be one of compressed-tensors, gguf, mlx, gptq"):
        find_format("onnx")


@pytest.mark.parametrize("step", ["write", "verify"])
def test_what_fails_leaves_nothing_and_keeps_what_was_there(
    step: str, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(export, "gptq", tmp_path / "gptq")
    before = {path.name: path.read_bytes() for path in (tmp_path / "gptq").iterdir()}

    def fail(*_: Any) -> Any:
        raise ExportMismatchError("weights differ")

    monkeypatch.setattr(module, "find_format", lambda name: replace(find_format(name), **{step: fail}))
    for target in ("gptq", "new"):
        with pytest.raises(ExportMismatchError):
            convert(export, "gptq", tmp_path / target, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gptq"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "gptq").iterdir()} == before


@pytest.mark.parametrize("name", FORMATS)
def test_half_written_and_damaged_files_never_stand_under_their_final_name(
    name: str, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = find_format(name)

    def full_disk(items: range, label: str) -> Iterator[int]:
        yield from items[:5]
        raise OSError(28, "No space left on device")

    def damaged(packed: PackedExport, folder: Path, *rest: Any) -> None:
        chosen.write(packed, folder, *rest)
        path = max(folder.iterdir(), key=lambda path: path.stat().st_size)
        octets = bytearray(path.read_bytes())
        octets[len(octets) // 2] ^= 0x40
        path.write_bytes(octets)

    with pytest.raises((OSError, ValueError), match="No space left"):
        convert(export, name, tmp_path / name, progress=full_disk)
    monkeypatch.setattr(module, "find_format", lambda name: replace(chosen, write=damaged))
    with pytest.raises(ValueError, match="export again"):
        convert(export, name, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_report_says_how_equal_the_values_are(export: Path, tmp_path: Path) -> None:
    report = convert(export, "gptq", tmp_path / "gptq")
    assert report.path.startswith(str(tmp_path / "gptq"))
    assert report.num_bytes == sum(path.stat().st_size for path in (tmp_path / "gptq").iterdir())
    assert proof(report).endswith("equal bit for bit")
    assert proof(replace(report, largest_error=0.03)).endswith("equal within 0.03 of a scale")
