"""A model larger than memory: its blocks come from the files of a folder one at a time, and leave again.

``open_stream`` builds the model without weights, loads what lies outside of its blocks, and gives a ``BlockStream``,
which loads a block where it is ``resident``.  Names and layouts of files are translated by transformers' own
conversions (experts apart in files are one parameter in the model), tensor by tensor: beside a block, at most the parts
of one of its parameters are in memory.  The numbers are those that ``from_pretrained`` loads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictInfo

from moeq.checkpoint.declared import declare_dtypes, make_unsaved_buffers
from moeq.checkpoint.loading import check_finite_weights, load_config
from moeq.checkpoint.model_class import model_class
from moeq.checkpoint.release import map_large_tensors, release_memory, trim_heap
from moeq.checkpoint.sources import Source, find_sources, made_of, stored_in
from moeq.disk.tensor_file import StoredTensor, read_ahead
from moeq.kernels.onednn import keep_fewer_kernels
from moeq.models.adapter import find_blocks
from moeq.models.residency import BlockChange
from moeq.models.storage import widen


class BlockStream:
    """Residency of a model whose blocks are read from files; see ``moeq.models.residency.Residency``.

    Args:
        model: On the meta device.
        sources: By name of the (first) parameter that is made of them.
    """

    def __init__(self, model: PreTrainedModel, sources: dict[str, Source]) -> None:
        self._model, self._sources = model, sources
        self.prefix, self.blocks = find_blocks(model)
        self._device = torch.device("cpu")
        self._changes: list[BlockChange] = []
        self._depth = [0] * len(self.blocks)
        self._checked: set[int] = set()
        self._unloaded = [_tensors(block) for block in self.blocks]
        self.num_loads = 0

    def place(self, device: torch.device | str) -> None:
        """Move what is always there, and the blocks that are resident; others come to this device."""
        self._device = torch.device(device)
        for _, tensor in _named(self._model):
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
            tensors = [tensor for name in self._names(block) for tensor, _ in self._sources[name].tensors]
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
        self._load([name for name in self._sources if not name.startswith(f"{self.prefix}.")])
        self._model.tie_weights()
        _refuse_absent(self._model, self.blocks)

    @property
    def stored(self) -> dict[str, tuple[StoredTensor, ...]]:
        """Tensors of the files by the (first) parameter that is made of them."""
        return {name: tuple(tensor for tensor, _ in source.tensors) for name, source in self._sources.items()}

    def block_bytes(self, block: int) -> int:
        """Bytes of a block's tensors in the files."""
        return sum(tensor.num_bytes for name in self._names(block) for tensor, _ in self._sources[name].tensors)

    def _names(self, block: int) -> list[str]:
        return [name for name in self._sources if name.startswith(f"{self.prefix}.{block}.")]

    def _load_block(self, block: int) -> None:
        self._load(self._names(block))
        absent = [name for name, tensor in _named(self.blocks[block]) if tensor.device.type == "meta"]
        if absent:
            raise ValueError(_absent_message([f"{self.prefix}.{block}.{name}" for name in absent]))
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

    def values(self, block: int) -> Iterator[tuple[str, Tensor]]:
        """Tensors of a block as its files have them, by name, one parameter in memory at a time; none is kept."""
        yield from self._values(self._names(block))

    def _load(self, names: Sequence[str]) -> None:
        for name, value in self._values(names):
            _put(self._model, name, value)

    def _values(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Values of parameters and buffers by name, on the device and in the dtypes that the model declares."""
        info = LoadStateDictInfo(
            missing_keys=set(),
            unexpected_keys=set(),
            mismatched_keys=set(),
            error_msgs=[],
            conversion_errors={},
            skipped_pp_keys=set(),
        )
        for name in names:
            for target, value in made_of(self._model, name, self._sources[name], info).items():
                tensor = value[0] if isinstance(value, list) else value
                yield target, _as_declared(self._model, target, tensor, self._device)
        if info.conversion_errors:
            name, error = next(iter(info.conversion_errors.items()))
            raise ValueError(f"{name} could not be made of the tensors of its files: {error}")


def open_stream(
    folder: Path, dtype: torch.dtype | None, compute: Callable[[torch.dtype], torch.dtype]
) -> tuple[PreTrainedModel, BlockStream]:
    """A model whose blocks are streamed from a folder of safetensors, in evaluation mode without gradients.

    Args:
        folder: Of a dense Hugging Face checkpoint.
        dtype: Storage dtype; None is that of the configuration, or else of the files.
        compute: Dtype of the parameters in memory, given the storage dtype.

    Raises:
        ValueError: Files are damaged or in another format, are quantized already, or lack tensors of the model.
    """
    map_large_tensors()
    keep_fewer_kernels()
    config = load_config(str(folder))
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{folder} is quantized already, so its blocks cannot be streamed; set --model.placement memory"
        )
    stored = stored_in(folder)
    stored_dtype = dtype or config.dtype or next(t.dtype for t in stored.values() if t.dtype.is_floating_point)
    with torch.device("meta"):
        model = model_class(config).from_config(config, dtype=stored_dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config._name_or_path = model.name_or_path = str(folder)
    mapping = get_model_conversion_mapping(model)
    return model, stream_into(model, stored_dtype, stored, mapping, wide=compute(stored_dtype) != stored_dtype)


def stream_into(
    model: PreTrainedModel, dtype: torch.dtype, stored: Mapping[str, StoredTensor], mapping: list[Any], *, wide: bool
) -> BlockStream:
    """Load what lies outside of the blocks of a model on the meta device; its blocks come from the stream.

    Args:
        model: In its storage dtype; it is in evaluation mode without gradients afterwards.
        dtype: Storage dtype.
        stored: Tensors of the files by key.
        mapping: Conversions from files to this model, in loading direction.
        wide: Hold it in float32.

    Raises:
        ValueError: The files lack tensors of the model, or a tensor has another shape.
    """
    declare_dtypes(model, dtype)
    model.eval().requires_grad_(False)
    if wide:
        widen(model)
    make_unsaved_buffers(model)
    stream = BlockStream(model, find_sources(model, stored, mapping))
    stream.load_outside()
    return stream


def _as_declared(model: nn.Module, name: str, value: Tensor, device: torch.device) -> Tensor:
    """The value of a parameter or buffer in the dtype that the model declares for it."""
    empty = model.get_parameter_or_buffer(name)  # type: ignore[operator]
    if value.shape != empty.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)} in the files, the model needs {tuple(empty.shape)}")
    return value.to(device, empty.dtype)


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter or buffer its value."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        owner._parameters[leaf] = parameter = nn.Parameter(value, requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]


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


def _named(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _refuse_absent(model: nn.Module, blocks: nn.ModuleList) -> None:
    inside = {id(tensor) for _, tensor in _named(blocks)}
    absent = [name for name, tensor in _named(model) if tensor.is_meta and id(tensor) not in inside]
    if absent:
        raise ValueError(_absent_message(absent))


def _absent_message(names: Sequence[str]) -> str:
    return f"the checkpoint lacks {len(names)} tensors of the model, first {names[0]}; download or copy it again"
