"""NVFP4 and MXFP4 in compressed-tensors: bytes by a slow reader, shared global scales, and who opens them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moeq.formats.compressed_tensors_float import float_tensors
from moeq.formats.convert import convert
from tests.export.rounding import E2M1, real_weight, round_float
from tests.formats.packed import (
    FloatKind,
    Grid,
    config_of,
    is_expert,
    logits_of,
    tensors_of,
    write_tiny_packed,
)

NAME = "compressed-tensors"
WEIGHT_OI = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


def reference_values(tensors: dict[str, Tensor], key: str) -> Tensor:
    """Byte by byte, from what the formats say."""
    packed_OB, scale_OG = tensors[f"{key}.weight_packed"], tensors[f"{key}.weight_scale"]
    found = torch.empty(len(packed_OB), 2 * packed_OB.shape[1])
    size = found.shape[1] // scale_OG.shape[1]
    for row, octets in enumerate(packed_OB.tolist()):
        for column in range(found.shape[1]):
            nibble = octets[column // 2] >> 4 * (column % 2) & 15
            level = sorted(abs(value) for value in E2M1 if value >= 0)[nibble & 7] * (-1 if nibble & 8 else 1)
            scale = scale_OG[row, column // size]
            if scale.dtype == torch.uint8:
                found[row, column] = level * 2.0 ** (int(scale) - 127)
            else:
                found[row, column] = level * float(scale) / float(tensors[f"{key}.weight_global_scale"])
    return found


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_bytes_mean_the_values_of_the_codes_and_zeros_stay_zero(kind: FloatKind) -> None:
    weight = round_float(WEIGHT_OI, kind)
    weight.codes_OI[2] = torch.arange(64) % 15  # every code
    weight.scale_OG[3] = 0
    tensors = float_tensors({"a": weight})
    assert torch.equal(reference_values(tensors, "a").bfloat16(), real_weight(weight))
    assert not tensors["a.weight_packed"][3].any()


def test_weights_that_are_merged_share_a_global_scale_that_changes_no_value() -> None:
    one, other = (round_float(part_OI, "nvfp4") for part_OI in (WEIGHT_OI, WEIGHT_OI / 16))
    tensors = float_tensors({"a": one, "b": other})
    assert torch.equal(tensors["a.weight_global_scale"], tensors["b.weight_global_scale"])
    assert float_tensors({"b": other})["b.weight_global_scale"] == 16 * tensors["a.weight_global_scale"]
    for key, weight in {"a": one, "b": other}.items():
        assert torch.equal(reference_values(tensors, key).bfloat16(), real_weight(weight))
    far = replace(other, scale_OG=other.scale_OG * 2.0**-20)
    with pytest.raises(ValueError, match=r"^a: scales from .* have no power of two in common"):
        float_tensors({"a": one, "b": far})


def test_mxfp4_opens_in_transformers_with_the_logits_of_the_dequantized_model(tmp_path: Path) -> None:
    made = write_tiny_packed("qwen2_moe", tmp_path, lambda name: "mxfp4")
    report = convert(made.folder, NAME, tmp_path / "ct")
    assert (report.types, report.largest_error) == ({"MXFP4, groups of 32": len(made.quantized)}, 0.0)
    assert report.bits_per_weight == 4.25
    assert config_of(tmp_path / "ct")["quantization_config"]["format"] == "mxfp4-pack-quantized"
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.bfloat16)
    assert torch.equal(logits_of(opened), logits_of(made.model))


def test_nvfp4_has_one_global_scale_where_vllm_reads_one_and_transformers_refuses_such_experts(tmp_path: Path) -> None:
    made = write_tiny_packed("qwen2_moe", tmp_path, lambda name: "nvfp4")
    report = convert(made.folder, NAME, tmp_path / "ct")
    assert (report.types, report.largest_error) == ({"NVFP4, groups of 16": len(made.quantized)}, 0.0)
    numel = sum(weight.codes_OI.numel() for weight in made.quantized.values())
    assert report.bits_per_weight == 4.5 + 32 * len(made.quantized) / numel
    tensors = tensors_of(tmp_path / "ct")
    for leaves in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        first = f".{leaves[0]}.weight_global_scale"
        keys = [key for key in tensors if key.endswith(first)]
        assert keys
        for key in keys:
            assert len({tensors[key.replace(leaves[0], leaf)].item() for leaf in leaves}) == 1
    name = "model.layers.1.mlp.experts.2.up_proj"
    assert torch.equal(reference_values(tensors, name).bfloat16(), real_weight(made.quantized[name]))
    with pytest.raises(ValueError, match="leaves out the global scales of experts in NVFP4 and would read these wrong"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "ct")


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_attention_in_floats_beside_integer_experts_opens_in_transformers(kind: FloatKind, tmp_path: Path) -> None:
    def grid_of(name: str) -> Grid:
        return (4, 32, True) if is_expert(name) else kind

    made = write_tiny_packed("qwen2_moe", tmp_path, grid_of)
    convert(made.folder, NAME, tmp_path / "ct")
    config = config_of(tmp_path / "ct")["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert {group["format"] for group in config["config_groups"].values()} == {
        "pack-quantized",
        f"{kind}-pack-quantized",
    }
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.bfloat16)
    assert torch.equal(logits_of(opened), logits_of(made.model))


def test_grids_by_table_that_a_runtime_merges_are_alike(tmp_path: Path) -> None:
    made = write_tiny_packed(
        "qwen2_moe", tmp_path, lambda name: "nvfp4" if name.endswith("0.self_attn.k_proj") else "mxfp4"
    )
    with pytest.raises(ValueError, match=r"k_proj is NVFP4 \(groups of 16\), .*q_proj is MXFP4 .* give them one grid"):
        convert(made.folder, NAME, tmp_path / "ct")
    assert not (tmp_path / "ct").exists()
