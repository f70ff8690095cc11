"""Norms and their readers are found by behaviour, and folding a scale into them is exact or is seen not to be."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm, Qwen3NextRMSNormGated

from moeq.models.adapter import Adapter
from moeq.models.blocks import BlockCall, capture_calls
from moeq.models.norms import (
    NormForm,
    find_norm_readers,
    find_readers,
    fold_difference,
    fold_into_norm,
    norm_form,
    norm_weight,
    reader_weights,
    set_norm_weight_value,
)
from tests.tiny import tiny_model

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "olmoe")


def randomized(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.2, 3.0)
    return module


def probe(family: str, **overrides: Any) -> tuple[Adapter, Tensor, list[BlockCall]]:
    adapter = Adapter(tiny_model(family, **overrides))
    calls = capture_calls(adapter.model, adapter.blocks, {"input_ids": torch.arange(1, 41).reshape(2, 20)})
    return adapter, calls[0].hidden, calls


@pytest.mark.parametrize("width", [2, 7, 64])
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (MixtralRMSNorm, NormForm(0.0, subtracts_mean=False)),
        (Qwen3NextRMSNorm, NormForm(1.0, subtracts_mean=False)),
        (nn.RMSNorm, NormForm(0.0, subtracts_mean=False)),
        (nn.LayerNorm, NormForm(0.0, subtracts_mean=True)),
    ],
)
def test_the_form_of_a_norm_is_what_it_does(kind: Any, form: NormForm, width: int) -> None:
    assert norm_form(randomized(kind(width))) == form
    assert norm_form(randomized(kind(width)).to(torch.bfloat16)) == form


class Scale(nn.Module):
    """Multiplies, and does not normalise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@pytest.mark.parametrize(
    "module", [nn.Linear(8, 8), nn.Embedding(8, 8), nn.BatchNorm1d(8).eval(), Scale(), Qwen3NextRMSNormGated(8)]
)
def test_other_modules_with_a_weight_are_no_norms(module: nn.Module) -> None:
    assert norm_form(module) is None
    with pytest.raises(ValueError, match="does not behave like a norm"):
        norm_weight(module)


@pytest.mark.parametrize("kind", [MixtralRMSNorm, Qwen3NextRMSNorm])
def test_a_stored_multiplier_is_the_one_that_is_applied(kind: Any) -> None:
    norm = kind(16)
    multiplier = torch.linspace(0.5, 2, 16).double()
    norm.weight.data = set_norm_weight_value(norm, multiplier)
    torch.testing.assert_close(norm_weight(norm), multiplier, rtol=1e-6, atol=0)
    x = torch.randn(3, 16)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (16,), multiplier.float(), norm_eps(norm)))


def norm_eps(norm: nn.Module) -> float:
    return float(getattr(norm, "eps", getattr(norm, "variance_epsilon", 0)))


def test_every_reader_of_a_norm_is_found_in_the_order_of_the_run() -> None:
    adapter, hidden, calls = probe("qwen2_moe")
    readers = {r.norm.rpartition(".")[2]: r.readers for r in find_norm_readers(adapter, 1, hidden, calls[1])}
    base = "model.layers.1"
    assert readers["input_layernorm"] == tuple(f"{base}.self_attn.{x}_proj" for x in "qkv")
    mlp = {f"{base}.mlp.{x}" for x in ("experts", "gate", "shared_expert_gate")}
    mlp |= {f"{base}.mlp.shared_expert.{x}_proj" for x in ("gate", "up")}
    assert set(readers["post_attention_layernorm"]) == mlp
    assert readers.keys() == {"input_layernorm", "post_attention_layernorm"}


def test_a_norm_inside_attention_has_its_reader_and_norms_of_heads_have_none() -> None:
    adapter, hidden, calls = probe("deepseek_v3")
    readers = {r.norm.rpartition(".")[2]: r.readers for r in find_norm_readers(adapter, 0, hidden, calls[0])}
    assert readers["kv_a_layernorm"] == ("model.layers.0.self_attn.kv_b_proj",)
    adapter, hidden, calls = probe("qwen3_moe")
    names = {r.norm for r in find_norm_readers(adapter, 0, hidden, calls[0])}
    assert not any("q_norm" in name or "k_norm" in name for name in names)


def test_the_head_reads_the_last_norm() -> None:
    model = tiny_model("mixtral")
    ids = torch.arange(1, 9)[None]
    assert find_readers(model, lambda: model(input_ids=ids, use_cache=False))["model.norm"] == ["lm_head"]


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_any_scale_leaves_every_block_as_it_was(family: str) -> None:
    adapter, hidden, calls = probe(family)
    for block in range(len(adapter.blocks)):
        for readers in find_norm_readers(adapter, block, hidden, calls[block]):
            scale = 0.2 + 2 * torch.rand(len(norm_weight(adapter.model.get_submodule(readers.norm))))
            values = fold_into_norm(adapter, readers, scale)
            assert fold_difference(adapter, block, hidden, calls[block], values) < 1e-5
            values.pop(next(iter(values)))
            assert fold_difference(adapter, block, hidden, calls[block], values) > 1e-2


def test_folding_writes_nothing_and_keeps_the_dtype() -> None:
    adapter, hidden, calls = probe("olmoe", dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in adapter.model.state_dict().items()}
    readers = find_norm_readers(adapter, 0, hidden, calls[0])[-1]
    values = fold_into_norm(adapter, readers, 0.5 + torch.rand(64))
    assert 1e-5 < fold_difference(adapter, 0, hidden, calls[0], values) < 1e-2
    for name, tensor in adapter.model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert name not in values or (values[name].dtype, values[name].shape) == (tensor.dtype, tensor.shape)


def test_a_reader_that_no_hook_sees_is_measured() -> None:
    adapter, hidden, calls = probe("mixtral")
    attention: Any = adapter.blocks[0].self_attn
    forward = attention.forward

    def with_hidden_reader(hidden_states: Tensor, **kwargs: Any) -> Any:
        output, *rest = forward(hidden_states=hidden_states, **kwargs)
        return (output + 0.1 * hidden_states, *rest)

    attention.forward = with_hidden_reader
    readers = find_norm_readers(adapter, 0, hidden, calls[0])[0]
    values = fold_into_norm(adapter, readers, 0.5 + torch.rand(64))
    assert fold_difference(adapter, 0, hidden, calls[0], values) > 1e-3


def test_transposed_experts_have_their_in_features_on_the_other_axis() -> None:
    model = tiny_model("gpt_oss")
    path = next(name for name, module in model.named_modules() if isinstance(module, GptOssExperts))
    assert reader_weights(model, path) == {f"{path}.gate_up_proj": -2}
    assert reader_weights(model, "lm_head") == {"lm_head.weight": -1}
