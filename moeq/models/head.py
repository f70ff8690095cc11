"""What a model does behind its last block: last norm, head, and whatever its family multiplies or caps there."""

from typing import Any

from torch import Tensor, nn

from moeq.models.blocks import hands_on


def logits_behind(model: nn.Module, blocks: nn.ModuleList, inputs: dict[str, Tensor], hidden_BTD: Tensor) -> Tensor:
    """Logits [B, T, V] of a model whose last block returned these hidden states; differentiable in them.

    The model's own forward pass is run with every block replaced by a stub that returns them: no weight of a block is
    needed.  What the last block hands on, nothing reads.

    Args:
        model: A causal LM.
        blocks: Its decoder blocks.
        inputs: ``input_ids`` int64 [B, T], and ``attention_mask`` where there is padding.
        hidden_BTD: Output of the last block.
    """
    output = (hidden_BTD, None) if hands_on(blocks) else hidden_BTD

    def stub(*_: Any, **__: Any) -> Any:
        return output

    patched: list[Any] = list(blocks)
    for block in patched:
        block.forward = stub
    try:
        logits_BTV: Tensor = model(**inputs, use_cache=False).logits
    finally:
        for block in patched:
            del block.forward
    return logits_BTV
