"""Going through blocks one at a time gives the gradients of the whole model, however experts are stored."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from moeq.models.adapter import Adapter
from moeq.tuning.sorted_experts import sorted_experts
from moeq.tuning.through_blocks import pass_backward, pass_forward
from tests.tiny import tiny_model

IDS = torch.arange(1, 49).reshape(2, 24)


def reference(model: nn.Module, adapter: Adapter, at_last: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Last hidden states, and gradients of all parameters of blocks, by autograd of the library's own model."""
    leaves = {
        f"{adapter.block_prefix}.{name}": value.detach().clone().requires_grad_()
        for name, value in adapter.blocks.named_parameters()
    }
    seen: list[Tensor] = []
    hook = adapter.blocks[-1].register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    functional_call(model, leaves, (), {"input_ids": IDS, "use_cache": False})
    hook.remove()
    seen[0].backward(at_last)
    return seen[0].detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("keep", [False, True], ids=["run again", "kept"])
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_gradients_are_those_of_the_whole_model(family: str, keep: bool) -> None:
    model = tiny_model(family)
    adapter = Adapter(model)
    hidden = int(model.config.hidden_size)  # type: ignore[arg-type, union-attr]
    at_last = torch.randn(2, 24, hidden, generator=torch.Generator().manual_seed(0))
    expected_last, expected = reference(model, adapter, at_last)
    leaves = [
        {name: value.detach().clone().requires_grad_() for name, value in block.named_parameters()}
        for block in adapter.blocks
    ]
    order: list[int] = []
    with sorted_experts(adapter.expert_modules()) as counts:
        passage = pass_forward(adapter, {"input_ids": IDS}, leaves.__getitem__, keep=keep)
        torch.testing.assert_close(passage.last, expected_last, rtol=1e-4, atol=1e-5)
        pass_backward(adapter, passage, at_last, leaves.__getitem__, order.append)
    assert order == list(reversed(range(len(adapter.blocks))))
    found = {
        f"{adapter.block_prefix}.{block}.{name}": leaf.grad
        for block, values in enumerate(leaves)
        for name, leaf in values.items()
        if leaf.grad is not None
    }
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4, msg=name)
    per_token = model.config.num_experts_per_tok  # type: ignore[union-attr]
    assert {int(tokens_E.sum()) for tokens_E in counts.values()} == {IDS.numel() * per_token}
