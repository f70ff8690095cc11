"""Runs on processors with and without bfloat16 products: the same kind of files, nearly the same codes, never mixed."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moeq.export.moeq_format import read_quantized
from tests.evaluation_data import write_evaluation_data
from tests.test_main import fit, validate
from tests.tiny import save_tiny

MOEQUANT, TEXT, EVAL = (Path(f"configs/{name}.yaml") for name in ("moequant_w3", "gptq_text_w3", "eval"))
ROTATED = Path("configs/moequant_rotated_w4.yaml")


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("dtype") / "model")


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the same fit in both dtypes; on text, as self-sampled ids may differ."""
    folder = tmp_path_factory.mktemp("runs")
    for compute in ("stored", "float32"):
        many = ["--data.num_windows=48", "--data.length=64", "--model.damping=0.1"]
        fit(TEXT, model, folder / compute, f"--model.compute_dtype={compute}", *many)
    return {compute: folder / compute for compute in ("stored", "float32")}


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def dtypes(path: Path) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in load_file(path).items()}


def test_the_manifest_says_what_was_computed_in_and_what_the_files_hold(runs: dict[str, Path]) -> None:
    for compute, expected in (("stored", "bfloat16"), ("float32", "float32")):
        found = manifest(runs[compute])
        assert (found["dtype"], found["compute_dtype"]) == ("bfloat16", expected)
        assert found["fingerprint"]["compute dtype"] == expected
    assert manifest(runs["stored"])["fingerprint"]["model"] == manifest(runs["float32"])["fingerprint"]["model"]


def test_exports_hold_the_same_kind_of_values(runs: dict[str, Path]) -> None:
    for kind in ("export", "dense"):
        stored, wide = (dtypes(folder / kind / "model.safetensors") for folder in runs.values())
        assert stored == wide
        assert torch.float32 not in wide.values()
        configs = [json.loads((folder / kind / "config.json").read_text()) for folder in runs.values()]
        for config in configs:
            config.get("quantization_config", {}).pop("metadata", None)
        assert configs[0] == configs[1]


def test_the_dense_export_holds_exactly_the_dequantized_weights(runs: dict[str, Path]) -> None:
    packed, dense = (AutoModelForCausalLM.from_pretrained(runs["float32"] / kind) for kind in ("export", "dense"))
    dense.set_experts_implementation("eager")
    ids = torch.arange(24).view(2, 12)
    assert packed.dtype == dense.dtype == torch.bfloat16
    assert torch.equal(packed(input_ids=ids).logits, dense(input_ids=ids).logits)
    verification = json.loads((runs["float32"] / "verification.json").read_text())
    assert verification["checkpoint"]["logits_equal"]
    assert verification["dense"]["logits_equal"]


def share_of_other_codes(folders: dict[str, Path], ending: str = "") -> float:
    """Share of the codes that two exports have differently, of weights whose name ends so."""
    stored, wide = (read_quantized(folder / "export") for folder in folders.values())
    assert stored.keys() == wide.keys()
    names = [name for name in stored if name.endswith(ending)]
    different = sum(int((stored[name].codes_OI != wide[name].codes_OI).sum()) for name in names)
    return different / sum(stored[name].codes_OI.numel() for name in names)


def test_rounding_to_nearest_does_not_depend_on_the_dtype(model: Path, tmp_path: Path) -> None:
    for compute in ("stored", "float32"):
        fit(Path("configs/rtn_w3.yaml"), model, tmp_path / compute, f"--model.compute_dtype={compute}")
    stored, wide = ((tmp_path / c / "export/model.safetensors").read_bytes() for c in ("stored", "float32"))
    assert stored == wide


