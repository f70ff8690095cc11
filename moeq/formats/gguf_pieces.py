"""What a tensor of a GGUF file is of a tensor of the model: all of it, some of its rows, or values made of it.

Rows can be chosen and put in another order where a weight stays quantized: its scales are theirs.  Whatever else is
made of values (a transposed part, exp, 1 + w) is stored as floats that hold it exactly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeq.quant.spec import QuantizedWeight


@dataclass(frozen=True)
class Piece:
    """A tensor of the file.

    Attributes:
        name: In the file; of a block what follows its number.
        rows: Indices of the rows that it is made of, in its order; None is all of them.
        columns: The same of in-features.
        shape: That it has; None is the one it had.
        values: Made of the values in place of rows.
        of_block: Its name has the number of the block in front, where it is of a block.
    """

    name: str
    rows: Tensor | None = None
    columns: Tensor | None = None
    shape: tuple[int, ...] | None = None
    values: Callable[[Tensor], Tensor] | None = None
    of_block: bool = True

    def of_codes(self, weight: QuantizedWeight) -> QuantizedWeight:
        """These rows and columns of a quantized weight; see ``check_groups``."""
        assert self.values is None
        if self.rows is not None:
            weight = weight.each(lambda part: part[self.rows])
        if (columns := self.columns) is not None:
            num = len(columns)

            def moved(part: Tensor) -> Tensor:
                """Codes, or numbers of groups or super-blocks, each with its columns."""
                size = num // part.shape[1]
                return part[:, columns.view(-1, size)[:, 0] // size]

            weight = weight.each(moved)
        return weight

    def check_groups(self, group_size: int | None) -> None:
        """Raise ValueError where columns of one group of scales go to different places."""
        if self.columns is None or group_size is None:
            return
        columns_GS = self.columns.view(-1, group_size)
        first_G1 = columns_GS[:, :1] // group_size * group_size
        if not torch.equal(columns_GS, first_G1 + torch.arange(group_size)):
            raise ValueError(
                f"llama.cpp has its columns in another order, which takes groups of {group_size} apart; halve them, or "
                "take a group per channel"
            )

    def of_values(self, tensor: Tensor) -> Tensor:
        """The piece of a tensor of the model, without the shape where rows are all that is asked for."""
        if self.values is not None:
            return self.values(tensor)
        if self.rows is not None:
            tensor = tensor[self.rows]
        return tensor if self.columns is None else tensor[:, self.columns]

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape in the file, from the shape of the tensor of the model."""
        if self.shape is not None:
            return self.shape
        if self.values is not None:
            return tuple(self.values(torch.empty(shape, device="meta")).shape)
        return shape if self.rows is None else (len(self.rows), *shape[1:])


# (configuration, shape of the tensor of the model) -> what the file has of it.
Pieces = Callable[[Any, tuple[int, ...]], Sequence[Piece]]


def half_turns(config: Any, shape: tuple[int, ...], heads: int) -> Tensor:
    """Order of the rows of a projection of queries or keys for a runtime that turns neighbours.

    transformers turns dimension i of a head with i + d / 2, llama.cpp's "normal" rotary embedding 2 i with 2 i + 1.

    Args:
        config: Of the model.
        shape: Of the weight or bias.
        heads: Of the projection.
    """
    del config
    return torch.arange(shape[0]).view(heads, 2, -1).mT.flatten()


def turned_queries(name: str) -> Pieces:
    """A projection of queries for a runtime that turns neighbours."""
    return lambda config, shape: [Piece(name, half_turns(config, shape, config.num_attention_heads))]


def turned_keys(name: str) -> Pieces:
    """A projection of keys for a runtime that turns neighbours."""
    return lambda config, shape: [Piece(name, half_turns(config, shape, config.num_key_value_heads))]


def latent_parts(config: Any, shape: tuple[int, ...]) -> Sequence[Piece]:
    """Multi-head latent attention: what keys and values are made of, each head apart.

    llama.cpp multiplies queries with the transposed part of the keys, whose groups of scales would lie across rows: it
    is stored in values.
    """
    keys, values, heads = config.qk_nope_head_dim, config.v_head_dim, config.num_attention_heads
    rows = torch.arange(shape[0]).view(heads, keys + values)
    return [
        Piece("attn_k_b.weight", values=lambda weight: weight.view(heads, keys + values, -1)[:, :keys].mT.contiguous()),
        Piece("attn_v_b.weight", rows[:, keys:].flatten(), shape=(heads, values, shape[1])),
    ]


def halves(first: str, second: str) -> Pieces:
    """Rows of two projections, one above the other."""

    def make(config: Any, shape: tuple[int, ...]) -> Sequence[Piece]:
        del config
        upper, lower = torch.arange(shape[0]).chunk(2)
        return [Piece(first, upper), Piece(second, lower)]

    return make


def expert_biases(config: Any, shape: tuple[int, ...]) -> Sequence[Piece]:
    """Biases of gate and up rows in turn, [E, 2 F]."""
    del config, shape
    return [
        Piece("ffn_gate_exps.bias", values=lambda bias: bias[:, 0::2].contiguous()),
        Piece("ffn_up_exps.bias", values=lambda bias: bias[:, 1::2].contiguous()),
    ]


def vector(name: str) -> Pieces:
    """A matrix of one row or column as a vector."""
    return lambda config, shape: [Piece(name, values=Tensor.flatten)]


def renamed(name: str) -> Pieces:
    """All of it under a name that the package does not know it by."""
    return lambda config, shape: [Piece(name)]


def nothing(config: Any, shape: tuple[int, ...]) -> Sequence[Piece]:
    """Of a tensor that llama.cpp makes of the configuration."""
    del config, shape
    return []


def made(name: str, values: Callable[[Tensor], Tensor]) -> Pieces:
    """Values made of it, in float32."""
    return lambda config, shape: [Piece(name, values=lambda tensor: values(tensor.float()))]
