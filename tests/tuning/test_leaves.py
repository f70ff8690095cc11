"""Leaves begin as what is exported, and end as it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moeq.models.adapter import Adapter
from moeq.quant.grid import dequantize_weight
from moeq.tuning.leaves import BlockLeaves
from tests.tiny import tiny_model
from tests.tuning.tuned import SPEC, quantized_run


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_they_begin_as_the_values_that_the_codes_stand_for(family: str, tmp_path: Path) -> None:
    adapter = Adapter(tiny_model(family))
    run, resume, _ = quantized_run(adapter, tmp_path, left_out="experts.3.")
    leaves = BlockLeaves(adapter, run, 1, resume.quantized(1), SPEC)
    # The model holds the dequantized weights by now, and those that are left out.
    for name, value in leaves.parameters().items():
        assert torch.equal(value, adapter.blocks[1].get_parameter(name)), name


def test_they_end_as_what_they_stood_for_last(tmp_path: Path) -> None:
    adapter = Adapter(tiny_model("qwen2_moe"))
    run, resume, _ = quantized_run(adapter, tmp_path)
    solved = resume.quantized(0)
    leaves = BlockLeaves(adapter, run, 0, solved, SPEC)
    generator = torch.Generator().manual_seed(0)
    for key, leaf in leaves.leaves.items():
        noise = torch.randn(leaf.value.shape, generator=generator)
        leaf.value.data += (1.0 if key.endswith("level") else 0.01) * noise
    expected = {name: value.detach().clone() for name, value in leaves.parameters().items()}
    weights, others = leaves.close(solved)
    assert all(
        0 <= int(weight.codes_OI.min()) <= int(weight.codes_OI.max()) < 2**weight.bits for weight in weights.values()
    )
    for site in adapter.sites(0):
        rows = [dequantize_weight(weights[name], torch.float32) for name in site.weight_names()]
        weight_EOI = torch.cat(rows).view(site.num_experts, -1, site.in_features)
        for name, value in adapter.parameters_of(site, weight_EOI).items():
            torch.testing.assert_close(value, expected[name.split("layers.0.")[1]], rtol=1e-6, atol=1e-7)
    assert others, "norms and routers learn"
    for name, value in others.items():
        assert torch.equal(value, expected[name.split("layers.0.")[1]])


@pytest.mark.parametrize("learns", ["scale_rate", "level_rate", "norm_rate", "router_rate"])
def test_only_what_has_a_rate_learns(learns: str, tmp_path: Path) -> None:
    adapter = Adapter(tiny_model("qwen2_moe"))
    run, resume, _ = quantized_run(adapter, tmp_path)
    rates = {name: 0.0 for name in ("scale_rate", "level_rate", "norm_rate", "router_rate")}
    leaves = BlockLeaves(adapter, run, 0, resume.quantized(0), replace(SPEC, **{**rates, learns: 0.01}))
    assert leaves.leaves
    kinds = {
        "scale_rate": lambda key: key.endswith(": scale"),
        "level_rate": lambda key: key.endswith(": level"),
        "norm_rate": lambda key: "norm" in key or key.endswith("bias"),
        "router_rate": lambda key: key.endswith("mlp.gate.weight"),
    }
    assert all(kinds[learns](key) for key in leaves.leaves), list(leaves.leaves)
    sum(value.float().square().sum() for value in leaves.parameters().values()).backward()  # type: ignore[union-attr]
    assert all(leaf.value.grad is not None for leaf in leaves.leaves.values())
