"""Recorded expert choices and their agreement, on tiny random models."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeq.models.adapter import is_experts_module
from moeq.scoring.forward_plan import Spans
from moeq.scoring.routing import count_same_routing, record_routing, same_routing_by_owner, same_topk
from tests.tiny import tiny_model


class StoredElsewhere(nn.Module):
    """Computes what an experts module does under the same path and signature, as packed experts do."""

    has_gate = True
    is_transposed = False

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.hidden = [experts]  # in a list: not a submodule, so that its parameters are not found

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.hidden[0](hidden_states, top_k_index, top_k_weights)


def reference_choices(model: Any, input_ids_BL: Tensor) -> list[Tensor]:
    """Top-k of the router logits that the model itself returns: one ids_TK per block."""
    output = model(input_ids=input_ids_BL, output_router_logits=True)
    return [logits_TE.topk(model.config.num_experts_per_tok, dim=-1).indices for logits_TE in output.router_logits]


def test_sets_are_compared_whatever_their_order() -> None:
    ids_TK = torch.tensor([[3, 1], [2, 5], [4, 0]])
    assert same_topk(ids_TK, torch.tensor([[1, 3], [2, 4], [0, 4]])).tolist() == [True, False, True]


def test_different_numbers_of_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 2\) must have the reference's \(4, 2\)"):
        same_topk(torch.zeros(3, 2), torch.zeros(4, 2))


@torch.no_grad()
def test_agreement_equals_a_direct_computation(generator: torch.Generator) -> None:
    reference, model = tiny_model("qwen2_moe"), tiny_model("qwen2_moe")
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    input_ids_BL = torch.randint(0, 264, (2, 40), generator=generator)
    with record_routing(model) as routing, record_routing(reference) as reference_routing:
        model(input_ids=input_ids_BL)
        reference(input_ids=input_ids_BL)
    pairs = zip(reference_choices(model, input_ids_BL), reference_choices(reference, input_ids_BL), strict=True)
    expected = [set(a) == set(b) for a_TK, b_TK in pairs for a, b in zip(a_TK.tolist(), b_TK.tolist(), strict=True)]
    num_same, num_pairs = count_same_routing(routing, reference_routing)
    assert (num_same, num_pairs) == (sum(expected), len(expected))
    assert num_pairs == 2 * 2 * 40
    assert 0 < num_same < num_pairs


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_models_that_store_their_experts_differently_are_comparable(family: str, generator: torch.Generator) -> None:
    reference, model = tiny_model(family), tiny_model(family)
    for name, module in list(model.named_modules()):
        if is_experts_module(module):
            model.set_submodule(name, StoredElsewhere(module))
    input_ids_BL = torch.randint(0, 264, (1, 30), generator=generator)
    with record_routing(model) as routing, record_routing(reference) as reference_routing:
        model(input_ids=input_ids_BL)
        reference(input_ids=input_ids_BL)
    num_same, num_pairs = count_same_routing(routing, reference_routing)
    assert num_same == num_pairs == 30 * len(routing) > 0


@torch.no_grad()
def test_passes_are_concatenated_and_hooks_come_off_after_an_error() -> None:
    model = tiny_model("qwen2_moe")
    with pytest.raises(RuntimeError, match="stopped"), record_routing(model) as routing:  # noqa: PT012
        model(input_ids=torch.zeros(1, 3, dtype=torch.int64))
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
        raise RuntimeError("stopped")
    assert {tuple(ids_TK.shape) for ids_TK in routing.values()} == {(7, 2)}
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_models_with_other_experts_modules_are_refused() -> None:
    ids_TK = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"\['b'\]"):
        count_same_routing({"a": ids_TK, "b": ids_TK}, {"a": ids_TK})


def test_spans_count_for_their_document_and_the_rest_for_nobody(generator: torch.Generator) -> None:
    ids_TK, reference_TK = torch.randint(0, 3, (2, 20, 2), generator=generator)
    spans = Spans(torch.tensor([0, 4, 0, 15]), torch.tensor([4, 9, 4, 16]), torch.tensor([1, 1, 0, 1]))
    routing, reference = {"a": ids_TK, "b": ids_TK}, {"a": reference_TK.to(torch.uint8), "b": ids_TK.to(torch.uint8)}
    expected = [[0, 0], [0, 0]]
    for start, stop, owner in zip(*(part.tolist() for part in spans), strict=True):
        for name in routing:
            for t in range(start, stop):
                expected[0][owner] += set(routing[name][t].tolist()) == set(reference[name][t].tolist())
                expected[1][owner] += 1
    num_same, num_pairs = same_routing_by_owner(routing, reference, spans, 2)
    assert [num_same.tolist(), num_pairs.tolist()] == expected
    assert 0 < expected[0][0] < expected[1][0]
    with pytest.raises(ValueError, match=r"\['b'\]"):
        same_routing_by_owner(routing, {"a": ids_TK}, spans, 2)
