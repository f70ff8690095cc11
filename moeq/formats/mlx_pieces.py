"""Tensors of mlx-lm's modules made of a packed export's weights: quantized ones, and those that keep their values."""

import torch
from torch import Tensor

from moeq.disk.tensor_file import Declared
from moeq.formats.hf_folder import Piece
from moeq.formats.mlx_family import MlxFamily
from moeq.formats.mlx_modules import Held
from moeq.formats.source import PackedExport
from moeq.quant.carrier import Carrier, recentre, regroup
from moeq.quant.packing import num_words, pack
from moeq.quant.spec import QuantizedWeight


def quantized_piece(export: PackedExport, path: str, held: Held, carrier: Carrier) -> Piece:
    """``weight``, ``scales`` and ``biases`` of a module.

    Args:
        export: The packed export.
        path: Of the module.
        held: Its weights.
        carrier: Their storage type.
    """
    shapes = [export.shape(name) for name in held.names]
    num_rows, columns, dtype = [rows for rows, _ in shapes], shapes[0][1], export.dtype(held.names[0])
    groups = columns // (carrier.group_size or columns)
    declared = {
        f"{path}.weight": Declared(torch.uint32, held.shape(num_rows, num_words(columns, carrier.bits))),
        f"{path}.scales": Declared(dtype, held.shape(num_rows, groups)),
        f"{path}.biases": Declared(dtype, held.shape(num_rows, groups)),
    }

    def make() -> dict[str, Tensor]:
        # torch copies int32, not uint32.
        made = {
            key: torch.empty(each.shape, dtype=torch.int32 if each.dtype == torch.uint32 else each.dtype)
            for key, each in declared.items()
        }
        places = [list(held.places(tensor, num_rows)) for tensor in made.values()]
        for index, name in enumerate(held.names):
            for place, part in zip(places, _affine(export.quantized(name), carrier), strict=True):
                place[index].copy_(held.take(index, part))
        return {key: tensor.view(declared[key].dtype) for key, tensor in made.items()}

    return Piece(declared, make)


def dense_piece(export: PackedExport, path: str, held: Held) -> Piece:
    """``weight`` of a module that is not quantized there."""
    key, dtype, columns = f"{path}.weight", export.dtype(held.names[0]), export.shape(held.names[0])[1]
    num_rows = [export.shape(name)[0] for name in held.names]
    shape = held.shape(num_rows, columns)

    def make() -> dict[str, Tensor]:
        if held.is_whole:
            return {key: export.weight(held.names[0])}
        made = torch.empty(shape, dtype=dtype)
        for index, (place, weight_OI) in enumerate(
            zip(held.places(made, num_rows), export.weights(held.names), strict=True)
        ):
            place.copy_(held.take(index, weight_OI))
        return {key: made}

    return Piece({key: Declared(dtype, shape)}, make)


def changed(piece: Piece, family: MlxFamily) -> Piece:
    """A piece with what its class holds otherwise."""
    changes = {key: change for key in piece.declared if (change := family.change(key)) is not None}
    if not changes:
        return piece
    declared = dict(piece.declared)
    for key, change in changes.items():
        empty = change(torch.empty(declared[key].shape, dtype=declared[key].dtype))
        declared[key] = Declared(empty.dtype, tuple(empty.shape))
    return Piece(
        declared, lambda: {k: changes[k](tensor) if k in changes else tensor for k, tensor in piece.make().items()}
    )


def _affine(weight: QuantizedWeight, carrier: Carrier) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes (int32), scales and biases of one weight."""
    if weight.zero_point_OG is None or carrier.bits > weight.bits:
        weight = recentre(weight, carrier.bits)
    weight = regroup(weight, carrier.group_size)
    zero_OG = 2 ** (carrier.bits - 1) if weight.zero_point_OG is None else weight.zero_point_OG.float()
    bias_OG = (-zero_OG * weight.scale_OG.float()).to(weight.scale_OG.dtype)
    return pack(weight.codes_OI, carrier.bits), weight.scale_OG, bias_OG
