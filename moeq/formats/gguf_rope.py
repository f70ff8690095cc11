"""Keys of a GGUF file for rotary embeddings; what llama.cpp would compute otherwise is refused."""

import math
from types import SimpleNamespace
from typing import Any

Metadata = dict[str, Any]


def head_dim(config: Any) -> int:
    """Size of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope(config: Any, head: int) -> Metadata:
    """Rotary embedding of heads of a size; raises ValueError for a kind of scaling that is not written."""
    values = dict(config.rope_parameters or {})
    kind = values.get("rope_type", "default")
    turned = int(head * values.get("partial_rotary_factor", 1.0))
    if turned % 2:
        raise ValueError(f"llama.cpp turns an even number of dimensions of a head, and this model turns {turned}")
    keys: Metadata = {"rope.dimension_count": turned, "rope.freq_base": float(values["rope_theta"])}
    if kind == "default":
        return keys
    if kind == "linear":
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": float(values["factor"])}
    if kind == "yarn":
        _check_magnitude(values)
        return keys | yarn(config, values)
    raise ValueError(f"rotary scaling of kind {kind} is not written; default, linear and yarn are")


def rope_of_kinds(config: Any, head: int) -> Metadata:
    """Rotary embeddings of blocks with and without a window, which differ in their base."""
    full, window = (config.rope_parameters[f"{kind}_attention"] for kind in ("full", "sliding"))
    if window.get("rope_type", "default") != "default":
        raise ValueError("rotary scaling of blocks with a window is not written")
    keys = rope(SimpleNamespace(rope_parameters=full, max_position_embeddings=config.max_position_embeddings), head)
    return keys | {"rope.freq_base_swa": float(window["rope_theta"])}


def sections(config: Any) -> Metadata:
    """How many pairs of dimensions turn by time, height and width, one section behind the other."""
    sizes = (config.rope_parameters or {}).get("mrope_section")
    return {} if sizes is None else {"rope.dimension_sections": [*sizes, *[0] * (4 - len(sizes))]}


def sections_in_turn(keys: Metadata) -> Metadata:
    """The same where pairs turn by time, height and width in turn, of a family's other keys.

    llama.cpp lets pairs stand still that are beyond three times their section, in texts too (61 and 62 of Qwen3-VL's
    64); transformers turns them by time.  With sections that leave none beyond, all pairs of a text turn.
    """
    half = keys["rope.dimension_count"] // 2
    return {"rope.dimension_sections": [(half + 2) // 3, (half + 1) // 3, half // 3, 0]}


def latent_rope(config: Any, head: int) -> Metadata:
    """Rotary embedding of DeepSeek, whose yarn scales the scores of attention by ``mscale_all_dim``."""
    values = dict(config.rope_parameters or {})
    if values.get("rope_type", "default") != "yarn":
        return rope(config, head)
    scale, all_dim = values.get("mscale"), values.get("mscale_all_dim")
    if not all_dim or scale != all_dim or values.get("attention_factor") is not None:
        raise ValueError("llama.cpp computes yarn with mscale equal to mscale_all_dim, and this model differs")
    keys: Metadata = {"rope.dimension_count": head, "rope.freq_base": float(values["rope_theta"])}
    return keys | yarn(config, values) | {"rope.scaling.yarn_log_multiplier": 0.1 * float(all_dim)}


def yarn(config: Any, values: dict[str, Any]) -> Metadata:
    """Keys of yarn with a factor; raises ValueError for a range that llama.cpp would compute otherwise."""
    if not values.get("truncate", True):
        raise ValueError("llama.cpp rounds the range of yarn to whole dimensions, and the model does not (truncate)")
    betas = tuple(float(values.get(name) or usual) for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)))
    if betas != (32.0, 1.0):
        raise ValueError(
            "llama.cpp computes yarn with beta_fast: 32 and beta_slow: 1, whatever a file says, and this model has "
            f"{betas[0]:g} and {betas[1]:g}"
        )
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(values["factor"]),
        "rope.scaling.original_context_length": int(
            values.get("original_max_position_embeddings") or config.max_position_embeddings
        ),
        "rope.scaling.yarn_beta_fast": betas[0],
        "rope.scaling.yarn_beta_slow": betas[1],
    }


def _check_magnitude(values: dict[str, Any]) -> None:
    """llama.cpp multiplies by 0.1 log(factor) + 1, whatever a model says."""
    own = 0.1 * math.log(values["factor"]) + 1.0
    given = values.get("attention_factor")
    if values.get("mscale") and values.get("mscale_all_dim"):
        raise ValueError("llama.cpp computes the magnitude of yarn without mscale and mscale_all_dim")
    if given is not None and not math.isclose(given, own, rel_tol=1e-6):
        raise ValueError(f"llama.cpp computes yarn with attention_factor: {own:.6g}, and this model has {given:.6g}")
