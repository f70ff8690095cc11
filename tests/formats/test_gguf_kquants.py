"""Blocks of K-types against gguf's own reader, and number by number against the layouts."""

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize as gguf_dequantize

from moeq.formats.gguf_blocks import to_bytes
from moeq.formats.gguf_kquants import BLOCK_BYTES, k_blocks
from moeq.quant.carrier import choose_carrier, recentre
from moeq.quant.grid import dequantize_weight
from moeq.quant.kinds import TABLES, TWO_LEVEL, Kind
from moeq.quant.rtn import round_to_nearest
from moeq.quant.spec import GridSpec, QuantizedWeight
from tests.two_level import weight_with_every_number

ROWS, BLOCKS = 5, 3


@pytest.mark.parametrize("kind", TWO_LEVEL)
def test_the_reader_of_gguf_finds_every_value_bit_for_bit(kind: Kind) -> None:
    weight = weight_with_every_number(kind, rows=ROWS, supers=BLOCKS)
    blocks = k_blocks(weight, kind)
    assert blocks.shape == (ROWS, BLOCKS * BLOCK_BYTES[kind])
    read = gguf_dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(read, dequantize_weight(weight, torch.float32).numpy())


@pytest.mark.parametrize("kind", TWO_LEVEL)
def test_another_code_scale_or_minimum_is_another_block(kind: Kind) -> None:
    """No two numbers share a place: changing one changes the bytes, and every byte belongs to some number."""
    weight = weight_with_every_number(kind, rows=ROWS, supers=BLOCKS)
    seen = torch.zeros(BLOCKS * BLOCK_BYTES[kind], dtype=torch.bool)
    before = k_blocks(weight, kind)[0]
    for tensor in weight.tensors().values():
        for column in range(tensor.shape[1]):
            old = tensor[0, column].clone()
            tensor[0, column] = 0 if old != 0 else 1
            changed = k_blocks(weight, kind)[0] != before
            assert changed.any()
            seen |= changed
            tensor[0, column] = old
    assert seen.float().mean() > 0.9  # a byte may stay equal by chance


def test_a_block_has_the_bytes_that_gguf_knows_and_the_bits_that_are_paid() -> None:
    for kind, num_bytes in BLOCK_BYTES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]] == (256, num_bytes)
        assert choose_carrier("gguf", GridSpec.of_kind(kind), 256).num_bits(3, 256) == 3 * 8 * num_bytes


@pytest.mark.parametrize("kind", ["iq4_nl", "mxfp4"])
def test_the_reader_of_gguf_finds_the_values_of_a_table(kind: Kind) -> None:
    grid, weight_EOI = GridSpec.of_kind(kind), torch.randn(1, 9, 96, generator=torch.Generator().manual_seed(2))
    weight_EOI[0, 0, :32], weight_EOI[0, 1] = 0, weight_EOI[0, 1] * 1e-4
    weight = round_to_nearest(weight_EOI, grid, torch.bfloat16).expert(0, grid)
    weight.codes_OI[2] = torch.arange(96) % len(TABLES[kind].levels)  # every code
    carrier = choose_carrier("gguf", grid, 96)
    blocks = to_bytes(carrier.name, weight)
    assert 8 * blocks.size == carrier.num_bits(9, 96)
    read = gguf_dequantize(blocks, gguf.GGMLQuantizationType[carrier.name])
    assert np.array_equal(read, dequantize_weight(weight, torch.float32).numpy())
    for name in ("Q4_0", "IQ4_NL", "MXFP4"):
        if name != carrier.name:
            with pytest.raises(ValueError, match=f"{name} does not hold a weight on {kind}"):
                to_bytes(name, weight)
    with pytest.raises(ValueError, match="no grid of uniform groups"):
        recentre(weight, 8)


def test_a_weight_on_another_grid_is_refused() -> None:
    uniform = QuantizedWeight(torch.zeros(1, 256, dtype=torch.uint8), torch.ones(1, 8), None, 4, 32)
    for weight, kind in ((uniform, "q4_k"), (weight_with_every_number("q4_k"), "q5_k")):
        with pytest.raises(ValueError, match=f"{kind.upper()} does not hold"):
            k_blocks(weight, kind)
