"""The Triton kernel of the sweep against its torch twin, on a GPU where there is one, else in Triton's interpreter.

Skipped where triton is missing, as it is beside CPU builds of torch: its wheel is 285 MB, too much for a development
dependency.  ``pip install triton`` runs these tests on any Linux machine.
"""

import os

import pytest
import torch
from torch import Tensor

from moeq.quant import sweep
from moeq.quant.gptq import gptq_solve
from moeq.quant.spec import GridSpec, SolveSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":  # the interpreter is chosen when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"
columns = pytest.importorskip(
    "moeq.kernels.sweep_triton", reason="triton is not installed", exc_type=ModuleNotFoundError
)


def part(experts: int, size: int, rows: int, bits: int, per_channel: bool, seed: int) -> tuple[sweep._Block, Tensor]:
    """Columns of some experts, cut out of larger tensors, and their feedback."""
    generator = torch.Generator().manual_seed(seed)
    shape = (experts, size + 3, rows)
    scale_EO = 0.05 + torch.rand(experts, 1, rows, generator=generator)
    low_EO = -torch.randint(0, 2**bits, (experts, 1, rows), generator=generator).float()
    target, weight = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    scale, low = scale_EO.expand(shape), low_EO.expand(shape)
    if not per_channel:
        scale = scale * (0.5 + torch.rand(shape, generator=generator))
        low = low.contiguous()
    feedback = torch.randn(experts, size, size, generator=generator) / size**0.5
    tensors = (target, weight, torch.zeros(shape), torch.zeros(shape), scale, low, low + 2**bits - 1)
    return sweep._Block(*(tensor.to(DEVICE) for tensor in tensors)).columns(2, 2 + size), feedback.to(DEVICE)


def copied(block: sweep._Block) -> sweep._Block:
    return sweep._Block(*(tensor.clone() for tensor in vars(block).values()))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("experts", "size", "rows"), [(1, 1, 1), (3, 5, 33), (2, 16, 32), (1, 64, 70), (2, 37, 10)])
def test_the_kernel_gives_the_levels_of_the_torch_loop(experts: int, size: int, rows: int, per_channel: bool) -> None:
    for bits in (2, 4, 8):
        block, feedback_ESS = part(experts, size, rows, bits, per_channel, seed=bits)
        expected = copied(block)
        sweep._round_together(expected, feedback_ESS)
        sweep._round_by_kernel(block, feedback_ESS)
        assert torch.equal(block.level, expected.level)
        torch.testing.assert_close(block.target, expected.target, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(block.delta, expected.delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("grid", [GridSpec(3, None, True), GridSpec(4, 16, False), GridSpec(2, 24, True)])
def test_a_sweep_by_the_kernel_gives_the_codes_of_a_sweep_without(
    grid: GridSpec, act_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_EOI = torch.randn(3, 10, 96, generator=generator) * 0.05
    x_ETI = torch.randn(3, 200, 96, generator=generator) * (0.2 + torch.rand(96, generator=generator))
    weight_EOI, hessian_EII = weight_EOI.to(DEVICE), (x_ETI.mT @ x_ETI / 200).to(DEVICE)
    solve = SolveSpec(act_order=act_order)
    monkeypatch.setattr(sweep, "_choose_loop", lambda _: (sweep._round_together, sweep.STEP_TOGETHER))
    expected = gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.bfloat16)
    launches = []

    def kernel(block: sweep._Block, feedback_SS: Tensor) -> None:
        launches.append(block)
        sweep._round_by_kernel(block, feedback_SS)

    monkeypatch.setattr(sweep, "_choose_loop", lambda _: (kernel, sweep.STEP_CUDA))
    found = gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.bfloat16)
    assert launches
    assert torch.equal(found.codes_EOI, expected.codes_EOI)
    assert torch.equal(found.scale_EOG, expected.scale_EOG)
    torch.testing.assert_close(found.relative_error_E, expected.relative_error_E, rtol=1e-4, atol=0.0)
