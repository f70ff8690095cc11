import copy

import pytest
import torch
from torch import nn

from moeq.disk.digest import model_digest
from moeq.models.adapter import Adapter
from moeq.models.storage import is_widened, rounded_to_storage, storage_dtype, widen
from tests.tiny import tiny_model

BF16, F32 = torch.bfloat16, torch.float32


def wide(family: str = "qwen2_moe") -> tuple[nn.Module, nn.Module]:
    """A bfloat16 model, and the same in float32."""
    model = tiny_model(family, dtype=BF16)
    widened = copy.deepcopy(model)
    widen(widened)
    return model, widened


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_a_widened_model_holds_the_same_values_in_float32_and_knows_the_dtypes_of_its_files(family: str) -> None:
    model, widened = wide(family)
    assert is_widened(widened)
    assert not is_widened(model)
    assert storage_dtype(model) == storage_dtype(widened) == BF16
    for name, tensor in model.state_dict().items():
        held = widened.state_dict()[name]
        if tensor.is_floating_point():
            assert held.dtype == F32
            assert storage_dtype(model, name) == storage_dtype(widened, name) == tensor.dtype, name
        assert torch.equal(held, tensor.to(held.dtype)), name


def test_a_widened_model_computes_in_float32() -> None:
    model, widened = wide()
    ids = torch.arange(24).view(2, 12)
    logits, expected = widened(input_ids=ids).logits, tiny_model("qwen2_moe")
    assert logits.dtype == F32
    expected.load_state_dict(model.state_dict())
    assert torch.equal(logits, expected(input_ids=ids).logits)


def test_tied_parameters_stay_tied() -> None:
    model = tiny_model("qwen2_moe", dtype=BF16, tie_word_embeddings=True)
    widen(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == F32


def test_parts_that_are_float32_in_the_files_stay_float32() -> None:
    model = tiny_model("deepseek_v3", dtype=BF16)
    name = "model.layers.1.mlp.gate.weight"
    gate = model.get_parameter(name)
    gate.data = gate.data.float() * 1.001  # not a bfloat16 number
    widen(model)
    assert storage_dtype(model, name) == F32
    assert storage_dtype(model, "model.norm.weight") == BF16


def test_weights_that_are_written_are_rounded_to_the_files_dtype() -> None:
    model, widened = wide()
    value_DD = torch.randn(64, 64)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(rounded_to_storage(widened, name, value_DD), value_DD.to(BF16))
    for site in Adapter(model).sites(1):
        new_EOI = torch.randn(site.num_experts, sum(site.rows), site.in_features)
        for each in (model, widened):
            Adapter(each).set_weight(site, new_EOI)
        assert torch.equal(Adapter(model).get_weight(site).float(), Adapter(widened).get_weight(site))


def test_the_digest_of_a_model_does_not_depend_on_the_dtype_that_it_is_computed_in() -> None:
    model, widened = wide()
    digests = [model_digest(each, lambda name, each=each: storage_dtype(each, name)) for each in (model, widened)]
    assert digests[0] == digests[1] == model_digest(model) != model_digest(widened)
