"""Shapes and shares of all weights, against the parameters of the model."""

import pytest

from moeq.models.adapter import Adapter
from moeq.models.shapes import experts_per_token, weight_shapes
from tests.tiny import tiny_config, tiny_model


def test_every_weight_has_its_place_its_shape_and_the_share_of_tokens_that_use_it() -> None:
    model = tiny_model("qwen2_moe")
    shapes = {shape.name: shape for shape in weight_shapes(Adapter(model))}
    expert = shapes["model.layers.1.mlp.experts.3.down_proj"]
    assert (expert.kind, expert.block, expert.linear, expert.expert) == ("routed", 1, "down_proj", 3)
    assert (expert.out_features, expert.in_features) == model.get_parameter(
        "model.layers.1.mlp.experts.down_proj"
    ).shape[1:]
    assert expert.active_share == 2 / 8
    query = shapes["model.layers.0.self_attn.q_proj"]
    assert (query.kind, query.expert, query.active_share) == ("attention", None, 1.0)
    assert (query.out_features, query.in_features) == model.get_parameter(
        "model.layers.0.self_attn.q_proj.weight"
    ).shape
    assert sum(shape.numel for shape in shapes.values()) == sum(
        p.numel() for name, p in model.named_parameters() if p.ndim > 1 and "layers" in name and "gate." not in name
    )


@pytest.mark.parametrize(("family", "chosen"), [("mixtral", 2), ("ernie4_5_moe", 2), ("zaya", 1), ("gemma4_text", 2)])
def test_experts_per_token_are_read_by_the_name_that_the_family_gives_them(family: str, chosen: int) -> None:
    assert experts_per_token(tiny_config(family)) == chosen
