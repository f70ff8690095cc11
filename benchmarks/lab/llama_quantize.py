"""llama.cpp's own quantization: its code for the blocks, called in the wheel of xllamacpp, and its choice of types.

The wheel has no ``llama_model_quantize``.  What that function does is here: the type of each tensor (its source,
src/llama-quant.cpp, for a model of experts whose key heads serve fewer than four query heads), and one call of
``ggml_quantize_chunk`` for each expert with the importances of that expert, as ``llama-quantize`` makes them.
"""

import ctypes
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from moeq.disk.atomic import whole_file
from moeq.models.adapter import Adapter, Site
from moeq.models.observe import observe

Rule = str | Callable[[int, int], str]  # a type, or one by block and number of blocks


def _more_bits(more: str, usual: str) -> Rule:
    """``more`` in the first and last eighth of the blocks and in every third between."""

    def rule(block: int, num_blocks: int) -> str:
        first, last = num_blocks // 8, 7 * num_blocks // 8
        return more if block < first or block >= last or (block - first) % 3 == 2 else usual

    return rule


# By file type: the type of most tensors, and of roles that differ.
MIXTURES: dict[str, dict[str, Rule]] = {
    "Q2_K": {"rest": "Q2_K", "value": "Q3_K", "down": "Q3_K", "output": "Q3_K"},
    "Q3_K_S": {"rest": "Q3_K"},
    "Q3_K_M": {
        "rest": "Q3_K", "value": lambda block, _: "Q5_K" if block < 2 else "Q4_K", "output": "Q4_K",
        "down": lambda block, num_blocks: "Q5_K" if block < num_blocks // 16 else "Q4_K",
    },
    "Q4_K_S": {
        "rest": "Q4_K", "value": lambda block, _: "Q5_K" if block < 4 else "Q4_K",
        "down": lambda block, num_blocks: "Q5_K" if block < num_blocks // 8 else "Q4_K",
    },
    "Q4_K_M": {"rest": "Q4_K", "value": _more_bits("Q6_K", "Q4_K"), "down": _more_bits("Q6_K", "Q4_K")},
    "Q6_K": {"rest": "Q6_K"}, "Q4_0": {"rest": "Q4_0"}, "Q5_0": {"rest": "Q5_0"}, "Q8_0": {"rest": "Q8_0"},
    "IQ2_XS": {"rest": "IQ2_XS", "value": "Q4_K"},
    "IQ3_XXS": {"rest": "IQ3_XXS", "query": "IQ2_S", "key": "IQ2_S", "output": "IQ3_S"},
    "IQ4_XS": {"rest": "IQ4_XS"},
}  # fmt: skip
ROLES = {"attn_v.": "value", "attn_k.": "key", "attn_q.": "query", "attn_output.": "output", "ffn_down": "down"}
# Where a row is no multiple of 256.
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"} | dict.fromkeys(
    ("IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"
)


def _of_eight(mixture: str) -> dict[str, Rule]:
    """What differs in a model of just eight experts, which llama.cpp takes for Mixtral-8x7B."""
    more = "Q4_K" if mixture.startswith("IQ2") else "Q8_0"
    rules: dict[str, Rule] = {"key": more, "value": more}
    return rules if mixture in ("Q4_0", "Q5_0", "Q6_K", "Q8_0") else {**rules, "output": "Q5_K"}


