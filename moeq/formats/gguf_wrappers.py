"""Wrappers of images, sound and text whose language models llama.cpp reads; what stands beside these is another file.

llama.cpp takes the language model from one file and the tower from a second one ("mmproj"), which its own converter
makes of the source.  Positions of a text are equal in time, height and width, so that the sections of a rotary
embedding matter for images alone.
"""

from dataclasses import replace
from typing import Any

from moeq.formats import gguf_glm5 as glm5
from moeq.formats import gguf_qwen4 as qwen4
from moeq.formats.gguf_families import FAMILIES, grouped_heads
from moeq.formats.gguf_family import ALL_SPARSE, NO_BIAS, SILU, Family
from moeq.formats.gguf_metadata import deepseek_ocr, experts, sigmoid_routing
from moeq.formats.gguf_rope import Metadata, sections, sections_in_turn


def _of(language_model: str) -> Family:
    return replace(FAMILIES[language_model], language_model=language_model)


def _qwen3_vl(config: Any) -> Metadata:
    keys = experts("num_experts", "moe_intermediate_size")(config)
    return keys | sections_in_turn(keys)


def _deepstack(config: Any) -> Metadata:
    """How many of the first blocks take features of images of their own."""
    return {"n_deepstack_layers": len(config.vision_config.deepstack_visual_indexes)}


_QWEN3_VL = Family(
    "qwen3vlmoe",
    _qwen3_vl,
    (SILU, NO_BIAS, ("norm_topk_prob", True), *ALL_SPARSE),
    language_model="qwen3_vl_moe_text",
    beside=_deepstack,
)

WRAPPERS: dict[str, Family] = {
    "qwen3_5_moe": _of("qwen3_5_moe_text"),
    "qwen4_exp": replace(_of("qwen4_exp_text"), beside=qwen4.images),
    "gemma4": _of("gemma4_text"),
    "internvl": _of("qwen3_moe"),
    "kimi_k25": _of("deepseek_v3"),
    "mistral3": _of("mistral4"),
    "dots3_note": _of("dots3_note_text"),
    "deepseek_ocr2": Family(
        "deepseek2-ocr",
        deepseek_ocr,
        (SILU, NO_BIAS, ("mlp_bias", False), ("topk_method", "greedy")),
        language_model="deepseek_ocr2_text",
        refuses=grouped_heads,
    ),
    "qwen3_vl_moe": _QWEN3_VL,
    "qwen3_omni_moe_thinker": replace(_QWEN3_VL, language_model="qwen3_omni_moe_text"),
    "glm5_next": Family(
        "glm5-next",
        glm5.glm5_next,
        (SILU, NO_BIAS),
        glm5.GLM5_NEXT,
        own_head=True,
        names="kimi-linear",
        refuses=glm5.problem,
        language_model="glm5_next_text",
    ),
    "glm4v_moe": Family(
        "glm4moe", lambda config: sigmoid_routing(config) | sections(config), (SILU,), language_model="glm4v_moe_text"
    ),
}
