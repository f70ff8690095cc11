import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeq.checkpoint.nibble_forms import NibbleForm, SqueezedForm
from moeq.checkpoint.packed import IMPLEMENTATION, PackedExperts, PackedLinear
from moeq.checkpoint.packed_self import packed_self
from moeq.checkpoint.plane_form import PlaneForm
from moeq.checkpoint.prepare import model_bytes, prepare
from moeq.kernels.nibbles import arrangement
from moeq.models.adapter import Adapter
from tests.tiny import tiny_model

FAMILIES = ("qwen2_moe", "mixtral", "gpt_oss", "nemotron_h")
UNLIMITED = 1e9
IDS = torch.tensor([[5, 9, 200, 31, 7], [3, 3, 80, 2, 150]])
needs_nibbles = pytest.mark.skipif(arrangement() is None, reason="torch has no operation on 4 bits for this processor")


def packed_model(family: str, dtype: torch.dtype = torch.bfloat16, bits: int = 4) -> PreTrainedModel:
    return packed_self(Adapter(tiny_model(family, dtype=dtype)), bits)


def forms(model: nn.Module) -> set[type]:
    return {type(module.form) for module in model.modules() if isinstance(module, PackedLinear)}


@contextmanager
def chosen_experts(model: nn.Module) -> Iterator[list[Tensor]]:
    """Top-k indices that each block of experts is called with."""
    chosen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: chosen.append(args[1].sort(-1).values))
        for module in model.modules()
        if isinstance(module, PackedExperts)
    ]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prepared_model_gives_the_logits_of_the_reference_and_chooses_its_experts(family: str) -> None:
    model = packed_model(family, torch.float32)
    with chosen_experts(model) as chosen:
        expected = model(IDS).logits
        prepare(model)
        assert forms(model) == {PlaneForm}
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    half = len(chosen) // 2
    assert half
    for before, after in zip(chosen[:half], chosen[half:], strict=True):
        assert torch.equal(before, after)


@needs_nibbles
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_in_bfloat16_every_module_gives_the_outputs_of_the_reference_up_to_its_roundings(family: str) -> None:
    model, calls = packed_model(family), []
    modules = [m for m in model.modules() if isinstance(m, PackedExperts | PackedLinear)]
    inside = {id(m) for e in modules if isinstance(e, PackedExperts) for m in e.modules() if m is not e}
    for module in modules:
        if id(module) not in inside:
            module.register_forward_hook(lambda *call: calls.append(call))
    model(IDS)
    expected = list(calls)
    prepare(model, 1000.0)
    assert forms(model) & {NibbleForm, SqueezedForm}
    assert any(isinstance(module, PackedExperts) for module, _, _ in expected)
    for module, inputs, output in expected:
        difference = (module(*inputs) - output).float().norm()
        assert float(difference / output.float().norm()) < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("bits", [2, 8])
def test_room_decides_how_many_weights_take_4_bits_and_is_not_exceeded(bits: int) -> None:
    model = packed_model("qwen2_moe", bits=bits)
    before = model_bytes(model)
    assert before == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    result = prepare(model, 0.0)
    assert forms(model) <= {PlaneForm, SqueezedForm}
    assert result.num_bytes == (model_bytes(model), before)
    assert model_bytes(model) <= before
    result = prepare(packed_model("qwen2_moe", bits=bits))
    assert result.num_bytes[0] <= 1.05 * before
    assert not result.fallbacks
    assert f"{result.num_bytes[0] / before:.3f} times" in result.line()


@needs_nibbles
def test_room_may_be_given_to_a_model_that_is_prepared() -> None:
    model = packed_model("qwen2_moe", bits=3)
    prepare(model, 0.0)
    assert SqueezedForm in forms(model)
    made = {id(module.form) for module in model.modules() if isinstance(module, PackedLinear)}
    prepare(model, 0.0)
    assert {id(module.form) for module in model.modules() if isinstance(module, PackedLinear)} == made
    prepare(model, UNLIMITED)
    assert NibbleForm in forms(model)
    assert SqueezedForm not in forms(model)


@needs_nibbles
def test_what_every_token_passes_takes_4_bits_before_experts() -> None:
    model = packed_model("mixtral", bits=8)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    prepare(model, 1000.0)
    attention = {type(layer.form) for name, layer in layers.items() if "self_attn" in name}
    assert NibbleForm in attention
    assert NibbleForm not in {type(layer.form) for name, layer in layers.items() if "experts" in name}


@needs_nibbles
def test_a_saved_model_has_the_bytes_of_one_that_was_not_prepared(tmp_path: Path) -> None:
    model = packed_model("qwen2_moe", bits=3)
    model.save_pretrained(tmp_path / "before")
    prepare(model, UNLIMITED)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "after")
    for path in (tmp_path / "before").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes()
    assert forms(model) == {type(None)}
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
    assert NibbleForm in forms(model)


def test_moving_a_prepared_model_brings_the_reference_back() -> None:
    model = packed_model("mixtral")
    with torch.no_grad():
        expected = model(IDS).logits
    prepare(model)
    model.to("cpu")
    model.set_experts_implementation("eager")
    assert forms(model) == {type(None)}
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)


def test_eager_experts_and_gradients_go_by_the_reference() -> None:
    model = packed_model("mixtral")
    experts = next(module for module in model.modules() if isinstance(module, PackedExperts))
    hidden = torch.randn(3, experts[0].up_proj.in_features).bfloat16()
    index, weights = torch.tensor([[0, 1], [2, 1], [0, 3]]), torch.rand(3, 2).bfloat16()
    expected = experts(hidden, index, weights)
    prepare(model)
    with_gradients = hidden.clone().requires_grad_()
    experts(with_gradients, index, weights).float().sum().backward()
    assert with_gradients.grad is not None
    assert with_gradients.grad.abs().sum() > 0
    model.set_experts_implementation("eager")
    assert torch.equal(experts(hidden.requires_grad_(), index, weights), expected)


def test_the_reference_is_reported_once_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("moeq.checkpoint.plane_form.MULTIPLE", 24)
    model = packed_model("mixtral")
    with caplog.at_level(logging.INFO, "moeq.checkpoint.prepare"):
        result = prepare(model)
        with torch.no_grad():
            model(IDS)
    assert {fallback.reason for fallback in result.fallbacks} == {"out features not in multiples of 24"}
    assert len(caplog.messages) == 1
    assert f"{len(result.fallbacks)} by the reference (out features not in multiples of 24)" in caplog.messages[0]


@torch.no_grad()
def test_slots_of_other_ranks_are_skipped_by_prepared_experts_too() -> None:
    model = packed_model("qwen2_moe", torch.float32)
    prepare(model)
    experts = next(module for module in model.modules() if isinstance(module, PackedExperts))
    hidden, elsewhere = torch.randn(2, experts[0].up_proj.in_features), len(experts)
    output = experts(hidden, torch.tensor([[2, elsewhere], [elsewhere, elsewhere]]), torch.full((2, 2), 0.5))
    alone = experts(hidden[:1], torch.tensor([[2]]), torch.tensor([[0.5]]))
    torch.testing.assert_close(output[:1], alone)
    assert torch.equal(output[1], torch.zeros_like(output[1]))


def test_dense_experts_run_as_transformers_runs_them() -> None:
    model = tiny_model("mixtral", dtype=torch.float32)
    with torch.no_grad():
        model.set_experts_implementation("grouped_mm")
        expected = model(IDS).logits
        model.set_experts_implementation(IMPLEMENTATION)
        assert torch.equal(model(IDS).logits, expected)
