"""Tiny checkpoints of the formats that sources are quantized in, each beside its values as an ordinary checkpoint.

``save_quantized("gptq", folder)`` writes ``folder/quantized`` and ``folder/plain``: the values of the second are
computed from what the first stores, number by number, by the definition of the format.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import save_tiny

Tensors = dict[str, Tensor]
# What is stored for one weight by the ending of its key, and the weight that it stands for.
Quantized = tuple[Tensors, Tensor]
GROUP, BLOCK = 16, 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def linears(tensors: Tensors) -> list[str]:
    """Keys of what these formats quantize: matrices of linears, without routers."""
    kept = ("embed_tokens", "lm_head", "norm", "mlp.gate.")
    return [k for k, w in tensors.items() if w.ndim == 2 and k.endswith(".weight") and not any(n in k for n in kept)]


def save_quantized(kind: str, folder: Path) -> tuple[Path, Path]:
    """Write a checkpoint of a kind of ``KINDS``, and the plain one; returns both folders."""
    family, description, quantize = KINDS[kind]
    sizes = {"vocab_size": 288} if family == "deepseek_v3" else {}
    plain = save_tiny(family, folder / "plain", **sizes)
    quantized = folder / "quantized"
    shutil.copytree(plain, quantized)
    tensors = load_file(plain / "model.safetensors")
    stored, values = dict(tensors), dict(tensors)
    generator = torch.Generator().manual_seed(5)
    if kind == "mxfp4":
        for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            parts, values[key] = mxfp4(tensors[key], generator)
            del stored[key]
            stored |= {f"{key}{ending}": tensor for ending, tensor in parts.items()}
    else:
        for key in linears(tensors):
            parts, values[key] = quantize(tensors[key].float(), generator)
            del stored[key]
            stored |= {key.removesuffix("weight") + leaf: tensor for leaf, tensor in parts.items()}
    save_file(stored, quantized / "model.safetensors", metadata={"format": "pt"})
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    edit_config(quantized, quantization_config=description)
    return quantized, plain


def make_fp8(folder: Path) -> None:
    """Store the linears of a checkpoint as float8 in blocks, as DeepSeek does; towers beside the text stay."""
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(5)
    for key in [key for key in linears(tensors) if not any(part in key for part in ("visual", "vision", "conv1d"))]:
        parts, _ = fp8_blocks(tensors.pop(key).float(), generator)
        tensors |= {key.removesuffix("weight") + leaf: tensor for leaf, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization_config=KINDS["fp8_blocks"][1])


def edit_config(folder: Path, **values: Any) -> None:
    """Change values of a folder's configuration."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def reference(code: Callable[[int, int], float], scale: Callable[[int, int], float], shape: tuple[int, int]) -> Tensor:
    """A weight, number by number: in float32, then rounded to bfloat16."""
    rows = [[code(o, i) * scale(o, i) for i in range(shape[1])] for o in range(shape[0])]
    return torch.tensor(rows, dtype=torch.float32).bfloat16()


