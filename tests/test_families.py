"""Every supported family goes through fit, packed checkpoint and reload in a fresh process, with equal logits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from moeq.export.checkpoint import read_quantized
from tests.test_main import fit
from tests.tiny import save_tiny

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "olmoe")
RELOAD = """
import sys, torch
import moeq.export.quantizer
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder + "/export")
    torch.save(model(torch.arange(1, 60).reshape(1, -1)).logits, folder + "/reloaded.pt")
"""


def mixed_plan(model: Path, folder: Path) -> Path:
    """A configuration in which experts of one block have 2, 3, 4 and 8 bits, from the plan of an RTN run."""
    fit(Path("configs/rtn_w3.yaml"), model, folder)
    plan = json.loads((folder / "allocation.json").read_text())
    for index, grid in enumerate(plan["weights"].values()):
        grid["bits"] = (2, 3, 4, 8)[index % 4]
    (folder / "mixed.json").write_text(json.dumps(plan))
    config = yaml.safe_load(Path("configs/moequant_w3.yaml").read_text())
    allocation = next(c for c in config["trainer"]["callbacks"] if c["class_path"].endswith("BitAllocation"))
    allocation["init_args"] = {"plan": str(folder / "mixed.json")}
    path = folder / "moequant_mixed.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders by family: MoEQuant with mixed bits; then all exports reloaded in one fresh process."""
    folders = {}
    for family in FAMILIES:
        base = tmp_path_factory.mktemp(family)
        model = save_tiny(family, base / "model")
        fit(mixed_plan(model, base / "rtn"), model, base / "run")
        folders[family] = base / "run"
    command = [sys.executable, "-c", RELOAD, *map(str, folders.values())]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()})
    return folders


@pytest.mark.parametrize("family", FAMILIES)
def test_reloaded_in_a_fresh_process_gives_the_logits_of_the_dense_export(
    family: str, quantized: dict[str, Path]
) -> None:
    folder = quantized[family]
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense", experts_implementation="eager")
    # Parameters mapped from the file are not aligned, which may change the order of float32 sums.
    for parameter in dense.parameters():
        parameter.data = parameter.data.clone()
    logits = dense(torch.arange(1, 60).reshape(1, -1)).logits
    assert torch.equal(torch.load(folder / "reloaded.pt"), logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_is_quantized_with_its_bits_and_no_expert_is_lost(family: str, quantized: dict[str, Path]) -> None:
    folder = quantized[family]
    plan = json.loads((folder / "allocation.json").read_text())["weights"]
    weights = read_quantized(folder / "export")
    assert {name: weight.bits for name, weight in weights.items()} == {n: grid["bits"] for n, grid in plan.items()}
    assert {weight.bits for weight in weights.values()} == {2, 3, 4, 8}
    for name, weight in weights.items():
        assert weight.codes_OI.unique().numel() > 2, f"{name} is constant"


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_gates_embeddings_and_norms_stay_as_they_are(family: str, quantized: dict[str, Path]) -> None:
    folder = quantized[family]
    original = AutoModelForCausalLM.from_pretrained(folder.parent / "model").state_dict()
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense").state_dict()
    kept = ("mlp.gate.", "shared_expert_gate", "norm", "embed", "lm_head")
    assert sum(any(part in name for part in kept) for name in original) > 5
    for name, tensor in original.items():
        if any(part in name for part in kept):
            assert torch.equal(tensor, dense[name]), name
