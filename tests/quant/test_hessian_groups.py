"""Sums of all experts at once against those of one expert after another."""

import pytest
import torch
from torch import Tensor

from moeq.quant import hessian_groups
from moeq.quant.hessian import HessianState, accumulate, empty_state
from moeq.quant.hessian_groups import accumulate_groups

STARTS = [0, 7, 7, 12, 40]  # the second expert has no token


def rows(in_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(STARTS[-1], in_features, generator=generator).to(dtype)
    return x_NI, torch.rand(STARTS[-1], generator=generator).to(dtype)


def reference(x_NI: Tensor, affinity_N: Tensor, power: float) -> tuple[HessianState, HessianState]:
    state, pool = empty_state(4, x_NI.shape[1], "cpu"), empty_state(1, x_NI.shape[1], "cpu")
    for expert in range(4):
        part = slice(STARTS[expert], STARTS[expert + 1])
        accumulate(state, expert, x_NI[part], affinity_N[part], power, pool)
    return state, pool


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_all_experts_at_once_have_the_sums_of_each(
    power: float, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_NI, affinity_N = rows(24, dtype)
    monkeypatch.setattr(hessian_groups, "CHUNK_BYTES", chunk * 4 * 24**2)
    state, pool = empty_state(4, 24, "cpu"), empty_state(1, 24, "cpu")
    for _ in range(2):
        accumulate_groups(state, x_NI, affinity_N, STARTS, power, pool)
    for found, expected in zip((state, pool), reference(x_NI, affinity_N, power), strict=True):
        for one, other in zip(found.tensors(), expected.tensors(), strict=True):
            torch.testing.assert_close(one, 2 * other, rtol=1e-5, atol=1e-5)
    assert torch.equal(state.sum_EII, state.sum_EII.mT)


def test_an_expert_without_rows_keeps_its_sums() -> None:
    state = empty_state(4, 24, "cpu")
    accumulate_groups(state, *rows(24, torch.float32), STARTS, 1.0)
    assert not any(bool(tensor[1].any()) for tensor in state.tensors())
