from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from moeq.allocation.constraints import Budget
from moeq.allocation.plan import plan_cost
from moeq.allocation.price import check_budget, file_cost, file_types, symmetry_note
from moeq.allocation.runtime import RUNTIMES, find_runtime
from moeq.quant.carrier import CarrierMode
from moeq.quant.packing import pack
from moeq.quant.spec import GridSpec, WeightShape
from tests.allocation.toy import toy_weights

WEIGHTS = toy_weights(num_blocks=2, num_experts=4, hidden=128, inner=64)
# A grid by projection, so that every runtime but vllm's could read it; sizes ask for no more.
GRIDS = {
    "q_proj": GridSpec(2, 64, symmetric=True), "k_proj": GridSpec(2, 32, symmetric=True),
    "v_proj": GridSpec(3, 64, symmetric=False), "o_proj": GridSpec(4, 64, symmetric=False),
    "gate_proj": GridSpec(4, 64, symmetric=True), "up_proj": GridSpec(6, 32, symmetric=False),
    "down_proj": GridSpec(5, None, symmetric=True),
}  # fmt: skip
PLAN = {w.name: GRIDS[w.linear] for w in WEIGHTS}


def reference_bits(runtime: str, mode: str, grid: GridSpec, rows: int, columns: int) -> Fraction:
    """Bits of a weight in a file by what the formats' descriptions say of one weight, block by block."""
    group = grid.group_size or columns
    symmetric = grid.bits if grid.symmetric else grid.bits + 1
    if runtime == "llama.cpp":  # bytes of a block: halves for scales, then codes
        if symmetric == 2 and group == 64:
            return Fraction(rows * columns, 64) * 8 * (2 + 16)
        if mode == "native" and not grid.symmetric and grid.bits == 4:
            return Fraction(rows * columns, 32) * 8 * (2 + 2 + 16)
        codes = {4: 16, 5: 4 + 16, 8: 32}[next(bits for bits in (4, 5, 8) if symmetric <= bits)]
        return Fraction(rows * columns, 32) * 8 * (2 + codes)
    if runtime == "mlx":  # every group has a scale and a bias
        bits = next(b for b in (2, 3, 4, 5, 6, 8) if (symmetric if mode == "exact" else grid.bits) <= b)
        return rows * columns * (bits + Fraction(32, group))
    if runtime == "gptqmodel":  # every group has a scale and a zero point
        bits = next(b for b in (2, 3, 4, 8) if grid.bits <= b)
        return rows * columns * (bits + Fraction(16 + bits, group))
    if runtime in ("vllm", "sglang"):
        bits = next(b for b in (4, 8) if symmetric <= b)
        return rows * columns * bits + Fraction(rows * columns, group) * 16
    zero = 0 if grid.symmetric else grid.bits
    return rows * columns * (grid.bits + Fraction(16 + zero, group))


# Types of 3, 5 and 6 bits, as "native" has them, are none that vLLM and SGLang read.
MODES = [(runtime, "exact") for runtime in RUNTIMES] + [(name, "native") for name in ("llama.cpp", "mlx", "gptqmodel")]


@pytest.mark.parametrize(("runtime", "mode"), MODES)
def test_cost_in_files_is_the_sum_over_their_types(runtime: str, mode: CarrierMode) -> None:
    bits = [reference_bits(runtime, mode, PLAN[w.name], w.out_features, w.in_features) for w in WEIGHTS]
    shares = [Fraction(1, 2) if w.expert is not None else Fraction(1) for w in WEIGHTS]
    cost = file_cost(PLAN, WEIGHTS, find_runtime(runtime), mode)
    numel = sum(w.numel for w in WEIGHTS)
    active, active_numel = (
        sum(s * x for s, x in zip(shares, xs, strict=True)) for xs in (bits, [w.numel for w in WEIGHTS])
    )
    assert cost.average_bits == pytest.approx(float(sum(bits) / numel), rel=1e-12)
    assert cost.active_average_bits == pytest.approx(float(active / active_numel), rel=1e-12)
    assert cost.bytes == sum(bits) / 8
    assert cost.active_bytes == active / 8
    plain = plan_cost(PLAN, WEIGHTS)
    assert (cost.code_bits, cost.active_code_bits) == (plain.code_bits, plain.active_code_bits)
    assert runtime != "research" or cost == plain


