"""Sources that are quantized already: their weights as an ordinary checkpoint would have them.

What a source says of itself (``quantization_config`` of its configuration) chooses one reader; the tensors of each
quantized weight become one *dequantized* tensor under the key that the weight has elsewhere, computed when it is read.
The model is made without that description, so that nothing can quantize it again when it is saved.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from moeq.checkpoint.affine import Dequantized, Readable
from moeq.checkpoint.float_formats import FLOAT8, read_fp8, read_mxfp4
from moeq.checkpoint.integer_formats import read_awq, read_compressed_tensors, read_gptq, weight_schemes

PACKED_BY_MOEQ = "moeq"
Reader = Callable[[Mapping[str, Readable], Mapping[str, Any], torch.dtype], Iterator[tuple[str, Dequantized]]]
READERS: dict[str, Reader] = {
    "fp8": read_fp8,
    "mxfp4": read_mxfp4,
    "compressed-tensors": read_compressed_tensors,
    "gptq": read_gptq,
    "awq": read_awq,
}
COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")
# Of activations and caches, which are not quantized here.
UNUSED = frozenset(
    {
        "input_scale", "input_zero_point", "input_scale_inv", "output_scale", "output_zero_point", "activation_scale",
        "k_scale", "v_scale", "q_scale", "prob_scale",
    }
)  # fmt: skip
CONFIG_KEYS = ("quantization_config", "compression_config")
_READ = "fp8 (per block, row or matrix), mxfp4 (gpt-oss), compressed-tensors (int and float8), gptq and awq (gemm)"


def description_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the values of a ``config.json`` say of quantization, at the top or of the language model; None for nothing.

    A description without ``quant_method`` is one of compressed-tensors.
    """
    text = config.get("text_config")
    for values in (config, text if isinstance(text, Mapping) else {}):
        for key in CONFIG_KEYS:
            if isinstance(values.get(key), Mapping) and values[key]:
                return {"quant_method": "compressed-tensors"} | dict(values[key])
    return None


def quantized_by(description: Mapping[str, Any] | None) -> str | None:
    """Name of the method of a source that is dequantized when it is read; None for any other, moeq's own included.

    Raises:
        ValueError: The method, or its variant, is not read.
    """
    if description is None or description["quant_method"] == PACKED_BY_MOEQ:
        return None
    method = str(description["quant_method"])
    why = _not_read(method, description)
    if why is not None:
        raise ValueError(
            f"the source is quantized by {method}{why}, which moeq does not read (it reads {_READ}); give "
            "the original, or save it dequantized to bfloat16 first"
        )
    return method


def without_description(config: Any) -> Any:
    """A configuration of transformers, changed in place to one of a model that is not quantized."""
    for values in (config, getattr(config, "text_config", None)):
        for key in CONFIG_KEYS:
            if values is not None and hasattr(values, key):
                delattr(values, key)
    return config


def read_description(folder: Path) -> tuple[dict[str, Any] | None, torch.dtype]:
    """What the configuration of a folder says of quantization, and the dtype of its weights (bfloat16 unless stated).

    Raises:
        ValueError: ``config.json`` is damaged.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); export or copy it again") from error
    text = config.get("text_config")
    stated = [values.get(key) for values in (config, text or {}) for key in ("dtype", "torch_dtype")]
    name = next((str(value).removeprefix("torch.") for value in stated if value), "bfloat16")
    dtype = getattr(torch, name, None)
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2
    return description_of(config), dtype if floating else torch.bfloat16


def dequantized(
    stored: Mapping[str, Readable], description: Mapping[str, Any] | None, dtype: torch.dtype
) -> dict[str, Readable]:
    """Tensors of a source as a checkpoint that is not quantized has them, in the order of the source.

    Args:
        stored: Tensors of the files by key.
        description: ``description_of`` the source.
        dtype: Of the weights that are dequantized.

    Returns:
        The same where the source is not quantized, or by moeq.

    Raises:
        ValueError: The format is not read, parts of a weight are missing, or tensors of unknown use are left.
    """
    method = quantized_by(description)
    if method is None or description is None:
        return dict(stored)
    weights = dict(READERS[method](stored, description, dtype))
    parts = {part.name for weight in weights.values() for part in weight.parts}
    kept = {
        key: tensor
        for key, tensor in stored.items()
        if key not in parts and key not in weights and not _is_unused(key, stored, weights)
    }
    for key, tensor in kept.items():
        if tensor.dtype in FLOAT8 or key.rpartition(".")[2] in ("qweight", "qzeros", "weight_packed"):
            raise ValueError(
                f"{key} is quantized in a way that {method} does not describe; give the original, or save it "
                "dequantized to bfloat16 first"
            )
    return kept | weights


def _is_unused(key: str, stored: Mapping[str, Readable], weights: Mapping[str, Dequantized]) -> bool:
    """Whether a tensor belongs to activations or caches, or to a weight that is not quantized after all."""
    owner, _, leaf = key.rpartition(".")
    left = leaf in ("weight_scale", "weight_zero_point", "weight_scale_inv") and f"{owner}.weight" in stored
    return leaf in UNUSED or (left and f"{owner}.weight" not in weights)


def _not_read(method: str, description: Mapping[str, Any]) -> str | None:
    """What of a source is not read, for the message: nothing beyond the method's name may be an empty string."""
    if method not in READERS:
        return ""
    if method == "awq":
        version, bits = str(description.get("version", "gemm")).lower(), description.get("bits", 4)
        return None if (version, bits) == ("gemm", 4) else f" ({version}, {bits} bits)"
    if method == "gptq":
        layout = description.get("checkpoint_format") or "gptq"
        marlin = layout not in ("gptq", "gptq_v2") or description.get("is_marlin_format")
        return f" ({'marlin' if layout == 'gptq' else layout})" if marlin else None
    if method == "compressed-tensors":
        return _compressed_not_read(description)
    return None


def _compressed_not_read(description: Mapping[str, Any]) -> str | None:
    groups = (description.get("config_groups") or {}).values()
    formats = {description.get("format"), *(group.get("format") for group in groups)} - {None, "mixed-precision"}
    if other := sorted(formats - set(COMPRESSED_FORMATS)):
        return f" ({other[0]})"
    sparsity = (description.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        return f" ({sparsity})"
    if description.get("transform_config"):
        return " (with transforms)"
    strategies = {scheme.get("strategy") for scheme in weight_schemes(description)}
    known = {None, "tensor", "channel", "group", "block"}
    return f" ({min(map(str, strategies - known))})" if strategies - known else None
