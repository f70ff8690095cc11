"""Round to nearest: nearest levels, reported error, experts independent of each other."""

import pytest
import torch

from moeq.quant.grid import choose_qparams, dequantize, dequantize_weight, quantize
from moeq.quant.rtn import round_to_nearest
from moeq.quant.solution import output_energy
from moeq.quant.spec import GridSpec

WEIGHT_EOI = torch.randn(3, 8, 48, generator=torch.Generator().manual_seed(0))


def test_codes_and_parameters_are_those_of_the_grid() -> None:
    grid = GridSpec(3, 16, False)
    solution = round_to_nearest(WEIGHT_EOI, grid, torch.bfloat16)
    qparams = choose_qparams(WEIGHT_EOI, grid, torch.bfloat16)
    assert torch.equal(solution.scale_EOG, qparams.scale_EOG)
    assert torch.equal(solution.codes_EOI, quantize(WEIGHT_EOI, qparams, grid))
    assert not solution.failed_E.any()
    assert not solution.num_retries_E.any()


def test_error_is_reported_in_the_norm_of_the_hessian() -> None:
    grid = GridSpec(3, None, True)
    inputs_ETI = torch.randn(3, 100, 48, generator=torch.Generator().manual_seed(1))
    hessian_EII = inputs_ETI.mT @ inputs_ETI / 100
    solution = round_to_nearest(WEIGHT_EOI, grid, torch.float32, hessian_EII)
    rounded_EOI = dequantize(solution.codes_EOI, solution.scale_EOG, None, 3)
    noise_ETO = inputs_ETI @ (WEIGHT_EOI - rounded_EOI).mT
    signal_ETO = inputs_ETI @ WEIGHT_EOI.mT
    expected_E = noise_ETO.square().sum((1, 2)) / signal_ETO.square().sum((1, 2))
    torch.testing.assert_close(solution.relative_error_E.float(), expected_E, rtol=1e-4, atol=0.0)
    plain_E = round_to_nearest(WEIGHT_EOI, grid, torch.float32).relative_error_E
    expected_E = (WEIGHT_EOI - rounded_EOI).square().sum((1, 2)) / WEIGHT_EOI.square().sum((1, 2))
    torch.testing.assert_close(plain_E.float(), expected_E, rtol=1e-5, atol=0.0)


def test_an_expert_of_zeros_stays_zero_and_has_no_error() -> None:
    solution = round_to_nearest(torch.zeros(1, 4, 32), GridSpec(3, 16, False), torch.bfloat16)
    assert not dequantize(solution.codes_EOI, solution.scale_EOG, solution.zero_point_EOG, 3).any()
    assert solution.relative_error_E.tolist() == [0.0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_experts_rows_are_a_quantized_weight(symmetric: bool) -> None:
    grid = GridSpec(4, 16, symmetric)
    solution = round_to_nearest(WEIGHT_EOI, grid, torch.bfloat16)
    whole_EOI = dequantize(solution.codes_EOI, solution.scale_EOG, solution.zero_point_EOG, 4)
    part = solution.expert(2, grid, slice(4, 8))
    assert torch.equal(dequantize_weight(part, torch.float32), whole_EOI[2, 4:])


@pytest.mark.parametrize("in_features", [48, 256, 300])
def test_output_energy_equals_the_full_product(in_features: int) -> None:
    generator = torch.Generator().manual_seed(2)
    weight_OI = torch.randn(5, in_features, generator=generator)
    inputs_TI = torch.randn(64, in_features, generator=generator)
    expected = (inputs_TI.double() @ weight_OI.double().mT).square().sum()
    torch.testing.assert_close(output_energy(weight_OI, inputs_TI.mT @ inputs_TI), expected, rtol=1e-5, atol=0.0)
