import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from moeq.checkpoint.model_class import model_class
from moeq.models.adapter import STAGES, Adapter, find_blocks, own_parameter
from moeq.models.families import refusal
from moeq.models.shapes import weight_shapes
from tests.families import SUPPORTED
from tests.tensors_made import TensorsMade
from tests.tiny import tiny_config, tiny_model

PLAIN_FAMILIES = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v3")


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_sites_cover_every_matrix_of_the_blocks_but_routers_gates_and_norms(family: str) -> None:
    model = tiny_model(family)
    adapter = Adapter(model)
    covered = sum(adapter.get_weight(site).numel() for site in adapter.all_sites())
    skipped = ("mlp.gate.", "shared_expert_gate", "norm", "bias")
    expected = sum(
        p.numel() for name, p in adapter.blocks.named_parameters() if not any(part in name for part in skipped)
    )
    assert covered == expected


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_weight_names_are_unique_and_expert_names_carry_the_expert(family: str) -> None:
    names = [name for site in Adapter(tiny_model(family)).all_sites() for name in site.weight_names()]
    assert len(names) == len(set(names))
    assert "model.layers.1.mlp.experts.3.gate_proj" in names
    assert not any("gate_up" in name or name.endswith(("mlp.gate", "shared_expert_gate")) for name in names)


def test_stacked_weight_of_an_expert_is_gate_above_up() -> None:
    model = tiny_model("mixtral")
    adapter = Adapter(model)
    site = next(s for s in adapter.sites(1) if s.kind == "routed" and s.stage == "mlp_in")
    experts = model.get_submodule("model.layers.1.mlp.experts")
    x = torch.randn(3, 64)
    gate, up = (adapter.get_weight(site)[5] @ x.T).split(site.rows)
    expected = experts.act_fn(gate.T) * up.T
    torch.testing.assert_close(experts._apply_gate(x @ experts.gate_up_proj[5].T), expected)


@pytest.mark.parametrize("family", [*PLAIN_FAMILIES, "gpt_oss", "aria_text", "nemotron_h"])
def test_written_weights_are_read_back_and_touch_nothing_else(family: str) -> None:
    model = tiny_model(family)
    adapter = Adapter(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for site in adapter.sites(1):
        adapter.set_weight(site, adapter.get_weight(site) + 1)
    for site in adapter.sites(1):
        adapter.set_weight(site, adapter.get_weight(site) - 1)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], atol=1e-5, rtol=0)
        assert torch.equal(parameter, before[name]) or "layers.1." in name


@pytest.mark.parametrize("family", SUPPORTED)
def test_sites_and_shapes_need_no_weights(family: str) -> None:
    with torch.device("meta"):
        config = tiny_config(family)
        abstract = Adapter(model_class(config).from_config(config))
    assert all(parameter.is_meta for parameter in abstract.model.parameters())
    adapter = Adapter(tiny_model(family))
    assert abstract.all_sites() == adapter.all_sites()
    assert weight_shapes(abstract) == weight_shapes(adapter)
    for site in adapter.all_sites():
        assert adapter.get_weight(site).shape == (site.num_experts, sum(site.rows), site.in_features)


# Gate above up, gate and up in turn and transposed, transposed, without a gate.
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "aria_text", "nemotron_h"])
def test_some_experts_are_read_and_written_without_a_copy_of_the_others(family: str) -> None:
    model = tiny_model(family)
    with TensorsMade() as made:
        adapter = Adapter(model)
        sites = [site for site in adapter.all_sites() if site.kind == "routed"]
    assert sites
    assert made.largest == 0
    for site in sites:
        whole_EOI = adapter.get_weight(site)
        with TensorsMade() as made:
            some_EOI = adapter.get_weight(site, (5, 2))
        assert 2 * whole_EOI[0].numel() == some_EOI.numel() == made.largest
        assert torch.equal(some_EOI, whole_EOI[[5, 2]])
        assert some_EOI.is_contiguous()
        some_EOI += 1
        assert torch.equal(adapter.get_weight(site), whole_EOI), "not a copy"
        with TensorsMade() as made:
            adapter.set_weight(site, some_EOI, (5, 2))
        assert made.largest <= whole_EOI[0].numel()
        whole_EOI[[5, 2]] = some_EOI
        assert torch.equal(adapter.get_weight(site), whole_EOI)
        assert adapter.dtype_of(site) == whole_EOI.dtype


