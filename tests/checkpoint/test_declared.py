"""Tensors that files hold in float32 beside a model in bfloat16 keep it: in memory where the family computes with them,
in exports always."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from moeq.checkpoint.loading import load_model, stream_model
from moeq.export.stored import as_stored, declared_tensors
from moeq.models.blocks import visiting
from tests.families import SUPPORTED
from tests.tiny import save_tiny

IDS = torch.arange(3, 21).reshape(2, 9)
ENDINGS = (
    "gate.weight",
    "router.weight",
    "classifier.weight",
    "A_log",
    "dt_bias",
    "sinks",
    "_bias",
    ".D",
    "norm.weight",
)
# Added to scores, or a decay: rounded, they send tokens elsewhere.
BIASES = ("e_score_correction_bias", "expert_bias", "A_log", "dt_bias")


def save_with_float32(family: str, folder: Path) -> dict[str, Tensor]:
    """A tiny model in bfloat16 whose files hold small tensors and routers in float32, with values that need it."""
    path = save_tiny(family, folder) / "model.safetensors"
    generator, tensors = torch.Generator().manual_seed(3), load_file(path)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and key.endswith(ENDINGS):
            tensors[key] = tensor.float() + 1e-4 * torch.rand(tensor.shape, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("family", SUPPORTED)
@torch.no_grad()
def test_every_family_keeps_what_its_files_hold_in_float32(family: str, tmp_path: Path) -> None:
    files = save_with_float32(family, tmp_path)
    loaded = load_model(str(tmp_path))
    logits = loaded(IDS, use_cache=False).logits
    model, stream = stream_model(str(tmp_path))
    with visiting(stream.blocks, stream.resident):
        assert torch.equal(model(IDS, use_cache=False).logits, logits)
    assert logits.isfinite().all()
    for name, tensor in loaded.state_dict().items():
        if name.endswith(BIASES):
            assert tensor.dtype == torch.float32, name
    held = {name: as_stored(loaded, name, tensor) for name, tensor in loaded.state_dict().items()}
    declared = declared_tensors(loaded)
    assert all(held[name].dtype == declared[name].dtype for name in declared)
    exported = revert_weight_conversion(loaded, held)
    for key, tensor in files.items():
        assert exported[key].dtype == tensor.dtype, key
        assert torch.equal(exported[key], tensor), key


def test_a_router_that_changed_is_exported_as_it_is_in_memory(tmp_path: Path) -> None:
    save_with_float32("qwen3_moe", tmp_path)
    model = load_model(str(tmp_path), compute="float32")
    router = model.model.layers[0].mlp.gate
    router.weight.mul_(2)
    assert torch.equal(as_stored(model, "model.layers.0.mlp.gate.weight", router.weight), router.weight)


def test_an_asked_dtype_holds_for_everything(tmp_path: Path) -> None:
    save_with_float32("minimax_m2", tmp_path)
    model = load_model(str(tmp_path), "bfloat16")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert {declared.dtype for declared in declared_tensors(model).values()} == {torch.bfloat16}
