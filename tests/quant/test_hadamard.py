"""Rotations are orthogonal, spread evenly, and the fast transform is the matrix."""

import pytest
import torch
from torch import Tensor

from moeq.quant.hadamard import (
    factor_size,
    hadamard,
    make_basis,
    paley,
    random_orthogonal,
    random_signs,
    transform,
)

# Powers of two, each factor of either construction, and products; 2880 is the width of gpt-oss.
SIZES = (1, 2, 4, 8, 64, 12, 20, 28, 36, 44, 60, 76, 104, 24, 80, 96, 144, 224)


@pytest.mark.parametrize("size", [*SIZES, 2880])
def test_a_hadamard_matrix_has_signs_only_and_orthogonal_rows(size: int) -> None:
    matrix = hadamard(size)
    assert matrix.shape == (size, size)
    assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", SIZES)
def test_the_fast_transform_is_the_product_with_the_matrix(size: int, generator: torch.Generator) -> None:
    x = torch.randn(3, 2, size, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(transform(x, paley(factor_size(size))), x @ hadamard(size))


def matrix_of(size: int, kind: str, seed: int) -> Tensor:
    return make_basis(size, kind, seed)(torch.eye(size))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", SIZES)
def test_a_random_hadamard_rotation_is_orthogonal_and_its_entries_are_equally_large(size: int) -> None:
    q = matrix_of(size, "hadamard", seed=3)
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(q.abs(), torch.full_like(q, size**-0.5))
    torch.testing.assert_close(q, random_signs(size, 3)[:, None] * hadamard(size) / size**0.5)


def test_one_large_value_is_spread_over_all() -> None:
    x = torch.zeros(96)
    x[17] = 1.0
    assert make_basis(96, "hadamard", 0)(x).abs().max() == pytest.approx(96**-0.5)


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_the_seed_decides_the_rotation_beyond_signs_of_its_outputs(kind: str) -> None:
    a, b, again = (matrix_of(64, kind, seed) for seed in (0, 1, 0))
    assert torch.equal(a, again)
    x = torch.arange(64).double()
    assert not torch.allclose((x @ a).abs(), (x @ b).abs())


@pytest.mark.parametrize("size", [3, 92, 100])
def test_a_random_orthogonal_matrix_needs_no_factor(size: int) -> None:
    q = random_orthogonal(size, 0)
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix_of(size, "orthogonal", 0), q)


@pytest.mark.parametrize(("size", "near"), [(92, "88, 96"), (6, "4, 8"), (7, "4, 8"), (50, "48, 56")])
def test_a_size_without_a_factor_names_the_nearest_and_the_remedy(size: int, near: str) -> None:
    with pytest.raises(ValueError, match=rf"size {size} .*have one: {near}\); choose kind: orthogonal"):
        factor_size(size)


def test_the_factor_is_the_smallest_one() -> None:
    assert [factor_size(n) for n in (2048, 1536, 5120, 7168, 2304, 2880)] == [1, 12, 20, 28, 36, 180]