def test_both_dtypes_find_nearly_the_same_codes_and_errors(runs: dict[str, Path]) -> None:
    """Until something is quantized, inputs differ by one rounding; later what differs already moves more codes."""
    assert 0 < share_of_other_codes(runs, "layers.0.self_attn.q_proj") < 0.06
    assert share_of_other_codes(runs) < 0.15
    errors = []
    for folder in runs.values():
        rows = list(csv.DictReader((folder / "errors.csv").read_text().splitlines()))
        errors.append(torch.tensor([float(row["relative_error"]) for row in rows]))
    assert torch.isclose(errors[0].mean(), errors[1].mean(), rtol=0.02)


def test_a_run_is_not_continued_in_the_other_dtype(model: Path, tmp_path: Path) -> None:
    fit(TEXT, model, tmp_path / "run", "--model.compute_dtype=float32")
    for name in ("export", "dense"):
        (tmp_path / "run" / name).rename(tmp_path / name)
    with pytest.raises(SystemExit, match=r"blocks of a run with another compute dtype; .*--model.restart true"):
        fit(TEXT, model, tmp_path / "run", "--model.compute_dtype=stored")
    # What a processor chooses by itself counts, not how it was asked for.
    fit(TEXT, model, tmp_path / "run", "--model.compute_dtype=auto")
    assert (tmp_path / "run/export/model.safetensors").read_bytes() == (
        tmp_path / "export/model.safetensors"
    ).read_bytes()


def test_sampled_sequences_of_the_other_dtype_are_not_read(model: Path, tmp_path: Path) -> None:
    for compute in ("stored", "float32"):
        options = [f"--model.compute_dtype={compute}", f"--data.cache_dir={tmp_path / 'cache'}"]
        fit(MOEQUANT, model, tmp_path / compute, *options)
    assert len(list((tmp_path / "cache").glob("ebss-*.safetensors"))) == 2


@pytest.mark.parametrize("config", [MOEQUANT, ROTATED, Path("configs/moequant_awq_w4.yaml")])
def test_what_steps_change_besides_the_weights_is_rounded_to_the_files_dtype(
    config: Path, model: Path, tmp_path: Path
) -> None:
    fit(config, model, tmp_path, "--model.compute_dtype=float32")
    source = load_file(model / "model.safetensors")
    exported = load_file(tmp_path / "export/model.safetensors")
    changed = [n for n in source if n.endswith(("gate.weight", "norm.weight")) and not source[n].equal(exported[n])]
    assert changed
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16, torch.int32, torch.int64}
    assert json.loads((tmp_path / "verification.json").read_text())["checkpoint"]["logits_equal"]


def test_an_evaluation_says_its_dtype_and_does_not_mix_in_results_of_the_other(
    model: Path, tmp_path: Path, runs: dict[str, Path]
) -> None:
    data = write_evaluation_data(tmp_path / "data")
    options = [
        "--data.tasks=[sums]", "--data.domains={prose: wikitext2_test.txt}", "--data.window_length=64",
        "--data.num_windows=4", f"--data.data_dir={data}", f"--model.reference={model}", "--data.num_documents=8",
    ]  # fmt: skip
    found = {}
    for compute, expected in (("stored", "bfloat16"), ("float32", "float32")):
        chosen = [f"--model.compute_dtype={compute}", *options]
        found[compute] = validate(EVAL, runs["float32"] / "export", tmp_path / compute, *chosen)
        assert (found[compute]["dtype"], found[compute]["compute_dtype"]) == ("bfloat16", expected)
    assert found["stored"]["model"]["digest"] == found["float32"]["model"]["digest"]
    kls = [next(t for t in r["tasks"] if t["task"] == "prose")["metrics"]["kl"]["value"] for r in found.values()]
    assert kls[0] == pytest.approx(kls[1], rel=0.1)
    assert kls[0] != kls[1]
    again = ["--model.compute_dtype=stored", *options]
    other = validate(EVAL, runs["float32"] / "export", tmp_path / "float32", *again)
    for task, expected_task in zip(other["tasks"], found["stored"]["tasks"], strict=True):
        assert task["num_resumed"] == 0
        assert "compute_dtype: 'float32' -> 'bfloat16'" in task["notes"][0]
        assert task["metrics"] == expected_task["metrics"]
