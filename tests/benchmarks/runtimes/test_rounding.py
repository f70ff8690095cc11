"""llama.cpp's rounding of activations, number by number."""

import pytest
import torch
from torch import nn

from benchmarks.runtimes.rounding import TOKENS, RoundedActivations, rounded_activations


def test_activations_are_integers_up_to_127_times_the_scale_of_their_block() -> None:
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    values[1, :32] = 0
    found = rounded_activations(values, "Q4_0")
    for row, ours in zip(values.tolist(), found.tolist(), strict=True):
        for start in (0, 32):
            block = row[start : start + 32]
            scale = max(abs(value) for value in block) / 127
            half = torch.tensor(scale).half().item()
            for value, rounded in zip(block, ours[start : start + 32], strict=True):
                expected = round(value / scale) * half if scale else 0.0
                assert rounded == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_floats_take_activations_in_their_own_dtype(kind: str, dtype: torch.dtype) -> None:
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounded_activations(values, kind), values.to(dtype).float())


def test_only_products_with_known_weights_are_rounded() -> None:
    one, other = nn.Linear(32, 4, bias=False), nn.Linear(32, 4, bias=False)
    values = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), RoundedActivations({one.weight.untyped_storage().data_ptr(): "Q8_0"}):
        found, kept, part = one(values), other(values), values @ one.weight[:2].mT
    rounded = rounded_activations(values, "Q8_0")
    assert torch.equal(found, rounded @ one.weight.mT)
    assert torch.equal(kept, values @ other.weight.mT)
    assert torch.equal(part, rounded @ one.weight[:2].mT)


def test_a_token_has_one_scale() -> None:
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    found = rounded_activations(values, TOKENS)
    for row, ours in zip(values.tolist(), found.tolist(), strict=True):
        scale = max(abs(value) for value in row) / 127
        assert ours == pytest.approx([round(value / scale) * scale for value in row], rel=1e-5, abs=1e-7)
