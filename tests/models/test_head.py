"""What stands behind the last block is the model's own, whatever its family does there."""

import pytest
import torch

from moeq.models.adapter import find_blocks
from moeq.models.head import logits_behind
from tests.tiny import tiny_model


# Plain, with a cap on the logits, with multipliers, and with something that blocks hand on.
@pytest.mark.parametrize("family", ["qwen2_moe", "gemma4_text", "granitemoe", "cohere2_moe", "zaya", "glm_moe_dsa"])
@torch.no_grad()
def test_logits_from_the_last_hidden_states_are_those_of_the_model(family: str) -> None:
    model, seen = tiny_model(family), []
    _, blocks = find_blocks(model)
    ids, mask = torch.randint(1, 257, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    hook = blocks[-1].register_forward_hook(lambda _, __, made: seen.append(made[0] if type(made) is tuple else made))
    expected = model(**inputs).logits
    hook.remove()
    assert torch.equal(logits_behind(model, blocks, inputs, seen[0]), expected)
    assert torch.equal(model(**inputs).logits, expected)  # the blocks are themselves again


def test_logits_carry_a_gradient_to_the_hidden_states() -> None:
    model = tiny_model("qwen2_moe")
    _, blocks = find_blocks(model)
    hidden = torch.randn(1, 5, 64, requires_grad=True)
    logits = logits_behind(model, blocks, {"input_ids": torch.ones(1, 5, dtype=torch.int64)}, hidden)
    expected = model.lm_head(model.model.norm(hidden))
    gradients = [torch.autograd.grad(each.square().sum(), hidden)[0] for each in (logits, expected)]
    torch.testing.assert_close(*gradients)
