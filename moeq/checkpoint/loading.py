"""Loading a model, whole or with its blocks left in its files, with the errors a user can act on."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from moeq.checkpoint.configuration import load_config, load_tokenizer
from moeq.checkpoint.dequantized import read_description
from moeq.checkpoint.finite import check_finite_weights
from moeq.checkpoint.hub import weights_folder, why_not
from moeq.disk.tensor_file import stored_tensors
from moeq.kernels.compute_dtype import ComputeDType, compute_dtype
from moeq.models.adapter import find_blocks
from moeq.models.storage import storage_dtype, widen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moeq.checkpoint.stream import BlockStream

__all__ = [
    "DType", "align", "check_finite_weights", "load_config", "load_model", "load_tokenizer", "model_bytes",
    "stream_model", "working_bytes",
]  # fmt: skip

DType = Literal["auto", "float32", "bfloat16", "float16"]
_ALIGNMENT = 64  # bytes; what torch's own CPU allocator gives


def load_model(
    name: str,
    dtype: DType = "auto",
    compute: ComputeDType = "stored",
    device: torch.device | str = "cpu",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """A language model or its wrapper in evaluation mode without gradients, from a folder (or moeq export) or the hub.

    Args:
        name: Folder or hub id.
        dtype: Storage dtype: that of the weights, of scales, and of exports; auto is the one of the files.
        compute: Dtype of the parameters in memory, which hold the same values (``moeq.kernels.compute_dtype``).
        device: Where it is going to run; it is loaded on the CPU.
        revision: Branch, tag or commit at the hub.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ValueError: The name is unknown, a file is truncated or was changed, tensors are missing, a weight is not
            finite, or is quantized in a way that is not read.
    """
    from moeq.checkpoint.opening import open_whole
    from moeq.disk.folder import check_integrity

    if Path(name).is_dir():
        check_integrity(Path(name))
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    folder = weights_folder(name, revision)
    with _readable_errors(name):
        if getattr(config, "quantization_config", None) is not None:
            return _load_packed(folder, dtype, compute, device, trust_remote_code=trust_remote_code)
        model = open_whole(
            folder,
            _asked(dtype),
            lambda held: compute_dtype(compute, held, device),
            trust_remote_code=trust_remote_code,
        )
    align(model)
    return model


def _load_packed(
    folder: Path, dtype: DType, compute: ComputeDType, device: torch.device | str, *, trust_remote_code: bool
) -> "PreTrainedModel":
    """A packed export of moeq, as a user opens it."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    import moeq.checkpoint.quantizer  # noqa: F401  registers the packed format with transformers
    from moeq.checkpoint.complete import missing_message
    from moeq.checkpoint.declared import restore_float32
    from moeq.checkpoint.load_report import without_unexpected_keys
    from moeq.checkpoint.model_class import model_class
    from moeq.checkpoint.names import packed_conversions

    opened_by = model_class(load_config(str(folder), trust_remote_code=trust_remote_code))
    with without_unexpected_keys():  # what an export carries, compared with its source when it was written
        model, found = opened_by.from_pretrained(
            folder, dtype=_asked(dtype) or "auto", output_loading_info=True, trust_remote_code=trust_remote_code
        )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(missing_message(missing))
    if dtype == "auto":
        leaves = model.config.quantization_config.expert_leaves
        restore_float32(model, folder, packed_conversions(get_model_conversion_mapping(model), leaves))
    check_finite_weights(model)
    if compute_dtype(compute, storage_dtype(model), device) != storage_dtype(model):
        widen(model)
    align(model)
    return model.eval().requires_grad_(False)


def stream_model(
    name: str,
    dtype: DType = "auto",
    compute: ComputeDType = "stored",
    device: torch.device | str = "cpu",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> "tuple[PreTrainedModel, BlockStream]":
    """The same model with its blocks left in its files; arguments are those of ``load_model``.

    Raises:
        ValueError: See ``load_model``, and ``moeq.checkpoint.stream.open_stream``.
    """
    from moeq.checkpoint.stream import open_stream

    with _readable_errors(name):
        return open_stream(
            weights_folder(name, revision),
            _asked(dtype),
            lambda held: compute_dtype(compute, held, device),
            trust_remote_code=trust_remote_code,
        )


def _asked(dtype: DType) -> torch.dtype | None:
    chosen: torch.dtype | None = None if dtype == "auto" else getattr(torch, dtype)
    return chosen


@contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(why_not("model", name, error)) from error
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"transformers has no language model for {name}; docs/families.md lists the families that work"
        ) from error


def align(model: nn.Module) -> None:
    """Move parameters to aligned memory.

    ``from_pretrained`` maps files into memory, where tensors start at any multiple of 8 bytes, and matrix products in
    float32 on a CPU may sum in another order for such operands: equal weights would give unequal results.  Those that
    are aligned by chance move, too: as long as one is left in a file, all of it that was read stays resident.
    """
    for parameter in model.parameters():
        mapped = parameter.untyped_storage().nbytes() > parameter.nbytes
        if parameter.device.type == "cpu" and (mapped or parameter.data_ptr() % _ALIGNMENT):
            parameter.data = parameter.data.clone()


def model_bytes(
    name: str,
    dtype: DType = "auto",
    compute: ComputeDType = "stored",
    device: torch.device | str = "cpu",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Bytes of a model in memory: of the files of a folder (packed weights stay packed), else of its parameters."""
    folder = Path(name)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    as_it_is = dtype == "auto" and read_description(folder)[0] is None
    if files and (as_it_is or (folder / "moeq_manifest.json").is_file()):
        return sum(_file_bytes(path, compute, device) for path in files)
    model = _without_weights(name, dtype, revision, trust_remote_code=trust_remote_code)
    tensors = (*model.parameters(), *model.buffers())
    return sum(
        t.numel() * (compute_dtype(compute, t.dtype, device) if t.is_floating_point() else t.dtype).itemsize
        for t in tensors
    )


def working_bytes(
    name: str, dtype: DType = "auto", *, revision: str | None = None, trust_remote_code: bool = False
) -> int:
    """What a fit has beside the model at the least: its largest block in float32, and a workspace of that size.

    Hessians and waiting states take what is left.
    """
    _, blocks = find_blocks(_without_weights(name, dtype, revision, trust_remote_code=trust_remote_code))
    return max(2 * torch.float32.itemsize * sum(p.numel() for p in block.parameters()) for block in blocks)


def _without_weights(name: str, dtype: DType, revision: str | None, *, trust_remote_code: bool) -> "PreTrainedModel":
    from moeq.checkpoint.model_class import model_class

    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    with _readable_errors(name), torch.device("meta"):
        return model_class(config).from_config(
            config, dtype=_asked(dtype) or config.dtype, trust_remote_code=trust_remote_code
        )


def _file_bytes(path: Path, compute: ComputeDType, device: torch.device | str) -> int:
    """Bytes in memory of the tensors of a file; scales are never widened."""
    total = path.stat().st_size
    for name, tensor in stored_tensors(path).items():
        if tensor.dtype in (torch.bfloat16, torch.float16) and not name.endswith(("weight_scale", "weight_min")):
            extra = compute_dtype(compute, tensor.dtype, device).itemsize - tensor.dtype.itemsize
            total += extra * math.prod(tensor.shape)
    return total
