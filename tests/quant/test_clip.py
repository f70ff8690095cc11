"""Clipping ranges by output error: the best step of a loop, never worse than min-max, nothing without inputs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moeq.quant.clip import SMALLEST, STEPS, clip_by_output_error
from moeq.quant.grid import choose_qparams, dequantize, quantize
from moeq.quant.kinds import Kind
from moeq.quant.spec import GridSpec

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT_EOI = torch.randn(2, 5, 32, generator=GENERATOR) ** 3
INPUTS_ETI = torch.randn(2, 60, 32, generator=GENERATOR) @ torch.randn(2, 32, 32, generator=GENERATOR)
HESSIAN_EII = INPUTS_ETI.mT @ INPUTS_ETI


def reference_error(group_S: Tensor, x_TS: Tensor, shrink: float, bits: int, symmetric: bool, sign: int = 1) -> float:
    """Squared change of the group's contribution to the output, over all tokens."""
    low, high = min(0.0, float(group_S.min())) * shrink, max(0.0, float(group_S.max())) * shrink
    if symmetric:
        scale, zero = sign * max(-low, high) / (2 ** (bits - 1) - 1), 2 ** (bits - 1)
    else:
        scale = (high - low) / (2**bits - 1)
        zero = min(max(round(-low / scale), 0), 2**bits - 1)
    real_S = torch.tensor([(min(max(round(float(w) / scale) + zero, 0), 2**bits - 1) - zero) * scale for w in group_S])
    return float((x_TS @ (real_S - group_S)).square().sum())


@pytest.mark.parametrize(("symmetric", "kind"), [(True, "uniform"), (False, "uniform"), (True, "full_range")])
@pytest.mark.parametrize("group_size", [8, None])
def test_the_error_of_every_group_is_the_least_of_a_loop_over_steps(
    group_size: int | None, symmetric: bool, kind: Kind
) -> None:
    grid = GridSpec(3, group_size, symmetric, kind=kind)
    qparams = clip_by_output_error(WEIGHT_EOI, HESSIAN_EII, grid, torch.float32)
    codes_EOI = quantize(WEIGHT_EOI, qparams, grid)
    delta_EOI = dequantize(codes_EOI, qparams.scale_EOG, qparams.zero_point_EOG, 3) - WEIGHT_EOI
    size, chosen = group_size or 32, []
    for e in range(2):
        for o in range(5):
            for start in range(0, 32, size):
                part = slice(start, start + size)
                x_TS, group_S = INPUTS_ETI[e][:, part], WEIGHT_EOI[e, o, part]
                errors = [
                    reference_error(group_S, x_TS, 1 - step * (1 - SMALLEST) / STEPS, 3, symmetric, sign)
                    for step in range(STEPS + 1)
                    for sign in ((1, -1) if kind == "full_range" else (1,))
                ]
                if kind == "full_range":  # three quarters of the symmetric range: the one from end to end
                    errors += [reference_error(group_S, x_TS, 0.75, 3, True, sign) for sign in (1, -1)]
                found = float((x_TS @ delta_EOI[e, o, part]).square().sum())
                assert found == pytest.approx(min(errors), rel=1e-3)
                chosen.append(errors.index(min(errors)))
    assert len(set(chosen)) > 3, "the example has to need clipping"


def test_the_scale_of_one_bit_is_the_best_of_many() -> None:
    grid = GridSpec(1, 8, symmetric=True)
    scale_EOG = clip_by_output_error(WEIGHT_EOI, HESSIAN_EII, grid, torch.float32).scale_EOG
    for e, o, g in ((0, 0, 0), (1, 4, 3), (0, 2, 1)):
        part = slice(8 * g, 8 * g + 8)
        x_TS, group_S = INPUTS_ETI[e][:, part], WEIGHT_EOI[e, o, part]
        signs_S = torch.tensor([0.5 if w > 0 else -0.5 for w in group_S])
        scales = torch.linspace(0.01, 4 * float(group_S.abs().max()), 4001)
        errors = [float((x_TS @ (signs_S * scale - group_S)).square().sum()) for scale in scales]
        best = float(scales[errors.index(min(errors))])
        assert float(scale_EOG[e, o, g]) == pytest.approx(best, abs=2 * float(scales[1] - scales[0]))
    empty = clip_by_output_error(WEIGHT_EOI, torch.zeros_like(HESSIAN_EII), grid, torch.float32)
    assert torch.equal(empty.scale_EOG, choose_qparams(WEIGHT_EOI, grid, torch.float32).scale_EOG)


def test_groups_without_inputs_keep_their_min_max_range() -> None:
    grid = GridSpec(3, 8)
    hessian_EII = HESSIAN_EII.clone()
    hessian_EII[:, :8], hessian_EII[:, :, :8] = 0, 0
    clipped = clip_by_output_error(WEIGHT_EOI, hessian_EII, grid, torch.bfloat16)
    plain = choose_qparams(WEIGHT_EOI, replace(grid, clip_search=False), torch.bfloat16)
    assert torch.equal(clipped.scale_EOG[..., 0], plain.scale_EOG[..., 0])
    assert not torch.equal(clipped.scale_EOG[..., 1:], plain.scale_EOG[..., 1:])
    assert (clipped.scale_EOG <= plain.scale_EOG).all()
    assert clipped.scale_EOG.dtype == torch.bfloat16
