import pytest
import torch
from torch import Tensor, nn

from moeq.models.adapter import Adapter, Site
from moeq.models.observe import observe
from moeq.quant.hessian import accumulate, empty_state
from moeq.scoring.divergence import kl_sum_and_agreement
from moeq.survey.fisher import (
    add_squares,
    counted_tokens,
    empty_gradients,
    next_tokens,
    observe_gradients,
    sampled_tokens,
    score_gradient,
)
from moeq.survey.sensitivity import fisher_costs, mean_square_gradients, row_energies, token_hessians
from tests.tiny import tiny_model

FAMILIES = ("qwen2_moe", "mixtral", "deepseek_v3")


def weight_gradients(model: nn.Module, ids: Tensor, mask: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Gradient of the summed log-likelihood by ordinary autograd, with the library's own experts."""
    model.requires_grad_(True)
    log_p = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    (log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1) * mask).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.requires_grad_(False)
    return gradients


def backward(model: nn.Module, inputs: dict[str, Tensor], seed: int) -> None:
    """Backward pass through the whole model of the log-likelihood of sampled tokens."""
    embeddings = model.get_input_embeddings().weight.requires_grad_()
    logits = model(**inputs).logits
    ids = sampled_tokens(logits.detach(), torch.Generator().manual_seed(seed))
    torch.autograd.grad(logits, embeddings, score_gradient(logits, ids, counted_tokens(inputs)))
    embeddings.requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_at_the_outputs_give_the_gradients_of_the_weights(family: str) -> None:
    model = tiny_model(family)
    adapter = Adapter(model)
    ids, mask = torch.randint(1, 257, (3, 12)), torch.ones(3, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    targets = sampled_tokens(model(input_ids=ids, attention_mask=mask).logits, torch.Generator().manual_seed(4))
    expected = weight_gradients(model, ids, mask, targets)
    rows: dict[tuple[str, int], Tensor] = {}
    found: dict[tuple[str, int, int], Tensor] = {}

    def on_gradient(site: Site, expert: int, part: slice, gradient: Tensor) -> None:
        found[site.name, expert, part.start] = gradient.T @ rows[site.name, expert]

    keep = mask.flatten().bool()
    with observe(adapter, adapter.all_sites(), lambda site, e, x, _: rows.update({(site.name, e): x})) as token_mask:
        token_mask.keep = keep
        model(input_ids=ids, attention_mask=mask)
    with observe_gradients(adapter, adapter.all_sites(), on_gradient, keep):
        backward(model, {"input_ids": ids, "attention_mask": mask}, 4)
    assert all(parameter.grad is None for parameter in model.parameters())
    for site in adapter.all_sites():
        for expert in range(site.num_experts):
            parts = [value for (name, e, _), value in sorted(found.items()) if (name, e) == (site.name, expert)]
            if site.kind == "routed":
                stacked = expected[f"{site.modules[0]}.{'down' if site.stage == 'mlp_down' else 'gate_up'}_proj"][
                    expert
                ]
            else:
                stacked = torch.cat([expected[f"{path}.weight"] for path in site.modules])
            reached = (site.name, expert) in rows
            assert reached or float(stacked.abs().max()) == 0
            if reached:
                torch.testing.assert_close(torch.cat(parts), stacked, rtol=1e-3, atol=1e-5)


def test_tokens_are_sampled_from_the_prediction() -> None:
    logits = torch.tensor([0.0, 1.0, -2.0, -torch.inf]).expand(2, 20000, 4)
    ids = sampled_tokens(logits, torch.Generator().manual_seed(0))
    shares = ids.flatten().bincount(minlength=4) / ids.numel()
    torch.testing.assert_close(shares, logits[0, 0].softmax(-1), rtol=0, atol=0.01)


def test_the_gradient_of_the_score_is_that_of_autograd() -> None:
    logits, mask = torch.randn(2, 5, 9, requires_grad=True), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    ids, counted = next_tokens({"input_ids": torch.randint(0, 9, (2, 5)), "attention_mask": mask})
    assert counted.int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    score = (logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1) * counted).sum()
    (expected,) = torch.autograd.grad(score, logits)
    torch.testing.assert_close(score_gradient(logits, ids, counted), expected)


@torch.no_grad()
def measured_kl(model: nn.Module, adapter: Adapter, ids: Tensor, site: Site, delta: Tensor) -> float:
    """KL in nats per token of changing the weights of a site."""
    original, reference = adapter.get_weight(site), model(ids).logits
    adapter.set_weight(site, original + delta)
    kl_sum, _, num_positions = kl_sum_and_agreement(reference, model(ids).logits)
    adapter.set_weight(site, original)
    return float(kl_sum / num_positions)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fisher_cost_of_a_small_change_of_one_weight_predicts_the_kl_divergence(family: str) -> None:
    # Every expert is chosen: a choice that tips is no small change, and no derivative sees it.
    groups = {"topk_group": 2} if family == "deepseek_v3" else {}
    model = tiny_model(family, num_experts_per_tok=8, **groups)
    adapter, ids = Adapter(model), torch.randint(1, 257, (24, 24))
    sites = adapter.all_sites()
    states = {site.name: empty_state(site.num_experts, site.in_features, "cpu") for site in sites}
    gradients = {site.name: empty_gradients(site, "cpu") for site in sites}
    with observe(adapter, sites, lambda site, e, x, _: accumulate(states[site.name], e, x)):
        model(ids)
    with observe_gradients(adapter, sites, add_squares(gradients), None):
        for seed in range(8):
            backward(model, {"input_ids": ids}, seed)
    predicted, measured = [], []
    for site in sites:
        expert = int(states[site.name].num_tokens_E.argmax())
        delta = torch.zeros_like(adapter.get_weight(site))
        delta[expert] = 1e-2 * torch.randn(delta[expert].shape) * 2 ** torch.randn(())
        hessians = token_hessians(states[site.name].sum_EII, states[site.name].num_tokens_E, ids.numel())
        state = gradients[site.name]
        gradient = mean_square_gradients(state.sum_EO, state.num_tokens_E)
        cost = fisher_costs(row_energies(delta, hessians), gradient, slice(None), 2)
        predicted.append(float(cost[expert]))
        measured.append(measured_kl(model, adapter, ids, site, delta))
    ratio = torch.tensor(measured) / torch.tensor(predicted)
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (predicted, measured)])
    assert 0.7 < float(ratio.log().mean().exp()) < 1.4
    assert float((ratio.log()).abs().mean()) < 0.4
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.9
