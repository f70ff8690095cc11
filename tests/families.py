"""Tiny configurations of every family whose experts follow the experts interface of transformers.

Hidden size 64, experts of width 32, 8 experts of which 2 are chosen, 4 heads of 16; 2 blocks, or 3 where a family
mixes kinds of blocks.  A key is a ``model_type``; what a configuration leaves out is in ``tests.tiny``.
"""

from typing import Any

from transformers import CONFIG_MAPPING

Values = dict[str, Any]


def _values(*parts: Values, **more: Any) -> Values:
    """Union of dictionaries, later ones first."""
    return {key: value for part in (*parts, more) for key, value in part.items()}


_LOCAL: Values = {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2}
_EXPERTS: Values = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
_QWEN = _values(_EXPERTS, head_dim=16)
_GATED = _values(_QWEN, shared_expert_intermediate_size=32)
_LATENT: Values = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "qk_nope_head_dim": 16,
}  # fmt: skip
_ROUTED: Values = {
    "moe_intermediate_size": 32, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}  # fmt: skip
# Block 0 is dense and block 1 has two groups of experts and a shared expert, as in the real one.
_DEEPSEEK = _values(_LATENT, _ROUTED, first_k_dense_replace=1)
_INDEXED: Values = {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 4}
_LINEAR: Values = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
_DENSE_FIRST: Values = {"mlp_layer_types": ["dense", "sparse"]}
_SLIDING: Values = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
_LINEAR_FIRST: Values = {"layer_types": ["linear_attention", "full_attention"]}

