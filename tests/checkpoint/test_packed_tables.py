"""Weights whose levels stand in a table, in packed modules, descriptions of checkpoints and block files."""

from pathlib import Path

import pytest
import torch
from torch import nn

from moeq.checkpoint.packed import PackedLinear
from moeq.checkpoint.packed_weight import PackedFormat, packed_tensors
from moeq.checkpoint.quantizer import MoEQConfig
from moeq.fit.block_files import read_block, save_block
from moeq.fit.memory import packed_bytes
from moeq.fit.run import Run
from moeq.quant.kinds import TABLES, Kind
from moeq.quant.rtn import round_to_nearest
from moeq.quant.spec import GridSpec, QuantizedWeight, WeightShape

BF16 = torch.bfloat16


def weight_on(kind: Kind) -> QuantizedWeight:
    grid, weight_EOI = GridSpec.of_kind(kind), torch.randn(1, 12, 96, generator=torch.Generator().manual_seed(0))
    return round_to_nearest(weight_EOI, grid, BF16).expert(0, grid)


def reference_values(weight: QuantizedWeight) -> torch.Tensor:
    levels, size = TABLES[weight.kind].levels, TABLES[weight.kind].group_size
    rows = [
        [levels[code] * float(weight.scale_OG[o, i // size]) for i, code in enumerate(codes)]
        for o, codes in enumerate(weight.codes_OI.tolist())
    ]
    return torch.tensor(rows).to(BF16)


def assert_equal(ours: QuantizedWeight, theirs: QuantizedWeight) -> None:
    assert (ours.kind, ours.bits, ours.group_size) == (theirs.kind, theirs.bits, theirs.group_size)
    assert ours.tensors().keys() == theirs.tensors().keys()
    for part, tensor in ours.tensors().items():
        assert torch.equal(tensor, theirs.tensors()[part])


@pytest.mark.parametrize("kind", TABLES)
def test_a_packed_linear_holds_what_it_was_given_and_computes_with_its_values(kind: Kind) -> None:
    weight = weight_on(kind)
    layer = PackedLinear(96, 12, PackedFormat.of(GridSpec.of_kind(kind)), BF16)
    layer.load_state_dict(packed_tensors(weight), strict=True)
    assert_equal(layer.quantized(), weight)
    assert torch.equal(layer.weight, reference_values(weight))
    hidden = torch.randn(3, 96)
    assert torch.equal(layer(hidden), nn.functional.linear(hidden, reference_values(weight).float()))


@pytest.mark.parametrize("kind", TABLES)
def test_a_description_says_the_kind_and_a_version_that_older_programs_refuse(kind: Kind) -> None:
    grids = {"model.layers.0.up_proj": PackedFormat.of(GridSpec.of_kind(kind))}
    config = MoEQConfig.from_grids(grids, list(grids), weight_dtype=BF16, expert_leaves={}, metadata={})
    assert config.format_version == 2
    assert MoEQConfig.from_dict(config.to_dict()).grid("model.layers.0.up_proj") == grids["model.layers.0.up_proj"]


@pytest.mark.parametrize("kind", TABLES)
def test_a_block_file_gives_back_what_was_saved(kind: Kind, tmp_path: Path) -> None:
    weight = weight_on(kind)
    save_block(tmp_path, 0, Run(quantized={"a": weight}), ["a"], [], {"configuration": "c"})
    file = read_block(tmp_path, 0)
    assert file.grids == {"a": (4, TABLES[kind].group_size, kind)}
    assert_equal(file["a"], weight)
    shape = WeightShape("a", "dense", 12, 96, 0, "a")
    assert sum(tensor.nbytes for tensor in file.tensors.values()) == packed_bytes(shape, GridSpec.of_kind(kind), 2)
