"""A model larger than memory: its blocks come from the files of a folder one at a time, and leave again.

``open_stream`` builds the model without weights, loads what lies outside of its blocks, and gives a ``BlockStream``,
which loads a block where it is ``resident``.  Names and layouts of files are translated by transformers' own
conversions (experts apart in files are one parameter in the model), tensor by tensor: beside a block, at most the parts
of one of its parameters are in memory.  The numbers are those that ``from_pretrained`` loads.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictInfo

from moeq.checkpoint.loading import check_finite_weights, load_config
from moeq.checkpoint.release import map_large_tensors, trim_heap
from moeq.disk.folder import weight_files
from moeq.disk.tensor_file import StoredTensor, read_ahead, stored_tensors
from moeq.models.adapter import find_blocks
from moeq.models.residency import BlockChange
from moeq.models.storage import storage_dtype, widen


@dataclass(frozen=True)
class _Source:
    """Where one parameter of the model comes from: its files' tensors with the pattern that each matched."""

    converter: WeightConverter | None
    tensors: tuple[tuple[StoredTensor, str | None], ...]


class BlockStream:
    """Residency of a model whose blocks are read from files; see ``moeq.models.residency.Residency``.

    Args:
        model: On the meta device.
        sources: By name of the (first) parameter that is made of them.
    """

    def __init__(self, model: PreTrainedModel, sources: dict[str, _Source]) -> None:
        self._model, self._sources = model, sources
        self.prefix, self.blocks = find_blocks(model)
        self._device = torch.device("cpu")
        self._changes: list[BlockChange] = []
        self._depth = [0] * len(self.blocks)
        self._checked: set[int] = set()
        self._unloaded = [_tensors(block, "meta") for block in self.blocks]
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
        trim_heap()

    def values(self, block: int) -> Iterator[tuple[str, Tensor]]:
        """Tensors of a block as its files have them, by name, one parameter in memory at a time; none is kept."""
        yield from self._values(self._names(block))

    def _load(self, names: Sequence[str]) -> None:
        for name, value in self._values(names):
            _put(self._model, name, value)

    def _values(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Values of parameters and buffers by name, on the device and in the dtypes that the model declares."""
        info = LoadStateDictInfo(set(), set(), set(), {}, [], set())
        for name in names:
            for target, value in _converted(self._model, name, self._sources[name], info).items():
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
    config = load_config(str(folder))
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{folder} is quantized already, so its blocks cannot be streamed; set --model.placement memory"
        )
    stored = stored_in(folder)
    stored_dtype = dtype or config.dtype or next(t.dtype for t in stored.values() if t.dtype.is_floating_point)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=stored_dtype)
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
    _apply_dtype_plan(model, dtype)
    model.eval().requires_grad_(False)
    if wide:
        widen(model)
    _make_unsaved_buffers(model)
    stream = BlockStream(model, _find_sources(model, stored, mapping))
    stream.load_outside()
    return stream


def stored_in(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder by its key."""
    paths = weight_files(folder)
    if missing := [path for path in paths if not path.is_file()]:
        other = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".gguf"))
        remedy = f"it holds {other}; convert them to safetensors" if other else "download or copy the folder again"
        raise ValueError(f"{missing[0]} is missing, so blocks cannot be streamed; {remedy}")
    return {name: tensor for path in paths for name, tensor in stored_tensors(path).items()}


def _find_sources(model: PreTrainedModel, stored: Mapping[str, StoredTensor], mapping: list[Any]) -> dict[str, _Source]:
    """Which tensors of the files each parameter is made of, by transformers' conversions; unknown ones are left out."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, list[tuple[StoredTensor, str | None]]] = defaultdict(list)
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if name in known:
            found[name].append((stored[key], pattern))
    # What save_pretrained reverts: the conversions that these files needed.
    model._weight_conversions = [entry for entry in mapping if entry.was_used()]
    return {
        name: _Source(by_pattern[tensors[0][1]] if tensors[0][1] else None, tuple(tensors))
        for name, tensors in found.items()
    }


def _converted(
    model: PreTrainedModel, name: str, source: _Source, info: LoadStateDictInfo
) -> dict[str, Tensor | list[Tensor]]:
    """Parameters that are made of a source, by name."""
    if source.converter is None:
        # Of several keys that are one parameter (a tied head in the files) the last is taken, as in from_pretrained.
        return {name: _read(model, name, source.tensors[-1][0])}
    converter = copy.deepcopy(source.converter)
    for tensor, pattern in source.tensors:
        converter.add_tensor(name, tensor.name, pattern, partial(_read, model, name, tensor))
    values: dict[str, Tensor | list[Tensor]] = converter.convert(
        name, model=model, config=model.config, hf_quantizer=None, loading_info=info
    )
    return values


def _read(model: PreTrainedModel, name: str, tensor: StoredTensor) -> Tensor:
    """A tensor of a file in the storage dtype of its parameter."""
    value = tensor.read()
    return value.to(storage_dtype(model, name)) if value.is_floating_point() else value


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


def _tensors(module: nn.Module, device: str) -> list[tuple[nn.Module, str, bool, Any]]:
    """Owner, name and kind of each tensor of a module that files hold, with an empty one on a device."""
    found: list[tuple[nn.Module, str, bool, Any]] = []
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device=device)
                found.append((owner, leaf, False, nn.Parameter(empty, requires_grad=False)))
        for leaf, buffer in owner._buffers.items():
            if buffer is not None and leaf not in owner._non_persistent_buffers_set:
                found.append((owner, leaf, True, torch.empty_like(buffer, device=device)))
    return found


def _named(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _apply_dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Declare the dtypes of parameters that transformers keeps in float32."""
    kept = [*(model._keep_in_fp32_modules_strict or ())] if dtype != torch.float32 else []
    kept += [*(model._keep_in_fp32_modules or ())] if dtype == torch.float16 else []
    for name, tensor in _named(model):
        # Parts of a path, one or several, as transformers matches them.
        if tensor.is_floating_point() and any(f".{part}." in f".{name}." for part in kept):
            tensor.data = tensor.data.float()


def _make_unsaved_buffers(model: PreTrainedModel) -> None:
    """Compute what no file holds (rotary frequencies, slopes) on the CPU, as a model that is loaded whole does."""
    owners = {name.rpartition(".")[0] for name, buffer in model.named_non_persistent_buffers() if buffer.is_meta}
    for path in owners:
        module = model.get_submodule(path)
        for leaf in module._non_persistent_buffers_set:
            buffer = module._buffers[leaf]
            if buffer is not None and buffer.is_meta:
                module._buffers[leaf] = torch.empty_like(buffer, device="cpu")
        model._init_weights(module)


def _refuse_absent(model: nn.Module, blocks: nn.ModuleList) -> None:
    inside = {id(tensor) for _, tensor in _named(blocks)}
    absent = [name for name, tensor in _named(model) if tensor.is_meta and id(tensor) not in inside]
    if absent:
        raise ValueError(_absent_message(absent))


def _absent_message(names: Sequence[str]) -> str:
    return f"the checkpoint lacks {len(names)} tensors of the model, first {names[0]}; download or copy it again"
