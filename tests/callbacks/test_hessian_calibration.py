"""The bound on Hessians changes the passes of a run and nothing else."""

import json
from pathlib import Path

import pytest
import yaml

from tests.fit.test_resume import arguments
from tests.processes import TWO_RANKS, run
from tests.test_main import fit
from tests.tiny import save_tiny

# Three experts of 64 in features: 8 * 64^2 * (3 + 1) + 4 * 64^2 * 3 bytes.
THREE_EXPERTS = f"--model.hessian_gib={180224 / 2**30}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration and solve alone: finished blocks hold the quantized weights."""
    content = yaml.safe_load(Path("configs/gptq_text_w3.yaml").read_text())
    callbacks = content["trainer"]["callbacks"]
    content["trainer"]["callbacks"] = [c for c in callbacks if not c["class_path"].endswith(("Export", "Figures"))]
    content["model"]["affinity_power"] = 1.0
    path = tmp_path_factory.mktemp("config") / "solve_alone.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def results(folder: Path) -> dict[str, bytes]:
    """Every file of a run that says something about its weights."""
    names = ("errors.csv", "expert_usage.json", "allocation.json", "blocks/block_000.safetensors")
    return {name: (folder / name).read_bytes() for name in (*names, "blocks/block_001.safetensors")}


@pytest.mark.parametrize(
    "option",
    [
        "sequential=stage",
        pytest.param("sequential=block", marks=pytest.mark.slow),
        pytest.param("routing=all_experts", marks=pytest.mark.slow),
    ],
)
def test_a_bound_that_cuts_the_experts_gives_the_same_bytes(
    option: str, config: Path, model: Path, tmp_path: Path
) -> None:
    fit(config, model, tmp_path / "whole", f"--model.{option}")
    fit(config, model, tmp_path / "cut", f"--model.{option}", THREE_EXPERTS)
    assert results(tmp_path / "whole") == results(tmp_path / "cut")
    passes = json.loads((tmp_path / "cut/manifest.json").read_text())["seconds"]
    assert any("(2 of" in label for label in passes)


@pytest.mark.slow
def test_with_all_experts_none_has_few_tokens_and_gate_and_up_share_one_hessian(
    config: Path, model: Path, tmp_path: Path
) -> None:
    reasons = {}
    for routing in ("routed", "all_experts"):
        fit(config, model, tmp_path / routing, f"--model.routing={routing}", "--data.num_windows=8")
        records = json.loads((tmp_path / routing / "fallbacks.json").read_text())
        reasons[routing] = {record["reason"] for record in records if ".experts." in record["weight"]}
    assert "few calibration tokens" in reasons["routed"]
    assert not {"few calibration tokens", "no calibration tokens"} & reasons["all_experts"]
    usage = [(tmp_path / routing / "expert_usage.json").read_text() for routing in reasons]
    # The first block's experts are routed to on the same inputs.
    assert json.loads(usage[0])["model.layers.0.mlp.experts"] == json.loads(usage[1])["model.layers.0.mlp.experts"]


@pytest.mark.slow
def test_two_ranks_in_chunks_give_the_bytes_of_two_ranks(config: Path, model: Path, tmp_path: Path) -> None:
    two = [*TWO_RANKS, "--data.batch_size=1"]
    for name, options in (("whole", []), ("cut", [THREE_EXPERTS])):
        done = run([*arguments(config, model, tmp_path / name), *two, *options])
        assert done.returncode == 0, done.stderr
    assert results(tmp_path / "whole") == results(tmp_path / "cut")


@pytest.mark.slow
def test_a_run_may_continue_with_another_bound(config: Path, model: Path, tmp_path: Path) -> None:
    fit(config, model, tmp_path)
    whole = results(tmp_path)
    (tmp_path / "blocks/block_001.safetensors").unlink()
    fit(config, model, tmp_path, THREE_EXPERTS)
    assert results(tmp_path) == whole
