import pytest
import torch
from torch import Tensor, nn

from moeq.allocation.evidence import Evidence
from moeq.allocation.plan import Choice
from moeq.models.adapter import Adapter, Site
from moeq.models.observe import observe_routing
from moeq.quant.grid import dequantize
from moeq.quant.rtn import round_to_nearest
from moeq.quant.spec import GridSpec
from moeq.survey.survey_spec import COSTS, SurveySpec
from moeq.survey.surveyor import survey_model
from tests.tiny import tiny_model

CHOICES = (Choice(2, 16), Choice(4, 16))
GRID = GridSpec(4, 16, clip_search=False)
IDS = torch.randint(1, 257, (6, 12), generator=torch.Generator().manual_seed(5))
EXPERTS = "model.layers.1.mlp.experts"


def survey(model: nn.Module, **settings: object) -> Evidence:
    settings = {"choices": CHOICES, "grid": GRID, "num_gradient_batches": 2, **settings}
    return survey_model(model, IDS.split(3), SurveySpec(**settings))


def rounded(weight_EOI: Tensor, choice: Choice) -> Tensor:
    solution = round_to_nearest(weight_EOI, choice.grid(GRID), torch.float32)
    return dequantize(solution.codes_EOI, solution.scale_EOG, solution.zero_point_EOG, choice.bits)


def block_outputs(model: nn.Module, path: str) -> Tensor:
    """Output of one block in a forward pass of the whole model."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return seen[0].flatten(0, 1)


def change_of_block(model: nn.Module, adapter: Adapter, replaced: dict[Site, Tensor], block: int = 1) -> Tensor:
    """Change of a block's output when weights of sites are replaced."""
    before = block_outputs(model, f"model.layers.{block}")
    originals = {site: adapter.get_weight(site) for site in replaced}
    for site, weight in replaced.items():
        adapter.set_weight(site, weight)
    after = block_outputs(model, f"model.layers.{block}")
    for site, weight in originals.items():
        adapter.set_weight(site, weight)
    return after - before


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_every_weight_has_every_cost_and_more_bits_cost_less(family: str) -> None:
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evidence = survey(model, costs=COSTS, scores=("kurtosis", "outlier"), predictor=True)
    names = [name for site in Adapter(model).all_sites() for name in site.weight_names()]
    for table in evidence.costs.values():
        assert list(table) == names
        assert all(costs[Choice(2, 16)] >= costs[Choice(4, 16)] >= 0 for costs in table.values())
    assert [list(values) for values in evidence.scores.values()] == [names, names]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    dense = family == "deepseek_v3"  # its first block has no routed experts
    for similarity in (evidence.similarity_L, evidence.predicted_similarity_L):
        assert similarity is not None
        assert similarity.isnan().tolist() == [dense, False]


def test_tokens_affinity_and_similarity_equal_whole_forward_passes() -> None:
    model = tiny_model("qwen2_moe")
    evidence, routed = survey(model, costs=(), similarity="block"), {}
    ffn: list[Tensor] = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda _, args, out: ffn.extend([args[0], out]))
    with observe_routing({EXPERTS: model.get_submodule(EXPERTS)}, lambda path, *call: routed.update({path: call})):
        model(IDS)
    handle.remove()
    ids, weights = routed[EXPERTS]
    assert evidence.tokens[EXPERTS].tolist() == [int((ids == expert).sum()) for expert in range(8)]
    expected = torch.stack([weights[ids == expert].double().sum() for expert in range(8)])
    torch.testing.assert_close(evidence.affinity[EXPERTS], expected)
    cosine = torch.nn.functional.cosine_similarity(ffn[0], ffn[1], dim=-1).double().mean()
    torch.testing.assert_close(evidence.similarity_L[1], cosine, rtol=1e-5, atol=1e-6)


def test_block_output_is_the_measured_change_of_the_block_for_every_kind_of_weight() -> None:
    model = tiny_model("qwen2_moe")
    adapter, choice = Adapter(model), CHOICES[0]
    table = survey(model, costs=("block_output",)).costs["block_output"]
    energy = block_outputs(model, "model.layers.1").double().square().sum()
    for site in adapter.sites(1):
        weight_EOI = adapter.get_weight(site)
        for linear, leaf in enumerate(site.leaves):
            expert = site.num_experts // 2
            new, start = weight_EOI.clone(), sum(site.rows[:linear])
            rows = slice(start, start + site.rows[linear])
            new[expert, rows] = rounded(weight_EOI, choice)[expert, rows]
            change = change_of_block(model, adapter, {site: new}).double()
            cost = table[site.weight_name(expert, leaf)][choice]
            assert cost == pytest.approx(float(change.square().sum() / energy), rel=1e-3, abs=1e-9)


