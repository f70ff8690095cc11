"""Configuration and tokenizer of a model, with errors a user can act on."""

from pathlib import Path
from typing import Any

from moeq.checkpoint.dequantized import PACKED_BY_MOEQ, description_of, quantized_by, without_description
from moeq.checkpoint.hub import has_vocabulary, why_not


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The configuration of a model.

    It says nothing of quantization where the weights are dequantized as they are read, so that whatever is made of it
    is an ordinary model; that of a packed export of moeq keeps its ``quantization_config``.

    Args:
        name: Folder or hub id.
        revision: Branch, tag or commit at the hub.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ValueError: There is none, it needs code that is not to be run, or the model is quantized in a way that is not
            read.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # of files, of the hub, and of code that comes with the model
        raise ValueError(why_not("model", name, error, revision)) from error
    description = description_of(_plain(config))
    quantized_by(description)
    if description is not None and description["quant_method"] != PACKED_BY_MOEQ:
        without_description(config)
    if config.dtype is None:  # some wrappers say it of their language model alone
        config.dtype = config.get_text_config().dtype
    return config


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer that belongs to a model; arguments are those of ``load_config``.

    Raises:
        ValueError: There is none, or it needs code that is not to be run.
    """
    from transformers import AutoTokenizer

    try:
        if Path(name).is_dir() and not trust_remote_code and not has_vocabulary(Path(name)):
            raise ValueError("no vocabulary")
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ValueError(why_not("tokenizer", name, error, revision)) from error


def _plain(config: Any) -> dict[str, Any]:
    """What a configuration says of quantization, at the top and of the language model, as plain values."""
    found: dict[str, Any] = {}
    for place, values in (("", config), ("text_config", getattr(config, "text_config", None))):
        said = {}
        for key in ("quantization_config", "compression_config"):
            value = getattr(values, key, None)
            if value is not None:
                said[key] = value if isinstance(value, dict) else value.to_dict()
        found |= {place: said} if place else said
    return found
