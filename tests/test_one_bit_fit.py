"""A fit in which some weights get one bit: solved, learned, exported and read back as others are, or refused early."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM

from callbacks.bit_allocation import BitAllocation
from callbacks.export import Export
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from callbacks.hqq import HQQ
from callbacks.learned_rounding import LearnedRounding
from moeq.allocation.patterns import Pattern
from moeq.export.moeq_format import read_quantized
from moeq.module import MoEQuantModule
from tests.own_fit import fit_own
from tests.two_level import save_wide

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
SIGNS = (Pattern("*.experts.*.gate_proj", bits=1, group_size=128), Pattern("*.self_attn.*", bits=1))


def fit(steps: list[Callback], model: Path, folder: Path) -> MoEQuantModule:
    return fit_own(steps, model, folder, bits=3, group_size=32)


def test_weights_of_one_bit_are_solved_learned_exported_and_opened_with_the_same_values(tmp_path: Path) -> None:
    model = save_wide(tmp_path / "model")
    steps = [BitAllocation(patterns=list(SIGNS)), HessianCalibration(), GPTQ(), LearnedRounding(num_steps=3)]
    module = fit([*steps, Export(formats=["moeq", "gguf", "mlx"])], model, tmp_path / "run")
    quantized = read_quantized(tmp_path / "run/export")
    signs = {name: weight for name, weight in quantized.items() if weight.bits == 1}
    assert {weight.bits for weight in quantized.values()} == {1, 3}
    assert {name.rpartition(".")[2] for name in signs} == {"gate_proj", "q_proj", "k_proj", "v_proj", "o_proj"}
    report = json.loads((tmp_path / "run/verification.json").read_text())
    assert report["checkpoint"]["logits_equal"]
    assert report["gguf"]["largest_error"] == report["mlx"]["largest_error"] == 0.0
    assert report["gguf"]["types"]["Q1_0"] == sum("gate_proj" in name for name in signs)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export", dtype=torch.float32)
    weight_OI = opened.model.layers[1].self_attn.o_proj.weight
    for row_I in weight_OI[:4]:
        for group_S in row_I.split(32):
            assert len(set(group_S.abs().tolist())) == 1
    errors = {row["weight"]: row["relative_error"] for row in module.run.errors}
    # One bit keeps the sign and the mean size: 1 - 2 / pi of the energy of Gaussian weights is lost, less with GPTQ.
    assert all(0.01 < errors[name] < 0.45 for name in signs)


def test_one_bit_is_refused_by_hqq_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"HQQ needs 2 bits at least, and .*gate_proj is to have 1; use RTN or GPTQ"):
        fit([BitAllocation(patterns=list(SIGNS[:1])), HQQ()], save_wide(tmp_path / "model"), tmp_path / "run")
    assert not (tmp_path / "run/blocks").exists()
