"""Divergences of all rounded structures, measured in one sweep over the blocks, are those of whole models."""

from pathlib import Path

import pytest
import torch

from moeq.allocation.plan import Choice
from moeq.disk.waiting import WaitingStates
from moeq.models.adapter import Adapter
from moeq.quant.grid import dequantize
from moeq.quant.rtn import round_to_nearest
from moeq.quant.spec import GridSpec
from moeq.survey.measured_scale import Variant, measured_divergences
from moeq.survey.survey_spec import SurveySpec
from moeq.survey.sweeps import BlockStates, Inputs, sweep_forward, unseen
from tests.tiny import tiny_model

GRID = GridSpec(4, 16, clip_search=False)
SPEC = SurveySpec(costs=("fisher_kl",), choices=(Choice(2, 16), Choice(4, 64)), grid=GRID)


def batches() -> dict[int, Inputs]:
    ids = torch.randint(1, 257, (2, 2, 10), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids[0])
    mask[1, 6:] = 0
    return {0: {"input_ids": ids[0], "attention_mask": mask}, 1: {"input_ids": ids[1]}}


@torch.no_grad()
def reference_divergence(adapter: Adapter, variant: Variant) -> float:
    """Nats per token with the weights of a structure rounded, in whole forward passes."""
    block, kind, choice = variant
    model, kl_sum, num_tokens = adapter.model, 0.0, 0
    originals = {site: adapter.get_weight(site) for site in adapter.sites(block) if site.kind == kind}
    for inputs in batches().values():
        reference = model(**inputs).logits.double().log_softmax(-1)
        for site, weight in originals.items():
            if site.in_features % choice.group_size == 0:
                found = round_to_nearest(weight, choice.grid(GRID), torch.float32)
                parts = found.codes_EOI, found.scale_EOG, found.zero_point_EOG
                adapter.set_weight(site, dequantize(*parts, choice.bits))
        changed = model(**inputs).logits.double().log_softmax(-1)
        for site, weight in originals.items():
            adapter.set_weight(site, weight)
        kept = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        kl_sum += float((reference.exp() * (reference - changed)).sum(-1)[kept].sum())
        num_tokens += int(kept.sum())
    return kl_sum / num_tokens


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "zaya"])
def test_divergences_of_one_sweep_are_those_of_whole_models(family: str, tmp_path: Path) -> None:
    adapter, waiting = Adapter(tiny_model(family)), WaitingStates(10_000, tmp_path)
    before = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    states = BlockStates(waiting)
    sweep_forward(adapter, batches(), states, unseen)
    divergences = measured_divergences(adapter, SPEC, batches(), states, unseen)
    states.clear()
    assert waiting.bytes_in_memory == waiting.bytes_on_disk == 0
    assert all(torch.equal(value, before[name]) for name, value in adapter.model.state_dict().items())
    kinds = {(site.block, site.kind) for site in adapter.all_sites()}
    assert {(block, kind) for block, kind, _ in divergences} == kinds
    for variant, divergence in divergences.items():
        assert divergence == pytest.approx(reference_divergence(adapter, variant), rel=1e-3, abs=1e-7), variant