def test_own_parameters_are_those_of_the_module_itself() -> None:
    linear = nn.Linear(4, 4, bias=False)
    assert own_parameter(linear, "weight") is linear.weight
    assert own_parameter(linear, "bias") is None
    assert own_parameter(nn.Sequential(linear), "0.weight") is None


def test_sites_come_in_the_order_of_the_data_flow() -> None:
    stages = [STAGES.index(site.stage) for site in Adapter(tiny_model("deepseek_v3")).sites(1)]
    assert stages == sorted(stages)
    assert {STAGES[stage] for stage in stages} == set(STAGES) - {"mlp_pre", "mlp_post"}


def test_latent_projections_stand_before_and_after_the_experts() -> None:
    sites = Adapter(tiny_model("nemotron_h")).sites(1)
    stages = [site.stage for site in sites]
    assert stages == sorted(stages, key=STAGES.index)
    assert {site.stage for site in sites if site.kind == "dense"} == {"mlp_pre", "mlp_post"}
    assert next(site for site in sites if site.kind == "routed").in_features == 32


def test_a_gate_inside_attention_is_calibrated_with_attention() -> None:
    site = next(site for site in Adapter(tiny_model("afmoe")).sites(1) if "gate_proj" in site.leaves)
    assert (site.kind, site.stage) == ("attention", "attention_in")


def test_a_linear_that_no_table_knows_is_kept_and_reported() -> None:
    model = tiny_model("qwen3_moe")
    model.model.layers[0].mlp.extra = nn.Linear(64, 64)
    adapter = Adapter(model)
    assert [(kept.weight, kept.detail) for kept in adapter.kept()] == [
        ("model.layers.0.mlp.extra", "no table says which input it reads")
    ]
    assert "model.layers.0.mlp.extra" not in {path for site in adapter.all_sites() for path in site.modules}


def test_shared_experts_are_told_from_dense_blocks() -> None:
    kinds = [{site.kind for site in Adapter(tiny_model("deepseek_v3")).sites(block)} for block in (0, 1)]
    assert kinds == [{"attention", "dense"}, {"attention", "shared", "routed"}]


def test_only_qwen2_gates_its_shared_expert() -> None:
    for family, gated in (("qwen2_moe", True), ("deepseek_v3", False)):
        adapter = Adapter(tiny_model(family))
        site = next(s for s in adapter.sites(1) if s.kind == "shared")
        assert (adapter.shared_affinity_gate(site) is not None) == gated


def test_a_dense_model_is_refused_with_its_family_and_the_ones_that_work() -> None:
    with pytest.raises(ValueError, match=r"llama has no routed experts.*qwen2_moe"):
        Adapter(tiny_model("llama"))


@pytest.mark.parametrize("family", ["llama4", "longcat_flash"])
def test_how_other_experts_differ_is_said(family: str) -> None:
    how = {"llama4": "every expert runs on every token", "longcat_flash": "some experts are the identity"}[family]
    with pytest.raises(ValueError, match=rf"{family} has no routed experts, or experts that do not .* \({how}"):
        Adapter(tiny_model(family))


def test_a_norm_after_each_expert_is_refused_with_the_reason() -> None:
    model = tiny_model("mixtral")
    model.get_submodule("model.layers.0.mlp.experts").has_post_expert_norm = True
    with pytest.raises(ValueError, match=r"mixtral cannot be quantized by moeq: .* has a norm after each expert"):
        Adapter(model)


def test_a_module_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no list of decoder blocks"):
        find_blocks(nn.Linear(2, 2))


# The first list of blocks is a vision tower's; the vision tower has experts, too.
@pytest.mark.parametrize("family", ["gemma4", "dots3_note"])
def test_the_blocks_of_a_wrapper_are_those_of_its_language_model(family: str) -> None:
    model = tiny_model(family)
    path, blocks = find_blocks(model)
    assert path == "model.language_model.layers"
    assert blocks is model.model.language_model.layers
    assert all(name.startswith(path) for site in Adapter(model).all_sites() for name in site.weight_names())


def test_blocks_that_share_keys_and_values_are_refused() -> None:
    with pytest.raises(ValueError, match="keys and values of earlier ones"):
        Adapter(tiny_model("mistral_large4", kv_source_layers=[0, 0]))


@pytest.mark.parametrize("family", ["qwen3_omni_moe", "diffusion_gemma"])
def test_models_that_cannot_run_on_text_are_refused_by_their_configuration(family: str) -> None:
    assert refusal(CONFIG_MAPPING[family]()) is not None
