"""Which class opens a source: a causal language model, or the wrapper of images, sound and text it was published as."""

from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

# Auto classes with what each makes of a class of configurations.
AUTO_CLASSES: dict[Any, Any] = {
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForMultimodalLM: MODEL_FOR_MULTIMODAL_LM_MAPPING,
}


def model_class(config: Any) -> Any:
    """The auto class of transformers that opens a source as what its configuration says that it is.

    A wrapper is never opened as its language model alone, unless ``architectures`` names that: what stands beside the
    language model would be left out of every export.

    Args:
        config: Configuration of the source, or of an export.

    Returns:
        One of ``AUTO_CLASSES``; ``AutoModelForCausalLM`` for what none of them knows, which says so when it is asked.
    """
    known = {auto: _classes(made[type(config)]) for auto, made in AUTO_CLASSES.items() if type(config) in made}
    named = {*(getattr(config, "architectures", None) or ())}
    for auto, classes in known.items():
        if named & {each.__name__ for each in classes}:
            return auto
    for auto, classes in known.items():
        if type(config) in {each.config_class for each in classes}:  # not that of a part of it
            return auto
    custom = getattr(config, "auto_map", None) or {}
    return next((auto for auto in AUTO_CLASSES if auto in known or auto.__name__ in custom), AutoModelForCausalLM)


def runs_code(model: Any) -> bool:
    """Whether a model or its configuration is of a class that came with its files: it is opened again by that."""
    packages = {type(each).__module__.partition(".")[0] for each in (model, model.config)}
    return TRANSFORMERS_DYNAMIC_MODULE_NAME in packages


def _classes(found: Any) -> tuple[Any, ...]:
    """One class, or several, as a tuple."""
    return tuple(found) if isinstance(found, list | tuple) else (found,)
