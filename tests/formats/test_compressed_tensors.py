"""Folders of compressed-tensors: the same values, the schemes that runtimes look up, and refusals of all else."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from moeq.disk.folder import check_integrity
from moeq.export.compare import ExportMismatchError
from moeq.formats.compressed_tensors import FORMAT
from moeq.formats.convert import convert
from moeq.formats.source import open_packed
from tests.formats.packed import (
    Grid,
    Tiny,
    add_draft_layer,
    config_of,
    flip_a_bit,
    is_expert,
    logits_of,
    tensors_of,
    write_tiny_packed,
)

NAME = "compressed-tensors"
# What vLLM asks for the experts of a block by, whatever the files call them.
ASKED = ("gate_proj", "up_proj", "down_proj")


def scheme_of(config: dict[str, Any], name: str, kind: str = "Linear") -> tuple[int, int | None] | None:
    """As vLLM looks it up: what is ignored first, then the first target that matches the name, or its class."""
    quantization = config["quantization_config"]
    if any(re.match(rule.removeprefix("re:"), name) for rule in quantization["ignore"]):
        return None
    for group in quantization["config_groups"].values():
        for target in group["targets"]:
            if re.match(target[3:], name) if target.startswith("re:") else target == kind:
                return group["weights"]["num_bits"], group["weights"]["group_size"]
    raise AssertionError(f"{name} has no scheme and is not ignored")


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_transformers_opens_it_with_the_logits_of_the_dequantized_model(
    family: str, tiny: Callable[..., Tiny], tmp_path: Path
) -> None:
    made = tiny(family, "3 bits")
    report = convert(made.folder, NAME, tmp_path / "ct")
    assert report.types == {"int4, groups of 32": len(made.quantized)}
    assert report.largest_error == 0.0
    assert report.bits_per_weight == 4.5
    assert report.reader.startswith("compressed-tensors 0.")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.bfloat16)
    assert torch.equal(logits_of(opened), logits_of(made.model))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "lfm2_moe", "ernie4_5_moe"])
def test_more_families_open_in_transformers(family: str, tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    made = tiny(family, "3 bits")
    convert(made.folder, NAME, tmp_path / "ct")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.bfloat16)
    assert torch.equal(logits_of(opened), logits_of(made.model))


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_every_weight_has_the_scheme_of_its_codes_where_blocks_and_kinds_differ(
    family: str, tiny: Callable[..., Tiny], tmp_path: Path
) -> None:
    made = tiny(family, "mixed")
    report = convert(made.folder, NAME, tmp_path / "ct")
    config, stored = config_of(tmp_path / "ct"), tensors_of(tmp_path / "ct")
    assert len(report.types) > 1
    for key, packed in stored.items():
        name, _, leaf = key.rpartition(".")
        if leaf == "weight_packed":
            columns, groups = stored[f"{name}.weight_shape"][1].item(), stored[f"{name}.weight_scale"].shape[1]
            bits, group_size = scheme_of(config, name) or (0, None)
            assert (bits, columns // (group_size or columns)) == (32 * packed.shape[1] // columns, groups)
            if is_expert(name):
                path = name.rpartition(".")[0]
                assert {scheme_of(config, f"{path}.{leaf}") for leaf in ASKED} == {scheme_of(config, name)}
        elif leaf == "weight" and stored[key].ndim == 2:
            assert scheme_of(config, name) is None
    kept = {name for name in open_packed(made.folder).weight_names if name not in made.quantized}
    assert all(scheme_of(config, name) is None for name in kept)


@pytest.mark.parametrize("family", ["phimoe", "nemotron_h"])
def test_what_files_call_otherwise_than_modules_has_the_same_scheme_by_both_names(family: str, tmp_path: Path) -> None:
    made = write_tiny_packed(family, tmp_path, lambda name: (4, 32, True))
    convert(made.folder, NAME, tmp_path / "ct")
    config, export = config_of(tmp_path / "ct"), open_packed(made.folder)
    for name in export.grids:
        assert scheme_of(config, name) == scheme_of(config, export.key(name)) == (4, 32)
    others = [name for name, parameter in export.model.named_parameters() if parameter.ndim == 2]
    kept = {name.removesuffix(".weight") for name in others if name in export.other_names}
    assert kept
    for name in kept:
        assert (
            scheme_of(config, name) is scheme_of(config, export.key(f"{name}.weight").removesuffix(".weight")) is None
        )


def test_transformers_refuses_blocks_that_differ_since_it_would_read_them_wrongly(
    tiny: Callable[..., Tiny], tmp_path: Path
) -> None:
    convert(tiny("qwen2_moe", "mixed").folder, NAME, tmp_path / "ct")
    with pytest.raises(ValueError, match="reads one scheme for all experts of a model and would read these wrongly"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "ct")
    assert "transformers, which refuses it" in (tmp_path / "ct" / "README.md").read_text()


def test_attention_may_have_another_scheme_than_experts_in_transformers_too(tmp_path: Path) -> None:
    made = write_tiny_packed("qwen2_moe", tmp_path, lambda name: (4, 32, True) if is_expert(name) else (8, None, True))
    convert(made.folder, NAME, tmp_path / "ct")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.bfloat16)
    assert torch.equal(logits_of(opened), logits_of(made.model))


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_native_keeps_widths_and_zero_points(bits: int, tmp_path: Path) -> None:
    made = write_tiny_packed("olmoe", tmp_path, lambda name: (bits, 32, False), num_hidden_layers=1)
    report = convert(made.folder, NAME, tmp_path / "ct", carrier="native")
    assert report.types == {f"int{bits} with zero points, groups of 32": len(made.quantized)}
    assert report.bits_per_weight == bits + (16 + bits) / 32


def test_a_changed_bit_is_found(tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    packed = tiny("qwen2_moe", "3 bits").folder
    convert(packed, NAME, tmp_path / "ct")
    check_integrity(tmp_path / "ct")
    for key in ("model.layers.1.mlp.experts.3.up_proj.weight_packed", "model.layers.0.mlp.gate.weight"):
        flip_a_bit(tmp_path / "ct", key)
        with pytest.raises(ExportMismatchError, match=key.removesuffix("_packed").removesuffix(".weight")):
            FORMAT.verify(open_packed(packed), tmp_path / "ct", "exact", lambda blocks, label: blocks)
        flip_a_bit(tmp_path / "ct", key)


def grids_of(change: dict[str, Grid | None], default: Grid = (4, 32, True)) -> Callable[[str], Grid | None]:
    return lambda name: next((grid for ending, grid in change.items() if name.endswith(ending)), default)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (
            "qwen2_moe",
            {"0.mlp.experts.3.up_proj": (8, 32, True)},
            r"layers\.0\.mlp\.experts\.3\.up_proj is int8 .* one",
        ),
        ("qwen2_moe", {"1.mlp.experts.2.down_proj": None}, r"experts\.2\.down_proj is kept as it is"),
        ("qwen2_moe", {"0.self_attn.k_proj": (4, None, True)}, r"k_proj is int4 \(per channel\), .*q_proj is int4"),
        ("qwen2_moe", {"0.self_attn.o_proj": (4, 16, True)}, r"o_proj: compressed-tensors has no type .* groups of 16"),
        ("gpt_oss", {}, "has biases, which no runtime reads beside experts"),
        ("granitemoe", {}, "lies with all experts in one tensor of the source's files"),
    ],
)
def test_what_runtimes_read_wrongly_is_refused_by_name_and_nothing_is_left(
    family: str, change: dict[str, Grid | None], message: str, tmp_path: Path
) -> None:
    made = write_tiny_packed(family, tmp_path, grids_of(change), num_hidden_layers=2)
    with pytest.raises(ValueError, match=message):
        convert(made.folder, NAME, tmp_path / "ct")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "packed"}


@pytest.mark.parametrize(("dtype", "is_carried"), [(torch.bfloat16, True), (torch.float8_e4m3fn, False)])
def test_draft_layers_stay_where_runtimes_read_them_beside_packed_weights(
    dtype: torch.dtype, is_carried: bool, tmp_path: Path
) -> None:
    made = write_tiny_packed(
        "qwen3_moe", tmp_path, grids_of({}), prepare=lambda source: add_draft_layer(source, dtype=dtype)
    )
    convert(made.folder, NAME, tmp_path / "ct")
    config = config_of(tmp_path / "ct")
    key = "model.layers.2.eh_proj.weight"
    assert (key in tensors_of(tmp_path / "ct")) == is_carried
    assert config["num_nextn_predict_layers"] == int(is_carried)
    if is_carried:
        assert scheme_of(config, key.removesuffix(".weight")) is None


def test_experts_that_stay_are_written_one_by_one_as_in_the_source(tmp_path: Path) -> None:
    made = write_tiny_packed("mixtral", tmp_path, lambda name: None if is_expert(name) else (4, 32, True))
    convert(made.folder, NAME, tmp_path / "ct")
    source, ours = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "ct")
    names = [key for key in source if is_expert(key)]
    assert len(names) == 48
    assert all(torch.equal(source[key], ours[key]) for key in names)


def test_the_configuration_of_the_source_stays_as_it_was(tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    made = tiny("qwen2_moe", "3 bits")
    convert(made.folder, NAME, tmp_path / "ct")
    source = config_of(made.folder.parent / "source")
    assert list(config_of(tmp_path / "ct").items())[: len(source)] == list(source.items())
    assert (tmp_path / "ct" / "tokenizer.json").read_bytes() == (made.folder / "tokenizer.json").read_bytes()
    assert FORMAT.serve(Path("ct")) == "vllm serve ct"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["kimi_k25", "qwen3_5_moe"])
def test_towers_of_wrappers_stay_as_they_are_even_where_their_names_end_as_those_of_blocks(
    family: str, tmp_path: Path
) -> None:
    def grid_of(name: str) -> Grid | None:
        """Of the language model, what fits."""
        inside = "language_model.layers." in name and not name.endswith(("kv_b_proj", "in_proj_a", "in_proj_b"))
        return (4 if is_expert(name) else 8, 32, True) if inside else None

    made = write_tiny_packed(family, tmp_path, grid_of)
    convert(made.folder, NAME, tmp_path / "ct")
    config = config_of(tmp_path / "ct")
    towers = [name for name in open_packed(made.folder).weight_names if "language_model" not in name]
    assert towers
    assert all(scheme_of(config, name) is None for name in towers)
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "ct", dtype=torch.bfloat16)
    assert torch.equal(logits_of(opened), logits_of(made.model))
