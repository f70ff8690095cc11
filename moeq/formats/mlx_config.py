"""``config.json`` as mlx-lm's classes read it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moeq.formats.mlx_family import MlxFamily, rope_of


def completed(values: Mapping[str, Any], config: Any, family: MlxFamily, *, has_head: bool) -> dict[str, Any]:
    """A source's configuration with what mlx-lm's class reads and other libraries look for elsewhere.

    Args:
        values: Of ``config.json``.
        config: The same as transformers reads it.
        family: Of the model.
        has_head: Whether the files have a head that is not the embedding.
    """
    if family.language_model:
        inner = replace(family, language_model="")
        text = completed(values["text_config"], config.get_text_config(), inner, has_head=has_head)
        if family.written_as:
            single = {key: value for key, value in values.items() if not isinstance(value, dict)}
            return {**single, **text, "model_type": family.written_as}
        beside = {key: make(config) for key, make in family.made_beside.items()}
        return {**beside, **values, "text_config": text}
    if family.inside_of:
        text = completed(values, config, replace(family, inside_of=""), has_head=has_head)
        single = {key: value for key, value in text.items() if not isinstance(value, dict)}
        return {**single, "model_type": family.inside_of, "text_config": text}
    rope = rope_of(config)
    added: dict[str, Any] = {}
    if rope.get("rope_type", "default") != "default":
        added["rope_scaling"] = {**rope, "type": rope["rope_type"]}
    if "rope_theta" in rope:
        added["rope_theta"] = rope["rope_theta"]
    for key in family.keys:
        added[key] = rope[key] if key in rope else getattr(config, key, None)
    missing = {key: value for key, value in added.items() if key not in values}
    made = {key: make(config) for key, make in family.made.items()}
    if family.written_as:
        made["model_type"] = family.written_as
    return {**values, **missing, **made, "tie_word_embeddings": not has_head}
