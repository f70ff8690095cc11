import itertools
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moeq.fit import share
from moeq.fit.share import SolvedWeight, divide, experts_per_unit, gather_solved, solve_operations
from moeq.quant.spec import Fallback, QuantizedWeight


def test_every_unit_has_one_rank_and_the_longest_share_is_near_the_shortest_possible() -> None:
    draw = random.Random(0)
    for num_ranks in (1, 2, 3):
        costs = [draw.randint(1, 50) for _ in range(7)]
        shares = (loads(costs, owners, num_ranks) for owners in itertools.product(range(num_ranks), repeat=7))
        best = min(max(loads_of_ranks) for loads_of_ranks in shares)
        owners = divide(costs, num_ranks)
        assert len(owners) == 7
        assert max(loads(costs, owners, num_ranks)) <= 4 / 3 * best


def loads(costs: list[int], owners: tuple[int, ...] | list[int], num_ranks: int) -> list[int]:
    return [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(num_ranks)]


def test_equal_units_go_round_and_few_units_leave_ranks_without_one() -> None:
    assert divide([5, 5, 5, 5], 2) == [0, 1, 0, 1]
    assert divide([1, 9, 1, 1], 2) == [1, 0, 1, 1]
    assert divide([3], 3) == [0]
    assert divide([], 3) == []


def test_the_work_of_a_solve_is_that_of_its_products() -> None:
    # A product [M, K] x [K, N] counts 2 M K N; the feedback and the energy each take half of one, [O, I] x [I, I].
    assert solve_operations(10, 30) == 30**3 // 3 + 2 * (2 * 10 * 30 * 30) // 2
    assert experts_per_unit(4096, 7168) == 1
    assert experts_per_unit(1536, 2048) == 4
    assert experts_per_unit(256, 256) > 1000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_rank_has_every_weight_as_it_was_solved(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    by_rank = [[solved("a", dtype), solved("b", dtype)], [], [replace(solved("c", dtype), offset_OI=None)]]
    sent = {source: iter([t for w in weights for t in share._tensors(w)]) for source, weights in enumerate(by_rank)}
    outlines = [(r, share._with_tensors(w, share._outline)) for r, weights in enumerate(by_rank) for w in weights]

    def broadcast(tensor: Tensor, source: int) -> None:
        tensor.copy_(next(sent[source]))

    monkeypatch.setattr(share, "rank_and_world", lambda: (1, 3))
    monkeypatch.setattr(share, "gather_lists", lambda _: outlines)
    monkeypatch.setattr(share, "broadcast", broadcast)
    gathered = gather_solved(by_rank[1])
    expected = [weight for weights in by_rank for weight in weights]
    assert [weight.name for weight in gathered] == ["a", "b", "c"]
    for one, other in zip(gathered, expected, strict=True):
        pairs = zip(share._tensors(one), share._tensors(other), strict=True)
        assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)
        assert (one.fallbacks, one.relative_error) == (other.fallbacks, other.relative_error)


def solved(name: str, dtype: torch.dtype) -> SolvedWeight:
    codes_OI = torch.randint(0, 8, (6, 32), dtype=torch.uint8)
    zero_point_OG = None if name == "b" else torch.randint(0, 8, (6, 2), dtype=torch.uint8)
    weight = QuantizedWeight(codes_OI, torch.rand(6, 2).to(dtype), zero_point_OG, bits=3, group_size=16)
    return SolvedWeight(name, weight, 0.25, (Fallback(name, "reason", "detail"),), torch.rand(6, 32).half())
