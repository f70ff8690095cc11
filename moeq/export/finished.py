"""A quantized model as an export takes it: one finished block after another, wherever its weights are.

In memory or streamed, the blocks are visited in the same order by the same code, so that both give the same files.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from transformers import PreTrainedModel

from moeq.export.origin import Draft, Origin, find_origin
from moeq.models.adapter import Adapter
from moeq.quant.spec import QuantizedWeight

# Shows how far a loop over blocks is: (blocks, what is done to them) -> the same blocks.
Progress = Callable[[Sequence[int], str], Iterable[int]]


def silent(blocks: Sequence[int], label: str) -> Iterable[int]:
    """No progress is shown."""
    return blocks


class QuantizedBlocks(Protocol):
    """What a fit has made of the blocks of a model."""

    def quantized(self, block: int) -> Mapping[str, QuantizedWeight]:
        """Codes of the weights of one finished block, on the CPU, by canonical name."""

    def commit(self, block: int) -> None:
        """Write the dequantized weights and the changed parameters of a block, which is resident, into the model."""


@dataclass(frozen=True)
class FinishedModel:
    """A model and what became of its blocks.

    Attributes:
        adapter: The model; what lies outside of its blocks is as it is to be exported.
        blocks: What a fit has made of its blocks.
        draft: Whether layers for speculative decoding, which are in the source's files alone, travel into exports.
    """

    adapter: Adapter
    blocks: QuantizedBlocks
    draft: Draft = "keep"

    @property
    def model(self) -> PreTrainedModel:
        """The dense model."""
        model = self.adapter.model
        assert isinstance(model, PreTrainedModel)
        return model

    @cached_property
    def origin(self) -> Origin:
        """The files that the model was opened from."""
        return find_origin(self.model, self.draft)

    @property
    def block_indices(self) -> range:
        """Of all blocks."""
        return range(len(self.adapter.blocks))

    def path(self, block: int) -> str:
        """Path of a block in the model."""
        return f"{self.adapter.block_prefix}.{block}"

    @contextmanager
    def finished(self, block: int) -> Iterator[None]:
        """Within, the model holds the dequantized weights and the changed parameters of a block."""
        with self.adapter.resident(block):
            self.adapter.residency.read_ahead(block + 1)
            self.blocks.commit(block)
            yield


class HeldBlocks:
    """Blocks of a model in memory that holds the dequantized weights already.

    Args:
        prefix: Path of the model's list of blocks.
        quantized: All codes by canonical name.

    Raises:
        ValueError: A name lies outside of the blocks.
    """

    def __init__(self, prefix: str, quantized: Mapping[str, QuantizedWeight]) -> None:
        self._prefix, self._quantized = prefix, quantized
        if outside := [name for name in quantized if not name.startswith(f"{prefix}.")]:
            raise ValueError(f"{outside[0]} lies outside of {prefix}; quantize linears and experts of blocks")

    def quantized(self, block: int) -> Mapping[str, QuantizedWeight]:
        """Codes of one block."""
        path = f"{self._prefix}.{block}."
        return {name: weight for name, weight in self._quantized.items() if name.startswith(path)}

    def commit(self, block: int) -> None:
        """Nothing to do."""


def held(model: PreTrainedModel, quantized: Mapping[str, QuantizedWeight] | None = None) -> FinishedModel:
    """A model in memory that holds the dequantized values of ``quantized``, by canonical name (None: of nothing).

    Raises:
        ValueError: The model is none that moeq quantizes, or a name lies outside of its blocks.
    """
    adapter = Adapter(model)
    return FinishedModel(adapter, HeldBlocks(adapter.block_prefix, quantized or {}))
