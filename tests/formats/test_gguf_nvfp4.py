"""NVFP4 in GGUF: blocks and global scales as gguf reads them, and families in which llama.cpp multiplies by these."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from benchmarks.runtimes.cells import Cell
from benchmarks.runtimes.exports import Source, open_reference
from benchmarks.runtimes.rounding import rounding_of
from moeq.formats.convert import convert
from moeq.formats.gguf import NAME
from moeq.formats.gguf_blocks import to_bytes
from moeq.formats.gguf_file import read_file
from moeq.formats.gguf_nvfp4 import SCALED, global_scale
from moeq.formats.source import open_packed
from moeq.quant.carrier import choose_carrier
from moeq.quant.spec import GridSpec
from tests.export.rounding import real_weight, round_float
from tests.families import FAMILIES
from tests.formats.gguf_models import IDS, divergence, transformers_logits, write_packed
from tests.formats.llama_cpp import LlamaCpp, needs_llama_cpp
from tests.formats.test_gguf_runs import OPTIONS

WIDE = ("moe_intermediate_size", "intermediate_size", "shared_expert_intermediate_size")


def wide(family: str) -> dict[str, Any]:
    """Rows of whole blocks of 64."""
    return {name: 64 for name in WIDE if name in FAMILIES[family]} | OPTIONS.get(family, {})


def test_the_reader_of_gguf_finds_the_values_times_a_power_of_two() -> None:
    weight = round_float(torch.randn(9, 192, generator=torch.Generator().manual_seed(2)).bfloat16(), "nvfp4")
    weight.codes_OI[2] = torch.arange(192) % 15  # every code
    weight.scale_OG[3] = 0
    weight.codes_OI[3] = 5
    read = gguf.dequantize(to_bytes("NVFP4", weight), gguf.GGMLQuantizationType.NVFP4)
    assert torch.equal((torch.from_numpy(read) * global_scale(weight)).bfloat16(), real_weight(weight))
    with pytest.raises(ValueError, match="rows of whole 64, not 96"):
        choose_carrier("gguf", GridSpec.of_kind("nvfp4"), 96)


def test_a_family_whose_scales_llama_cpp_leaves_out_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    export, _ = write_packed("qwen2_moe", tmp_path, lambda name: "nvfp4", **wide("qwen2_moe"))
    with pytest.raises(
        ValueError, match=r"qwen2_moe in NVFP4: .* in blocks of cohere2_moe, .*mixtral, .*; choose grid mxfp4"
    ):
        convert(export, "gguf", tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


@needs_llama_cpp
@pytest.mark.parametrize(
    "family", ["mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(SCALED - {"mixtral"}))]
)
def test_llama_cpp_multiplies_by_the_global_scales_of_these_families(family: str, tmp_path: Path) -> None:
    export, quantized = write_packed(family, tmp_path, lambda name: "nvfp4", **wide(family))
    report = convert(export, "gguf", tmp_path / "gguf")
    assert (report.types["NVFP4"], report.largest_error) == (len(quantized), 0.0)
    _, stored = read_file(tmp_path / "gguf" / NAME)
    scales = {name: tensor.values() for name, tensor in stored.items() if name.endswith(".scale")}
    assert all(bool((torch.frexp(values).mantissa == 0.5).all()) for values in scales.values())
    assert scales["blk.1.ffn_down_exps.scale"].shape == (8,)
    file = LlamaCpp(tmp_path / "gguf" / NAME)
    found, packed = file.logits(IDS), open_packed(export)
    file.close()
    source, cell = Source(family, tmp_path / "source", IDS[None]), Cell(family, "nvfp4", "gguf")
    model = open_reference(source, packed, cell, ())
    with torch.no_grad(), rounding_of(model, packed, "exact"):  # of activations, to 8 bits
        alike = model(IDS[None]).logits[0]
    assert divergence(alike, found) < 1e-6
    assert divergence(transformers_logits(source.folder), found) > 1e-5
