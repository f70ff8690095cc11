"""Random rotations: orthogonal matrices that spread every coordinate evenly over all of them.

    Q = D H / sqrt(n),    D = diag(random signs),    H H^T = n I,  H_ij = +-1      (QuaRot, arXiv 2404.00456, section 3)

A row vector is rotated by ``x Q``, a weight [O, I] by ``W Q`` on its in-features.  With the signs applied *before* H
different seeds give different values; after it they would only flip signs, which no grid would notice.

For ``n = 2^k m``, ``H = H_2 x ... x H_2 x H_m`` (Kronecker products): k butterflies and one product with the small
factor.  H_m is built from the quadratic residues of a prime q (Paley, 1933): with chi the Legendre symbol,

    Q_ij = chi(i - j),   S = [[0, 1], [-1^T, Q]],  C = [[0, 1], [1^T, Q]]
    q = 3 mod 4:  H_(q+1)  = I + S
    q = 1 mod 4:  H_(2q+2) = C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]]

Legend: N rows, D features.
"""

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor

RotationKind = Literal["hadamard", "orthogonal"]
Basis = Callable[[Tensor], Tensor]


def make_basis(size: int, kind: RotationKind, seed: int, device: torch.device | None = None) -> Basis:
    """A random rotation: a function that multiplies [..., size] by an orthogonal matrix from the right, in float64.

    Args:
        size: Number of features.
        kind: "hadamard", or "orthogonal" (uniformly random, any size, without a fast transform).
        seed: Of the signs, or of the matrix.
        device: Where it will be used.

    Raises:
        ValueError: No Hadamard matrix of this size is known here.
    """
    if kind == "orthogonal":
        matrix_DD = random_orthogonal(size, seed).to(device)
        return lambda x: x.double() @ matrix_DD
    small_MM = paley(factor_size(size)).to(device)
    signs_D = random_signs(size, seed).to(device)
    return lambda x: transform(x.double() * signs_D, small_MM) * size**-0.5


def random_signs(size: int, seed: int) -> Tensor:
    """Random signs, float64 [size]."""
    return torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def random_orthogonal(size: int, seed: int) -> Tensor:
    """A uniformly (Haar) random orthogonal matrix, float64 [size, size]."""
    gauss = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(gauss)
    return q * r.diagonal().sign()


def transform(x: Tensor, small_MM: Tensor) -> Tensor:
    """``x H`` with ``H`` the Kronecker product of H_2 matrices and ``small_MM``, not normalised.

    Args:
        x: [..., n], n = 2^k m.
        small_MM: Hadamard matrix of size m.
    """
    m = len(small_MM)
    y = x.unflatten(-1, (-1, m)) @ small_MM
    y = y.flatten(-2)
    stride = m
    while stride < x.shape[-1]:
        pairs = y.unflatten(-1, (-1, 2, stride))
        first, second = pairs.unbind(-2)
        y = torch.stack((first + second, first - second), -2).flatten(-3)
        stride *= 2
    return y


def hadamard(size: int) -> Tensor:
    """The Hadamard matrix that ``transform`` applies: float64 [size, size] of +-1 with orthogonal rows."""
    small = paley(factor_size(size))
    matrix = torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    while len(matrix) * len(small) < size:
        matrix = torch.kron(two, matrix)
    return torch.kron(matrix, small)


def factor_size(size: int) -> int:
    """The smallest m with size = 2^k m for which ``paley`` has a matrix.

    Raises:
        ValueError: There is none; it names the nearest sizes that have one.
    """
    found = _factor_size(size)
    if found is not None:
        return found
    smaller = next(n for n in range(size - 1, 0, -1) if _factor_size(n))
    larger = next(n for n in range(size + 1, 2 * size + 1) if _factor_size(n))
    raise ValueError(
        f"no Hadamard matrix of size {size} is known here (sizes that have one: {smaller}, {larger}); "
        "choose kind: orthogonal"
    )


def has_hadamard(size: int) -> bool:
    """Whether a Hadamard matrix of this size is known here."""
    return _factor_size(size) is not None


@cache
def paley(size: int) -> Tensor:
    """Hadamard matrix of size 1, q + 1 (prime q = 3 mod 4) or 2 (q + 1) (prime q = 1 mod 4), float64."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    first = _is_prime(size - 1) and (size - 1) % 4 == 3
    q = size - 1 if first else size // 2 - 1
    residue_Q = torch.full((q,), -1.0, dtype=torch.float64)
    residue_Q[torch.arange(1, q).square() % q] = 1
    residue_Q[0] = 0
    index = torch.arange(q)
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:] = 1
    conference[1:, 0] = -1 if first else 1
    conference[1:, 1:] = residue_Q[(index[:, None] - index) % q]
    unit = torch.eye(q + 1, dtype=torch.float64)
    if first:
        return unit + conference
    plus, minus = (torch.tensor(rows, dtype=torch.float64) for rows in ([[1, 1], [1, -1]], [[1, -1], [-1, -1]]))
    return torch.kron(conference, plus) + torch.kron(unit, minus)


def _factor_size(size: int) -> int | None:
    odd = size // (size & -size)
    while odd <= size:
        if odd == 1 or _has_paley(odd):
            return odd
        odd *= 2
    return None


def _has_paley(size: int) -> bool:
    if size % 4:
        return False
    second = size // 2 - 1
    return (_is_prime(size - 1)) or (second % 4 == 1 and _is_prime(second))


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))
