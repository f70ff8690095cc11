"""Each format holds each family that its runtime knows at 2, 3, 4 and 8 bits and mixed, as others' readers find it.

No runtime is needed: gguf's dequantization, compressed-tensors' own unpacking and two readers in numpy.  What names
mean in llama.cpp and mlx-lm is held by the tests that run them, so that there only values are looked for.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from torch import Tensor

from benchmarks.runtimes.cells import OPTIONS
from moeq.formats import gguf_families, gguf_wrappers, mlx_known
from moeq.formats.convert import convert
from moeq.formats.gguf import NAME
from moeq.formats.gguf_file import read_file
from moeq.formats.gptq_reader import dequantize_words
from moeq.formats.mlx_reader import dequantize_bits
from moeq.quant.carrier import FORMATS, MERGED_LINEARS
from tests.export.rounding import real_weight
from tests.families import FAMILIES, SUPPORTED, WRAPPERS
from tests.formats.packed import Grid, GridOf, Tiny, config_of, is_expert, tensors_of, write_tiny_packed

FEW = ("qwen2_moe", "deepseek_v3")  # in each check; the others are slow
# Families that a runtime knows; compressed-tensors and GPTQ are not bound to families.
KNOWN = {"gguf": gguf_families.FAMILIES | gguf_wrappers.WRAPPERS, "mlx": mlx_known.KNOWN}
WALKED = (
    *SUPPORTED, "qwen3_5_moe", "qwen3_vl_moe", "glm4v_moe", "gemma4", "internvl", "kimi_k25", "mistral3",
    "deepseek_ocr2", "qwen3_omni_moe_thinker", "qwen4_exp", "glm5_next", "dots3_note",
)  # fmt: skip
_FUSED = "lies with all experts in one tensor of the source's files"
_UNSEEN = "GPTQModel was not seen to read"
_IN_ONE = {
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoe_swa", "granitemoehybrid", "zaya"), _FUSED),
    **dict.fromkeys(("aria_text", "gemma4_text", "hy_v4", "inkling_text", "mistral4", "minimax_m3_vl_text"), _FUSED),
    **dict.fromkeys(("gemma4", "qwen3_vl_moe", "mistral3"), _FUSED),
    "gpt_oss": "has biases, which no runtime reads beside experts",
}
# What these refuse, and why.
REFUSED: dict[str, dict[str, str]] = {
    "mlx": {
        **dict.fromkeys(("qwen3_5_moe", "qwen3_next"), "with 1 added, which bfloat16 rounds"),
        "minimax_m3_vl_text": "adds 1 to norms of minimax_m3_vl_text when it uses them, which bfloat16 rounds",
    },
    "compressed-tensors": {**_IN_ONE, "dots3_note": "fc1.weight would be written twice"},  # of its vision tower
    "gptq": {
        **{family: reason for family, reason in _IN_ONE.items() if family != "qwen3_vl_moe"},
        **dict.fromkeys(
            (
                "gemma4",
                "internvl",
                "kimi_k25",
                "mistral3",
                "deepseek_ocr2",
                "qwen3_omni_moe_thinker",
                "qwen4_exp",
                "glm5_next",
                "dots3_note",
            ),
            _UNSEEN,
        ),
        "qwen4_exp_text": "ngram_embedding.shard_0.weight is stored otherwise than",
        "lfm2_moe": "GPTQModel opens lfm2_moe and computes something else",
        **dict.fromkeys(("kimi_linear", "bailing_hybrid"), "k_conv1d.weight is stored otherwise than"),
    },
}
# llama.cpp has its columns in another order, which takes groups of 32 apart in models as small as these.
REORDERED = "linear_attn.out_proj"
# transformers writes these of Kimi K2.5 otherwise than they are published.
PUBLISHED_KEYS = ("language_model.model.blocks.", "language_model.model.layers.")
# Alike where vLLM merges; other linears have 8 bits.
LINEARS: dict[str, Grid] = {"qkv": (2, 64, True), "qkv_a": (3, 32, False), "gate_up": (4, 32, False)}


def mixed() -> GridOf:
    """Every width beside others: linears by kind, experts by block, by projection and side by side.

    Experts of the first block that has some are at 2 bits, 3 with zero points and 4, those of the next at 8 and at 4
    with zero points: one type of compressed-tensors for a block.
    """
    blocks: list[str] = []

    def grid_of(name: str) -> Grid | None:
        if ".layers." not in name or name.endswith(REORDERED):
            return None
        leaf = name.rpartition(".")[2]
        if not is_expert(name):
            return LINEARS.get(MERGED_LINEARS.get(leaf, ""), (8, 32, True))
        block, _, expert = name.partition(".experts.")
        blocks.extend([block] if block not in blocks else [])
        if blocks.index(block) % 2:
            return (4, 32, False) if leaf == "down_proj" else (8, 32, True)
        down: Grid = (3, 32, False) if int(expert.partition(".")[0]) % 2 else (4, 32, True)
        return {"gate_proj": (2, 32, True), "up_proj": (3, 32, False)}.get(leaf, down)

    return grid_of


def options_of(family: str) -> dict[str, Any]:
    """Of a tiny model: what runtimes compute with, and ranks that are multiples of 32."""
    values = WRAPPERS[family]["text_config"] if family in WRAPPERS else FAMILIES[family]
    latent = {"qk_rope_head_dim": 32} if "kv_lora_rank" in values else {}
    return latent | OPTIONS.get(family, {})


def rows(tensors: Iterable[Tensor]) -> set[bytes]:
    """Bytes in bfloat16 of every row of matrices and stacks of them; zeros have no sign."""
    matrices = [(tensor.bfloat16() + 0).flatten(0, -2).contiguous() for tensor in tensors if tensor.ndim > 1]
    return {row.tobytes() for matrix in matrices for row in matrix.view(torch.int16).numpy()}


def check_rows(found: set[bytes], made: Tiny, without: tuple[str, ...] = ()) -> None:
    for name, weight in made.quantized.items():
        if not name.endswith(without or ("nothing",)):
            assert rows([real_weight(weight)]) <= found, name


def check_gguf(folder: Path, made: Tiny) -> None:
    _, stored = read_file(folder / NAME)
    # The keys' part of kv_b_proj is transposed head by head, and stays in BF16.
    check_rows(rows(tensor.values() for tensor in stored.values()), made, without=("kv_b_proj",))


def check_mlx(folder: Path, made: Tiny) -> None:
    tensors, said = tensors_of(folder), config_of(folder)["quantization"]
    found = [tensor for key, tensor in tensors.items() if key.endswith(".weight") and tensor.dtype != torch.uint32]
    for key in (key for key in tensors if key.endswith(".scales")):
        path = key.removesuffix(".scales")
        parts = [tensors[f"{path}.{part}"].flatten(0, -2) for part in ("weight", "scales", "biases")]
        found.append(dequantize_bits(*parts, said.get(path, said)["bits"]))
    check_rows(rows(found), made)


def check_compressed_tensors(folder: Path, made: Tiny) -> None:
    """Under the keys that transformers gives the dequantized model in files."""
    made.model.save_pretrained(folder / "dense")
    stored, dense = tensors_of(folder), tensors_of(folder / "dense")
    num_read = 0
    for key, theirs in dense.items():
        key = key.replace(*PUBLISHED_KEYS)
        path = key.removesuffix(".weight")
        if f"{path}.weight_packed" not in stored:
            assert torch.equal(stored[key], theirs), key
            continue
        packed, scale_OG = stored[f"{path}.weight_packed"], stored[f"{path}.weight_scale"]
        bits = 32 * packed.shape[1] // theirs.shape[1]
        codes_OI = unpack_from_int32(packed, bits, theirs.shape)
        scale_OI = scale_OG.repeat_interleave(theirs.shape[1] // scale_OG.shape[1], 1)
        assert torch.equal((codes_OI.float() * scale_OI.float()).bfloat16(), theirs), key
        num_read += 1
    assert num_read == len(made.quantized)


def check_gptq(folder: Path, made: Tiny) -> None:
    """Under the names of modules."""
    stored, config = tensors_of(folder), config_of(folder)["quantization_config"]
    for name, weight in made.quantized.items():
        parts = {part: stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        assert torch.equal(dequantize_words(parts, config, name).bfloat16(), real_weight(weight)), name


CHECKS: dict[str, Callable[[Path, Tiny], None]] = {
    "gguf": check_gguf,
    "mlx": check_mlx,
    "compressed-tensors": check_compressed_tensors,
    "gptq": check_gptq,
}


@pytest.mark.parametrize(
    "family", [family if family in FEW else pytest.param(family, marks=pytest.mark.slow) for family in WALKED]
)
def test_every_format_holds_every_family_at_mixed_widths(family: str, tmp_path: Path) -> None:
    made = write_tiny_packed(family, tmp_path, mixed(), multiple=32, **options_of(family))
    assert {weight.bits for weight in made.quantized.values()} == {2, 3, 4, 8}
    check_formats(made, family, tmp_path)


@pytest.mark.parametrize("bits", [1, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (2, 3, 4, 8))])
def test_every_format_holds_one_width_of_all_weights(bits: int, tmp_path: Path) -> None:
    made = write_tiny_packed("mixtral", tmp_path, lambda name: (bits, 32, True))
    check_formats(made, "mixtral", tmp_path)


def check_formats(made: Tiny, family: str, folder: Path) -> None:
    """Of those that know the family: all weights as they are read back, or a refusal that leaves nothing."""
    for name in FORMATS:
        if family not in KNOWN.get(name, WALKED):
            continue
        if (reason := REFUSED.get(name, {}).get(family)) is not None:
            with pytest.raises(ValueError, match=reason):
                convert(made.folder, name, folder / name)
            assert not (folder / name).exists()
            continue
        report = convert(made.folder, name, folder / name)
        assert (report.num_quantized, report.largest_error) == (len(made.quantized), 0.0)
        assert (report.num_left_out > 0) == (family in WRAPPERS and name in KNOWN)
        CHECKS[name](folder / name, made)
