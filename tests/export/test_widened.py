"""A model that computes in float32 exports files of the dtype that it came from, and they are what was evaluated."""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from moeq.checkpoint.loading import load_model
from moeq.disk.folder import weight_files
from moeq.export.dense import write_dense
from moeq.export.finished import held
from moeq.export.moeq_format import write_checkpoint
from moeq.export.verify import ExportMismatchError, verify_dense, verify_packed
from moeq.models.storage import widen
from moeq.quant.spec import QuantizedWeight
from tests.export.rounding import real_weight, round_model
from tests.tiny import save_tiny

IDS = torch.arange(24).view(2, 12) * 11
FAMILIES = ("qwen2_moe", "mixtral", "deepseek_v3")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}


def rounded(family: str) -> tuple[nn.Module, nn.Module, dict[str, QuantizedWeight]]:
    """A quantized bfloat16 model, the same in float32, and its codes."""
    with TemporaryDirectory() as folder:  # from files, which some families have loaded partly in float32
        model = load_model(str(save_tiny(family, Path(folder))))
    quantized = round_model(model)
    widened = copy.deepcopy(model)
    widen(widened)
    return model, widened, quantized


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_do_not_depend_on_the_dtype_that_a_model_computes_in(family: str, tmp_path: Path) -> None:
    model, widened, quantized = rounded(family)
    for name, each in (("narrow", model), ("wide", widened)):
        write_checkpoint(each, None, quantized, tmp_path / name / "packed", metadata={})
        write_dense(held(each), None, tmp_path / name / "dense")
    for kind in ("packed", "dense"):
        narrow, wide = (tmp_path / name / kind for name in ("narrow", "wide"))
        for file in ("model.safetensors", "config.json"):
            assert (narrow / file).read_bytes() == (wide / file).read_bytes(), (kind, file)
        assert torch.float32 not in {tensor.dtype for tensor in tensors(wide).values()} or family == "deepseek_v3"
    assert all(p.dtype == torch.float32 for p in widened.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_of_a_widened_model_are_verified_in_the_dtype_that_it_computes_in(family: str, tmp_path: Path) -> None:
    _, widened, quantized = rounded(family)
    write_checkpoint(widened, None, quantized, tmp_path / "packed", metadata={})
    write_dense(held(widened), None, tmp_path / "dense")
    seen: list[torch.dtype] = []
    widened.register_forward_hook(lambda _, args, output: seen.append(output.logits.dtype))
    for report in (
        verify_packed(tmp_path / "packed", held(widened, quantized), IDS),
        verify_dense(tmp_path / "dense", held(widened), IDS),
    ):
        assert report.logits_equal
        assert report.max_logit_difference == 0.0
    assert set(seen) == {torch.float32}


def test_a_change_that_bfloat16_does_not_hold_is_found_out(tmp_path: Path) -> None:
    _, widened, quantized = rounded("mixtral")
    write_checkpoint(widened, None, quantized, tmp_path / "packed", metadata={})
    write_dense(held(widened), None, tmp_path / "dense")
    name = next(name for name in quantized if "self_attn" in name)
    for changed, message in (("model.norm", r"tensors differ .*model\.norm"), (name, rf"of the model differ .*{name}")):
        other = copy.deepcopy(widened)
        other.get_parameter(f"{changed}.weight").data *= 1 + 2**-12
        with pytest.raises(ValueError, match=rf"{changed}\.weight holds values"):
            write_dense(held(other), None, tmp_path / "refused")
        with pytest.raises(ExportMismatchError, match=message):
            verify_packed(tmp_path / "packed", held(other, quantized), IDS)
    assert not (tmp_path / "refused").exists()


def test_files_of_another_dtype_than_the_source_are_found_out(tmp_path: Path) -> None:
    model, widened, _ = rounded("mixtral")
    write_dense(held(model.float()), None, tmp_path / "dense")
    with pytest.raises(ExportMismatchError, match=r"tensors differ .*model\.embed_tokens\.weight"):
        verify_dense(tmp_path / "dense", held(widened), IDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_export_opened_in_float32_has_the_values_of_its_file(family: str, tmp_path: Path) -> None:
    model, widened, quantized = rounded(family)
    write_checkpoint(model, None, quantized, tmp_path / "packed", metadata={})
    narrow, wide = (load_model(str(tmp_path / "packed"), "auto", compute) for compute in ("stored", "float32"))
    assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    for name, weight in quantized.items():
        for opened in (narrow, wide):
            layer = opened.get_submodule(name)
            assert layer.weight_scale.dtype == torch.bfloat16
            assert torch.equal(layer.weight, real_weight(weight))
    widened.set_experts_implementation("eager")
    assert torch.equal(wide(input_ids=IDS).logits, widened(input_ids=IDS).logits)
    assert narrow(input_ids=IDS).logits.dtype == torch.bfloat16
