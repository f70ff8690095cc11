"""Norms and the linears that read them, found by running a block; scales moved from a norm into its readers.

With a norm ``y = m * x / rms(x)`` (m its multiplier) and readers ``W y``, for any positive s per channel,

    (W diag(s)) (y / s) = W y        so        m <- m / s,   W <- W diag(s)   leaves the block as it was.

AWQ chooses s from activations; rotation takes s = m, which leaves a norm without a weight.  Families differ in what
they store (m, or m - 1) and in who reads a norm, so both are asked of the running model: a module is a norm when it
behaves like one on known inputs, and a reader when its input is a norm's output.  What reads a norm in a way no hook
sees is found by ``fold_difference``, which runs the block before and after.

Legend: D (or I) in-features, O out-features, E experts.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map  # no public one in torch 2.13

from moeq.models.adapter import Adapter, is_experts_module, own_parameter
from moeq.models.blocks import BlockCall, run_block

_TOLERANCE = 1e-3  # between forms that differ by one, or by a mean; the epsilon inside a norm is far below


@dataclass(frozen=True)
class NormForm:
    """How a norm uses its weight: multiplier = weight + offset; a LayerNorm subtracts the mean."""

    offset: float
    subtracts_mean: bool


@dataclass(frozen=True)
class NormReaders:
    """A norm and everything whose input is its output.

    Attributes:
        norm: Path of the norm.
        readers: Paths of linears, routers, shared gates and experts modules, in the order in which they run.
    """

    norm: str
    readers: tuple[str, ...]


@torch.no_grad()
def norm_form(module: nn.Module) -> NormForm | None:
    """The form of a norm with a weight, or None for a module that is not one; found by running it."""
    weight = own_parameter(module, "weight")
    if weight is None or weight.ndim != 1 or len(weight) < 2 or not weight.is_floating_point():
        return None
    sign = torch.ones(len(weight), device=weight.device)
    sign[1::2] = -1
    x = sign - sign.mean()
    x = 8 * x / x.square().mean().sqrt()  # mean 0, root mean square 8, no entry near 0
    tensors = {name: parameter.float() for name, parameter in module.named_parameters()}
    try:
        y = functional_call(module, tensors, (torch.stack([x, -x, 16 * x, x + 8]).unsqueeze(0),))
    except (TypeError, RuntimeError, ValueError, IndexError, AttributeError):
        return None  # it wants other inputs, such as a gate
    if not isinstance(y, Tensor) or y.shape != (1, 4, len(weight)):
        return None
    plus, minus, large, shifted = y[0]

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE)

    multiplier = 8 * (plus - minus) / 2 / x
    offset = next((o for o in (0.0, 1.0) if same(multiplier, tensors["weight"] + o)), None)
    if offset is None or not same(plus, large):
        return None
    return NormForm(offset, subtracts_mean=same(plus, shifted))


def norm_weight(module: nn.Module) -> Tensor:
    """What a norm multiplies its normalised input by, float64 [D], whichever way the family stores it."""
    return _parameter(module, "weight").detach().double() + _form(module).offset


def set_norm_weight_value(module: nn.Module, multiplier_D: Tensor) -> Tensor:
    """The value to store in the norm's ``weight`` for this multiplier, in its dtype (nothing is written)."""
    return (multiplier_D.double() - _form(module).offset).to(_parameter(module, "weight").dtype)


def find_norm_readers(adapter: Adapter, block: int, hidden: Tensor, call: BlockCall) -> list[NormReaders]:
    """Norms of one block that something reads, with all their readers.

    Args:
        adapter: The model.
        block: Index of the block.
        hidden: A small input of the block, [B, T, D].
        call: What else the block is called with (see ``moeq.models.blocks.capture_calls``).
    """
    module = adapter.blocks[block]
    found = find_readers(module, lambda: run_block(module, hidden, call), f"{adapter.block_prefix}.{block}.")
    return [NormReaders(norm, tuple(readers)) for norm, readers in found.items() if readers]


