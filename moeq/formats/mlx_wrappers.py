"""Wrappers of images, sound and text whose language models mlx-lm computes; what stands beside these is left out.

Of some mlx-lm has a class of the wrapper, which reads the language model alone.  Others are written as folders of the
language model, for the class that computes what it does: texts have equal positions in time, height and width, so that
the sections of a rotary embedding matter for images alone.
"""

from dataclasses import replace

from moeq.formats.mlx_families import (
    CONVOLUTION,
    FAMILIES,
    LATENT,
    ONE_ADDED,
    SILU,
    full_attention_interval,
    head_dim,
    irregular,
    num_dense,
)
from moeq.formats.mlx_family import MlxFamily
from moeq.formats.mlx_rearranged import MINIMAX_M3

# Where wrappers have their language model, in files and in mlx-lm.
_INSIDE = {"model.language_model.": "language_model.model.", "lm_head": "language_model.lm_head"}
# The same where it is written alone.
_ALONE = {"model.language_model.": "model.", "language_model.model.": "model.", "language_model.lm_head": "lm_head"}
_QWEN3 = replace(FAMILIES["qwen3_moe"], renamed=_ALONE, written_as="qwen3_moe")

WRAPPERS: dict[str, MlxFamily] = {
    "qwen3_vl_moe": MlxFamily(
        renamed=_INSIDE, keys=("num_experts", "mlp_only_layers", "decoder_sparse_step", "head_dim"),
        made={"norm_topk_prob": lambda config: True},
        computed={**SILU, "attention_bias": (False,)}, has_tied_head=False, language_model="qwen3_vl_moe_text",
    ),
    "qwen3_omni_moe_thinker": replace(_QWEN3, made={"head_dim": head_dim}, language_model="qwen3_omni_moe_text"),
    "internvl": replace(_QWEN3, language_model="qwen3_moe"),
    "qwen3_5_moe": MlxFamily(
        renamed=_INSIDE, made={"full_attention_interval": full_attention_interval},
        computed={**SILU, "attention_bias": (False,)}, language_model="qwen3_5_moe_text", changed=CONVOLUTION,
        refuses=irregular, one_added=ONE_ADDED,
    ),
    "kimi_k25": replace(LATENT, rope_types=("default", "yarn"), language_model="deepseek_v3"),
    "gemma4": replace(
        FAMILIES["gemma4_text"], renamed=_INSIDE, language_model="gemma4_text",
        made_beside={"vocab_size": lambda config: config.get_text_config().vocab_size},
    ),
    "mistral3": replace(
        FAMILIES["mistral4"], renamed={"model.language_model.": "language_model.model."}, language_model="mistral4"
    ),
    "glm4v_moe": replace(
        FAMILIES["glm4_moe"], renamed=_ALONE, made={"head_dim": head_dim}, language_model="glm4v_moe_text",
        written_as="glm4_moe",
    ),
    "minimax_m3_vl": MlxFamily(language_model="minimax_m3_vl_text", **MINIMAX_M3),
    "deepseek_ocr2": MlxFamily(
        renamed=_ALONE, language_model="deepseek_ocr2_text", written_as="deepseek", has_tied_head=False,
        made={"first_k_dense_replace": num_dense, "moe_layer_freq": lambda config: 1},
        computed={
            **SILU, "topk_method": ("greedy",), "mlp_bias": (False,), "routed_scaling_factor": (1.0,),
        },
    ),
}  # fmt: skip
