"""Which tensors are of a language model, and which stand beside it: runtimes of language models do not read these."""

from transformers import PreTrainedModel

from moeq.formats.source import PackedExport
from moeq.models.adapter import find_blocks


def language_root(model: PreTrainedModel) -> str:
    """What names of a language model begin with, but for its head: "model.", or that and more inside of a wrapper."""
    return find_blocks(model)[0].removesuffix("layers")


def is_beside(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight or tensor is of what stands beside a wrapper's language model."""
    alone = model.config.get_text_config() is model.config
    return not alone and not name.startswith((language_root(model), "lm_head"))


def left_out(export: PackedExport) -> list[str]:
    """Keys of what a runtime of language models does not read: a tower, draft layers, what no parameter is made of."""
    parameter_of = export.contents.parameter_of
    return [
        key for key in export.contents.stored if key not in parameter_of or is_beside(export.model, parameter_of[key])
    ]
