from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeq.models.visits import visiting_blocks
from tests.tiny import tiny_model

IDS = torch.arange(40).view(2, 20) * 5 % 256 + 1


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_v3", "minimax"])
def test_visiting_blocks_give_the_same_numbers_and_are_at_home_again(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    expected, homes = logits(model), tensors(model)
    with visiting_blocks(model, "cpu"):
        assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected)
    assert tensors(model).keys() == homes.keys()
    assert all(tensor is homes[name] for name, tensor in tensors(model).items())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.model.layers)


def test_one_block_is_away_at_a_time_while_it_runs() -> None:
    model = tiny_model("mixtral")
    homes = tensors(model)
    away: list[set[int]] = []

    def look(*_: Any) -> None:
        moved = [name for name, tensor in tensors(model).items() if tensor is not homes[name] and ".layers." in name]
        away.append({int(name.split(".")[2]) for name in moved})

    with visiting_blocks(model, "cpu"):
        hooks = [block.self_attn.register_forward_pre_hook(look) for block in model.model.layers]
        logits(model)
        look()
    for hook in hooks:
        hook.remove()
    assert away == [{0}, {1}, set()]


def test_a_block_that_fails_is_at_home_again() -> None:
    model = tiny_model("mixtral")
    homes = tensors(model)

    def fail(*_: Any) -> None:
        raise ArithmeticError("no such product")

    hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError), visiting_blocks(model, "cpu"):
        logits(model)
    hook.remove()
    assert all(tensor is homes[name] for name, tensor in tensors(model).items())


def test_a_parameter_with_two_places_stays_one() -> None:
    model = tiny_model("mixtral", tie_word_embeddings=True)
    with visiting_blocks(model, "cpu"):
        assert model.lm_head.weight is model.model.embed_tokens.weight
