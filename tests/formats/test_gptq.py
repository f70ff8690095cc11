"""Folders in GPTQ's layout, read number by number after its description."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeq.export.compare import ExportMismatchError
from moeq.formats.convert import convert
from moeq.formats.gptq import FORMAT
from moeq.formats.source import open_packed
from tests.export.rounding import real_weight
from tests.formats.packed import (
    Grid,
    Tiny,
    add_draft_layer,
    config_of,
    flip_a_bit,
    is_expert,
    tensors_of,
    write_tiny_packed,
)


def bit_of(words: list[int], position: int) -> int:
    return words[position // 32] >> (position % 32) & 1


def number_of(words: list[int], index: int, bits: int) -> int:
    return sum(bit_of(words, index * bits + i) << i for i in range(bits))


def reference_weight(tensors: dict[str, Tensor], name: str, bits: int, layout: str) -> Tensor:
    """One number after another: (code - zero) * scale, the zero of the group that ``g_idx`` names."""
    qweight, qzeros, scales = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
    group_of = tensors[f"{name}.g_idx"].tolist()
    zeros = [[number_of(row.tolist(), o, bits) for o in range(scales.shape[1])] for row in qzeros]
    if layout == "gptq":
        zeros = [[(zero + 1) % 2**bits for zero in row] for row in zeros]
    rows = []
    for o, column in enumerate(qweight.T):
        words = column.tolist()
        codes = [number_of(words, i, bits) for i in range(len(group_of))]
        rows.append([(code - zeros[g][o]) * scales[g, o].item() for code, g in zip(codes, group_of, strict=True)])
    return torch.tensor(rows)


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, False), (3, True), (4, True), (8, False)])
def test_numbers_are_those_of_the_codes(bits: int, symmetric: bool, tmp_path: Path) -> None:
    made = write_tiny_packed("olmoe", tmp_path, lambda name: (bits, 32, symmetric), num_hidden_layers=1)
    report = convert(made.folder, "gptq", tmp_path / "gptq")
    config, tensors = config_of(tmp_path / "gptq")["quantization_config"], tensors_of(tmp_path / "gptq")
    assert report.types == {f"{bits} bits, groups of 32": len(made.quantized)}
    assert (config["checkpoint_format"], config["sym"]) == (("gptq", True) if symmetric else ("gptq_v2", False))
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.experts.5.down_proj"):
        read = reference_weight(tensors, name, bits, config["checkpoint_format"])
        assert torch.equal(read.to(torch.bfloat16), real_weight(made.quantized[name]))


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_tensors_have_the_names_of_modules_whatever_the_files_of_a_family_call_them(
    family: str, tiny: Callable[..., Tiny], tmp_path: Path
) -> None:
    made = tiny(family, "mixed")
    report = convert(made.folder, "gptq", tmp_path / "gptq")
    assert report.num_quantized == len(made.quantized)
    tensors = tensors_of(tmp_path / "gptq")
    ours = {key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")}
    assert ours == made.quantized.keys()
    state = made.model.state_dict()
    kept = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] not in ours}
    assert all(torch.equal(state[key], tensor) for key, tensor in kept.items())
    config = config_of(tmp_path / "gptq")
    assert json.loads((tmp_path / "gptq" / "quantize_config.json").read_text()) == config["quantization_config"]
    assert "would make random ones" in config["transformers_weights"]


def test_single_experts_may_have_other_widths_or_none(tmp_path: Path) -> None:
    def grid_of(name: str) -> Grid | None:
        if not is_expert(name):
            return (8, None, True)
        expert = int(name.split(".")[-2])
        return None if expert == 3 else ((2, 32, False) if expert % 2 else (4, 64 if "down" not in name else 32, True))

    made = write_tiny_packed("qwen3_moe", tmp_path, grid_of)
    convert(made.folder, "gptq", tmp_path / "gptq")
    config = config_of(tmp_path / "gptq")["quantization_config"]
    names = open_packed(made.folder).weight_names
    for name in names:
        if name == "lm_head":
            continue
        rules = [values for rule, values in config["dynamic"].items() if re.match(rule[2:], name)]
        assert len(rules) <= 1
        said = rules[0] if rules else config
        quantized = made.quantized.get(name)
        assert (said == {}) == (quantized is None)
        if quantized is not None:
            assert (said["bits"], said["group_size"]) == (quantized.bits, quantized.group_size or -1)
    assert len(config["dynamic"]) < 12


def test_a_changed_bit_is_found(tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    packed = tiny("qwen2_moe", "3 bits").folder
    convert(packed, "gptq", tmp_path / "gptq")
    name = "model.layers.1.mlp.experts.3.up_proj"
    for part in ("qweight", "qzeros", "scales"):
        flip_a_bit(tmp_path / "gptq", f"{name}.{part}")
        with pytest.raises(ExportMismatchError, match=re.escape(name)):
            FORMAT.verify(open_packed(packed), tmp_path / "gptq", "exact", lambda blocks, label: blocks)
        flip_a_bit(tmp_path / "gptq", f"{name}.{part}")


@pytest.mark.parametrize(
    ("family", "dtype", "grid", "message"),
    [
        ("olmoe", torch.float32, (4, 32, True), "scales of .* are not exact in float16"),
        ("olmoe", torch.bfloat16, (4, 8, True), "gptq has no type that holds 4 bits, groups of 8"),
        ("gpt_oss", torch.bfloat16, (4, 32, True), "has biases"),
        ("lfm2_moe", torch.bfloat16, (4, 32, True), "GPTQModel opens lfm2_moe and computes something else"),
        (
            "internvl",
            torch.bfloat16,
            (4, 32, True),
            "not seen to read internvl rightly",
        ),
    ],
)
def test_what_the_layout_does_not_hold_is_refused_by_name(
    family: str, dtype: torch.dtype, grid: Grid, message: str, tmp_path: Path
) -> None:
    made = write_tiny_packed(family, tmp_path, lambda name: grid, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        convert(made.folder, "gptq", tmp_path / "gptq")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "packed"}


def test_draft_layers_that_are_quantized_already_are_left_out(tmp_path: Path) -> None:
    made = write_tiny_packed(
        "qwen3_moe",
        tmp_path,
        lambda name: (4, 32, True),
        prepare=lambda source: add_draft_layer(source, dtype=torch.float8_e4m3fn),
    )
    convert(made.folder, "gptq", tmp_path / "gptq")
    assert config_of(tmp_path / "gptq")["num_nextn_predict_layers"] == 0
    assert not [key for key in tensors_of(tmp_path / "gptq") if ".layers.2." in key]
