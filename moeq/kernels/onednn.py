"""Products and linears of many rows on a CPU, in float32, by oneDNN.

On a CPU ``torch.mm`` and ``torch.nn.functional.linear`` call MKL, which keeps to AVX2 on processors of other makers
than Intel; oneDNN uses what the processor has, at twice the rate where that is AVX-512.  The public way to it in
float32 is ``F.linear`` of a tensor in oneDNN's layout, which copies both operands and the result: worth it from a few
hundred rows on.  Which way a product goes depends on its shape alone, so that an expert's result does not depend on its
company.  Results differ from MKL's in rounding alone.

Beside them: how many of its compiled kernels oneDNN keeps.

Shapes: E experts, M rows, K inner, N columns.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ONEDNN_ROWS = 256  # below, the copies cost more than the product gains
# Of fewer outputs, the copy of the input costs more than the product of a linear gains.
_MIN_OUTPUTS = 64
# oneDNN's own variable, which it reads before its first product; its default; what ``keep_fewer_kernels`` sets.
_KEPT, _DEFAULT_KERNELS, _FEWER_KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", 1024, 512


def add_product_(total: Tensor, left: Tensor, right: Tensor, sign: int = 1) -> None:
    """``total += sign * left @ right`` in float32 or float64, with a leading dimension of experts or without.

    On other devices than a CPU this is one batched product.

    Args:
        total: [M, N] or [E, M, N], any strides; written.
        left: [M, K] or [E, M, K].
        right: [K, N] or [E, K, N].
        sign: 1 or -1.
    """
    if total.dim() == 3:
        if total.device.type == "cpu":  # one after another: the same bits for an expert alone and among others
            for parts in zip(total.unbind(), left.unbind(), right.unbind(), strict=True):
                add_product_(*parts, sign)
        else:
            total.baddbmm_(left, right, alpha=sign)
    elif by_onednn(total, left):
        product_MN = torch.nn.functional.linear(left.to_mkldnn(), right.mT.contiguous()).to_dense()
        total.add_(product_MN, alpha=sign)
    else:
        total.addmm_(left, right, alpha=sign)


def by_onednn(total: Tensor, left: Tensor) -> bool:
    """Whether a product is large enough for oneDNN, and of a kind that it knows."""
    large = min(*total.shape, left.shape[1]) >= ONEDNN_ROWS
    return (
        large and total.dtype == torch.float32 and total.device.type == "cpu" and torch.backends.mkldnn.is_available()
    )


@contextmanager
def linears_by_onednn(model: nn.Module) -> Iterator[None]:
    """Within, inputs of at least ``ONEDNN_ROWS`` tokens pass through float32 linears on a CPU in oneDNN's layout.

    Linears of other classes (quantized ones), dtypes or devices, and those that are hooked already are left alone.
    """
    with ExitStack() as hooks:
        for module in model.modules():
            if _is_known(module):
                hooks.callback(module.register_forward_pre_hook(_enter).remove)
                hooks.callback(module.register_forward_hook(_leave).remove)
        yield


def _is_known(module: nn.Module) -> bool:
    # A sharded weight is no plain parameter.  Which hooks a module has cannot be asked for in public; the two
    # dictionaries are read as torch 2.13 has them, and a hook before ours would see oneDNN's layout.
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and module.out_features >= _MIN_OUTPUTS
        and not (module._forward_hooks or module._forward_pre_hooks)
        and torch.backends.mkldnn.is_available()
    )


def _enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not args:
        return None
    inputs: Tensor = args[0]
    is_large = inputs.dtype == torch.float32 and inputs.numel() >= ONEDNN_ROWS * inputs.shape[-1]
    return (inputs.to_mkldnn(), *args[1:]) if is_large else None


def _leave(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    return output.to_dense() if output.is_mkldnn else None


def keep_fewer_kernels() -> None:
    """Let oneDNN keep half as many compiled kernels, unless the user has set their number.

    It compiles one for each number of rows of a product in bfloat16 (5 ms, up to 0.9 MB), and experts see another
    number of tokens in every block.  Without effect where the process has computed a product before.
    """
    os.environ.setdefault(_KEPT, str(_FEWER_KERNELS))


def most_kernels() -> int:
    """Kernels that oneDNN keeps."""
    return int(os.environ.get(_KEPT, _DEFAULT_KERNELS))
