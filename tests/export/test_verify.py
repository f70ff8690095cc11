from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moeq.disk.folder import MANIFEST
from moeq.export import reopen
from moeq.export.dense import write_dense
from moeq.export.finished import held
from moeq.export.moeq_format import write_checkpoint
from moeq.export.verify import ExportMismatchError, verify_dense, verify_packed
from moeq.quant.spec import QuantizedWeight
from tests.export.rounding import round_model
from tests.tiny import tiny_model

IDS = torch.arange(24).view(2, 12) * 11
NAME = "model.layers.0.mlp.experts.3.down_proj"
KEY = "model.layers.0.block_sparse_moe.experts.3.w2"


@pytest.fixture(params=["whole", "streamed"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read exports back as a user opens them, or block by block as large ones are."""
    if request.param == "streamed":
        monkeypatch.setattr(reopen, "WHOLE_BYTES", 0)


@pytest.fixture
def export(tmp_path: Path, how: None) -> tuple[nn.Module, dict[str, QuantizedWeight], Path]:
    model = tiny_model("mixtral", num_hidden_layers=1)
    quantized = round_model(model)
    write_checkpoint(model, None, quantized, tmp_path / "export", metadata={})
    return model, quantized, tmp_path / "export"


def alter(folder: Path, key: str) -> None:
    """Change one number of one tensor, as a faulty writer would: the manifest does not know better."""
    tensors = load_file(folder / "model.safetensors")
    tensors[key].view(-1)[0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / MANIFEST).unlink()


def test_a_faithful_export_is_reported_equal(export: tuple) -> None:
    model, quantized, folder = export
    before = model.get_experts_implementation()
    report = verify_packed(folder, held(model, quantized), IDS)
    assert report.logits_equal
    assert report.to_dict()["max_logit_difference"] == 0.0
    assert (report.num_quantized, report.num_tokens) == (len(quantized), 24)
    assert report.num_other > 0
    assert model.get_experts_implementation() == before


@pytest.mark.parametrize(
    ("key", "named"),
    [
        (f"{KEY}.weight_packed", rf"{NAME} \(codes_OI\)"),
        (f"{KEY}.weight_scale", rf"{NAME} \(scale_OG\)"),
        ("model.layers.0.block_sparse_moe.gate.weight", r"model\.layers\.0\.mlp\.gate\.weight"),
        ("model.norm.weight", r"model\.norm\.weight"),
        ("model.layers.0.self_attn.q_proj.weight", r"model\.layers\.0\.self_attn\.q_proj\.weight"),
    ],
)
def test_a_tensor_that_differs_is_named(export: tuple, key: str, named: str) -> None:
    model, quantized, folder = export
    alter(folder, key)
    with pytest.raises(ExportMismatchError, match=named):
        verify_packed(folder, held(model, quantized), IDS)


def test_a_zero_point_that_differs_is_named(export: tuple) -> None:
    model, quantized, folder = export
    name = next(name for name, weight in quantized.items() if weight.zero_point_OG is not None)
    other = replace(quantized[name], zero_point_OG=quantized[name].zero_point_OG ^ 1)
    with pytest.raises(ExportMismatchError, match=rf"{name} \(zero_point_OG\)"):
        verify_packed(folder, held(model, {**quantized, name: other}), IDS)


def test_a_missing_weight_is_named(export: tuple) -> None:
    model, quantized, folder = export
    with pytest.raises(ExportMismatchError, match=NAME):
        verify_packed(folder, held(model, {name: w for name, w in quantized.items() if name != NAME}), IDS)


def test_a_model_that_does_not_hold_the_dequantized_values_is_found_out(export: tuple) -> None:
    model, quantized, folder = export
    model.model.layers[0].mlp.experts.down_proj.data[3, 0, 0] += 1
    with pytest.raises(ExportMismatchError, match=f"dequantized weights of the model differ .*{NAME}"):
        verify_packed(folder, held(model, quantized), IDS)


def test_an_export_that_computes_something_else_is_found_out(export: tuple) -> None:
    model, quantized, folder = export
    # Not a factor: the norm behind the only block takes that out again.
    model.model.layers[0].register_forward_hook(lambda module, args, output: output.roll(1, -1))
    with pytest.raises(ExportMismatchError, match=r"logits of .* although all tensors are equal"):
        verify_packed(folder, held(model, quantized), IDS)
    assert not verify_packed(folder, held(model, quantized), IDS, logit_tolerance=1e3).logits_equal


def test_damage_is_found_before_loading(export: tuple) -> None:
    model, quantized, folder = export
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"model\.safetensors has \d+ bytes"):
        verify_packed(folder, held(model, quantized), IDS)


def test_a_tensor_too_many_is_named(export: tuple) -> None:
    model, quantized, folder = export
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.0.extra.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    (folder / MANIFEST).unlink()
    with pytest.raises(ExportMismatchError, match=r"tensors differ .*model\.layers\.0\.extra\.weight"):
        verify_packed(folder, held(model, quantized), IDS)


def test_a_tensor_too_few_is_named(export: tuple) -> None:
    model, quantized, folder = export
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{KEY}.weight_packed"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match=rf"{NAME}|{KEY}"):
        verify_packed(folder, held(model, quantized), IDS)


@pytest.mark.usefixtures("how")
def test_a_dense_export_is_compared_with_the_model(tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe", num_hidden_layers=1, dtype=torch.bfloat16)
    write_dense(held(model), None, tmp_path / "dense")
    report = verify_dense(tmp_path / "dense", held(model), IDS)
    assert report.logits_equal
    assert report.num_other == len(model.state_dict())
    model.model.norm.weight.data[0] += 1
    with pytest.raises(ExportMismatchError, match=r"model\.norm\.weight"):
        verify_dense(tmp_path / "dense", held(model), IDS)
