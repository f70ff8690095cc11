"""Hidden states between blocks, and running one block of a model at a time.

A decoder block is called as the model itself would call it: its arguments (masks, positions, rotary embeddings) are
captured by running the model with every block replaced by a stub that only writes down what it was given.  Neither what
follows the last block (the head is costly) nor what follows the last observed site of a pass is computed.

Blocks of a few families hand something on to the next one beside the hidden states (a router's state, chosen tokens).
Their stubs return ``HANDED_ON`` in its place, so that it is seen where the next block takes it, and
``ActivationStore.advance`` puts the value there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moeq.models.families import HAND_ON

HANDED_ON = object()


@dataclass(frozen=True)
class BlockCall:
    """What one block is called with besides its hidden states."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class BlockBatch:
    """One batch at a block: what the block reads now, and what the original model's returned there.

    Attributes:
        hidden_BTD: Input of the block, made by the quantized blocks before it.
        original_BTD: Output of the original block on the original model's hidden states.
        call: The other arguments of the block.
        keep_BT: bool; False at padding.
    """

    hidden_BTD: Tensor
    original_BTD: Tensor
    call: BlockCall
    keep_BT: Tensor


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
    return _run(block, hidden, call)[0]


def _run(block: nn.Module, hidden: Tensor, call: BlockCall) -> tuple[Tensor, Any]:
    """Hidden states and what is handed on to the next block, if anything.

    Raises:
        ValueError: The block hands something on, which ``moeq.models.families`` does not know of.
    """
    output = block(hidden, *call.args, **call.kwargs)
    if not isinstance(output, tuple):
        return output, None
    if len(output) > 1 and type(block).__name__ not in HAND_ON:
        raise ValueError(
            f"{type(block).__name__} returns {len(output)} values, and moeq/models/families.py does not say what the "
            "next block does with them; docs/families.md lists the families that work"
        )
    return output[0], output[1] if len(output) > 1 else None


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
        self._states: dict[int, tuple[int, Tensor, Any]] = {}

    def advance(self, batch: int, block: int, calls: list[BlockCall], blocks: nn.ModuleList) -> Tensor:
        """Input of ``block`` for a batch, made by running the blocks between it and the last one stored.

        In ``calls``, what earlier blocks hand on to this one is filled in.  The block after the last one stands for the
        output of all blocks.
        """
        reached, hidden, handed = self._states.get(batch, (0, calls[0].hidden, None))
        if reached > block:
            raise ValueError(f"activations of batch {batch} are at block {reached}, past block {block}: clear first")
        device = calls[0].hidden.device
        hidden, handed = hidden.to(device), _moved(handed, device)
        for index in range(reached, block):
            calls[index] = _filled(calls[index], handed)
            hidden, handed = _run(blocks[index], hidden, calls[index])
        if block < len(calls):
            calls[block] = _filled(calls[block], handed)
        self._states[batch] = (block, hidden.to(self.device), _moved(handed, self.device))
        return hidden

    def latest(self, batch: int) -> Tensor:
        """Input of the furthest block that a batch has reached, where it waits."""
        return self._states[batch][1]

    def num_bytes(self, device: torch.device) -> int:
        """Bytes of the stored states, if they are on ``device``."""
        states = [hidden for _, hidden, _ in self._states.values() if hidden.device.type == device.type]
        return sum(hidden.numel() * hidden.element_size() for hidden in states)

    def clear(self) -> None:
        """Forget everything: the next pass starts from the embeddings."""
        self._states.clear()


def _filled(call: BlockCall, handed: Any) -> BlockCall:
    """A call with the value of the block before in the place of the mark."""
    args = tuple(handed if value is HANDED_ON else value for value in call.args)
    kwargs = {name: handed if value is HANDED_ON else value for name, value in call.kwargs.items()}
    return replace(call, args=args, kwargs=kwargs)


def _moved(handed: Any, device: torch.device) -> Any:
    return handed.to(device) if isinstance(handed, Tensor) else handed


@contextmanager
def _stubs(blocks: nn.ModuleList, calls: list[BlockCall]) -> Iterator[None]:
    hands_on = any(type(block).__name__ in HAND_ON for block in blocks)

    def stub(*args: Any, **kwargs: Any) -> Any:
        positional = list(args)
        hidden = positional.pop(0) if positional else kwargs.pop("hidden_states")
        calls.append(BlockCall(hidden, tuple(positional), kwargs))
        if len(calls) == len(blocks):
            raise _Reached
        return (hidden, HANDED_ON) if hands_on else hidden

    patched: list[nn.Module] = list(blocks)
    forward: Callable[..., Any] = stub
    for block in patched:
        block.forward = forward
    try:
        yield
    finally:
        for block in patched:
            del block.forward
