"""Linears of many rows on a CPU, in float32, by oneDNN.

MKL, which ``torch.nn.functional.linear`` calls otherwise, is half as fast on processors of other makers than Intel (see
``moeq.kernels.products``).  The results differ in rounding alone.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moeq.kernels.products import ONEDNN_ROWS

# Of fewer outputs, the copy of the input costs more than the product gains.
_MIN_OUTPUTS = 64


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
    # A sharded weight is no plain parameter.
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
