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
    "mistral4": _values(
        _LATENT, _ROUTED, n_group=1, first_k_dense_replace=1,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
            "llama_4_scaling_beta": 0.1, "max_position_embeddings": 512,
        },
    ),
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
# A vision tower in the words of most families.
_TOWER: Values = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
# The same in the words of Qwen's and GLM's.
_VISUAL: Values = {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "out_hidden_size": 64}
_SMALL_IMAGE: Values = {"image_size": 56, "patch_size": 14}
_SAM: Values = {
    "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
    "patch_size": 16, "window_size": 2, "global_attn_indexes": [1], "downsample_channels": [16, 32],
}  # fmt: skip
_SOUND: Values = {
    "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "output_dim": 64,
    "num_mel_bins": 16, "max_source_positions": 32, "downsample_hidden_size": 16, "n_window": 4,
}  # fmt: skip


def _sections(*sizes: int) -> Values:
    """Rotary positions of time, height and width."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sizes)}}


def _text(family: str, *parts: Values, **more: Any) -> Values:
    """The ``text_config`` of a wrapper: a family of its own, or one that stands nowhere else."""
    return {"text_config": _values({"model_type": family}, FAMILIES.get(family, {}), *parts, **more)}


# Wrappers: a language model with experts, and beside it what turns images or sound into its embeddings.
WRAPPERS: dict[str, Values] = {
    "gemma4": _values(
        _text("gemma4_text"),
        vision_config=_values(_TOWER, num_key_value_heads=2, head_dim=16, position_embedding_size=64),
        audio_config=None, tie_word_embeddings=True,
    ),
    "qwen3_5_moe": _values(
        _text("qwen3_5_moe_text", _sections(1, 1, 0)), vision_config=_values(_VISUAL, num_position_embeddings=64)
    ),
    "qwen3_vl_moe": _values(
        _text("qwen3_vl_moe_text", _QWEN, _sections(4, 2, 2)),
        vision_config=_values(_VISUAL, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
    ),
    "glm4v_moe": _values(
        _text("glm4v_moe_text", _ROUTED, _sections(2, 1, 1), n_group=1), vision_config=_values(_VISUAL, _SMALL_IMAGE)
    ),
    "qwen3_omni_moe_thinker": _values(
        _text("qwen3_omni_moe_text", _EXPERTS, _sections(4, 2, 2)), audio_config=_SOUND,
        vision_config=_values(_VISUAL, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
    ),
    "kimi_k25": _values(
        _text("deepseek_v3"), vision_config=_values(_TOWER, pos_emb_height=4, pos_emb_width=4),
        projection_hidden_size=32, tie_word_embeddings=False,
    ),
    "mistral3": _values(
        _text("mistral4"), tie_word_embeddings=False,
        vision_config=_values(_TOWER, _SMALL_IMAGE, model_type="pixtral", head_dim=16),
    ),
    "internvl": _values(
        _text("qwen3_moe"), tie_word_embeddings=False,
        vision_config=_values(_TOWER, image_size=[56, 56], patch_size=[14, 14]),
    ),
    "aria": _values(
        _text("aria_text"), vision_config=_values(_TOWER, _SMALL_IMAGE, model_type="idefics3_vision"),
        projector_patch_to_query_dict={16: 4},
    ),
    "minimax_m3_vl": _values(
        _text("minimax_m3_vl_text"), vision_config=_values(_TOWER, _SMALL_IMAGE), projector_hidden_size=64,
    ),
    "deepseek_ocr2": _values(
        _text("deepseek_ocr2_text", _ROUTED, n_group=None, topk_group=None, mlp_layer_types=["dense", "sparse"]),
        vision_config={"sam_config": _SAM, "encoder_config": _values(_TOWER, num_key_value_heads=2)},
    ),
    "unlimited_ocr": _values(
        _text("unlimited_ocr_text", _ROUTED, _DENSE_FIRST, n_group=1, num_key_value_heads=4),
        vision_config={"sam_config": _values(_SAM, mlp_dim=64), "encoder_config": _values(_TOWER, _SMALL_IMAGE)},
    ),
    "glm5_next": _values(
        _text(
            "glm5_next_text", _LATENT, _ROUTED, _INDEXED, _DENSE_FIRST, _LINEAR_FIRST, n_group=1, head_dim=0,
            qk_rope_head_dim=0, index_kpool=2, linear_head_dim=16, linear_num_heads=4,
        ),
        vision_config=_values(_VISUAL, _SMALL_IMAGE, projection_intermediate_size=64),
    ),
    "dots3_note": _values(
        _text("dots3_note_text"),
        vision_config=_values(
            _TOWER, moe_intermediate_size=32, adapter_in_dim=32, adapter_out_dim=64, num_local_experts=4,
            num_experts_per_tok=2, mlp_layer_types=["dense", "sparse"],
        ),
        audio_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "downsample_hidden_size": 16, "feature_size": 16, "adapter_input_size": 32, "adapter_out_dim": 64,
        },
    ),
    "qwen4_exp": _values(_text("qwen4_exp_text"), vision_config=_values(_VISUAL, num_position_embeddings=64)),
    "mistral_large4": _values(
        _text("mistral_large4_text", _LATENT, _ROUTED, _INDEXED, n_group=1),
        vision_config=_values(_TOWER, _SMALL_IMAGE, model_type="pixtral", head_dim=16),
    ),
}  # fmt: skip
# Wrappers that are refused, and what the message must say.
REFUSED_WRAPPERS: dict[str, tuple[Values, str]] = {
    "llama4": (
        _values(
            {"text_config": REFUSED["llama4_text"][0]},
            vision_config=_values(_TOWER, _SMALL_IMAGE, projector_input_dim=32, projector_output_dim=32,
                                  vision_output_dim=32),
        ),
        NO_INTERFACE,
    ),
    "muse_spark": (
        _values(
            _text("muse_spark_text", _LOCAL, head_dim=16, moe_intermediate_size=32, moe_hidden_size=64),
            vision_config=_values(_TOWER, pos_emb_height=4, pos_emb_width=4),
            audio_config={"patch_sizes": [2], "hidden_sizes": [32], "depths": [1], "num_hidden_layers": 1,
                          "out_hidden_size": 64},
            out_hidden_size=32, projector_hidden_size=32,
        ),
        "has a norm after each expert",
    ),
    "ernie4_5_vl_moe": (
        _values(
            _text(
                "ernie4_5_vl_moe_text", _sections(3, 3, 2), moe_intermediate_size=[32, 16], moe_num_experts=8, moe_k=2,
                moe_num_shared_experts=1,
            ),
            vision_config=_values(_VISUAL),
        ),
        "number the experts of text and those of images through",
    ),
    "inkling_mm_model": (
        _values(
            _text("inkling_text"), vision_config={"patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2},
            audio_config={"n_mel_bins": 4, "mel_vocab_size": 8},
        ),
        "gate and up rows of linears in turn",
    ),
    "inkling2": (_values(_text("inkling2_text", REFUSED["inkling2_text"][0]), vision_config={"text_hidden_size": 64}),
                 "its blocks read the outputs of all earlier ones"),
}  # fmt: skip
# Families whose experts follow the interface, but which are no language models that predict the next token; of
# qwen3_omni_moe the thinker is one.
OTHER_TASKS = ("diffusion_gemma", "openai_privacy_filter", "qwen3_omni_moe")
# How files of a family hold layers for speculative decoding, by its number of blocks N; of the names that transformers
# skips (``_keys_to_ignore_on_load_unexpected``) and the configurations that count them.
DRAFT_LAYERS: dict[str, str] = {
    **dict.fromkeys(
        ("bailing_hybrid", "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hy_v3"),
        "model.layers.N.*",
    ),
    **dict.fromkeys(("dots3_note", "glm5_next"), "model.language_model.layers.N.*"),
    **dict.fromkeys(
        ("deepseek_v4", "mellum", "minimax_m3_vl", "nemotron_h", "qwen3_5_moe", "qwen3_next", "qwen4_exp"), "mtp.*"
    ),
    **dict.fromkeys(("inkling_text", "mimo_v2_flash"), "model.mtp.*"),
    "ernie4_5_moe": "model.mtp_*",
}
# Families whose weights are published quantized, alone or beside a copy in 16 bits.
PUBLISHED_AS: dict[str, str] = {
    **dict.fromkeys(
        ("deepseek_v3", "deepseek_v32", "glm4_moe", "mimo_v2_flash", "minimax_m2", "qwen3_moe", "qwen3_next",
         "qwen3_5_moe", "qwen3_vl_moe", "glm4v_moe"), "FP8 in blocks",
    ),
    "gpt_oss": "MXFP4",
    "kimi_k25": "int4 (compressed-tensors)",
}  # fmt: skip
# An older transformers knows fewer of them.
SUPPORTED = tuple(family for family in FAMILIES if family in CONFIG_MAPPING)
SUPPORTED_WRAPPERS = tuple(family for family in WRAPPERS if family in CONFIG_MAPPING)