@torch.no_grad()
def find_readers(
    root: nn.Module, run: Callable[[], Any], prefix: str = "", without: str | None = None
) -> dict[str, list[str]]:
    """Readers of every norm below a module that ``run`` makes run; a norm that none reads has an empty list.

    Args:
        root: The module; the weights of its norms are read.
        run: Runs it.
        prefix: Of the paths that are returned.
        without: Path below which norms and readers are left out.
    """
    found: dict[str, list[str]] = {}
    outputs: list[tuple[str, Tensor]] = []

    def on_norm(path: str, output: Any) -> None:
        found.setdefault(path, [])
        outputs.append((path, output.detach()))

    def on_reader(path: str, module: nn.Module, inputs: Iterator[Any]) -> None:
        for x in inputs:
            if not isinstance(x, Tensor) or not _reads(module, x):
                continue
            # The last norm first: values may coincide only by chance, or where nothing lies between.
            source = next((norm for norm, y in reversed(outputs) if _same_tensor(x, y)), None)
            if source is not None and path not in found[source]:
                found[source].append(path)

    with ExitStack() as stack:
        for path, module in root.named_modules():
            if without is not None and path.startswith(f"{without}."):
                continue
            if norm_form(module) is not None:
                hook: Any = lambda _m, _a, out, path=prefix + path: on_norm(path, out)  # noqa: E731
                stack.callback(module.register_forward_hook(hook).remove)
            elif _input_axes(module):
                before: Any = lambda m, a, k, path=prefix + path: on_reader(path, m, iter([*a, *k.values()]))  # noqa: E731
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        run()
    return found


def reader_weights(model: nn.Module, path: str) -> dict[str, int]:
    """Parameters with which a reader multiplies its input: full name, and which axis holds the in-features."""
    return {f"{path}.{name}": axis for name, axis in _input_axes(model.get_submodule(path)).items()}


@torch.no_grad()
def fold_into_norm(adapter: Adapter, readers: NormReaders, scale_D: Tensor) -> dict[str, Tensor]:
    """Values that multiply the in-features of all readers by s and divide the norm by it; nothing is written.

    Args:
        adapter: The model.
        readers: A norm with everything that reads it.
        scale_D: Positive factor per channel.

    Returns:
        New value, in its own dtype and layout, of every parameter that changes, by its name in the model.
    """
    norm = adapter.model.get_submodule(readers.norm)
    scale_D = scale_D.double()
    values = {f"{readers.norm}.weight": set_norm_weight_value(norm, norm_weight(norm) / scale_D)}
    if (bias := own_parameter(norm, "bias")) is not None:
        values[f"{readers.norm}.bias"] = (bias.double() / scale_D).to(bias.dtype)
    for path in readers.readers:
        for name, axis in reader_weights(adapter.model, path).items():
            weight = adapter.model.get_parameter(name)
            shape = [1] * weight.ndim
            shape[axis] = -1
            values[name] = (weight.double() * scale_D.view(shape)).to(weight.dtype)
    return values


@torch.no_grad()
def block_output(adapter: Adapter, block: int, hidden: Tensor, call: BlockCall, values: dict[str, Tensor]) -> Tensor:
    """Output of a block in float32 as if ``values`` (by name in the model) stood in it; the model stays as it is."""
    module, prefix = adapter.blocks[block], f"{adapter.block_prefix}.{block}."
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    tensors |= {name.removeprefix(prefix): value for name, value in values.items()}

    def single(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x

    tensors = {name: single(tensor) for name, tensor in tensors.items()}
    args, kwargs = tree_map(single, call.args), tree_map(single, call.kwargs)
    output = functional_call(module, tensors, (hidden.float(), *args), kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def fold_difference(adapter: Adapter, block: int, hidden: Tensor, call: BlockCall, values: dict[str, Tensor]) -> float:
    """How much ``values`` change what a block adds to its input, relative, in float32.

    Far above rounding (1e-5 for float32 weights, 1e-2 for bfloat16), something that reads the norm was not found.
    """
    before = block_output(adapter, block, hidden, call, {})
    after = block_output(adapter, block, hidden, call, values)
    return float((after - before).norm() / (before - hidden.float()).norm())


def _input_axes(module: nn.Module) -> dict[str, int]:
    """Own parameters of a module that multiply its input, with the axis of the in-features."""
    if is_experts_module(module):
        name = "gate_up_proj" if module.has_gate else "up_proj"
        return {name: -2 if module.is_transposed else -1} if own_parameter(module, name) is not None else {}
    weight = own_parameter(module, "weight")
    if weight is None or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return {}
    return {"weight": -1}


def _reads(module: nn.Module, x: Tensor) -> bool:
    axes = _input_axes(module).items()
    return x.ndim > 0 and all(_parameter(module, name).shape[axis] == x.shape[-1] for name, axis in axes)


def _same_tensor(x: Tensor, y: Tensor) -> bool:
    """One and the same storage, or equal values whatever the leading dimensions and the dtype."""
    if x.numel() != y.numel() or x.shape[-1] != y.shape[-1]:
        return False
    if x.data_ptr() == y.data_ptr() and x.dtype == y.dtype:
        return True
    return torch.equal(x.reshape(-1).double(), y.reshape(-1).double())


def _form(module: nn.Module) -> NormForm:
    form = norm_form(module)
    if form is None:
        raise ValueError(f"{type(module).__name__} does not behave like a norm with a weight; give the path of a norm")
    return form


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    parameter = own_parameter(module, name)
    assert parameter is not None
    return parameter