def fp8_blocks(weight: Tensor, generator: torch.Generator) -> Quantized:
    """DeepSeek: float8 in square blocks, the last of which may be cut."""
    rows, columns = weight.shape
    scale = torch.rand(-(-rows // BLOCK), -(-columns // BLOCK), generator=generator) * 1e-3 + 1e-3
    spread = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    values = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    v, s = values.float().tolist(), scale.tolist()
    plain = reference(lambda o, i: v[o][i], lambda o, i: s[o // BLOCK][i // BLOCK], (rows, columns))
    return {"weight": values, "weight_scale_inv": scale}, plain


def fp8_rows(weight: Tensor, generator: torch.Generator) -> Quantized:
    """compressed-tensors: float8 with a bfloat16 scale per row."""
    del generator
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    values = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    v, s = values.float().tolist(), scale.float().tolist()
    return {"weight": values, "weight_scale": scale}, reference(
        lambda o, i: v[o][i], lambda o, i: s[o][0], weight.shape
    )


def fp8_matrix(weight: Tensor, generator: torch.Generator) -> Quantized:
    """float8 with one scale, and one of activations that is not a weight."""
    del generator
    scale = (weight.abs().amax() / 448).reshape(())
    values = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    v, s = values.float().tolist(), scale.item()
    parts = {"weight": values, "weight_scale": scale, "input_scale": torch.ones(())}
    return parts, reference(lambda o, i: v[o][i], lambda o, i: s, weight.shape)


def int8_rows(weight: Tensor, generator: torch.Generator) -> Quantized:
    """compressed-tensors: int8, one by one, with a scale per row."""
    del generator
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    values = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    v, s = values.tolist(), scale.float().tolist()
    return {"weight": values, "weight_scale": scale}, reference(
        lambda o, i: v[o][i], lambda o, i: s[o][0], weight.shape
    )


def packed(
    bits: int, *, symmetric: bool = False, ordered: bool = False
) -> Callable[[Tensor, torch.Generator], Quantized]:
    """compressed-tensors: codes packed along rows, as numbers plus half of their range."""

    def quantize(weight: Tensor, generator: torch.Generator) -> Quantized:
        (rows, columns), half = weight.shape, 1 << (bits - 1)
        groups = columns // GROUP
        scale = (torch.rand(rows, groups, generator=generator) * 0.02 + 0.01).bfloat16()
        codes = torch.randint(0, 2 * half, (rows, columns), generator=generator)
        zeros = torch.randint(-half, half, (rows, groups), generator=generator)
        group = torch.arange(columns) // GROUP
        if ordered:
            group = group[torch.randperm(columns, generator=generator)]
        q, z, s, g = codes.tolist(), zeros.tolist(), scale.float().tolist(), group.tolist()
        parts = {
            "weight_packed": pack_rows(codes, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor([rows, columns]),
        }
        if not symmetric:
            parts["weight_zero_point"] = pack_rows(zeros.T + half, bits).T.contiguous()
        if ordered:
            parts["weight_g_idx"] = group.to(torch.int32)

        def number(o: int, i: int) -> float:
            return q[o][i] - half - (0 if symmetric else z[o][g[i]])

        return parts, reference(number, lambda o, i: s[o][g[i]], (rows, columns))

    return quantize


def gptq(version: int) -> Callable[[Tensor, torch.Generator], Quantized]:
    """GPTQ: codes along the in-features, zero points along the out-features, less one in the first version."""

    def quantize(weight: Tensor, generator: torch.Generator) -> Quantized:
        rows, columns = weight.shape
        groups = columns // GROUP
        scale = (torch.rand(groups, rows, generator=generator) * 0.02 + 0.01).half()
        codes = torch.randint(0, 16, (rows, columns), generator=generator)
        zeros = torch.randint(0, 16, (groups, rows), generator=generator)
        group = (torch.arange(columns) // GROUP)[torch.randperm(columns, generator=generator)]
        q, z, s, g = codes.tolist(), zeros.tolist(), scale.float().tolist(), group.tolist()
        parts = {
            "qweight": pack_rows(codes, 4).T.contiguous(),
            "qzeros": pack_rows((zeros - 1) % 16 if version == 1 else zeros, 4),
            "scales": scale,
            "g_idx": group.to(torch.int32),
        }
        return parts, reference(lambda o, i: q[o][i] - z[g[i]][o], lambda o, i: s[g[i]][o], (rows, columns))

    return quantize


def awq(weight: Tensor, generator: torch.Generator) -> Quantized:
    """AWQ: eight out-features a word, the even ones of them first."""
    rows, columns = weight.shape
    groups = columns // GROUP
    scale = (torch.rand(groups, rows, generator=generator) * 0.02 + 0.01).half()
    codes = torch.randint(0, 16, (columns, rows), generator=generator)
    zeros = torch.randint(0, 16, (groups, rows), generator=generator)
    order = [8 * word + place for word in range(rows // 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
    q, z, s = codes.tolist(), zeros.tolist(), scale.float().tolist()
    parts = {"qweight": pack_rows(codes[:, order], 4), "qzeros": pack_rows(zeros[:, order], 4), "scales": scale}
    plain = reference(lambda o, i: q[i][o] - z[i // GROUP][o], lambda o, i: s[i // GROUP][o], (rows, columns))
    return parts, plain


def mxfp4(weight: Tensor, generator: torch.Generator) -> Quantized:
    """gpt-oss: two numbers of four bits a byte, a power of two per 32 in-features, transposed in the model."""
    experts, columns, rows = weight.shape
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(120, 125, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
    b, e = blocks.tolist(), scales.tolist()
    values = torch.empty(experts, columns, rows, dtype=torch.bfloat16)
    for expert in range(experts):

        def number(o: int, i: int, of: list[Any] = b[expert]) -> float:
            octet = of[o][i // 32][i % 32 // 2]
            code = octet >> 4 if i % 2 else octet & 15
            return -E2M1[code - 8] if code >= 8 else E2M1[code]

        def scale(o: int, i: int, of: list[Any] = e[expert]) -> float:
            return 2.0 ** (of[o][i // 32] - 127)

        values[expert] = reference(number, scale, (rows, columns)).T
    return {"_blocks": blocks, "_scales": scales}, values


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes of each row one after another in words of 32 bits, the low end first."""
    words = []
    for row in codes.tolist():
        number = sum(code << (bits * i) for i, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        words.append([(number >> (32 * i)) & 0xFFFFFFFF for i in range(count)])
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def _scheme(bits: int, kind: str, layout: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": "channel", **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ["lm_head"]}


_PACKED: dict[str, Any] = {"strategy": "group", "group_size": GROUP}
_GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": False}
# Family, what the configuration says, and how a weight is stored.
KINDS: dict[str, tuple[str, dict[str, Any], Callable[[Tensor, torch.Generator], Quantized]]] = {
    "fp8_blocks": (
        "deepseek_v3",
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
        fp8_blocks,
    ),
    "fp8_matrix": ("qwen3_moe", {"quant_method": "fp8", "activation_scheme": "static"}, fp8_matrix),
    "fp8_rows": ("qwen3_moe", _scheme(8, "float", "float-quantized"), fp8_rows),
    "int8_rows": ("qwen3_moe", _scheme(8, "int", "int-quantized"), int8_rows),
    "packed_4": ("deepseek_v3", _scheme(4, "int", "pack-quantized", **_PACKED), packed(4, symmetric=True)),
    "packed_3": ("qwen3_moe", _scheme(3, "int", "pack-quantized", **_PACKED), packed(3, ordered=True)),
    "packed_8": ("qwen3_moe", _scheme(8, "int", "pack-quantized", **_PACKED), packed(8)),
    "gptq": ("qwen3_moe", _GPTQ, gptq(1)),
    "gptq_v2": ("qwen3_moe", _GPTQ | {"checkpoint_format": "gptq_v2"}, gptq(2)),
    "awq": ("qwen3_moe", {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq),
    "mxfp4": ("gpt_oss", {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, fp8_rows),
}  # fmt: skip