def test_gemq_and_pmq_of_an_expert_are_those_of_the_whole_expert_rounded_alone() -> None:
    model = tiny_model("qwen2_moe")
    adapter, choice, expert = Adapter(model), CHOICES[0], 3
    evidence = survey(model, costs=("gemq", "pmq"))
    replaced = {}
    for site in adapter.sites(1):
        if site.kind == "routed":
            replaced[site] = adapter.get_weight(site)
            replaced[site][expert] = rounded(replaced[site], choice)[expert]
    change = change_of_block(model, adapter, replaced)
    outputs: list[Tensor] = []
    handle = model.model.layers[1].register_forward_hook(lambda _, __, out: outputs.append(out))
    embeddings = model.model.embed_tokens.weight.requires_grad_()
    log_p = model(IDS).logits[:, :-1].log_softmax(-1)
    (gradient,) = torch.autograd.grad(log_p.gather(-1, IDS[:, 1:, None]).sum(), outputs[0])
    handle.remove()
    embeddings.requires_grad_(False)
    names = [f"{EXPERTS}.{expert}.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")]
    expected = (gradient.flatten(0, 1) * change).square().sum() / IDS.numel()
    assert sum(evidence.costs["gemq"][name][choice] for name in names) == pytest.approx(float(expected), rel=1e-3)
    share, affinity = (values[EXPERTS][expert] / IDS.numel() for values in (evidence.tokens, evidence.affinity))
    expected = share * affinity**1.5 * change.square().sum() / IDS.numel()
    assert sum(evidence.costs["pmq"][name][choice] for name in names) == pytest.approx(float(expected), rel=1e-3)


def test_fisher_kl_of_a_structure_is_the_measured_divergence_divided_as_fisher_divides_it() -> None:
    model = tiny_model("qwen2_moe")
    adapter, choice = Adapter(model), CHOICES[0]
    costs = survey(model, costs=("fisher", "fisher_kl"), solver="rtn", num_kl_batches=2).costs
    with torch.no_grad():
        reference = model(IDS).logits.log_softmax(-1)
    for kind in ("attention", "shared", "routed"):
        sites = [site for site in adapter.sites(0) if site.kind == kind]
        originals = {site: adapter.get_weight(site) for site in sites}
        for site, weight in originals.items():
            adapter.set_weight(site, rounded(weight, choice))
        with torch.no_grad():
            changed = model(IDS).logits.log_softmax(-1)
        for site, weight in originals.items():
            adapter.set_weight(site, weight)
        measured = (reference.exp() * (reference - changed)).sum(-1).mean()
        names = [name for site in sites for name in site.weight_names()]
        fisher, anchored = ([costs[cost][name][choice] for name in names] for cost in ("fisher", "fisher_kl"))
        assert sum(anchored) == pytest.approx(float(measured), rel=1e-3)
        expected = [value / sum(fisher) for value in fisher]
        assert [value / sum(anchored) for value in anchored] == pytest.approx(expected)


def test_a_survey_is_reproducible_and_gptq_promises_less_damage_than_rounding() -> None:
    model = tiny_model("qwen2_moe")
    first, second = (survey(model, costs=("fisher", "hessian"), scores=("spectral_tail",)) for _ in range(2))
    assert first.to_json() == second.to_json()
    rtn = survey(model, costs=("fisher", "hessian"), solver="rtn")
    for cost in ("fisher", "hessian"):
        totals = [sum(costs[CHOICES[0]] for costs in each.costs[cost].values()) for each in (first, rtn)]
        assert totals[0] < totals[1]


def test_a_choice_whose_groups_do_not_fit_a_weight_is_left_out_for_it() -> None:
    choices = (Choice(4, 64), Choice(4))
    table = survey(tiny_model("qwen2_moe"), costs=("hessian",), choices=choices).costs["hessian"]
    assert set(table[f"{EXPERTS}.0.gate_proj"]) == set(choices)
    assert set(table[f"{EXPERTS}.0.down_proj"]) == {Choice(4)}
    with pytest.raises(ValueError, match="down_proj: no group size"):
        survey(tiny_model("qwen2_moe"), choices=(Choice(4, 64),))


@pytest.mark.parametrize(
    "settings", [{"costs": ("hess",)}, {"scores": ("size",)}, {"solver": "awq"}, {"choices": ()}, {"similarity": "ffn"}]
)
def test_a_wrong_setting_is_named_with_what_is_allowed(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}.*(must|empty)"):
        SurveySpec(**settings)
