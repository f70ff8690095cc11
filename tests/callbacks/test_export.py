"""What an export says of itself, and that nothing that happens to it shows in its files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeq.disk.folder import check_integrity
from moeq.export.layout import LayoutWriter
from tests.test_main import fit, validate
from tests.tiny import save_tiny

RTN = Path("configs/rtn_w3.yaml")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("export") / "model")


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never interrupted; tests change copies only."""
    folder = tmp_path_factory.mktemp("export") / "run"
    fit(RTN, source, folder)
    return folder


def exported(folder: Path) -> dict[str, bytes]:
    """Every file of both exports but the manifests, which hold times."""
    paths = [path for kind in ("export", "dense") for path in (folder / kind).iterdir()]
    return {f"{p.parent.name}/{p.name}": p.read_bytes() for p in paths if p.name != "moeq_manifest.json"}


def stop_at(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """End the process, as a user does, when a function is called for the ``call``-th time."""
    original, calls = getattr(owner, name), []

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    patch.setattr(owner, name, stopping)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "call"), [("compare", 1), ("write", 5), ("compare", 2)])
def test_an_export_that_was_stopped_anywhere_ends_with_the_same_bytes(
    name: str, call: int, source: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moeq.export import verify

    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("export", "dense"))
    with monkeypatch.context() as patch:
        owner, function = (LayoutWriter, "write") if name == "write" else (verify, "_compare_logits")
        stop_at(patch, owner, function, call)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(RTN, source, folder)
    assert not [name for name in ("export", "dense") if (folder / name).exists()], "neither is accounted for"
    assert not list(folder.glob(".*.partial"))
    fit(RTN, source, folder)
    assert exported(folder) == exported(run)


@pytest.mark.slow
def test_what_validate_measures_of_an_export_is_in_its_card(source: Path, run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "export", tmp_path / "export")
    (tmp_path / "prose.txt").write_text("A short text about lakes and pikes.\n" * 8)
    few = [
        f"--model.reference={source}", f"--data.data_dir={tmp_path}", '--data.domains={"prose": "prose.txt"}',
        "--data.num_windows=2", "--data.window_length=32", "--data.tasks=null",
    ]  # fmt: skip
    for _ in range(2):  # the second finds the model unchanged, and its documents finished
        validate(Path("configs/eval.yaml"), folder, tmp_path / "eval", *few)
    card = (folder / "README.md").read_text()
    quality = card.partition("## Quality")[2].partition("## How it was made")[0]
    assert "| prose" in quality
    assert "beside `model`" in quality
    assert quality.count("By `validate`") == 1
    check_integrity(folder)


@pytest.mark.parametrize("gap", [0.0, 3e-6])
def test_logits_that_are_equal_up_to_rounding_alone_are_on_record(
    gap: float, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeq.export.verify._compare_logits", lambda *_: (gap == 0.0, gap))
    fit(RTN, source, tmp_path / "run")
    records = json.loads((tmp_path / "run/fallbacks.json").read_text())
    found = [record["weight"] for record in records if record["reason"] == "logits equal up to rounding"]
    assert found == (["checkpoint", "dense"] if gap else [])


def with_formats(folder: Path, group_size: int, *formats: str) -> Path:
    """The configuration of rounding to nearest, symmetric, with formats of runtimes."""
    config = yaml.safe_load(RTN.read_text())
    config["model"] |= {"group_size": group_size, "symmetric": True}
    for each in config["trainer"]["callbacks"]:
        if each["class_path"] == "Export":
            each["init_args"] = {"formats": ["moeq", *formats]}
    path = folder / f"rtn_{group_size}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_run_ends_with_verified_files_of_runtimes_and_the_commands_that_serve_them(
    source: Path, tmp_path: Path
) -> None:
    fit(with_formats(tmp_path, 32, "gguf", "mlx"), source, tmp_path / "run", "--model.group_size=32")
    verification = json.loads((tmp_path / "run/verification.json").read_text())
    plan = json.loads((tmp_path / "run/allocation.json").read_text())
    for name in ("gguf", "mlx"):
        assert verification[name]["num_quantized"] == len(plan["weights"])
        assert verification[name]["largest_error"] == 0.0
        assert verification[name]["path"].startswith(str(tmp_path / "run" / name))
    assert verification["gguf"]["types"]["Q4_0"] == len(plan["weights"])
    summary = (tmp_path / "run/summary.md").read_text()
    assert f"llama-server -m {tmp_path / 'run/gguf/model.gguf'}" in summary
    assert f"--model {tmp_path / 'run/mlx'}" in summary
    assert not (tmp_path / "run/dense").exists()


def test_a_plan_that_a_format_cannot_hold_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    config = with_formats(tmp_path, 16, "gguf")
    with pytest.raises(SystemExit, match=r"moeq: .*gguf.*groups that are multiples of 32"):
        fit(config, source, tmp_path / "run", "--model.group_size=16")
    assert not list((tmp_path / "run").glob("[!.l]*"))