def type_of(name: str, in_features: int, mixture: str, num_blocks: int, num_experts: int) -> str:
    """Type that llama.cpp gives a tensor of a block that is quantized.

    Args:
        name: In the file, such as "blk.0.attn_v.weight".
        in_features: Of a row.
        mixture: File type, of ``MIXTURES``.
        num_blocks: Of the model.
        num_experts: Of a block.
    """
    rules = MIXTURES[mixture] | (_of_eight(mixture) if num_experts == 8 else {})
    role = next((role for part, role in ROLES.items() if part in name), "rest")
    rule = rules.get(role, rules["rest"])
    chosen = rule if isinstance(rule, str) else rule(int(name.split(".")[1]), num_blocks)
    return FALLBACKS[chosen] if chosen in FALLBACKS and in_features % 256 else chosen


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is: a weight of a block of two or more dimensions that is no router; not embedding and head."""
    return name.startswith("blk.") and name.endswith(".weight") and len(shape) > 1 and "ffn_gate_inp" not in name


@torch.no_grad()
def importances(model: Any, ids_NL: Tensor) -> dict[str, Tensor]:
    """Mean of squared inputs of every quantizable weight, [I], by canonical name: what llama-imatrix gathers.

    Ones for an expert that no token reaches.
    """
    adapter = Adapter(model)
    sums: dict[tuple[Site, int], Tensor] = {}
    counts: dict[tuple[Site, int], int] = {}

    def on_rows(site: Site, expert: int, x_TI: Tensor, _: Tensor | None) -> None:
        key = site, expert
        sums[key] = sums.get(key, 0) + x_TI.float().square().sum(0).double()
        counts[key] = counts.get(key, 0) + len(x_TI)

    sites = adapter.all_sites()
    # Routed inputs of gate and up come from a hook, those of down from an implementation of its own.
    for stage in dict.fromkeys(site.stage for site in sites):
        with observe(adapter, tuple(site for site in sites if site.stage == stage), on_rows):
            for ids_BL in ids_NL.split(8):
                model(input_ids=ids_BL, use_cache=False)
    found = {}
    for site in sites:
        for expert in range(max(site.num_experts, 1)):
            count = counts.get((site, expert), 0)
            mean = sums[site, expert] / count if count else torch.ones(site.in_features)
            found |= {site.weight_name(expert, leaf): mean.float() for leaf in site.leaves}
    return found


def quantize_file(source: Path, target: Path, mixture: str, importance: Mapping[str, Tensor] | None = None) -> None:
    """Write a file with its blocks quantized as llama.cpp does; embedding, head, routers and norms stay as they are.

    Args:
        source: File with float weights.
        target: File to write.
        mixture: File type, of ``MIXTURES``.
        importance: Of each tensor of the file, [E, I] or [1, I]; None is without.
    """
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    num_blocks, num_experts = (
        int(reader.fields[f"{architecture}.{key}"].contents()) for key in ("block_count", "expert_count")
    )
    with whole_file(target) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        for name, field in reader.fields.items():
            if not name.startswith("GGUF.") and name != "general.architecture":
                inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), field.types[0], inner)
        for tensor in reader.tensors:
            shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
            if is_quantized(tensor.name, shape):
                kind = gguf.GGMLQuantizationType[type_of(tensor.name, shape[-1], mixture, num_blocks, num_experts)]
                values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
                weights = None if importance is None else importance[tensor.name]
                writer.add_tensor(tensor.name, quantize(values, kind, weights), raw_dtype=kind)
            else:
                writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def quantize(values: Any, kind: gguf.GGMLQuantizationType, importance_EI: Tensor | None = None) -> Any:
    """Bytes of a tensor, uint8 [..., bytes of a row], of float32 values [O, I] or [E, O, I]."""
    library, values = _library(), np.ascontiguousarray(values, dtype=np.float32)
    row_bytes = library.ggml_row_size(int(kind), values.shape[-1])
    made = np.zeros((*values.shape[:-1], row_bytes), dtype=np.uint8)
    for index, (part, bytes_of_part) in enumerate(_experts(values, made)):
        weights = None if importance_EI is None else np.ascontiguousarray(importance_EI[index].numpy())
        written = library.ggml_quantize_chunk(
            int(kind), part.ctypes.data, bytes_of_part.ctypes.data, 0, part.shape[0], part.shape[1],
            None if weights is None else weights.ctypes.data,
        )  # fmt: skip
        assert written == bytes_of_part.nbytes
    return made


def _experts(values: Any, made: Any) -> Iterator[tuple[Any, Any]]:
    yield from zip(values, made, strict=True) if values.ndim == 3 else [(values, made)]


@cache
def _library() -> Any:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise ValueError("llama.cpp is not installed; pip install xllamacpp")
    library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("*.so"))), mode=ctypes.RTLD_GLOBAL)
    library.ggml_row_size.argtypes, library.ggml_row_size.restype = [ctypes.c_int, ctypes.c_int64], ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library
