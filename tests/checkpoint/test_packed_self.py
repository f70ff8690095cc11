from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moeq.checkpoint.packed_self import packed_bytes, packed_self
from moeq.checkpoint.stream import open_stream
from moeq.models.adapter import Adapter
from moeq.models.residency import InMemory
from moeq.quant.grid import dequantize
from moeq.quant.rtn import round_to_nearest
from moeq.quant.spec import GridSpec
from tests.tiny import save_tiny, tiny_model

# Shared experts with gates; biases and another layout; correction biases and latent attention; experts without gate.
FAMILIES = ("qwen2_moe", "gpt_oss", "deepseek_v3", "nemotron_h")
IDS = torch.arange(40).view(2, 20) * 5 % 256 + 1


def eager(family: str, **settings: Any) -> Any:
    model = tiny_model(family, **settings)
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def reference_rounded(model: Any, bits: int) -> Any:
    """The dense model with every quantized weight rounded in place."""
    adapter = Adapter(model)
    for site in adapter.all_sites():
        grid = GridSpec(bits, 64 if site.in_features % 64 == 0 else 32, clip_search=bits < 8)
        found = round_to_nearest(adapter.get_weight(site), grid, model.dtype)
        adapter.set_weight(site, dequantize(found.codes_EOI, found.scale_EOG, found.zero_point_EOG, bits))
    return model


class OneAtATime(InMemory):
    """Counts the blocks that are resident together."""

    def __init__(self, model: Any, num_blocks: int) -> None:
        super().__init__(model, num_blocks)
        self.most = self.now = 0

    @contextmanager
    def resident(self, block: int) -> Iterator[None]:
        self.now += 1
        self.most = max(self.most, self.now)
        yield
        self.now -= 1


@pytest.mark.parametrize(("family", "bits"), [*((family, 4) for family in FAMILIES), ("qwen2_moe", 8)])
def test_logits_equal_those_of_the_dense_model_with_the_rounded_weights(family: str, bits: int) -> None:
    packed = packed_self(Adapter(tiny_model(family, dtype=torch.bfloat16)), bits)
    expected = logits(reference_rounded(eager(family, dtype=torch.bfloat16), bits))
    assert torch.equal(logits(packed), expected)
    assert not torch.equal(expected, logits(eager(family, dtype=torch.bfloat16)))


def test_a_streamed_model_and_one_in_memory_have_the_same_packed_self(tmp_path: Path) -> None:
    save_tiny("qwen2_moe", tmp_path)
    model, stream = open_stream(tmp_path, None, lambda dtype: dtype)
    streamed = packed_self(Adapter(model, stream), 4)
    in_memory = packed_self(Adapter(tiny_model("qwen2_moe", dtype=torch.bfloat16)), 4)
    assert all(torch.equal(value, in_memory.state_dict()[name]) for name, value in streamed.state_dict().items())
    assert torch.equal(logits(streamed), logits(in_memory))
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())


def test_routers_norms_and_what_lies_outside_of_the_blocks_are_exact() -> None:
    model = tiny_model("deepseek_v3")
    packed = packed_self(Adapter(model), 4).state_dict()
    exact = {name for name, value in model.state_dict().items() if name in packed and torch.equal(value, packed[name])}
    quantized = {name for name in model.state_dict() if name.endswith("_proj.weight") or ".experts." in name}
    assert exact >= {name for name in model.state_dict() if name not in quantized and "_proj" not in name}
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in exact
    assert not any(name.endswith("o_proj.weight") for name in packed)


def test_one_block_is_resident_at_a_time_and_the_model_stays_as_it_is() -> None:
    model = tiny_model("mixtral")
    before = logits(model)
    residency = OneAtATime(model, 2)
    packed = packed_self(Adapter(model, residency), 4)
    assert residency.most == 1
    assert torch.equal(logits(model), before)
    own = {tensor.data_ptr() for name, tensor in packed.state_dict().items() if ".layers." in name}
    assert own.isdisjoint(tensor.data_ptr() for tensor in model.state_dict().values())


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_are_those_of_its_tensors(bits: int) -> None:
    adapter = Adapter(tiny_model("qwen2_moe", dtype=torch.bfloat16))
    packed = packed_self(adapter, bits)
    shapes = sum(p.nbytes for name, p in packed.named_parameters() if name.endswith("weight_shape"))
    assert packed_bytes(adapter, bits) == sum(t.nbytes for t in (*packed.parameters(), *packed.buffers())) - shapes


def test_a_model_that_is_computed_in_float32_keeps_the_scales_of_its_files(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    model, stream = open_stream(tmp_path, None, lambda _: torch.float32)
    packed = packed_self(Adapter(model, stream), 4)
    linear = packed.get_submodule("model.layers.0.self_attn.q_proj")
    assert linear.weight_scale.dtype == torch.bfloat16
    assert logits(packed).dtype == torch.float32
    narrow = packed_self(Adapter(tiny_model("mixtral", dtype=torch.bfloat16)), 4)
    assert torch.equal(linear.weight_packed, narrow.get_submodule("model.layers.0.self_attn.q_proj").weight_packed)
