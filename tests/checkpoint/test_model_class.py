"""The class that opens a source is the one that its configuration names."""

import pytest
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
)

from moeq.checkpoint.model_class import model_class


class Custom(PretrainedConfig):
    """A configuration that transformers does not know."""

    model_type = "custom"


@pytest.mark.parametrize(
    ("family", "architecture", "expected"),
    [
        ("mixtral", "MixtralForCausalLM", AutoModelForCausalLM),
        ("mixtral", None, AutoModelForCausalLM),
        ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", AutoModelForImageTextToText),
        ("qwen3_5_moe", "Qwen3_5MoeForCausalLM", AutoModelForCausalLM),
        ("qwen3_5_moe_text", None, AutoModelForCausalLM),
        ("qwen3_vl_moe", "AnotherName", AutoModelForImageTextToText),
        ("mistral4", None, AutoModelForImageTextToText),
        ("qwen3_omni_moe", None, AutoModelForMultimodalLM),
        ("bert", "BertForMaskedLM", AutoModelForCausalLM),
    ],
)
def test_the_architecture_decides(family: str, architecture: str | None, expected: type) -> None:
    config = CONFIG_MAPPING[family]()
    config.architectures = None if architecture is None else [architecture]
    assert model_class(config) is expected


def test_a_wrapper_that_names_no_architecture_is_not_opened_as_its_language_model_alone() -> None:
    assert model_class(CONFIG_MAPPING["qwen3_5_moe"]()) is AutoModelForImageTextToText


def test_custom_code_is_opened_by_the_class_that_it_registers() -> None:
    assert model_class(Custom(auto_map={"AutoModelForImageTextToText": "code.Model"})) is AutoModelForImageTextToText
    assert model_class(Custom()) is AutoModelForCausalLM
