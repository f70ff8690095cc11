"""Weights on two-level grids in packed modules, in the description of a checkpoint, and in block files."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from moeq.checkpoint.packed import PackedLinear
from moeq.checkpoint.packed_weight import PARTS, PackedFormat, dequantize_codes, packed_tensors
from moeq.checkpoint.quantizer import MoEQConfig
from moeq.fit.block_files import read_block, save_block
from moeq.fit.memory import packed_bytes
from moeq.fit.run import Run
from moeq.quant.kinds import TWO_LEVEL, Kind
from moeq.quant.spec import GridSpec, QuantizedWeight, WeightShape
from tests.two_level import reference_values, weight_with_every_number

BF16 = torch.bfloat16


def assert_equal(ours: QuantizedWeight, theirs: QuantizedWeight) -> None:
    assert (ours.kind, ours.bits, ours.group_size, ours.dtype) == (
        theirs.kind, theirs.bits, theirs.group_size, theirs.dtype
    )  # fmt: skip
    held, expected = ours.tensors(), theirs.tensors()
    assert held.keys() == expected.keys()
    for part in held:
        assert held[part].dtype == expected[part].dtype
        assert torch.equal(held[part], expected[part])


def packed_linear(weight: QuantizedWeight) -> PackedLinear:
    rows, columns = weight.codes_OI.shape
    layer = PackedLinear(columns, rows, PackedFormat.of(GridSpec.of_kind(weight.kind)), weight.dtype)
    layer.load_state_dict(packed_tensors(weight), strict=True)
    return layer


@pytest.mark.parametrize("kind", TWO_LEVEL)
def test_a_packed_linear_holds_what_it_was_given_and_computes_with_its_values(kind: Kind) -> None:
    weight = weight_with_every_number(kind, rows=6, dtype=BF16)
    layer = packed_linear(weight)
    assert_equal(layer.quantized(), weight)
    assert set(dict(layer.named_parameters())) <= set(PARTS)
    assert torch.equal(layer.weight, reference_values(weight))
    hidden = torch.randn(3, weight.codes_OI.shape[1])
    assert torch.equal(layer(hidden), nn.functional.linear(hidden, reference_values(weight).float()))


@pytest.mark.parametrize("kind", TWO_LEVEL)
def test_a_file_is_as_large_as_the_blocks_of_the_runtime(kind: Kind) -> None:
    weight = weight_with_every_number(kind, rows=2, supers=8)  # integers of a row fill whole words
    grid = GridSpec.of_kind(kind)
    num_bytes = sum(tensor.nbytes for name, tensor in packed_tensors(weight).items() if name != "weight_shape")
    assert 8 * num_bytes == 2 * (2048 * grid.bits + grid.overhead_bits(2048))


def test_values_stay_those_of_the_model_whatever_dtype_it_is_opened_in() -> None:
    layer = packed_linear(weight_with_every_number("q4_k", dtype=BF16))
    before = layer.weight.clone()
    assert layer.float().weight.dtype == BF16  # as for uniform grids, whose scales keep their dtype
    assert torch.equal(layer.weight, before)


def test_a_description_says_the_kind_and_a_version_that_older_programs_refuse() -> None:
    uniform, two_level = PackedFormat(4, 32, True), PackedFormat.of(GridSpec.of_kind("q3_k"))
    names = [f"model.layers.{block}.up_proj" for block in range(3)]

    def describe(grids: dict[str, PackedFormat]) -> MoEQConfig:
        return MoEQConfig.from_grids(grids, names, weight_dtype=BF16, expert_leaves={}, metadata={})

    mixed = describe({names[0]: two_level, names[1]: two_level, names[2]: uniform})
    assert mixed.format_version == 2
    again = MoEQConfig.from_dict(json.loads(json.dumps(mixed.to_dict())))
    assert [again.grid(name) for name in names] == [two_level, two_level, uniform]
    assert describe(dict.fromkeys(names, uniform)).to_dict()["templates"] == {
        "model.layers.*.up_proj": {"bits": 4, "group_size": 32, "symmetric": True}
    }
    assert describe(dict.fromkeys(names, uniform)).format_version == 1


@pytest.mark.parametrize("kind", ["q3_k", "q4_k"])
def test_a_block_file_gives_back_what_was_saved(kind: Kind, tmp_path: Path) -> None:
    weight = weight_with_every_number(kind, rows=64, dtype=BF16)
    run = Run(quantized={"a": weight})
    save_block(tmp_path, 0, run, ["a"], [], {"configuration": "c"})
    file = read_block(tmp_path, 0)
    assert file.grids == {"a": (weight.bits, weight.group_size, kind)}
    assert_equal(file["a"], weight)
    shape = WeightShape("a", "dense", 64, 768, 0, "a")
    assert sum(tensor.nbytes for tensor in file.tensors.values()) == packed_bytes(shape, GridSpec.of_kind(kind), 2)


def test_parts_of_rows_are_dequantized_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_with_every_number("q5_k", rows=50, dtype=BF16)
    monkeypatch.setattr("moeq.checkpoint.packed_weight.CHUNK", 768 * 7 // torch.get_num_threads())
    assert torch.equal(dequantize_codes(weight), reference_values(weight))
