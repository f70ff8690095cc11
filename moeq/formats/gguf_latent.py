"""What llama.cpp computes otherwise of families with latent attention, each measured on tiny models."""

from typing import Any


def grouped_experts(config: Any) -> str | None:
    """DeepSeek-V2: how groups of experts are chosen."""
    if config.topk_method == "group_limited_greedy" and (config.n_group or 1) > 1:
        return "the best groups by the sum of two scores, and here they are the best by one (group_limited_greedy)"
    return unranked(config)


def unranked(config: Any) -> str | None:
    """llama.cpp knows models without a rank of queries by their 26 or 27 blocks."""
    if (config.q_lora_rank is None) == (config.num_hidden_layers in (26, 27)):
        return None
    return f"with 26 or 27 blocks q_lora_rank is null, otherwise a number, and here it is {config.q_lora_rank}"


def mistral4(config: Any) -> str | None:
    """Mistral 4: the rank of queries, and the magnitude of yarn."""
    return unranked(config) or _other_magnitude(config)


def indexed(config: Any) -> str | None:
    """DeepSeek-V3.2: llama.cpp turns heads of the indexer by Hadamard matrices of 64 rows or more, or ends."""
    return wide_heads(config) or _other_magnitude(config)


def wide_heads(config: Any) -> str | None:
    """An indexer whose heads are no multiples of 64 wide, with which llama.cpp ends."""
    size = config.index_head_dim
    return f"heads of the indexer are multiples of 64, and here they are {size} wide" if size % 64 else None


def glm_dsa(config: Any) -> str | None:
    """GLM-5: the same, and no scaled positions."""
    scaled = _rope(config).get("rope_type", "default") != "default"
    return "rotary positions without scaling (rope_type: default)" if scaled else indexed(config)


def _other_magnitude(config: Any) -> str | None:
    """These scale scores as by ``mscale_all_dim: 1``, whatever a file says; DeepSeek-V3 reads it."""
    rope = _rope(config)
    if rope.get("rope_type", "default") == "default" or rope.get("mscale_all_dim") == 1.0:
        return None
    return f"yarn with mscale_all_dim: 1, and here it is {rope.get('mscale_all_dim')}"


def _rope(config: Any) -> dict[str, Any]:
    return dict(config.rope_parameters or {})
