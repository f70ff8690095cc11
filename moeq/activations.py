"""Hidden states between blocks, and running one block of a model at a time.

A decoder block is called as the model itself would call it: its arguments (masks, positions, rotary embeddings) are
captured by running the model with every block replaced by a stub that only writes down what it was given.  Neither what
follows the last block (the head is costly) nor what follows the last observed site of a pass is computed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class BlockCall:
    """What one block is called with besides its hidden states."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Reached(Exception):
    """Everything that a forward pass was run for has been seen."""


@torch.no_grad()
def capture_calls(model: nn.Module, blocks: nn.ModuleList, inputs: dict[str, Tensor]) -> list[BlockCall]:
    """Arguments of every block for one batch; ``hidden`` of the first is the embedded input.  No block runs."""
    calls: list[BlockCall] = []
    with _stubs(blocks, calls), suppress(_Reached):
        model(**inputs, use_cache=False, logits_to_keep=1)
    return calls


@torch.no_grad()
def run_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """Output hidden states [B, T, D] of one block."""
    output = block(hidden, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def until_reached(entered: Sequence[nn.Module], finished: Sequence[nn.Module]) -> Iterator[None]:
    """End the forward pass inside, silently, once all these modules have been entered or have finished.

    Hooks on them that exist already still run.  A pass that does not reach all of them runs to its end.
    """
    waiting = {id(module) for module in (*entered, *finished)}

    def reached(module: nn.Module, *_: Any) -> None:
        waiting.discard(id(module))
        if not waiting:
            raise _Reached

    with ExitStack() as stack:
        for module in entered:
            stack.callback(module.register_forward_pre_hook(reached).remove)
        for module in finished:
            stack.callback(module.register_forward_hook(reached).remove)
        with suppress(_Reached):
            yield


class ActivationStore:
    """For each batch, the input of the furthest block reached so far.

    Args:
        device: Where the hidden states wait between passes ("cpu" bounds the memory of the accelerator).
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._states: dict[int, tuple[int, Tensor]] = {}

    def advance(self, batch: int, block: int, calls: list[BlockCall], blocks: nn.ModuleList) -> Tensor:
        """Input of ``block`` for a batch, made by running the blocks between it and the last one stored."""
        reached, hidden = self._states.get(batch, (0, calls[0].hidden))
        if reached > block:
            raise ValueError(f"activations of batch {batch} are at block {reached}, past block {block}: clear first")
        hidden = hidden.to(calls[0].hidden.device)
        for index in range(reached, block):
            hidden = run_block(blocks[index], hidden, calls[index])
        self._states[batch] = (block, hidden.to(self.device))
        return hidden

    def num_bytes(self, device: torch.device) -> int:
        """Bytes of the stored states, if they are on ``device``."""
        states = [hidden for _, hidden in self._states.values() if hidden.device.type == device.type]
        return sum(hidden.numel() * hidden.element_size() for hidden in states)

    def clear(self) -> None:
        """Forget everything: the next pass starts from the embeddings."""
        self._states.clear()


@contextmanager
def _stubs(blocks: nn.ModuleList, calls: list[BlockCall]) -> Iterator[None]:
    def stub(*args: Any, **kwargs: Any) -> Tensor:
        positional = list(args)
        hidden = positional.pop(0) if positional else kwargs.pop("hidden_states")
        calls.append(BlockCall(hidden, tuple(positional), kwargs))
        if len(calls) == len(blocks):
            raise _Reached
        return hidden

    patched: list[nn.Module] = list(blocks)
    forward: Callable[..., Tensor] = stub
    for block in patched:
        block.forward = forward
    try:
        yield
    finally:
        for block in patched:
            del block.forward
