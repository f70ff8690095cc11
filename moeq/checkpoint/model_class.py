"""Which class opens a source: a causal language model, or the wrapper of images, sound and text it was published as."""

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)


def model_class(config: Any) -> Any:
    """The auto class of transformers that opens a source as what its configuration says that it is.

    A wrapper is never opened as its language model alone, unless ``architectures`` names that: what stands beside the
    language model would be left out of every export.

    Args:
        config: Configuration of the source, or of an export.

    Returns:
        One of ``AUTO_CLASSES``; ``AutoModelForCausalLM`` for what none of them knows, which says so when it is asked.
    """
    known = {auto: _classes(auto, config) for auto in AUTO_CLASSES if type(config) in auto._model_mapping}
    named = {*(getattr(config, "architectures", None) or ())}
    for auto, classes in known.items():
        if named & {each.__name__ for each in classes}:
            return auto
    for auto, classes in known.items():
        if type(config) in {each.config_class for each in classes}:  # not that of a part of it
            return auto
    custom = getattr(config, "auto_map", None) or {}
    return next((auto for auto in AUTO_CLASSES if auto in known or auto.__name__ in custom), AutoModelForCausalLM)


def _classes(auto: Any, config: Any) -> tuple[type, ...]:
    """What an auto class may make of a configuration."""
    found = auto._model_mapping[type(config)]
    return tuple(found) if isinstance(found, list | tuple) else (found,)
