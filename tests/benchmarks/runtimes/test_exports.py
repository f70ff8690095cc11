"""What a file means by a weight, group by group."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from benchmarks.runtimes.cells import REFERENCE_GRIDS, TINY_GRIDS, UNQUANTIZED, Cell, grids_of
from benchmarks.runtimes.exports import values_in_file
from moeq.quant.spec import GridSpec, QuantizedWeight
from tests.export.rounding import round_weight
from tests.tiny import tiny_model


@pytest.fixture
def weight() -> QuantizedWeight:
    return round_weight(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16(), 4, 32, False)


@pytest.mark.parametrize(
    ("cell", "dtype"),
    [
        (Cell("m", "g", "mlx", "native"), torch.bfloat16),
        (Cell("m", "g", "gguf", "native"), torch.float16),
        (Cell("m", "g", "mlx", "exact"), torch.float32),
        (Cell("m", "g", "compressed-tensors", "native"), torch.float32),
    ],
)
def test_only_offsets_that_a_file_stores_are_rounded(weight: QuantizedWeight, cell: Cell, dtype: torch.dtype) -> None:
    found = values_in_file(SimpleNamespace(quantized=lambda name: weight), "it", cell)  # type: ignore[arg-type]
    assert weight.zero_point_OG is not None
    for row in range(3):
        for column in range(64):
            scale = weight.scale_OG[row, column // 32].float()
            offset = (-weight.zero_point_OG[row, column // 32].float() * scale).to(dtype).float()
            assert found[row, column].item() == pytest.approx((weight.codes_OI[row, column] * scale + offset).item())


@pytest.mark.parametrize(
    ("key", "is_fine"),
    [
        ("2 and 4 by block", lambda block, expert, leaf: block % 2 == 1),
        ("2 and 4 by projection", lambda block, expert, leaf: leaf == "down_proj"),
        ("2 and 4 by expert", lambda block, expert, leaf: expert % 3 == 0),
    ],
)
def test_mixes_of_experts(key: str, is_fine: Callable[[int, int, str], bool]) -> None:
    found = grids_of(tiny_model("qwen2_moe"), key, REFERENCE_GRIDS)
    experts = [name.split(".") for name in found if ".experts." in name]
    assert len(experts) == 2 * 8 * 3
    for parts in experts:
        assert (found[".".join(parts)].bits == 4) == is_fine(int(parts[2]), int(parts[5]), parts[6])


def test_full_range_mixes_have_scales_of_either_sign_everywhere() -> None:
    keys = [key for key in REFERENCE_GRIDS if "full range" in key]
    assert len(keys) == 8
    model = tiny_model("qwen2_moe")
    for key in keys:
        assert {grid.kind for grid in grids_of(model, key, REFERENCE_GRIDS).values()} == {"full_range"}


def test_the_unquantized_model_has_one_linear_on_8_bits() -> None:
    found = grids_of(tiny_model("qwen3_moe"), UNQUANTIZED, TINY_GRIDS)
    assert found == {"model.layers.0.self_attn.o_proj": GridSpec(8, 32, True, clip_search=False)}
