"""Channel scales move into norms and earlier rows without changing what the model computes."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moeq.channel_scaling import NOT_SCALED, Inputs, scale_stage
from moeq.models.adapter import Adapter, Site
from moeq.models.producers import find_producer
from moeq.quant.awq import Reader
from moeq.quant.rtn import round_to_nearest
from moeq.quant.spec import GridSpec
from moeq.run import Run
from moeq.solve import Unit, quantize_sites
from tests.tiny import tiny_model

IDS = torch.arange(1, 25).reshape(2, 12)
GRID = GridSpec(8, 16)


def random_scale(readers: Sequence[Reader], _: torch.dtype, channel_I: Tensor | None = None) -> Tensor:
    """A scale between about 1/3 and 3 in the place of the search; another one for other weights."""
    width = readers[0].weight_OI.shape[1] if channel_I is None else int(channel_I.max()) + 1
    generator = torch.Generator().manual_seed(int(1e4 * readers[0].weight_OI.abs().sum()))
    return (torch.randn(width, generator=generator) / 2).exp()


def nearest(_: Unit, weight_EOI: Tensor) -> object:
    return round_to_nearest(weight_EOI, GRID, torch.float32)


def inputs_of(site: Site) -> Inputs:
    identity = torch.eye(site.in_features).expand(site.num_experts, -1, -1)
    return Inputs(identity, torch.ones(site.num_experts))


def stages_of(adapter: Adapter, block: int) -> list[list[Site]]:
    sites = adapter.sites(block)
    return [[site for site in sites if site.stage == stage] for stage in dict.fromkeys(s.stage for s in sites)]


@pytest.mark.parametrize("sharing", [{}, {"num_key_value_heads": 1}])
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v3"])
def test_no_fold_changes_the_logits_of_a_float32_model(
    family: str, sharing: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "deepseek_v3":
        sharing = {} if not sharing else {"v_head_dim": 32, "q_lora_rank": None}  # type: ignore[dict-item]
    monkeypatch.setattr("moeq.channel_scaling.search_scale", random_scale)
    model = tiny_model(family, **sharing)
    adapter, run = Adapter(model), Run()
    run.plan = {name: GRID for site in adapter.all_sites() for name in site.weight_names()}
    for block in range(2):
        for sites in stages_of(adapter, block):
            before = model(IDS).logits
            scales = scale_stage(adapter, run, sites, {site.name: inputs_of(site) for site in sites})
            for site in sites:
                assert (scales[site.name].log().std(1) > 0.3).all(), "not scaled"
                adapter.set_weight(site, adapter.get_weight(site) * scales[site.name].unsqueeze(1))
            torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=1e-5 * float(before.abs().max()))
            quantize_sites(adapter, run, sites, nearest)  # type: ignore[arg-type]
    assert not run.fallbacks
    norms = [name for name in run.changed if name.endswith("norm.weight")]
    assert len(norms) == {"deepseek_v3": 8 if not sharing else 6}.get(family, 4)


def test_every_expert_has_a_scale_of_its_own_for_down_and_one_with_all_for_gate_and_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moeq.channel_scaling.search_scale", random_scale)
    adapter, run = Adapter(tiny_model("qwen2_moe")), Run()
    run.plan = {name: GRID for site in adapter.all_sites() for name in site.weight_names()}
    *_, mlp_in, mlp_down = stages_of(adapter, 0)
    scales = scale_stage(adapter, run, mlp_in, {site.name: inputs_of(site) for site in mlp_in})
    assert len({tuple(row) for scale_EI in scales.values() for row in scale_EI.tolist()}) == 1
    quantize_sites(adapter, run, mlp_in, nearest)  # type: ignore[arg-type]
    scales = scale_stage(adapter, run, mlp_down, {site.name: inputs_of(site) for site in mlp_down})
    assert len({tuple(row) for scale_EI in scales.values() for row in scale_EI.tolist()}) == 9


@pytest.mark.parametrize("what", ["output that is not linear in the values", "gate that is not linear in up"])
def test_a_fold_that_does_not_hold_is_refused_with_a_record(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2_moe")
    adapter, run = Adapter(model), Run()
    run.plan = {name: GRID for site in adapter.all_sites() for name in site.weight_names()}
    if what == "output that is not linear in the values":
        stage = "attention_out"
        model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _m, a: (a[0].tanh(),))
    else:
        stage = "mlp_down"
        experts = model.model.layers[0].mlp.experts
        monkeypatch.setattr(experts, "_apply_gate", lambda gate_up: gate_up.chunk(2, -1)[1].tanh(), raising=False)
    sites = [site for site in adapter.sites(0) if site.stage == stage]
    earlier = [site for site in adapter.sites(0) if site.stage.endswith("_in")]
    quantize_sites(adapter, run, earlier, nearest)  # type: ignore[arg-type]
    unchanged = dict(run.quantized)
    scales = scale_stage(adapter, run, sites, {site.name: inputs_of(site) for site in sites})
    (record,) = run.fallbacks
    refused = next(site for site in sites if site.weight_name(0, site.leaves[0]) == record.weight)
    assert record.reason == NOT_SCALED
    assert refused.kind == ("attention" if what == "output that is not linear in the values" else "routed")
    assert (scales[refused.name] == 1).all()
    producer_leaf = "v_proj" if what == "output that is not linear in the values" else "experts.0.up_proj"
    name = next(name for name in unchanged if name.endswith(producer_leaf))
    assert run.quantized[name] is unchanged[name]


def test_a_norm_with_a_reader_that_no_hook_sees_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeq.channel_scaling.search_scale", random_scale)
    model = tiny_model("mixtral")
    adapter, run = Adapter(model), Run()
    run.plan = {name: GRID for site in adapter.all_sites() for name in site.weight_names()}
    forward = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: forward(x) + x.tanh()  # type: ignore[assignment]
    sites = [site for site in adapter.sites(0) if site.stage == "mlp_in"]
    scales = scale_stage(adapter, run, sites, {site.name: inputs_of(site) for site in sites})
    assert all((scale == 1).all() for scale in scales.values())
    assert "changes the output of the block" in run.fallbacks[0].detail
    assert not run.changed


def test_the_value_rows_of_shared_heads_are_found_in_the_order_of_the_query_heads() -> None:
    model = tiny_model("qwen2_moe")
    adapter = Adapter(model)
    site = next(site for site in adapter.sites(0) if site.stage == "attention_out")
    producer = find_producer(adapter, site, lambda: model(IDS))
    assert producer is not None
    assert producer.leaf == "v_proj"
    heads = [list(range(16)), list(range(16)), list(range(16, 32)), list(range(16, 32))]  # 4 query heads, 2 pairs
    assert producer.row_J[producer.channel_I].tolist() == [row for head in heads for row in head]
