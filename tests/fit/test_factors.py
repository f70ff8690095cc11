"""Kronecker factors as a solver takes them: means, shrunk where tokens are few; files of this run alone."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeq.fit.factors import FEW_TOKENS, NO_LEVELS, Factors, SiteFactors
from moeq.fit.schedule import whole
from moeq.models.adapter import Adapter
from moeq.models.sites import Site
from moeq.quant.coverage import CoverageSpec
from moeq.quant.hessian import accumulate, empty_state
from moeq.quant.spec import GridSpec
from moeq.quant.two_sided_solve import TwoSidedSpec
from tests.tiny import tiny_model

TOKENS = (40, 3, 0)


def site() -> Site:
    return Site("m.experts.gate+up", 0, "routed", "mlp_in", ("m.experts",), ("gate", "up"), (4, 4), 6, len(TOKENS))


def written(folder: Path) -> tuple[Factors, list[Tensor], list[Tensor]]:
    """Factors of one site, and the gradients and inputs of each expert that they are of."""
    generator, where = torch.Generator().manual_seed(0), site()
    gradients = [torch.randn(n, sum(where.rows), generator=generator) for n in TOKENS]
    inputs = [torch.randn(n, where.in_features, generator=generator) for n in TOKENS]
    sums = SiteFactors(*(empty_state(len(TOKENS), size, "cpu") for size in (8, 6)))
    for expert in range(len(TOKENS)):
        accumulate(sums.output, expert, gradients[expert], power=0.0)
        accumulate(sums.input, expert, inputs[expert], power=0.0)
    factors = Factors(folder, {"run": "this"}, TwoSidedSpec())
    factors.write(0, {where.name: sums})
    return factors, gradients, inputs


@pytest.mark.parametrize("kappa", [5.0, "auto", 0.0])
def test_experts_with_few_tokens_are_pulled_toward_all_on_both_sides(tmp_path: Path, kappa: float) -> None:
    factors, *sides = written(tmp_path)
    rows, experts = torch.tensor([1, 4, 6]), (0, 2)
    found = factors.of(site(), experts, rows, CoverageSpec(kappa=kappa))
    for side, (h_EFF, rows_of, size) in enumerate(zip(found, sides, (8, 6), strict=True)):
        pool_FF = sum(x.double().mT @ x.double() for x in rows_of) / sum(TOKENS)
        strength = 2.0 * size if kappa == "auto" else kappa
        for position, expert in enumerate(experts):
            n, x = TOKENS[expert], rows_of[expert].double()
            expected_FF = pool_FF if n + strength == 0 else (x.mT @ x + strength * pool_FF) / (n + strength)
            if side == 0:
                expected_FF = expected_FF[rows][:, rows]
            torch.testing.assert_close(h_EFF[position].double(), expected_FF, rtol=1e-5, atol=1e-6)


def test_few_tokens_and_grids_without_even_levels_are_told_by_name(tmp_path: Path) -> None:
    factors, *_ = written(tmp_path)
    plan = {name: GridSpec(3, 2) for name in site().weight_names()} | {"m.experts.0.up": GridSpec.of_kind("iq4_nl")}
    del plan["m.experts.2.gate"]  # it stays as it is
    told = factors.fallbacks([whole(site())], plan, CoverageSpec(min_tokens=10))
    assert [(each.weight, each.reason) for each in told] == [
        ("m.experts.0.up", NO_LEVELS), ("m.experts.1.gate", FEW_TOKENS), ("m.experts.2.gate", FEW_TOKENS),
    ]  # fmt: skip
    assert "3 tokens, fewer than min_tokens (10)" in told[1].detail


def test_files_of_another_run_and_damaged_ones_are_missing(tmp_path: Path) -> None:
    factors, *_ = written(tmp_path)
    assert factors.missing(range(2)) == [1]
    assert Factors(tmp_path, {"run": "other"}, TwoSidedSpec()).missing([0]) == [0]
    path = tmp_path / "block_000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert Factors(tmp_path, {"run": "this"}, TwoSidedSpec()).missing([0]) == [0]


def test_a_site_of_one_expert_has_its_own_means(tmp_path: Path) -> None:
    adapter = Adapter(tiny_model("qwen2_moe"))
    where = next(each for each in adapter.sites(0) if each.stage == "attention_in")
    x_NI = torch.randn(7, where.in_features, generator=torch.Generator().manual_seed(1))
    sums = SiteFactors(empty_state(1, sum(where.rows), "cpu"), empty_state(1, where.in_features, "cpu"))
    accumulate(sums.input, 0, x_NI, power=0.0)
    factors = Factors(tmp_path, {}, TwoSidedSpec())
    factors.write(0, {where.name: sums})
    output_1OO, input_1II = factors.of(where, (0,), torch.arange(sum(where.rows)), CoverageSpec())
    torch.testing.assert_close(input_1II[0], x_NI.mT @ x_NI / 7, rtol=1e-5, atol=1e-6)
    assert not output_1OO.any()  # of no gradient; what is solved with it is one Hessian's
