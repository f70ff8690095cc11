"""Search for the module that first gave a NaN or an infinity, so that an evaluation that must stop says where to look.

The pass that gave non-finite logits is run once more with a hook on every module.  Modules finish from the inside out
and in the order of the data, so the first one whose output is not finite is where it began: the norm, the attention's
projection or the experts of a block (an activation function, which has no weights, stands for the module around it).
No module of the families in ``docs/families.md`` has such an output in a healthy model (masks with infinities arise
between modules), so nothing about a family need be known.

Shapes: N positions whose logits were computed, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteError(ValueError):
    """Logits with a NaN or an infinity: no number of this model means anything."""


class _Found(Exception):
    """The module that was looked for has been seen."""


@torch.no_grad()
def first_non_finite(model: nn.Module, run: Callable[[], object]) -> str | None:
    """Path of the first module with weights whose output is not finite in ``run()``; None where all are.

    The run ends there.  The hooks come off at the end, after an error too.

    Args:
        model: The model that ``run`` calls.
        run: Repeats the pass, with the inputs that gave non-finite logits.
    """
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def check(_: nn.Module, __: object, output: object) -> None:
            if not all(_is_finite(tensor) for tensor in _tensors(output)):
                found.append(name)
                raise _Found

        return check

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        with suppress(_Found):
            run()
    return _with_weights(model, found[0]) if found else None


def check_finite(
    logits_NV: Tensor,
    owner_N: Tensor,
    *,
    model: nn.Module,
    run: Callable[[], object],
    task: str,
    whose: str = "the model",
) -> None:
    """Stop at logits that are not finite, naming the task, the document and the module where it began.

    Args:
        logits_NV: Logits of a batch.
        owner_N: Index, in the task, of the document that each row belongs to.
        model: The model that gave them.
        run: Repeats the pass; called only where it is needed.
        task: Name of the task.
        whose: Which of two models it is, for the message.

    Raises:
        NonFiniteError: Some logits are not finite.
    """
    # A sum is NaN or infinite with any of its terms; where it merely overflows, the exact count decides.
    if logits_NV.sum(-1, dtype=torch.float32).isfinite().all():
        return
    bad_N = (~logits_NV.isfinite()).sum(-1)
    num_bad = int(bad_N.sum())
    if num_bad == 0:
        return
    documents = owner_N.to(bad_N.device)[bad_N > 0].unique().tolist()
    where = first_non_finite(model, run)
    raise non_finite_error(task, documents, where, counts=(num_bad, logits_NV.numel()), whose=whose)


def non_finite_error(
    task: str,
    documents: Sequence[int],
    where: str | None,
    *,
    counts: tuple[int, int] | None = None,
    whose: str = "the model",
) -> NonFiniteError:
    """The error that says everything.

    Args:
        task: Name of the task.
        documents: Indices of the documents, at least one.
        where: What ``first_non_finite`` found.
        counts: Logits that are not finite, and all logits, where they are known.
        whose: Which of two models it is.
    """
    several = f" and {len(documents) - 1} others of its batch" if len(documents) > 1 else ""
    logits = "non-finite logits" if counts is None else f"{counts[0]} non-finite logits of {counts[1]}"
    begin = (
        f"the first NaN or infinity comes out of {where}"
        if where is not None
        else "the same pass, run again, was finite in every module: the device or a kernel is not reliable"
    )
    return NonFiniteError(
        f"{whose} gave {logits} on task {task}, document {documents[0]}{several}; {begin}; "
        "check its weights there, or load it in bfloat16 or float32 instead of float16 (--model.dtype)"
    )


def _with_weights(model: nn.Module, path: str) -> str:
    """The module itself, or the innermost one around it that has parameters; the model's class for the model."""
    while path and not any(True for _ in model.get_submodule(path).parameters()):
        path = path.rpartition(".")[0]
    return path or type(model).__name__


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _tensors(output: Any) -> Iterator[Tensor]:
    """Tensors of what a module returned, however they are nested."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (tensor for value in output.values() for tensor in _tensors(value))
    elif isinstance(output, (tuple, list)):
        yield from (tensor for value in output for tensor in _tensors(value))
