"""Running one decoder block at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
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


class _Reached(Exception):
    """Everything that a forward pass was run for has been seen."""


@torch.no_grad()
def capture_calls(
    model: nn.Module, blocks: nn.ModuleList, inputs: dict[str, Tensor], last: int | None = None
) -> list[BlockCall]:
    """Arguments of every block for one batch; ``hidden`` of each is the embedded input.  No block runs.

    Args:
        model: Holds the blocks, whose weights need not be there.
        blocks: Its decoder blocks.
        inputs: The batch.
        last: The last block whose arguments are wanted; None is all.
    """
    calls: list[BlockCall] = []
    with _stubs(blocks, calls, len(blocks) if last is None else last + 1), suppress(_Reached):
        model(**inputs, use_cache=False, logits_to_keep=1)
    return calls


@torch.no_grad()
def run_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """Output hidden states [B, T, D] of one block."""
    return hand_on(block, hidden, call)[0]


def hand_on(block: nn.Module, hidden: Tensor, call: BlockCall) -> tuple[Tensor, Any]:
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


def hands_on(blocks: nn.ModuleList) -> bool:
    """Whether blocks of the family hand something on to the next one beside the hidden states."""
    return any(type(block).__name__ in HAND_ON for block in blocks)


@contextmanager
def visiting(blocks: nn.ModuleList, resident: Callable[[int], AbstractContextManager[None]]) -> Iterator[None]:
    """Within, the whole model can run: each block is resident (``Adapter.resident``) while it runs, and no longer."""
    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            inside = ExitStack()
            hooks.callback(inside.close)  # where a forward pass was ended by an error

            def enter(_: nn.Module, __: Any, index: int = index, inside: ExitStack = inside) -> None:
                inside.enter_context(resident(index))

            def leave(_: nn.Module, __: Any, ___: Any, inside: ExitStack = inside) -> None:
                inside.close()

            hooks.callback(block.register_forward_pre_hook(enter, prepend=True).remove)
            hooks.callback(block.register_forward_hook(leave).remove)
        yield


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


def fill_in(call: BlockCall, handed: Any) -> BlockCall:
    """A call with the value of the block before in the place of the mark."""
    args = tuple(handed if value is HANDED_ON else value for value in call.args)
    kwargs = {name: handed if value is HANDED_ON else value for name, value in call.kwargs.items()}
    return replace(call, args=args, kwargs=kwargs)


@contextmanager
def _stubs(blocks: nn.ModuleList, calls: list[BlockCall], num_wanted: int) -> Iterator[None]:
    returns_two = hands_on(blocks)

    def stub(*args: Any, **kwargs: Any) -> Any:
        positional = list(args)
        hidden = positional.pop(0) if positional else kwargs.pop("hidden_states")
        calls.append(BlockCall(hidden, tuple(positional), kwargs))
        if len(calls) == num_wanted:
            raise _Reached
        return (hidden, HANDED_ON) if returns_two else hidden

    patched: list[nn.Module] = list(blocks)
    forward: Callable[..., Any] = stub
    for block in patched:
        block.forward = forward
    try:
        yield
    finally:
        for block in patched:
            del block.forward
