"""Linears of the experts of one block with their inputs, and what is timed on them: moeq, the papers' loop, the floor.

Legend: E experts, O out features, I in features, T tokens of an expert in a batch.
"""

import argparse

import torch
from torch import Tensor

from benchmarks.speed.papers_loop import papers_hessian, papers_solve
from moeq.quant.gptq import gptq_solve
from moeq.quant.hessian import HessianState, accumulate, empty_state, mean_hessian
from moeq.quant.solution import Solution
from moeq.quant.spec import GridSpec, SolveSpec

GRID = GridSpec(bits=4, group_size=None, symmetric=True, clip_search=False)
SOLVE = SolveSpec(damping=0.01, act_order=False, column_block=128)


class Linear:
    """Stacked gate and up, or down: weights [E, O, I] and correlated, uneven inputs in batches [E, T, I]."""

    def __init__(
        self, shape: tuple[int, int, int], batches: int, tokens: int, parts: int, seed: int, device: str
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        experts, _, in_features = shape
        mixing_II = torch.eye(in_features) + 0.05 * torch.randn(in_features, in_features, generator=generator)
        scale_I = 0.1 + torch.rand(in_features, generator=generator)
        sizes = (experts, tokens, in_features)
        noise = [torch.randn(sizes, generator=generator) for _ in range(batches)]
        self.batches_ETI = [((x_ETI * scale_I) @ mixing_II).bfloat16().to(device) for x_ETI in noise]
        self.weight_EOI = (0.02 * torch.randn(shape, generator=generator)).to(device)
        self.parts = parts

    def our_hessian(self) -> Tensor:
        """Sums over batches and their mean, as in a calibration pass."""
        experts, _, in_features = self.weight_EOI.shape
        state: HessianState = empty_state(experts, in_features, self.weight_EOI.device)
        for x_ETI in self.batches_ETI:
            for expert, x_TI in enumerate(x_ETI):
                accumulate(state, expert, x_TI)
        return mean_hessian(state)

    def loop_hessian(self) -> None:
        """One Hessian for each linear of each expert."""
        for expert in range(len(self.weight_EOI)):
            for _ in range(self.parts):
                papers_hessian([x_ETI[expert] for x_ETI in self.batches_ETI])

    def our_solve(self, hessian_EII: Tensor) -> Solution:
        """Everything a run does: solve, scales, codes, relative error."""
        return gptq_solve(self.weight_EOI, hessian_EII, GRID, SOLVE, torch.float32)

    def loop_solve(self, hessian_EII: Tensor) -> Tensor:
        """Dequantized weights [E, O, I], one linear after another."""
        return torch.stack(
            [
                torch.cat([papers_solve(part, hessian_II, GRID, SOLVE) for part in weight_OI.chunk(self.parts)])
                for weight_OI, hessian_II in zip(self.weight_EOI, hessian_EII, strict=True)
            ]
        )

    def hessian_floor(self) -> None:
        """Half of x^T x per batch and expert."""
        for x_ETI in self.batches_ETI:
            for x_TI in x_ETI:
                rows_TI = x_TI.float()
                torch.mm(rows_TI[:, : rows_TI.shape[1] // 2].mT, rows_TI)

    def solve_floor(self, hessian_EII: Tensor) -> None:
        """The feedback in products of 128 rows, and a product of as many operations as the factor."""
        for weight_OI, hessian_II in zip(self.weight_EOI, hessian_EII, strict=True):
            weight_IO = weight_OI.mT.contiguous()
            for stop in range(128, len(weight_IO), 128):
                torch.mm(hessian_II[stop - 128 : stop, :stop], weight_IO[:stop])
            torch.mm(hessian_II[:, : len(weight_IO) // 6].mT.contiguous(), hessian_II)


def make_linears(sizes: tuple[int, int, int], args: argparse.Namespace, seed: int) -> list[Linear]:
    """Gate and up, which share their input, and down.

    Args:
        sizes: Experts of the block, of which ``args.experts`` are made; hidden size; expert width.
        args: Numbers of experts, batches and tokens, and the device.
        seed: Of weights and inputs.
    """
    _, width, expert_width = sizes
    shapes = [((args.experts, 2 * expert_width, width), 2), ((args.experts, width, expert_width), 1)]
    return [Linear(shape, args.batches, args.tokens, parts, seed, args.device) for shape, parts in shapes]