def test_rows_and_zero_points_fill_whole_words_as_they_are_packed() -> None:
    weight = WeightShape("m.o_proj", "attention", 20, 36, 0, "o_proj")
    for runtime, symmetric in (("vllm", True), ("gptqmodel", True), ("gptqmodel", False)):
        grid = GridSpec(4, None, symmetric=symmetric)
        codes = pack(torch.zeros(20, 36, dtype=torch.uint8), 4).numel() * 32
        zeros = pack(torch.zeros(1, 20, dtype=torch.uint8), 4).numel() * 32 if runtime == "gptqmodel" else 0
        assert find_runtime(runtime).file_bits(weight, grid) == codes + 20 * 16 + zeros


def test_a_plan_without_some_weights_costs_what_the_others_take() -> None:
    rest = [w for w in WEIGHTS if w.kind != "attention"]
    plan = {w.name: PLAN[w.name] for w in rest}
    assert file_cost(plan, WEIGHTS, find_runtime("mlx")) == file_cost(plan, rest, find_runtime("mlx"))


def test_types_of_a_file_are_counted() -> None:
    assert file_types(PLAN, WEIGHTS, find_runtime("llama.cpp")) == {"Q2_0": 2, "Q4_0": 14, "Q5_0": 12, "Q8_0": 10}
    native = file_types(PLAN, WEIGHTS, find_runtime("llama.cpp"), "native")
    assert native == {"Q2_0": 2, "Q4_0": 14, "Q4_1": 2, "Q5_0": 10, "Q8_0": 10}
    assert file_types(PLAN, WEIGHTS, find_runtime("research")) == {}


def test_what_has_no_type_is_refused_by_weight() -> None:
    odd = WeightShape("m.o_proj", "attention", 64, 48, 0, "o_proj")
    with pytest.raises(ValueError, match=r"m.o_proj: llama.cpp cannot read 4: gguf has no type .*rows that are"):
        file_cost({"m.o_proj": GridSpec(4, None, symmetric=True)}, [odd], find_runtime("llama.cpp"))


def test_a_budget_is_about_the_files_of_the_runtime() -> None:
    plan = {w.name: GridSpec(3, 64, symmetric=True) for w in WEIGHTS}
    llama, research = find_runtime("llama.cpp"), find_runtime("research")
    check_budget(plan, WEIGHTS, Budget(3.25, "average_bits"), research, "exact")
    check_budget(plan, WEIGHTS, Budget(4.5, "average_bits"), llama, "exact")
    with pytest.raises(
        ValueError, match=r"takes 4.5 average_bits in files for llama.cpp \(exact\) where the budget is 4.49"
    ):
        check_budget(plan, WEIGHTS, Budget(4.49, "average_bits"), llama, "exact")
    check_budget(plan, WEIGHTS, Budget(3.0, "code_bits"), llama, "exact")


@pytest.mark.parametrize(
    ("runtime", "mode", "bits", "note"),
    [
        ("llama.cpp", "exact", (2, 4), r"2g64 4.5 (symmetric 2.25), 4g64 5.5 (symmetric 4.5)"),
        ("llama.cpp", "exact", (3, 6), ""),
        ("llama.cpp", "native", (4,), ""),
        ("vllm", "exact", (3,), ""),
        ("vllm", "exact", (4, 8), r"4g64 8.25 (symmetric 4.25), 8g64 no type (symmetric 8.25)"),
        ("mlx", "exact", (3,), r"3g64 4.5 (symmetric 3.5)"),
        ("mlx", "native", (3,), ""),
        ("gptqmodel", "exact", (3, 4), ""),
        ("research", "exact", (2, 4), ""),
    ],
)
def test_asymmetric_grids_are_noted_where_symmetric_ones_are_a_width_cheaper(
    runtime: str, mode: CarrierMode, bits: tuple[int, ...], note: str
) -> None:
    found = symmetry_note([(w, GridSpec(b, 64)) for w in WEIGHTS for b in bits], find_runtime(runtime), mode)
    assert note in found
    assert bool(note) == bool(found)
    assert not found or found.endswith("; --model.grid full_range is smaller")
    even = [(w, replace(GridSpec(b, 64), symmetric=True)) for w in WEIGHTS for b in bits]
    assert not symmetry_note(even, find_runtime(runtime), mode)
    two_level = [(w, GridSpec.of_kind(kind)) for w in WEIGHTS for kind in ("q2_k", "q4_k")]
    assert not symmetry_note(two_level, find_runtime(runtime), mode)
