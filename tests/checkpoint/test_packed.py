import itertools

import pytest
import torch
from torch import Tensor, nn

from moeq.checkpoint import packed as packed_module
from moeq.checkpoint import packed_weight
from moeq.checkpoint.packed import PackedExpert, PackedExperts, PackedLinear, keep_dequantized
from moeq.checkpoint.packed_weight import PackedFormat, dequantize_codes, packed_tensors
from moeq.models.experts import expert_weight, is_experts_module, projections, stacked_weight
from moeq.quant.spec import QuantizedWeight
from tests.export.rounding import GRIDS, real_weight, round_weight
from tests.tiny import tiny_model

FAMILIES = ("qwen2_moe", "mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "gpt_oss", "aria_text", "nemotron_h")
DTYPES = (torch.float32, torch.bfloat16)


def packed_linear(weight: QuantizedWeight, bias: Tensor | None = None) -> PackedLinear:
    rows, columns = weight.codes_OI.shape
    grid = PackedFormat(weight.bits, weight.group_size, symmetric=weight.zero_point_OG is None)
    layer = PackedLinear(columns, rows, grid, weight.scale_OG.dtype, None if bias is None else bias.dtype)
    layer.load_state_dict({**packed_tensors(weight), **({} if bias is None else {"bias": bias})}, strict=True)
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_dequantized_weights_equal_a_loop_over_groups(grid: tuple[int, int | None, bool], dtype: torch.dtype) -> None:
    weight = round_weight(torch.randn(24, 32).to(dtype), *grid)
    assert torch.equal(dequantize_codes(weight), real_weight(weight))
    assert dequantize_codes(weight).dtype == dtype


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_are_dequantized_alike_in_parts_and_whole(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = round_weight(torch.randn(50, 64).bfloat16(), 4, 32, symmetric)
    monkeypatch.setattr(packed_weight, "CHUNK", 64 * 7 // torch.get_num_threads())
    assert torch.equal(dequantize_codes(weight), real_weight(weight))


@pytest.mark.parametrize("grid", [*GRIDS, (5, 8, False), (6, None, False), (7, 16, True)])
def test_a_packed_linear_equals_the_dense_linear(grid: tuple[int, int | None, bool]) -> None:
    weight = round_weight(torch.randn(20, 64), *grid)
    bias, hidden = torch.randn(20), torch.randn(3, 5, 64)
    layer = packed_linear(weight, bias)
    assert torch.equal(layer(hidden), nn.functional.linear(hidden, real_weight(weight), bias))
    assert layer.weight_packed.nbytes < weight.codes_OI.nbytes or weight.bits == 8


@pytest.mark.parametrize("grid", GRIDS)
def test_a_packed_linear_holds_the_codes_it_was_given(grid: tuple[int, int | None, bool]) -> None:
    weight = round_weight(torch.randn(20, 64), *grid)
    held = packed_linear(weight).quantized()
    assert torch.equal(held.codes_OI, weight.codes_OI)
    assert torch.equal(held.scale_OG, weight.scale_OG)
    assert (held.zero_point_OG is None) == (weight.zero_point_OG is None)
    if weight.zero_point_OG is not None:
        assert held.zero_point_OG is not None
        assert torch.equal(held.zero_point_OG, weight.zero_point_OG)


def test_tensors_have_the_names_and_shapes_of_compressed_tensors() -> None:
    tensors = packed_tensors(round_weight(torch.randn(20, 48, dtype=torch.bfloat16), 3, 16, False))
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "weight_packed": ((20, 5), torch.int32),
        "weight_scale": ((20, 3), torch.bfloat16),
        "weight_zero_point": ((2, 3), torch.int32),
        "weight_shape": ((2,), torch.int64),
    }
    assert tensors["weight_shape"].tolist() == [20, 48]


def pack_experts(source: nn.Module, dtype: torch.dtype, *, plain: tuple[tuple[int, str], ...] = ()) -> PackedExperts:
    """Round the experts of ``source`` in place, and hold them packed, those in ``plain`` as ordinary linears."""
    grids, experts = itertools.cycle(GRIDS), []
    for e in range(source.num_experts):
        layers: dict[str, nn.Module] = {}
        for leaf in projections(source):
            view = expert_weight(source, e, leaf)
            if (e, leaf) in plain:
                linear = nn.Linear(view.shape[1], view.shape[0], bias=False, dtype=dtype)
                linear.load_state_dict({"weight": view})
                layers[leaf] = linear
                continue
            weight = round_weight(view, *next(grids))
            view.copy_(real_weight(weight))
            layers[leaf] = packed_linear(weight)
        experts.append(PackedExpert(**layers))
    held = PackedExperts(source, experts)
    held.load_state_dict({name: p for name, p in source.state_dict().items() if "bias" in name}, strict=False)
    return held


def experts_of(family: str, dtype: torch.dtype) -> nn.Module:
    model = tiny_model(family, dtype=dtype)
    model.set_experts_implementation("eager")
    return next(module for module in model.modules() if is_experts_module(module))


def routing(tokens: int, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weights, index = torch.randn(tokens, experts).softmax(-1).topk(2)
    return index, weights.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_experts_equal_the_eager_loop_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    source = experts_of(family, dtype)
    experts = pack_experts(source, dtype, plain=((0, "gate_proj"), (1, "down_proj"), (2, "up_proj")))
    for tokens in (1, 37):
        hidden = torch.randn(tokens, stacked_weight(source, "into").shape[-1]).to(dtype)
        index, weights = routing(tokens, source.num_experts, dtype)
        assert torch.equal(experts(hidden, index, weights), source(hidden, index, weights))


@torch.no_grad()
def test_only_the_experts_that_are_hit_are_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = pack_experts(experts_of("mixtral", torch.float32), torch.float32)
    calls = []

    def counting(weight: QuantizedWeight) -> Tensor:
        calls.append(weight)
        return dequantize_codes(weight)

    monkeypatch.setattr(packed_module, "dequantize_codes", counting)
    index = torch.tensor([[2, 5], [5, 2]])
    experts(torch.randn(2, 64), index, torch.full((2, 2), 0.5))
    assert len(calls) == 2 * 3


@torch.no_grad()
def test_slots_of_other_ranks_are_skipped() -> None:
    source = experts_of("qwen3_moe", torch.float32)
    experts = pack_experts(source, torch.float32)
    hidden, elsewhere = torch.randn(2, 64), source.num_experts
    output = experts(hidden, torch.tensor([[2, elsewhere], [elsewhere, elsewhere]]), torch.full((2, 2), 0.5))
    # The same by weights of zero: eager loops of older versions of transformers know no slots of other ranks.
    expected = source(hidden, torch.tensor([[2, 3], [2, 3]]), torch.tensor([[0.5, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(output, expected)
    assert torch.equal(output[1], torch.zeros(64))


@torch.no_grad()
def test_hooks_see_packed_experts_as_experts() -> None:
    experts = pack_experts(experts_of("olmoe", torch.float32), torch.float32)
    assert is_experts_module(experts)
    assert experts.num_experts == len(experts) == 8
    seen = []
    with experts.register_forward_pre_hook(lambda module, args: seen.append([tuple(a.shape) for a in args])):
        experts(torch.randn(3, 64), *routing(3, 8, torch.float32))
    assert seen == [[(3, 64), (3, 2), (3, 2)]]


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "nemotron_h"])
@torch.no_grad()
def test_kept_weights_are_dequantized_once_and_give_the_same_outputs(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = experts_of(family, torch.float32)
    experts = pack_experts(source, torch.float32)
    linear = packed_linear(round_weight(torch.randn(64, 64), 4, 16, False))
    hidden = torch.randn(6, stacked_weight(source, "into").shape[-1])
    ids, weights = torch.tensor([[0, 1], [2, 3], [0, 2], [1, 3], [4, 5], [6, 7]]), torch.rand(6, 2)

    def outputs() -> list[Tensor]:
        return [experts(hidden, ids, weights), linear(torch.ones(2, 64))]

    calls: list[QuantizedWeight] = []
    make = packed_weight.dequantize_weight
    monkeypatch.setattr(
        packed_weight, "dequantize_weight", lambda weight, dtype: (calls.append(weight), make(weight, dtype))[1]
    )
    expected = outputs()
    per_pass = len(calls)
    both = nn.ModuleList([experts, linear])
    assert not keep_dequantized(both, 1000.0)
    outputs()
    assert len(calls) == 2 * per_pass
    assert keep_dequantized(both, 1e9)
    for _ in range(3):
        for output, before in zip(outputs(), expected, strict=True):
            assert torch.equal(output, before)
    assert len(calls) == 3 * per_pass


def test_a_model_without_packed_weights_keeps_none() -> None:
    assert not keep_dequantized(nn.Linear(4, 4), 1e9)
