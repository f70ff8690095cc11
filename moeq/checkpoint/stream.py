"""A model larger than memory: its blocks come from the files of a folder one at a time, and leave again.

``open_stream`` builds the model without weights, loads what lies outside of its blocks, and gives a ``BlockStream``,
which loads a block where it is ``resident``.  Names and layouts of files are translated by transformers' own
conversions (experts apart in files are one parameter in the model), tensor by tensor: beside a block, at most the parts
of one of its parameters are in memory.  The numbers are those that ``from_pretrained`` loads.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeq.checkpoint.affine import Part, Readable
from moeq.checkpoint.complete import missing_message
from moeq.checkpoint.finite import check_finite_tensors, check_finite_weights
from moeq.checkpoint.opening import open_sources, prepare
from moeq.checkpoint.release import map_large_tensors, release_memory, trim_heap
from moeq.checkpoint.sources import Source
from moeq.checkpoint.values import FileValues, named_tensors
from moeq.disk.tensor_file import StoredTensor, read_ahead
from moeq.kernels.onednn import keep_fewer_kernels
from moeq.models.adapter import find_blocks
from moeq.models.residency import BlockChange


class BlockStream(FileValues):
    """Residency of a model whose blocks are read from files; see ``moeq.models.residency.Residency``.

    Args:
        model: On the meta device.
        sources: By name of the (first) parameter that is made of them.
    """

    def __init__(self, model: PreTrainedModel, sources: Mapping[str, Source]) -> None:
        super().__init__(model, sources)
        self.prefix, self.blocks = find_blocks(model)
        self._changes: list[BlockChange] = []
        self._depth = [0] * len(self.blocks)
        self._checked: set[int] = set()
        self._unloaded = [_tensors(block) for block in self.blocks]
        self.num_loads = 0

    def place(self, device: torch.device | str) -> None:
        """Move what is always there, and the blocks that are resident; others come to this device.

        From here on the process is one whose blocks come and go; before, a stream is only asked for sizes.
        """
        map_large_tensors()
        keep_fewer_kernels()
        self._device = torch.device(device)
        for _, tensor in named_tensors(self._model):
            if not tensor.is_meta:
                tensor.data = tensor.data.to(self._device)

    @contextmanager
    def resident(self, block: int) -> Iterator[None]:
        """Load a block, changed as ``change_blocks`` has it, and drop it in the end, unless it was there before."""
        self._depth[block] += 1
        try:
            if self._depth[block] == 1:
                self._load_block(block)
            yield
        finally:
            self._depth[block] -= 1
            if not self._depth[block]:
                self._unload_block(block)

    def read_ahead(self, block: int) -> None:
        """Let the system read a block's files into its cache, which is memory that it takes back where it needs it."""
        if block < len(self.blocks) and not self._depth[block]:
            tensors = [part for part in self._parts(block) if isinstance(part, StoredTensor)]
            # The system may make the caller wait while its queue is full.
            Thread(target=read_ahead, args=(tensors,), daemon=True).start()

    def change_blocks(self, change: BlockChange) -> None:
        """Change the blocks that are resident now, others when they come."""
        self._changes.append(change)
        for block, depth in enumerate(self._depth):
            if depth:
                change(block)

    def load_outside(self) -> None:
        """Load everything that belongs to no block."""
        self.load([name for name in self._sources if not name.startswith(f"{self.prefix}.")])
        self.tie()
        inside = {id(tensor) for _, tensor in named_tensors(self.blocks)}
        outside = [(name, tensor) for name, tensor in named_tensors(self._model) if id(tensor) not in inside]
        if absent := [name for name, tensor in outside if tensor.is_meta]:
            raise ValueError(missing_message(absent))
        check_finite_tensors(outside)

    def block_bytes(self, block: int) -> int:
        """Bytes of a block's tensors in the files."""
        return sum(part.num_bytes for part in self._parts(block))

    def _parts(self, block: int) -> list[Part]:
        return [
            part for name in self._names(block) for tensor, _ in self._sources[name].tensors for part in tensor.parts
        ]

    def _names(self, block: int) -> list[str]:
        return [name for name in self._sources if name.startswith(f"{self.prefix}.{block}.")]

    def _load_block(self, block: int) -> None:
        self.load(self._names(block))
        if absent := [name for name, tensor in named_tensors(self.blocks[block]) if tensor.is_meta]:
            raise ValueError(missing_message([f"{self.prefix}.{block}.{name}" for name in absent]))
        if block not in self._checked:
            check_finite_weights(self.blocks[block], f"{self.prefix}.{block}.")
            self._checked.add(block)
        trim_heap()  # of the parts that parameters were made of
        self.num_loads += 1
        for change in self._changes:
            change(block)

    def _unload_block(self, block: int) -> None:
        for owner, leaf, is_buffer, empty in self._unloaded[block]:
            (owner._buffers if is_buffer else owner._parameters)[leaf] = empty
        release_memory(self._device)  # cycles keep some of what a block's passes made

    def block_values(self, block: int) -> Iterator[tuple[str, Tensor]]:
        """Tensors of a block as its files have them, by name, one parameter in memory at a time; none is kept."""
        yield from self.values(self._names(block))


def open_stream(
    folder: Path,
    dtype: torch.dtype | None,
    compute: Callable[[torch.dtype], torch.dtype],
    *,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, BlockStream]:
    """A model whose blocks are streamed from a folder, in evaluation mode without gradients.

    Args:
        folder: Of a Hugging Face checkpoint, dense or of a format that is dequantized.
        dtype: Storage dtype; None is that of the configuration, or else of the files.
        compute: Dtype of the parameters in memory, given the storage dtype.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ValueError: Files are damaged or in another format, are packed by moeq, or lack tensors of the model.
    """
    model, sources = open_sources(folder, dtype, compute, trust_remote_code=trust_remote_code)
    stream = BlockStream(model, sources)
    stream.load_outside()
    return model, stream


def stream_into(
    model: PreTrainedModel, dtype: torch.dtype, stored: Mapping[str, Readable], mapping: list[Any], *, wide: bool
) -> BlockStream:
    """Load what lies outside of the blocks of a model on the meta device; its blocks come from the stream.

    Args: See ``prepare``.

    Raises:
        ValueError: The files lack tensors of the model, or a tensor has another shape.
    """
    stream = BlockStream(model, prepare(model, dtype, stored, mapping, wide=wide))
    stream.load_outside()
    return stream


def _tensors(module: nn.Module) -> list[tuple[nn.Module, str, bool, Any]]:
    """Owner, name and kind of each tensor of a module that files hold, with one without values."""
    found: list[tuple[nn.Module, str, bool, Any]] = []
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta")
                found.append((owner, leaf, False, nn.Parameter(empty, requires_grad=False)))
        for leaf, buffer in owner._buffers.items():
            if buffer is not None and leaf not in owner._non_persistent_buffers_set:
                found.append((owner, leaf, True, torch.empty_like(buffer, device="meta")))
    return found
