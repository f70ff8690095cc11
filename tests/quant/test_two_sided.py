"""Rounding under two Hessians: feedback against loops written from the definition of the loss."""

import itertools

import pytest
import torch
from torch import Tensor

from moeq.quant.two_sided import Levels, damped, two_sided_loss, two_sided_round, unit_lower

E, O, I = 2, 5, 7  # noqa: E741


def problem(seed: int, rows: int = O, columns: int = I) -> tuple[Tensor, Tensor, Tensor, Levels]:
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    weight_EOI = normal(E, rows, columns)
    output_EOO, input_EII = (damped(a @ a.mT, 0.02) for a in (normal(E, rows, rows), normal(E, columns, columns)))
    scale_EOI = 0.5 + 0.4 * torch.rand(E, rows, columns, generator=generator)
    return weight_EOI, output_EOO, input_EII, Levels(scale_EOI, torch.full_like(scale_EOI, 3.0), 7)


def kronecker(output_OO: Tensor, input_II: Tensor) -> Tensor:
    """The Hessian of vec(D), columns one after another, float64."""
    return torch.kron(input_II.double(), output_OO.double())


def real(levels: Levels, code_EOI: Tensor) -> Tensor:
    return (code_EOI.double() - levels.zero_point_EOI) * levels.scale_EOI


def test_the_loss_is_the_quadratic_form_of_the_kronecker_product() -> None:
    delta_EOI, output_EOO, input_EII, _ = problem(0)
    vec_EN = delta_EOI.mT.flatten(1).double()
    expected_E = [0.5 * v @ kronecker(o, i) @ v for v, o, i in zip(vec_EN, output_EOO, input_EII, strict=True)]
    found_E = two_sided_loss(delta_EOI, output_EOO, input_EII)
    torch.testing.assert_close(found_E.double(), torch.stack(expected_E), rtol=1e-5, atol=0.0)


def test_the_factor_is_unit_lower_triangular_and_gives_the_hessian_back() -> None:
    _, _, input_EII, _ = problem(0)
    lower_EII = unit_lower(input_EII)
    assert torch.equal(lower_EII, lower_EII.tril())
    inverse_EII = torch.linalg.inv(lower_EII)
    inner_EII = inverse_EII.mT @ input_EII @ inverse_EII
    torch.testing.assert_close(inner_EII, torch.diag_embed(inner_EII.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_rounding_agrees_with_one_optimal_choice_after_another_in_float64(seed: int) -> None:
    """Each weight takes the level nearest to its best real value, if all weights after it were free to follow."""
    weight_EOI, output_EOO, input_EII, levels = problem(seed)
    found_EOI = two_sided_round(weight_EOI, output_EOO, input_EII, levels)
    for e in range(E):
        rows = output_EOO[e].diagonal().argsort(descending=True)
        columns = input_EII[e].diagonal().argsort(descending=True)
        order = [(int(r), int(c)) for c, r in itertools.product(columns, rows)]
        index = torch.tensor([r + c * O for r, c in order])
        hessian_NN = kronecker(output_EOO[e], input_EII[e])[index][:, index]
        delta_N = torch.zeros(0, dtype=torch.float64)
        for n, (r, c) in enumerate(order):
            # Minimise over weight n and all later ones, given what the earlier ones did.
            free_N = torch.linalg.solve(hessian_NN[n:, n:], -hessian_NN[n:, :n] @ delta_N)
            scale, zero = levels.scale_EOI[e, r, c].double(), levels.zero_point_EOI[e, r, c].double()
            code = ((weight_EOI[e, r, c].double() + free_N[0]) / scale + zero).round().clamp(0, levels.top)
            assert int(code) == int(found_EOI[e, r, c])
            delta_N = torch.cat([delta_N, ((code - zero) * scale - weight_EOI[e, r, c])[None]])


@pytest.mark.parametrize(("rows", "columns"), [(20, 35), (48, 16), (3, 40)])
def test_tiles_give_what_one_weight_after_another_gives(rows: int, columns: int) -> None:
    weight_EOI, output_EOO, input_EII, levels = problem(1, rows, columns)
    levels.scale_EOI[:, ::3] *= -1  # of full-range grids
    found_EOI = two_sided_round(weight_EOI, output_EOO, input_EII, levels)
    for e in range(E):
        row = output_EOO[e].diagonal().argsort(descending=True, stable=True)
        column = input_EII[e].diagonal().argsort(descending=True, stable=True)
        left_OO, right_II = (
            unit_lower(hessian.double()[order][:, order][None])[0]
            for hessian, order in ((output_EOO[e], row), (input_EII[e], column))
        )
        delta_OI = torch.zeros(rows, columns, dtype=torch.float64)
        for c, r in itertools.product(range(columns), range(rows)):
            at = int(row[r]), int(column[c])
            feedback = left_OO[r] @ delta_OI @ right_II[c]
            scale, zero = levels.scale_EOI[e][at].double(), levels.zero_point_EOI[e][at].double()
            code = ((weight_EOI[e][at].double() - feedback) / scale + zero).round().clamp(0, levels.top)
            assert int(code) == int(found_EOI[e][at])
            delta_OI[r, c] = (code - zero) * scale - weight_EOI[e][at]


def test_identities_round_to_nearest() -> None:
    weight_EOI, _, _, levels = problem(5)
    eyes = torch.eye(O).expand(E, O, O), torch.eye(I).expand(E, I, I)
    assert torch.equal(two_sided_round(weight_EOI, *eyes, levels), levels.nearest(weight_EOI))


def test_a_hessian_of_no_tokens_becomes_the_identity() -> None:
    torch.testing.assert_close(damped(torch.zeros(1, 3, 3), 0.1), torch.eye(3)[None])
