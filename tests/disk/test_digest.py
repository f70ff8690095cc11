import torch

from moeq.disk.digest import digest, model_digest, tensor_digest
from tests.tiny import tiny_model


def test_equal_models_have_equal_digests_and_others_not() -> None:
    digests = [model_digest(tiny_model("mixtral", seed=seed)) for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_one_changed_value_of_a_parameter_changes_the_digest() -> None:
    model = tiny_model("qwen2_moe")
    before = model_digest(model)
    model.model.layers[1].mlp.experts.down_proj[3, 2, 1] += 1
    assert model_digest(model) != before


def test_buffers_that_steer_routing_count() -> None:
    model = tiny_model("deepseek_v3")
    before = model_digest(model)
    model.model.layers[1].mlp.gate.e_score_correction_bias[0] += 1
    assert model_digest(model) != before


def test_tensor_digest_tells_values_dtype_and_shape_apart() -> None:
    x = torch.zeros(2, 3, dtype=torch.int64)
    variants = [x, x + 1, x.int(), x.reshape(3, 2)]
    assert len({tensor_digest(variant) for variant in variants}) == 4
    assert tensor_digest(x) == tensor_digest(x.clone())


def test_digest_ignores_the_order_of_keys_and_nothing_else() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert len({digest(x) for x in ({"a": 1}, {"a": "1"}, {"a": 2}, {"b": 1}, [1])}) == 5
