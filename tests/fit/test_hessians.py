"""Hessians of a pass: whoever reads them first, in whatever order, reads the sums of all ranks."""

import math

import pytest
import torch
from torch import Tensor

from moeq.fit.hessians import Hessians, hessians_of
from moeq.fit.schedule import SitePart, cut, whole
from moeq.models.adapter import Adapter, Site
from moeq.quant.coverage import CoverageSpec
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def sites() -> dict[str, Site]:
    """The attention's and the experts' inputs of a block."""
    found = Adapter(tiny_model("qwen2_moe")).sites(0)
    return {kind: next(s for s in found if s.kind == kind) for kind in ("attention", "routed")}


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """Two ranks that saw the same; what was summed over them."""
    summed: list[list[Tensor]] = []

    def sum_over_ranks(tensors: list[Tensor]) -> None:
        summed.append(tensors)
        for tensor in tensors:
            tensor *= 2

    monkeypatch.setattr("moeq.fit.hessians.sum_over_ranks", sum_over_ranks)
    return summed


def rows(site: Site, expert: int) -> Tensor:
    return torch.randn(6 + expert, site.in_features, generator=torch.Generator().manual_seed(expert))


def gather(hessians: Hessians, parts: list[SitePart]) -> None:
    hessians.open(parts, "cpu")
    for part in parts:
        for expert in range(part.site.num_experts):
            hessians.add(part.site, expert, rows(part.site, expert), None, 1.0)


def reference_sum(site: Site, expert: int) -> Tensor:
    """One outer product after the other."""
    total = torch.zeros(site.in_features, site.in_features, dtype=torch.float64)
    for row in rows(site, expert).double():
        total += torch.outer(row, row)
    return total


@pytest.mark.parametrize("first", ["attention", "routed", "pool"])
def test_the_first_reading_adds_up_the_ranks_once_whatever_it_reads(
    first: str, sites: dict[str, Site], doubled: list[list[Tensor]]
) -> None:
    hessians = Hessians()
    gather(hessians, [whole(site) for site in sites.values()])
    assert not doubled
    if first == "pool":
        assert hessians.pool(sites["routed"]) is not None
    else:
        assert hessians[sites[first]].sum_EII.shape[0] == sites[first].num_experts
    # The order of the pass, not of the reading: attention, experts, pool of the experts.
    assert [len(tensors[0]) for tensors in doubled] == [1, sites["routed"].num_experts, 1]
    for site in sites.values():
        for expert in range(site.num_experts):
            expected = 2 * reference_sum(site, expert)
            torch.testing.assert_close(hessians[site].sum_EII[expert], expected, rtol=1e-5, atol=1e-4)
    assert len(doubled) == 3


def test_what_comes_after_a_reading_is_refused(sites: dict[str, Site]) -> None:
    hessians, site = Hessians(), sites["attention"]
    gather(hessians, [whole(site)])
    assert site in hessians
    assert hessians[site].num_tokens_E.tolist() == [6.0]
    with pytest.raises(ValueError, match="was read before its pass was over"):
        hessians.add(site, 0, rows(site, 0), None, 1.0)
    hessians.close()
    assert site not in hessians


def test_a_pool_that_only_later_chunks_read_is_that_of_all_ranks(
    sites: dict[str, Site], doubled: list[list[Tensor]]
) -> None:
    site, hessians = sites["routed"], Hessians()
    bound = 3.5 * whole(site).bytes / site.num_experts / 2**30
    chunks = list(cut([site], bound, "routed"))
    assert len(chunks) > 1
    for parts in chunks[:-1]:  # nothing reads these
        gather(hessians, list(parts))
        hessians.close()
    gather(hessians, list(chunks[-1]))
    pool = hessians.pool(site)
    assert pool is not None
    expected = 2 * sum(reference_sum(site, expert) for expert in range(site.num_experts))
    torch.testing.assert_close(pool.sum_EII[0], expected, rtol=1e-5, atol=1e-3)
    hessians.close()
    assert hessians.pool(site) is None


def test_all_experts_at_once_add_up_to_those_one_by_one_however_the_site_is_cut(sites: dict[str, Site]) -> None:
    site = sites["routed"]
    each = [rows(site, expert) for expert in range(site.num_experts)]
    starts = [0, *torch.tensor([len(x_TI) for x_TI in each]).cumsum(0).tolist()]
    for bound in (math.inf, 3.5 * whole(site).bytes / site.num_experts / 2**30):
        together, apart = Hessians(), Hessians()
        for parts in cut([site], bound, "routed"):
            gather(apart, list(parts))
            together.open(parts, "cpu")
            together.add_groups(site, torch.cat(each), torch.ones(starts[-1]), starts, 1.0)
            pairs = [(together[site], apart[site])]
            if (pool := together.pool(site)) is not None and (other := apart.pool(site)) is not None:
                pairs.append((pool, other))
            assert len(pairs) == 2
            for found, expected in pairs:
                for one, reference in zip(found.tensors(), expected.tensors(), strict=True):
                    torch.testing.assert_close(one, reference, rtol=1e-5, atol=1e-4)
            together.close()
            apart.close()


def test_an_expert_to_be_rounded_gets_the_identity_and_a_record(sites: dict[str, Site]) -> None:
    site, hessians = sites["routed"], Hessians()
    gather(hessians, [whole(site)])
    of, fallbacks = hessians_of(hessians, [whole(site)], CoverageSpec("rtn", min_tokens=8))
    assert [fallback.weight for fallback in fallbacks] == [site.weight_name(e, site.leaves[0]) for e in (0, 1)]
    hessian_EII = of(site, [1, 3])
    assert torch.equal(hessian_EII[0], torch.eye(site.in_features))
    expected = (reference_sum(site, 3) / 9).float()
    torch.testing.assert_close(hessian_EII[1], expected, rtol=1e-4, atol=1e-4)
