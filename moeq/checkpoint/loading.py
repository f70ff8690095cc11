"""Loading a model and its tokenizer, with the errors a user can act on."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from moeq.disk.tensor_file import stored_tensors
from moeq.kernels.compute_dtype import ComputeDType, compute_dtype
from moeq.models.adapter import find_blocks
from moeq.models.storage import storage_dtype, widen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moeq.checkpoint.stream import BlockStream

DType = Literal["auto", "float32", "bfloat16", "float16"]
_ALIGNMENT = 64  # bytes; what torch's own CPU allocator gives


def load_model(
    name: str, dtype: DType = "auto", compute: ComputeDType = "stored", device: torch.device | str = "cpu"
) -> "PreTrainedModel":
    """A language model or its wrapper in evaluation mode without gradients, from a folder (or moeq export) or the hub.

    Args:
        name: Folder or hub id.
        dtype: Storage dtype: that of the weights, of scales, and of exports; auto is the one of the files.
        compute: Dtype of the parameters in memory, which hold the same values (``moeq.kernels.compute_dtype``).
        device: Where it is going to run; it is loaded on the CPU.

    Raises:
        ValueError: The name is unknown, a file is truncated or was changed, or a weight is not finite.
    """
    import moeq.checkpoint.quantizer  # noqa: F401  registers the packed format with transformers
    from moeq.checkpoint.model_class import model_class
    from moeq.disk.folder import check_integrity

    if Path(name).is_dir():
        check_integrity(Path(name))
    chosen: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    with _readable_errors(name):
        model = model_class(load_config(name)).from_pretrained(name, dtype=chosen)
    check_finite_weights(model)
    if compute_dtype(compute, storage_dtype(model), device) != storage_dtype(model):
        widen(model)
    align(model)
    model.eval().requires_grad_(False)
    return model


def stream_model(
    name: str, dtype: DType = "auto", compute: ComputeDType = "stored", device: torch.device | str = "cpu"
) -> "tuple[PreTrainedModel, BlockStream]":
    """The same model with its blocks left in its files; arguments are those of ``load_model``.

    Raises:
        ValueError: See ``load_model``, and ``moeq.checkpoint.stream.open_stream``.
    """
    from moeq.checkpoint.placement import weights_folder
    from moeq.checkpoint.stream import open_stream

    chosen = None if dtype == "auto" else getattr(torch, dtype)
    with _readable_errors(name):
        return open_stream(weights_folder(name), chosen, lambda stored: compute_dtype(compute, stored, device))


@contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(_not_found("model", name)) from error
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


def load_config(name: str) -> Any:
    """The configuration of a model; raises ValueError where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(_not_found("model", name)) from error


def model_bytes(
    name: str, dtype: DType = "auto", compute: ComputeDType = "stored", device: torch.device | str = "cpu"
) -> int:
    """Bytes of a model in memory: of the files of a folder (packed weights stay packed), else of its parameters."""
    files = sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
    if files and (dtype == "auto" or (Path(name) / "moeq_manifest.json").is_file()):
        return sum(_file_bytes(path, compute, device) for path in files)
    model = _without_weights(name, dtype)
    tensors = (*model.parameters(), *model.buffers())
    return sum(
        t.numel() * (compute_dtype(compute, t.dtype, device) if t.is_floating_point() else t.dtype).itemsize
        for t in tensors
    )


def working_bytes(name: str, dtype: DType = "auto") -> int:
    """What a fit has beside the model at the least: its largest block in float32, and a workspace of that size.

    Hessians and waiting states take what is left.
    """
    _, blocks = find_blocks(_without_weights(name, dtype))
    return max(2 * torch.float32.itemsize * sum(p.numel() for p in block.parameters()) for block in blocks)


def _without_weights(name: str, dtype: DType) -> "PreTrainedModel":
    from moeq.checkpoint.model_class import model_class

    config = load_config(name)
    with _readable_errors(name), torch.device("meta"):
        return model_class(config).from_config(config, dtype=config.dtype if dtype == "auto" else getattr(torch, dtype))


def _file_bytes(path: Path, compute: ComputeDType, device: torch.device | str) -> int:
    """Bytes in memory of the tensors of a file; scales are never widened."""
    total = path.stat().st_size
    for name, tensor in stored_tensors(path).items():
        if tensor.dtype in (torch.bfloat16, torch.float16) and not name.endswith("weight_scale"):
            extra = compute_dtype(compute, tensor.dtype, device).itemsize - tensor.dtype.itemsize
            total += extra * math.prod(tensor.shape)
    return total


def load_tokenizer(name: str) -> Any:
    """The tokenizer that belongs to a model; raises ValueError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(_not_found("tokenizer", name)) from error


def check_finite_weights(module: nn.Module, prefix: str = "") -> None:
    """Raise ValueError naming the first floating-point parameter that holds a NaN or an infinity.

    Args:
        module: The model, or a part of it.
        prefix: Path of the part, with a dot at its end.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.numel() and not _is_finite(parameter):
            count = int((~torch.isfinite(parameter)).sum())
            raise ValueError(
                f"{prefix}{name} has {count} of {parameter.numel()} values that are NaN or infinite; "
                "the checkpoint is damaged, download it again"
            )


def _is_finite(tensor: Tensor) -> bool:
    """Without a temporary of its size: extremes are NaN where any value is."""
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor.detach()))


def _not_found(what: str, name: str) -> str:
    folder = Path(name)
    if folder.is_dir():
        present = sorted(path.name for path in folder.iterdir())[:8]
        return f"no {what} could be read from the folder {name} (it holds {present}); give a Hugging Face model folder"
    return (
        f"no {what} found at {name!r}: it is not a folder here and the hub does not know or cannot be reached for it; "
        "check --model.name"
    )
