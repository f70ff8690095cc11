"""A batch through all blocks and back, one block at a time: what autograd of the whole model would give.

Forward, what each block reads of the batch is kept.  Backward, the block runs again on it and hands the gradient at its
input to the block below; its own leaves have their gradient then, and no other block's are in memory.  Where
everything is in memory anyway, what the forward pass made may be kept instead, and nothing runs twice.

Shapes: B batch, T tokens of a sequence, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moeq.models.adapter import Adapter
from moeq.models.blocks import BlockCall, capture_calls, fill_in, hand_on

# Parameters of a block, by their name in it.
Parameters = Callable[[int], Mapping[str, Tensor]]
Pair = tuple[Tensor, Any]


@dataclass
class Passage:
    """A batch that went through all blocks.

    Attributes:
        calls: How each block is called on it.
        read: What each block read: hidden states, and what was handed on.
        made: What each block made of it, with its graph; empty where blocks run again.
        last: The last hidden states.
    """

    calls: Sequence[BlockCall]
    read: list[Pair]
    made: list[Pair]
    last: Tensor


def pass_forward(
    adapter: Adapter, inputs: dict[str, Tensor], parameters: Parameters, *, keep: bool = False, read: bool = True
) -> Passage:
    """Run a batch through all blocks, each with parameters of its own.

    Args:
        adapter: The model.
        inputs: ``input_ids`` int64 [B, T].
        parameters: Those of each block, which is resident when they are asked for; others are the model's.
        keep: Keep what blocks made, with its graph.
        read: Keep what blocks read; without it nothing can go back.
    """
    calls = capture_calls(adapter.model, adapter.blocks, inputs)
    passage = Passage(calls, [], [], calls[0].hidden)
    handed: Any = None
    for block in range(len(adapter.blocks)):
        adapter.residency.read_ahead(block + 1)
        with adapter.resident(block), torch.enable_grad() if keep else torch.no_grad():
            pair = (_leaf(passage.last), _leaf(handed)) if keep else (passage.last, handed)
            made = _run(adapter, block, calls[block], pair, parameters(block))
        if read:
            passage.read.append(pair)
        if keep:
            passage.made.append(made)
        passage.last, handed = made[0].detach(), made[1]
    return passage


def pass_backward(
    adapter: Adapter, passage: Passage, gradient: Tensor, parameters: Parameters, after: Callable[[int], None]
) -> None:
    """From the gradient at the last hidden states to the leaves of every block.

    Args:
        adapter: The model.
        passage: What ``pass_forward`` kept; it is used up.
        gradient: At its last hidden states.
        parameters: As in the forward pass.
        after: Called with each block, still resident, once its leaves have their gradient.
    """
    gradients: list[Tensor | None] = [gradient, None]
    for block in reversed(range(len(adapter.blocks))):
        adapter.residency.read_ahead(block - 1) if block else None
        pair = passage.read.pop()
        with adapter.resident(block), torch.enable_grad():
            if passage.made:
                made = passage.made.pop()
            else:
                pair = _leaf(pair[0]), _leaf(pair[1])
                made = _run(adapter, block, passage.calls[block], pair, parameters(block))
            back = [(value, given) for value, given in zip(made, gradients, strict=True) if given is not None]
            torch.autograd.backward([value for value, _ in back], [given for _, given in back])
            gradients = [value.grad if isinstance(value, Tensor) else None for value in pair]
            del made, back
            with torch.no_grad():
                after(block)


def _run(adapter: Adapter, block: int, call: BlockCall, pair: Pair, parameters: Mapping[str, Tensor]) -> Pair:
    call = fill_in(replace(call, hidden=pair[0]), pair[1])
    values = {f"block.{name}": value for name, value in parameters.items()}
    made: Pair = functional_call(_Handing(adapter.blocks[block]), values, (call,))
    return made


class _Handing(nn.Module):
    """A block as a module that returns hidden states and what it hands on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, call: BlockCall) -> Pair:
        return hand_on(self.block, call.hidden, call)


def _leaf(value: Any) -> Any:
    """A tensor whose gradient can be asked for, where it is no index."""
    return value.detach().requires_grad_(value.is_floating_point()) if isinstance(value, Tensor) else value
