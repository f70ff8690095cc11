"""Memory that is given back."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from moeq.checkpoint.packed import IMPLEMENTATION
from moeq.checkpoint.release import leave_files
from moeq.export.moeq_format import write_checkpoint
from tests.export.rounding import round_model
from tests.tiny import tiny_model

MAPS = Path("/proc/self/maps")
linux = pytest.mark.skipif(sys.platform != "linux", reason="what is mapped is known on Linux alone")


@linux
def test_tensors_of_files_are_copied_and_others_stay_where_they_are(tmp_path: Path) -> None:
    values = {"weight": torch.randn(64, 32), "bias": torch.randn(64)}
    save_file(values, tmp_path / "layer.safetensors")
    layer = nn.Linear(32, 64)
    with safe_open(tmp_path / "layer.safetensors", "pt") as file:
        layer.weight = nn.Parameter(file.get_tensor("weight"))
    own = layer.bias.data_ptr()
    assert str(tmp_path) in MAPS.read_text()
    leave_files(layer)
    assert str(tmp_path) not in MAPS.read_text()
    assert torch.equal(layer.weight, values["weight"])
    assert layer.weight.requires_grad
    assert layer.bias.data_ptr() == own


@linux
def test_a_prepared_model_lets_its_files_go(tmp_path: Path) -> None:
    model = tiny_model("mixtral", dtype=torch.bfloat16)
    write_checkpoint(model, None, round_model(model), tmp_path / "export", metadata={})
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "export", experts_implementation=IMPLEMENTATION)
    assert str(tmp_path) not in MAPS.read_text()
    assert torch.equal(packed.lm_head.weight, model.lm_head.weight)
