"""Scales of channels move out of every family without a change of what it computes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeq.disk.waiting import WaitingStates
from moeq.fit.channel_scaling import Inputs, scale_stage
from moeq.fit.probe import Probe
from moeq.fit.run import Run
from moeq.fit.solve import Unit, quantize_sites
from moeq.models.adapter import STAGES, Adapter, Site
from moeq.quant.awq import round_scaled
from moeq.quant.solution import Solution
from moeq.quant.spec import GridSpec
from tests.tiny import FAMILIES, tiny_model

GRID = GridSpec(bits=8, group_size=16, clip_search=False)
IDS = torch.arange(1, 49).reshape(2, 24)


def uneven_inputs(site: Site) -> Inputs:
    """Inputs with a few large channels, for which a scale is worth while."""
    generator = torch.Generator().manual_seed(site.in_features)
    size_I = torch.ones(site.in_features)
    size_I[torch.randperm(site.in_features, generator=generator)[:4]] = 30.0
    hessian_II = torch.diag(size_I.square())
    return Inputs(hessian_II.expand(site.num_experts, -1, -1).clone(), torch.ones(site.num_experts))


def scaled_and_rounded(adapter: Adapter, *, scale: bool) -> tuple[Run, float]:
    """The run after all blocks, and the largest ratio of two scales of a site that was found."""
    run = Run(plan={name: GRID for site in adapter.all_sites() for name in site.weight_names()})
    widest = 1.0
    probe = Probe(adapter, WaitingStates(1 << 30, Path()))
    for block in range(len(adapter.blocks)):
        call = probe.call(block)
        for stage in STAGES:
            sites = [site for site in adapter.sites(block) if site.stage == stage]
            inputs = {site.name: uneven_inputs(site) for site in sites}
            ones = {site.name: torch.ones(site.num_experts, site.in_features) for site in sites}
            scales = scale_stage(adapter, run, sites, inputs, call) if scale and sites else ones

            def solver(
                unit: Unit, weight_EOI: Tensor, scales: dict[str, Tensor] = scales, inputs: dict[str, Inputs] = inputs
            ) -> Solution:
                experts, name = list(unit.experts), unit.site.name
                hessian_EII = inputs[name].hessian_EII[experts]
                return round_scaled(weight_EOI, hessian_EII, scales[name][experts], unit.grid, torch.float32)

            if sites:
                quantize_sites(adapter, run, sites, solver)
            widest = max([widest, *(float(scale_EI.max() / scale_EI.min()) for scale_EI in scales.values())])
        probe.advance(block)
    return run, widest


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_at_eight_bits_a_scaled_model_is_as_close_to_the_original_as_a_rounded_one(family: str) -> None:
    errors = []
    for scale in (False, True):
        model = tiny_model(family)
        original = model(IDS, use_cache=False).logits
        run, widest = scaled_and_rounded(Adapter(model), scale=scale)
        difference_BT = (model(IDS, use_cache=False).logits - original).norm(dim=-1) / original.norm(dim=-1)
        # The median: a token near the border between two experts may go to the other one.
        errors.append(float(difference_BT.median()))
        if scale:
            scaled = {fallback.weight for fallback in run.fallbacks}
            assert widest > 2 or len(scaled) == len(Adapter(model).all_sites()), "nothing was scaled, without a record"
    assert errors[1] < 3 * errors[0] + 1e-3, errors
