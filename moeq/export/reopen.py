"""An export as it is read back for verification: as a user opens it where it is small, else block by block.

Tensors of files become parameters by transformers' conversions in loading direction, the ones that ``from_pretrained``
uses.  A large file is not mapped into memory, as the safetensors library would have it: a limit on addresses
(``ulimit -v``) that a run kept to for hours would end it here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from moeq.checkpoint.affine import Readable
from moeq.checkpoint.declared import restore_float32
from moeq.checkpoint.load_report import without_unexpected_keys
from moeq.checkpoint.loading import align
from moeq.checkpoint.model_class import model_class, runs_code
from moeq.checkpoint.sources import stored_in
from moeq.checkpoint.stream import BlockStream, stream_into
from moeq.disk.folder import weight_files
from moeq.export.carried import unused_tensors
from moeq.export.contents import conversions, empty_model
from moeq.models.adapter import find_blocks
from moeq.models.residency import InMemory
from moeq.models.storage import file_dtype, is_widened, widen

# Exports up to this size are opened whole, as a user does.
WHOLE_BYTES = 10**9


@dataclass(frozen=True)
class Reopened:
    """A model that was read back.

    Attributes:
        model: In evaluation mode, in the dtype that the evaluated model computes in.
        resident: Within, the weights of a block are there; see ``moeq.models.residency``.
        values: Tensors of a block by name, which need not be resident.
        unexpected: Keys of the files that are no tensors of the model, and those of another dtype than the model's.
            What an export carries of its source is among the former.
    """

    model: PreTrainedModel
    resident: Callable[[int], AbstractContextManager[None]]
    values: Callable[[int], Iterable[tuple[str, Tensor]]]
    unexpected: list[str]


def reopen(directory: Path | str, model: PreTrainedModel) -> Reopened:
    """Read an export back.

    Args:
        directory: Its folder.
        model: The evaluated model; code that came with it is run from the export's own copy.

    Raises:
        ValueError: The files lack tensors of their model.
    """
    if sum(path.stat().st_size for path in weight_files(directory)) <= WHOLE_BYTES:
        return _whole(directory, model)
    return _streamed(Path(directory), model)


def _whole(directory: Path | str, model: PreTrainedModel) -> Reopened:
    attention = model.config._attn_implementation
    code = runs_code(model)
    opener = model_class(AutoConfig.from_pretrained(directory, trust_remote_code=code))
    with without_unexpected_keys():  # whoever verifies compares them with what was carried
        reloaded = opener.from_pretrained(directory, attn_implementation=attention, trust_remote_code=code)
    mapping = conversions(reloaded)
    unused = unused_tensors(reloaded, stored_in(Path(directory)), mapping)
    restore_float32(reloaded, Path(directory), mapping)
    if is_widened(model):
        widen(reloaded)
    reloaded = reloaded.to(model.device).eval()
    align(reloaded)
    prefix, blocks = find_blocks(reloaded)
    resident = InMemory(reloaded, len(blocks)).resident

    def values(block: int) -> Iterable[tuple[str, Tensor]]:
        return blocks[block].state_dict(prefix=f"{prefix}.{block}.").items()

    return Reopened(reloaded, resident, values, sorted({**unused.draft, **unused.others, **unused.reasons}))


def _streamed(folder: Path, model: PreTrainedModel) -> Reopened:
    skeleton, mapping = empty_model(folder, trust_remote_code=runs_code(model))
    skeleton.set_attn_implementation(model.config._attn_implementation)
    stored = stored_in(folder)
    stream = stream_into(skeleton, skeleton.dtype, stored, mapping, wide=is_widened(model))
    align(skeleton)
    stream.place(model.device)

    @contextmanager
    def resident(block: int) -> Iterator[None]:
        with stream.resident(block):
            align(stream.blocks[block])
            yield

    return Reopened(skeleton, resident, stream.block_values, _unexpected(skeleton, stream, stored))


def _unexpected(model: PreTrainedModel, stream: BlockStream, stored: Mapping[str, Readable]) -> list[str]:
    used = {tensor.name for tensors in stream.stored.values() for tensor in tensors}
    return sorted(stored.keys() - used) + [
        tensor.name
        for name, tensors in stream.stored.items()
        for tensor in tensors
        if tensor.dtype.is_floating_point and tensor.dtype != file_dtype(model, name)
    ]
