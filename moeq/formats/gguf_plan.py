"""Which tensors a GGUF file of a model has, of which types; whatever has no right place is refused by name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moeq.checkpoint.packed_weight import PackedFormat
from moeq.formats.gguf_blocks import FILE_TYPES, plain_type, quantized_type
from moeq.formats.gguf_families import FAMILIES
from moeq.formats.gguf_family import Family
from moeq.formats.gguf_file import FileTensor
from moeq.formats.gguf_nvfp4 import check_scaled, global_scale, scale_name
from moeq.formats.gguf_pieces import Piece
from moeq.formats.gguf_wrappers import WRAPPERS
from moeq.formats.language_model import is_beside, language_root
from moeq.formats.source import PackedExport, model_stacks, other_names, weight_shape
from moeq.quant.carrier import CarrierMode

# Tensors that llama.cpp wants in float32 though they are matrices: routers, gates, convolutions, what it adds, and what
# mixes residual streams, as transformers computes it.
_FLOAT32 = ("ffn_gate_inp", "conv", "ssm_a", "ssm_d", "ssm_norm", "compressor_ape", "hc_attn_fn", "hc_ffn_fn")
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class Planned:
    """A tensor of the file.

    Attributes:
        name: In the file.
        stored: Its type and shape.
        weights: Canonical names of the weights that it holds, one or those of all experts; none for other tensors.
        tensor: Name in the model of a tensor that is no weight, otherwise "".
        piece: What it is of each of them.
        scales_of: Canonical names of the weights whose global scales it holds, and nothing else.
    """

    name: str
    stored: FileTensor
    weights: tuple[str, ...]
    tensor: str
    piece: Piece
    scales_of: tuple[str, ...] = ()

    @property
    def has_blocks(self) -> bool:
        """Whether it holds codes."""
        return FILE_TYPES[self.stored.kind].block > 1

    def values(self, export: PackedExport) -> Iterator[Tensor]:
        """Its values as they are evaluated, one weight after another, in their dtype."""
        if self.scales_of:
            yield torch.tensor([global_scale(self.piece.of_codes(export.quantized(name))) for name in self.scales_of])
        for weight_OI in export.weights(self.weights):
            yield self.piece.of_values(weight_OI)
        if self.tensor:
            yield self.piece.of_values(export.tensor(self.tensor))


def find_family(model: PreTrainedModel) -> Family:
    """How a model is told to llama.cpp; raises ValueError where it cannot be, or would be computed otherwise."""
    name, config = model.config.model_type, model.config.get_text_config()
    if (family := (FAMILIES | WRAPPERS).get(name)) is None or family.language_model not in ("", config.model_type):
        raise ValueError(
            f"gguf: {_full_name(model.config)} is no family whose files were run in llama.cpp; docs/serving.md lists "
            "those that were, export moeq or dense"
        )
    for option, value in family.fixed:
        given = getattr(config, option, value)
        if given != value and (given or value):
            raise ValueError(
                f"gguf: llama.cpp computes {family.architecture} with {option}: {value}, and this model has {given}; "
                "no file would be right, export moeq or dense"
            )
    if problem := family.refuses(config):
        raise ValueError(f"gguf: llama.cpp computes {family.architecture} otherwise: {problem}; export moeq or dense")
    return family


def plan_file(model: PreTrainedModel, grids: Mapping[str, PackedFormat], mode: CarrierMode) -> list[Planned]:
    """Tensors of the file of a model, in its order.

    Args:
        model: Dense; it may have no values.
        grids: Of quantized weights, by canonical name.
        mode: Which types may hold a grid.

    Raises:
        ValueError: A tensor has no name in llama.cpp or a weight no type, or weights that are one tensor of the file
            need different types.
    """
    family, config, state = find_family(model), model.config.get_text_config(), model.state_dict()
    root = language_root(model)
    planned = []
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for stack, names in model_stacks(model).items():
        if (tied and stack == "lm_head") or is_beside(model, stack):
            continue
        shape = weight_shape(model, names[0])
        for piece in _pieces(config, family, root, stack, ".weight", shape):
            kind = _one_type(stack, names, grids, piece, shape[1], mode, model.dtype)
            planned.append(_planned(piece, kind, tuple(names), "", shape))
            planned += _scales(planned[-1], config.model_type)
    numbers = number_keys(model)
    for name in other_names(model):
        if is_beside(model, name) or name in numbers:
            continue
        shape, dtype = tuple(state[name].shape), state[name].dtype
        for piece in _pieces(config, family, root, name, "", shape):
            planned.append(_planned(piece, _kept_type(piece, dtype), (), name, shape))
    if tied and family.own_head:
        embedding = next(each for each in planned if each.name == _EMBEDDING)
        head = Piece(_HEAD)
        planned.append(Planned(_HEAD, embedding.stored, embedding.weights, embedding.tensor, head))
    return planned


def number_keys(model: PreTrainedModel) -> dict[str, str]:
    """Tensors of whole numbers that are keys of the file below the architecture's name, each with its key."""
    found = find_family(model).numbers
    ending = {name: next((each for each in found if name.endswith(f".{each}")), "") for name in other_names(model)}
    return {name: found[each] for name, each in ending.items() if each}


