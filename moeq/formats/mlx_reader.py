"""Weights of MLX's affine format read back: by MLX, or in numpy, which shares nothing with what writes them.

A row is one stream of bits, the lowest bit of each code first; ``value = code * scale + bias`` in float32.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moeq.checkpoint.packed_weight import dequantize_codes
from moeq.checkpoint.sources import raw_tensors
from moeq.disk.folder import weight_files
from moeq.export.compare import raise_for
from moeq.export.finished import Progress
from moeq.formats.carriers import version_of
from moeq.formats.mlx_modules import Held
from moeq.formats.source import PackedExport
from moeq.quant.carrier import CarrierMode
from moeq.quant.spec import QuantizedWeight

# (path of a module of mlx-lm, bits, group size) -> its values in float32, [O, I] or [E, O, I]
Reader = Callable[[str, int, int], Tensor]


def dequantize_bits(weight: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    """Values of a quantized weight.

    Args:
        weight: uint32, [O, W].
        scales: [O, G], any float dtype.
        biases: [O, G].
        bits: Per code.

    Returns:
        float32, [O, I] with I = 32 W / bits.
    """
    rows = weight.shape[0]
    octets = weight.contiguous().view(torch.uint8).numpy().reshape(rows, -1)
    streams = np.unpackbits(octets, axis=1, bitorder="little").reshape(rows, -1, bits)
    codes = streams.astype(np.float32) @ (2.0 ** np.arange(bits, dtype=np.float32))
    size = codes.shape[1] // scales.shape[1]
    scale, bias = (np.repeat(each.float().numpy(), size, axis=1) for each in (scales, biases))
    return torch.from_numpy(codes * scale + bias)


@dataclass(frozen=True)
class Found:
    """What was read back.

    Attributes:
        reader: What read it.
        largest_error: Largest difference of a value from the packed export's, in scales of its group.
    """

    reader: str
    largest_error: float


def check_modules(
    export: PackedExport, folder: Path, modules: Mapping[str, Held], mode: CarrierMode, progress: Progress
) -> Found:
    """Compare every quantized weight of a folder with the packed export.

    Args:
        export: The packed export.
        folder: That was written.
        modules: What each quantized module of mlx-lm holds, by its path there.
        mode: In "native" the rounding of biases is allowed.
        progress: Shows how many modules are read.

    Raises:
        ExportMismatchError: A weight differs by more than the format's rounding.
    """
    read, reader = _mlx_reader(folder) if find_spec("mlx") else _numpy_reader(folder)
    paths, largest = list(modules), 0.0
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))["quantization"]
    for index in progress(range(len(paths)), "reading"):
        path, held = paths[index], modules[paths[index]]
        values = config.get(path, config)
        real = read(path, values["bits"], values["group_size"])
        num_rows = [export.shape(name)[0] for name in held.names]
        for number, (ours_OI, name) in enumerate(zip(held.places(real, num_rows), held.names, strict=True)):
            quantized = export.quantized(name)
            theirs_OI = held.take(number, dequantize_codes(quantized))
            scale_OG = held.take(number, quantized.scale_OG).float().abs()
            scale_OI = scale_OG.repeat_interleave(theirs_OI.shape[1] // scale_OG.shape[1], 1)
            error = float(((ours_OI.to(theirs_OI.dtype).float() - theirs_OI.float()).abs() / scale_OI).max())
            raise_for(folder, "weights", [name] if error > _allowed(quantized, mode) else [])
            largest = max(largest, error)
    return Found(reader, largest)


def _allowed(weight: QuantizedWeight, mode: CarrierMode) -> float:
    """In scales.

    The bias and the value are each rounded by half a unit in the last place of numbers below 2^bits; in float32 the
    product is rounded, too, whatever the bias.
    """
    dtype = weight.scale_OG.dtype
    exact = dtype != torch.float32 and (mode == "exact" or weight.zero_point_OG is None)
    return 0.0 if exact else 2 ** (weight.bits + 1) * torch.finfo(dtype).eps


def _mlx_reader(folder: Path) -> tuple[Reader, str]:
    import mlx.core as mx

    arrays: dict[str, mx.array] = {}
    for file in weight_files(folder):
        arrays |= mx.load(str(file))  # type: ignore[arg-type]  # of a format that has no metadata

    def read(path: str, bits: int, group_size: int) -> Tensor:
        weight, scales, biases = (arrays.pop(f"{path}.{part}") for part in ("weight", "scales", "biases"))
        wide = (scales.astype(mx.float32), biases.astype(mx.float32))
        return torch.from_numpy(np.array(mx.dequantize(weight, *wide, group_size=group_size, bits=bits)))

    return read, version_of("mlx")


def _numpy_reader(folder: Path) -> tuple[Reader, str]:
    stored = raw_tensors(folder)

    def read(path: str, bits: int, group_size: int) -> Tensor:
        weight, scales, biases = (stored[f"{path}.{part}"].read() for part in ("weight", "scales", "biases"))
        flat = dequantize_bits(weight.flatten(0, -2), scales.flatten(0, -2), biases.flatten(0, -2), bits)
        return flat.view(*weight.shape[:-1], flat.shape[-1])

    return read, "numpy (mlx is not installed)"
