"""Which models mlx-lm computes rightly; whatever else it would open and compute otherwise is refused by name."""

import torch
from transformers import PreTrainedModel

from moeq.formats.mlx_families import FAMILIES
from moeq.formats.mlx_family import MlxFamily, rope_types
from moeq.formats.mlx_rearranged import REARRANGED
from moeq.formats.mlx_wrappers import WRAPPERS
from moeq.quant.carrier import CarrierMode

KNOWN: dict[str, MlxFamily] = FAMILIES | REARRANGED | WRAPPERS
# What mlx-lm computes of families that it opens.
OTHERWISE: dict[str, str] = {
    "jamba": "it weights the chosen experts by a softmax over their logits alone, and the model by one over all experts"
}


def check_norms(model: PreTrainedModel, family: MlxFamily, mode: CarrierMode) -> None:
    """Raise ValueError where norms are rounded, in the files or when they are used, and nothing may be.

    Args:
        model: Dense model.
        family: Its.
        mode: "native" allows it.
    """
    if (family.one_added or family.adds_one) and mode == "exact" and model.dtype != torch.float32:
        how = "holds norms of {} with 1 added" if family.one_added else "adds 1 to norms of {} when it uses them"
        raise ValueError(
            f"mlx-lm {how.format(model.config.model_type)}, which {str(model.dtype)[6:]} rounds (by up to 1 / 256); "
            "choose carrier: native, as mlx-lm's own converter does, or gguf"
        )


def find_family(model: PreTrainedModel) -> MlxFamily:
    """The family of a model.

    Raises:
        ValueError: mlx-lm does not know it, or would compute something else than the model; the setting is named.
    """
    name, config = model.config.model_type, model.config.get_text_config()
    family = KNOWN.get(name)
    if family is None or family.language_model not in ("", config.model_type):
        of = f" of {config.model_type}" if family else ""
        why = f" ({OTHERWISE[name]})" if name in OTHERWISE else ""
        raise ValueError(
            f"mlx-lm is not known to read {name}{of} rightly{why}; it does {', '.join(KNOWN)}: choose gguf or "
            "compressed-tensors"
        )
    for key, values in family.computed.items():
        if (value := getattr(config, key, values[0])) not in values:
            raise ValueError(
                f"{key}: {value} of {config.model_type} is not what mlx-lm computes ({values[0]}), and it would not "
                "say so; choose gguf or compressed-tensors"
            )
    if problem := family.refuses(config):
        raise ValueError(f"mlx-lm computes {name} with {problem}; choose gguf or compressed-tensors")
    for kind in rope_types(config):
        if kind not in family.rope_types:
            raise ValueError(
                f"mlx-lm is not known to compute rotary embeddings of type {kind} for {config.model_type}; choose gguf "
                "or compressed-tensors"
            )
    return family