def _scales(planned: Planned, family: str) -> list[Planned]:
    """The tensor of global scales that stands beside a tensor in NVFP4."""
    if planned.stored.kind != "NVFP4":
        return []
    check_scaled(family, planned.name)
    stored = FileTensor("F32", (len(planned.weights),))
    return [Planned(scale_name(planned.name), stored, (), "", planned.piece, scales_of=planned.weights)]


def _full_name(config: Any) -> str:
    """A wrapper with its language model."""
    name, inside = str(config.model_type), str(config.get_text_config().model_type)
    return name if inside == name else f"{name} ({inside})"


def _planned(piece: Piece, kind: str, weights: tuple[str, ...], tensor: str, shape: tuple[int, ...]) -> Planned:
    made = piece.shape_of(shape)
    if len(made) < 2 or piece.name.endswith(".bias"):
        kind = "F32"
    if len(weights) > 1:
        made = (len(weights), *made)
    return Planned(piece.name, FileTensor(kind, made), weights, tensor, piece)


def _pieces(config: Any, family: Family, root: str, name: str, ending: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    """What the file has of a tensor of the model, with names in the file."""
    if family.language_model and name.startswith(root):
        name, root = f"model.{name.removeprefix(root)}", "model."
    blocks = f"{root}layers."
    number, _, inside = name.removeprefix(blocks).partition(".") if name.startswith(blocks) else ("", "", name)
    if make := family.pieces.get(inside):
        # A family whose blocks differ has numbers and sizes of heads by block.
        for piece in make(config.per_layer_config[int(number)] if number else config, shape):
            yield replace(piece, name=f"blk.{number}.{piece.name}") if number and piece.of_block else piece
        return
    known = f"model.layers.{number}.{inside}" if number else name
    found = _names(family.names or family.architecture, config.num_hidden_layers).get_name(
        f"{known}{ending}".replace("e_score_correction_bias", "e_score_correction.bias"), (".weight", ".bias")
    )
    if found is None:
        raise ValueError(f"gguf: llama.cpp's {family.architecture} has no tensor for {name}; export moeq or dense")
    yield Piece(found)


def _one_type(
    stack: str, names: Any, grids: Mapping[str, PackedFormat], piece: Piece, in_features: int, mode: CarrierMode,
    dtype: torch.dtype,
) -> str:  # fmt: skip
    """Type of a tensor that holds some weights."""
    if piece.values is not None:
        return _kept_type(piece, dtype)
    found: dict[str, str] = {}
    for name in names:
        if name not in grids:
            found.setdefault(_kept_type(piece, dtype), name)
            continue
        try:
            found.setdefault(quantized_type(grids[name], in_features, mode), name)
            piece.check_groups(grids[name].spec.unit)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if len(found) > 1:
        types = ", ".join(f"{kind} ({name})" for kind, name in found.items())
        raise ValueError(
            f"gguf: the weights of {stack} are one tensor of one type, and would need {types}; plan with "
            "runtime: llama.cpp, which gives all experts of a projection in a block one type"
        )
    return next(iter(found))


def _kept_type(piece: Piece, dtype: torch.dtype) -> str:
    return "F32" if any(part in piece.name for part in _FLOAT32) else plain_type(dtype)


@cache
def _names(architecture: str, num_blocks: int) -> gguf.TensorNameMap:
    number = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(number, num_blocks)
