from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moeq.fit import share
from moeq.fit.run import Run
from moeq.fit.schedule import whole
from moeq.fit.solve import Unit, commit, cut, make_units, quantize_sites, solve_unit
from moeq.models.adapter import Adapter, Site
from moeq.quant.gptq import gptq_solve
from moeq.quant.grid import dequantize_weight
from moeq.quant.rtn import round_to_nearest
from moeq.quant.solution import Solution
from moeq.quant.spec import GridSpec, QuantizedWeight, SolveSpec
from tests.tensors_made import TensorsMade
from tests.tiny import tiny_model

GRID = GridSpec(bits=4, group_size=16, symmetric=False, clip_search=False)


def rtn(unit: Unit, weight_EOI: Tensor) -> Solution:
    return round_to_nearest(weight_EOI, unit.grid, torch.float32)


@pytest.fixture
def adapter() -> Adapter:
    return Adapter(tiny_model("qwen2_moe"))


def uniform(sites: tuple[Site, ...]) -> dict[str, GridSpec]:
    return {name: GRID for site in sites for name in site.weight_names()}


def test_a_uniform_plan_makes_one_unit_per_site(adapter: Adapter) -> None:
    sites = adapter.sites(0)
    units = make_units([whole(site) for site in sites], uniform(sites), max_experts=8)
    assert [unit.site for unit in units] == list(sites)
    assert all(len(unit.experts) == unit.site.num_experts for unit in units)


def test_units_cover_every_weight_once_for_any_mix_of_bits(adapter: Adapter) -> None:
    sites = adapter.sites(0)
    plan = {name: replace(GRID, bits=2 + i % 3) for i, name in enumerate(uniform(sites))}
    for max_experts in (1, 3, 8):
        units = make_units([whole(site) for site in sites], plan, max_experts)
        covered = [
            unit.site.weight_name(expert, unit.site.leaves[leaf])
            for unit in units
            for expert in unit.experts
            for leaf in unit.leaves
        ]
        assert sorted(covered) == sorted(plan)
        assert all(len(unit.experts) <= max_experts for unit in units)


@pytest.mark.parametrize("mixed", [False, True])
def test_codes_equal_those_of_each_weight_quantized_alone(adapter: Adapter, mixed: bool) -> None:
    sites = adapter.sites(1)
    plan = {name: replace(GRID, bits=2 + i % 5 if mixed else 4) for i, name in enumerate(uniform(sites))}
    originals = {
        site.weight_name(expert, leaf): rows
        for site in sites
        for expert in range(site.num_experts)
        for leaf, rows in zip(site.leaves, adapter.get_weight(site)[expert].split(site.rows), strict=True)
    }
    run = Run(plan=plan)
    quantize_sites(adapter, run, sites, rtn)
    assert run.quantized.keys() == originals.keys()
    for name, weight in originals.items():
        alone = round_to_nearest(weight[None], plan[name], torch.float32)
        assert torch.equal(run.quantized[name].codes_OI, alone.codes_EOI[0]), name
        assert torch.equal(run.quantized[name].scale_OG, alone.scale_EOG[0])
        assert run.quantized[name].bits == plan[name].bits


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_the_amount_of_work_in_a_unit_changes_no_code(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = Adapter(tiny_model(family))
    sites, generator = adapter.sites(1), torch.Generator().manual_seed(1)
    inputs = {site: torch.randn(site.num_experts, 90, site.in_features, generator=generator) for site in sites}

    def gptq(unit: Unit, weight_EOI: Tensor) -> Solution:
        x_ETI = inputs[unit.site][list(unit.experts)]
        return gptq_solve(weight_EOI, x_ETI.mT @ x_ETI, unit.grid, SolveSpec(), torch.float32)

    def solve(operations: int) -> dict[str, QuantizedWeight]:
        monkeypatch.setattr(share, "UNIT_OPERATIONS", operations)
        run = Run(plan=uniform(sites))
        quantize_sites(Adapter(tiny_model(family)), run, sites, gptq)
        return run.quantized

    whole, three, one = (solve(operations) for operations in (1 << 36, 3 << 20, 1))
    for name, weight in whole.items():
        for other in (three[name], one[name]):
            assert torch.equal(weight.codes_OI, other.codes_OI), name
            assert torch.equal(weight.scale_OG, other.scale_OG)


def test_a_unit_is_cut_at_a_fixed_amount_of_work_and_never_below_one_expert(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = next(site for site in adapter.sites(0) if site.kind == "routed")
    unit = Unit(site, tuple(range(8)), (0, 1), GRID)
    for num_experts, sizes in ((3, [3, 3, 2]), (8, [8]), (0, [1] * 8)):
        monkeypatch.setattr(share, "UNIT_OPERATIONS", num_experts * unit.operations // 8)
        pieces = cut(unit)
        assert [len(piece.experts) for piece in pieces] == sizes
        assert [expert for piece in pieces for expert in piece.experts] == list(unit.experts)
        assert sum(piece.operations for piece in pieces) == unit.operations


def test_the_model_then_holds_the_dequantized_weights(adapter: Adapter) -> None:
    sites = adapter.sites(0)
    run = Run(plan=uniform(sites))
    quantize_sites(adapter, run, sites, rtn)
    for site in sites:
        for expert, weight in enumerate(adapter.get_weight(site)):
            for leaf, rows in zip(site.leaves, weight.split(site.rows), strict=True):
                name = site.weight_name(expert, leaf)
                assert torch.equal(rows, dequantize_weight(run.quantized[name], torch.float32))


def test_every_weight_has_one_error_row(adapter: Adapter) -> None:
    sites = adapter.sites(0)
    run = Run(plan=uniform(sites))
    quantize_sites(adapter, run, sites, rtn)
    assert sorted(row["weight"] for row in run.errors) == sorted(run.plan)
    assert all(0 < row["relative_error"] < 0.1 for row in run.errors)


def test_failed_and_retried_factorisations_are_reported_by_weight(adapter: Adapter) -> None:
    def failing(unit: Unit, weight_EOI: Tensor) -> Solution:
        solution = rtn(unit, weight_EOI)
        experts = torch.arange(len(unit.experts))
        return replace(solution, failed_E=experts == 3, num_retries_E=experts * (experts < 3), one_sided_E=experts == 4)

    sites = tuple(site for site in adapter.sites(0) if site.kind == "routed" and site.stage == "mlp_down")
    run = Run(plan=uniform(sites))
    quantize_sites(adapter, run, sites, failing)
    assert [(f.weight.split(".")[-2], f.reason) for f in run.fallbacks] == [
        ("1", "factorisation retried in float64"),
        ("2", "factorisation retried with stronger damping"),
        ("3", "factorisation failed"),
        ("4", "factor not positive definite"),
    ]
    assert [f.detail for f in run.fallbacks] == [
        "float64 succeeded", "damping times 10, after float64 failed", "rounded to nearest",
        "a Kronecker factor has no Cholesky factor; codes of one Hessian",
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_solving_some_experts_and_writing_the_solved_ones_copies_no_whole_stack(family: str) -> None:
    adapter = Adapter(tiny_model(family))
    site = next(site for site in adapter.sites(1) if site.kind == "routed" and site.stage == "mlp_in")
    size = adapter.get_weight(site)[0].numel()
    with TensorsMade() as made:
        solve_unit(adapter, Unit(site, (6, 1), (0, 1), GRID), rtn)
    assert made.largest == 2 * size
    run = Run(plan=uniform((site,)))
    quantize_sites(adapter, run, (site,), rtn)
    with TensorsMade() as made:
        commit(adapter, (site,), run.quantized)
    assert made.largest == size