FAMILIES: dict[str, Values] = {
    "mixtral": _LOCAL,
    "qwen2_moe": _values(_EXPERTS, shared_expert_intermediate_size=64),
    "qwen3_moe": _QWEN,
    "qwen3_next": _values(_GATED, _LINEAR, _LINEAR_FIRST),
    "qwen3_5_moe_text": _values(_GATED, _LINEAR, _LINEAR_FIRST),
    "deepseek_v2": _values(_DEEPSEEK, topk_method="greedy"),
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _values(_LATENT, _ROUTED, _INDEXED, _DENSE_FIRST),
    "glm_moe_dsa": _values(_LATENT, _ROUTED, _INDEXED, _DENSE_FIRST, n_group=1),
    "axk1": _values(_LATENT, _ROUTED, _DENSE_FIRST),
    "axk2": _values(_LATENT, _ROUTED, _INDEXED, _DENSE_FIRST, head_dim=16, layer_types=["full_attention"] * 2),
    "glm4_moe": _values(_ROUTED, head_dim=16, first_k_dense_replace=1),
    "glm4_moe_lite": _values(_LATENT, _ROUTED, _DENSE_FIRST),
    "dots1": _values(_ROUTED, head_dim=16, first_k_dense_replace=1, layer_types=["full_attention"] * 2),
    "dots3_note_text": _values(
        _LATENT, _ROUTED, _INDEXED, _DENSE_FIRST, head_dim=32, shared_experts_intermediate_size=32,
    ),
    "solar_open": _values(_ROUTED, head_dim=16),
    "olmoe": _values(_LOCAL, num_experts=8),
    "flex_olmo": _values(_LOCAL, num_experts=8),
    "mellum": _QWEN,
    "phimoe": _LOCAL,
    "granitemoe": _LOCAL,
    "granitemoeshared": _values(_LOCAL, shared_intermediate_size=32),
    "granitemoe_swa": _values(_LOCAL, _SLIDING),
    "granitemoehybrid": _values(
        _LOCAL, shared_intermediate_size=32, layer_types=["mamba", "attention"], mamba_n_heads=8, mamba_d_head=16,
        mamba_d_state=16, mamba_n_groups=1, mamba_expand=2,
    ),
    "gpt_oss": _values(
        _LOCAL, _SLIDING, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "jamba": _values(
        _LOCAL, num_experts=8, expert_layer_period=2, expert_layer_offset=1, attn_layer_period=2, attn_layer_offset=1,
        mamba_d_state=16, mamba_dt_rank=16,
    ),
    "ernie4_5_moe": {
        "moe_intermediate_size": 32, "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1, "moe_layer_interval": 1,
    },
    "minimax": _values(_LOCAL, head_dim=16, block_size=8, layer_types=["linear_attention", "full_attention"]),
    "minimax_m2": _values(_LOCAL, head_dim=16),
    "hunyuan_v1_moe": {"intermediate_size": 32, "num_experts": 8, "moe_topk": 2, "head_dim": 16},
    "lfm2_moe": _values(_EXPERTS, layer_types=["conv", "full_attention"], num_dense_layers=1, conv_L_cache=3),
    "exaone_moe": _values(_QWEN, _SLIDING, _DENSE_FIRST, n_group=1, topk_group=1, num_shared_experts=1),
    "afmoe": _values(_QWEN, _SLIDING, num_shared_experts=1, num_dense_layers=1),
    "mimo_v2_flash": _values(
        _ROUTED, _SLIDING, _DENSE_FIRST, n_group=1, head_dim=16, v_head_dim=16, swa_head_dim=16, swa_v_head_dim=16,
        swa_num_attention_heads=4, swa_num_key_value_heads=2,
    ),
    "nemotron_h": _values(
        _ROUTED, moe_latent_size=32, moe_shared_expert_intermediate_size=32, head_dim=16, mamba_num_heads=8,
        mamba_head_dim=16, ssm_state_size=16, n_groups=1,
        layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
    ),
    "cohere2_moe": _values(_LOCAL, _SLIDING, num_experts=8, head_dim=16, mlp_layer_types=["sparse"] * 2),
    "gemma4_text": _values(
        _SLIDING, enable_moe_block=True, num_experts=8, moe_intermediate_size=32, top_k_experts=2, head_dim=16,
        global_head_dim=16, hidden_size_per_layer_input=16, vocab_size_per_layer_input=264, num_kv_shared_layers=0,
    ),
    "zaya": _values(_QWEN, num_experts_per_tok=1, router_hidden_size=32, layer_types=["hybrid"] * 2),
    "laguna": _GATED,
    "hy_v3": _values(_QWEN, _DENSE_FIRST, num_local_experts=8, num_shared_experts=1),
    "kimi_linear": _values(
        _LATENT, _ROUTED, _LINEAR_FIRST, _DENSE_FIRST, n_group=1, num_experts=8,
        linear_attn_config={"head_dim": 16, "num_heads": 4},
    ),
    "bailing_hybrid": _values(
        _LATENT, _EXPERTS, _LINEAR_FIRST, _DENSE_FIRST, n_group=1, topk_group=1, n_shared_experts=1
    ),
    "aria_text": {"intermediate_size": 32, "moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1},
    "flint": _values(_GATED, _SLIDING, mlp_only_layers=[0]),
    "kolibri1": _values(_QWEN, _SLIDING, num_shared_experts=1, shared_expert_intermediate_size=32),
    "beam": _values(_QWEN, _SLIDING, _DENSE_FIRST, n_group=2, topk_group=1),
    "deepseek_v4": {
        "moe_intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 32, "q_lora_rank": 32,
        "num_experts_per_tok": 2, "n_routed_experts": 8, "o_groups": 2, "o_lora_rank": 32, "index_n_heads": 2,
        "index_head_dim": 16, "index_topk": 4, "sliding_window": 32, "num_nextn_predict_layers": 0,
        "mlp_layer_types": ["hash_moe", "moe"],
    },
    "hy_v4": _values(_LATENT, _ROUTED, _INDEXED, _DENSE_FIRST, n_group=1, head_dim=32),
    "inkling_text": _values(
        _ROUTED, head_dim=16, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16, d_rel=16,
        rel_extent=32, sliding_window_size=32, layer_types=["hybrid_sliding", "hybrid"],
        mlp_layer_types=["dense", "sparse"],
    ),
    "inkling2_text": _values(
        _ROUTED, head_dim=16, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16, d_rel=16,
        rel_extent=32, sliding_window_size=32, unpadded_vocab_size=264,
    ),
    "qwen4_exp_text": _values(_GATED, _LINEAR, hc_lowrank=16),
    "minimax_m3_vl_text": _values(
        _LOCAL, _DENSE_FIRST, head_dim=16, dense_intermediate_size=64, shared_intermediate_size=32, rotary_dim=16,
        index_n_heads=2, index_head_dim=16, index_block_size=8, index_topk_blocks=2,
    ),
}  # fmt: skip
# Families of mixtures that are refused: a tiny configuration, and what the message must say.
NO_INTERFACE = "has no routed experts, or experts that do not follow the transformers experts interface"
REFUSED: dict[str, tuple[Values, str]] = {
    "inkling2_text": (FAMILIES.pop("inkling2_text"), "its blocks read the outputs of all earlier ones"),
    "llama4_text": (
        _values(_LOCAL, num_experts_per_tok=1, head_dim=16, intermediate_size_mlp=32, moe_layers=[1],
                no_rope_layers=[1, 1], layer_types=["full_attention"] * 2),
        NO_INTERFACE,
    ),
    "jetmoe": (_values(_LOCAL, kv_channels=16), NO_INTERFACE),
    "doge": ({"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2}, NO_INTERFACE),
    "longcat_flash": (
        _values(_LATENT, n_routed_experts=8, moe_topk=2, expert_ffn_hidden_size=32, ffn_hidden_size=64,
                zero_expert_num=2, num_layers=1, head_dim=16),
        NO_INTERFACE,
    ),
}  # fmt: skip
# Families whose experts follow the interface, but which transformers opens only together with images or sound, or not
# as a language model.
NOT_CAUSAL = (
    "deepseek_ocr2", "diffusion_gemma", "ernie4_5_vl_moe", "glm4v_moe", "glm5_next", "mistral4", "mistral_large4",
    "muse_spark", "openai_privacy_filter", "qwen3_omni_moe", "qwen3_vl_moe", "unlimited_ocr",
)  # fmt: skip
# An older transformers knows fewer of them.
SUPPORTED = tuple(family for family in FAMILIES if family in CONFIG_MAPPING)
