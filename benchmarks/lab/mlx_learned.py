"""mlx-lm's learned quantizations, DWQ and GPTQ: its own functions on given token ids, at the sizes of its others.

Both leave embedding, head and routers as they are, which mlx-lm would quantize, too.  DWQ multiplies with dequantized
weights while it learns: the products with packed ones take minutes for each step on a CPU.  AWQ of mlx-lm knows no
model with experts ("NYI").
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Adam
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.quant.dwq import dwq_quantize
from mlx_lm.quant.gptq import gptq_quantize
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from torch import Tensor

BATCH = 4  # of mlx-lm's DWQ


class Dequantized(nn.Module):
    """A quantized linear, or one of experts, whose product has gradients by scales and offsets that a CPU computes."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.bits, self.group_size, self.mode = layer.bits, layer.group_size, layer.mode
        ones = mx.ones(layer.scales.shape, mx.float32)
        codes = mx.dequantize(layer.weight, ones, mx.zeros_like(ones), layer.group_size, layer.bits)
        self.weight = mx.unflatten(codes, -1, (-1, layer.group_size))  # codes [..., O, G, S]
        self.scales, self.biases = layer.scales, layer.biases
        if "bias" in layer:
            self.bias = layer.bias
        self.freeze()

    def __call__(self, x: Any, indices: Any = None, sorted_indices: bool = False) -> Any:
        weight = mx.flatten(self.weight * self.scales[..., None] + self.biases[..., None], -2).swapaxes(-1, -2)
        if indices is None:
            return x @ weight + self.bias if "bias" in self else x @ weight
        return mx.gather_mm(x, weight, rhs_indices=indices, sorted_indices=sorted_indices)


def quantized_layers(model: Any) -> list[tuple[str, Any]]:
    """Modules with codes and scales, by path."""
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    return [(path, layer) for path, layer in leaves if hasattr(layer, "bits")]


def write_dwq(
    source: Path, folder: Path, bits: int, group_size: int, ids_NL: Tensor, num_passes: int, learning_rate: float,
    takes: Callable[[str], bool],
) -> None:  # fmt: skip
    """A folder of one width whose scales and offsets are distilled from the original (``mlx_lm.dwq``).

    Args:
        source: Folder of the unquantized model.
        folder: To write.
        bits: Of every weight.
        group_size: Of every weight.
        ids_NL: What it learns on, in batches of ``BATCH`` sequences.
        num_passes: Over them.
        learning_rate: Of Adam; 1e-6 is the default of ``mlx_lm.dwq``, for 512 steps of 4 sequences of 1024 tokens.
        takes: Whether a path is quantized.
    """
    mx.set_default_device(mx.cpu)
    teacher = load_model(source)[0]
    teacher.set_dtype(mx.float32)
    model, config = load_model(source)
    model, config = quantize_model(model, config, group_size, bits, quant_predicate=lambda path, module: takes(path))
    packed = quantized_layers(model)
    student = load_model(source)[0]
    student.update_modules(tree_unflatten([(path, Dequantized(layer)) for path, layer in packed]))
    student.set_dtype(mx.float32)
    student.freeze()
    data = [(row, 0) for row in ids_NL.tolist()]
    dwq_quantize(
        student, lambda batch, index, split: teacher(batch), Adam(learning_rate=learning_rate, bias_correction=True),
        data * num_passes, data[:BATCH], BATCH, ids_NL.shape[1] + 1, seed=0, dtype=mx.float32,
    )  # fmt: skip
    learned = dict(quantized_layers(student))
    for path, layer in packed:
        layer.scales, layer.biases = (
            getattr(learned[path], name).astype(layer.scales.dtype) for name in ("scales", "biases")
        )
    save_model(folder, model)
    save_config(config, folder / "config.json")


def write_gptq(
    source: Path, folder: Path, bits: int, group_size: int, ids_NL: Tensor, takes: Callable[[str], bool]
) -> None:
    """A folder of 2, 4 or 8 bits by ``mlx_lm.gptq``, which gives all experts of a projection one Hessian.

    Args:
        source: Folder of the unquantized model.
        folder: To write.
        bits: Of every weight.
        group_size: Of every weight.
        ids_NL: Calibration ids.
        takes: Whether a path is quantized.
    """
    mx.set_default_device(mx.cpu)
    solved = load_model(source)[0]
    solved.set_dtype(mx.float32)
    solved, _ = gptq_quantize(solved, mx.array(ids_NL.numpy()), bits, group_size, 8, group_size)
    model, config = load_model(source)
    model, config = quantize_model(model, config, group_size, bits, quant_predicate=lambda path, module: takes(path))
    found = dict(quantized_layers(solved))
    for path, layer in quantized_layers(model):
        layer.weight = found[path].weight
        layer.scales, layer.biases = (
            getattr(found[path], name).astype(layer.scales.dtype) for name in ("scales", "biases")
        )
    save_model(folder, model)
    save_config(config, folder / "config.json")
