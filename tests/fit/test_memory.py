"""What the formulas expect is what is alive, counted operation by operation."""

from pathlib import Path

import pytest
import torch

from moeq.allocation.plan import uniform_plan
from moeq.checkpoint.loading import stream_model
from moeq.fit.memory import (
    KERNEL_BYTES,
    LEAST_HESSIAN_BYTES,
    DataShape,
    block_file_bytes,
    choose_hessian_gib,
    gather_bytes,
    gather_together_bytes,
    kernel_bytes,
    stack_bytes,
)
from moeq.fit.schedule import GIB, whole
from moeq.fit.solve import make_units, solve_unit
from moeq.kernels.onednn import most_kernels
from moeq.models.adapter import Adapter
from moeq.models.blocks import capture_calls, run_block
from moeq.models.shapes import weight_shapes
from moeq.models.sizes import forward_bytes, model_bytes
from moeq.quant.gptq import gptq_solve
from moeq.quant.hessian import accumulate, empty_state
from moeq.quant.hessian_groups import accumulate_groups
from moeq.quant.spec import GridSpec, SolveSpec
from moeq.quant.workspace import workspace_bytes
from tests.live_bytes import LiveBytes
from tests.tiny import MOE_FAMILIES, save_tiny, tiny_model

WIDE = {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_streamed_block_takes_its_bytes_and_a_stack_of_experts_beside_them_while_it_loads(
    family: str, tmp_path: Path
) -> None:
    folder = save_tiny(family, tmp_path / "model", hidden_size=256)
    model, stream = stream_model(str(folder))
    expected = model_bytes(Adapter(model, stream), streamed=True)
    with LiveBytes() as live, stream.resident(0):
        assert live.now == pytest.approx(expected.blocks[0], rel=0.02)
    most = expected.blocks[0] + expected.loading[0]  # where all other parameters come first
    assert 0.7 * most <= live.peak <= 1.02 * most
    assert sum(expected.blocks) + expected.outside == expected.total
    assert expected.held(1) == {"outside of blocks": expected.outside, "block": expected.blocks[1]}


def test_a_model_in_memory_is_held_whole_and_a_tied_head_once() -> None:
    model = tiny_model("qwen2_moe", tie_word_embeddings=True)
    found = model_bytes(Adapter(model), streamed=False)
    assert found.total == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert found.held(0) == {"model": found.total}


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_activations_of_a_block_stay_below_what_is_expected_and_not_far(family: str) -> None:
    model = tiny_model(family)
    adapter, ids_BT = Adapter(model), torch.arange(512).remainder(264).view(4, 128)
    block = len(adapter.blocks) - 1
    call = capture_calls(model, adapter.blocks, {"input_ids": ids_BT})[block]
    with LiveBytes() as live, torch.no_grad():
        run_block(adapter.blocks[block], call.hidden, call)
    expected = forward_bytes(adapter, block, 512, 128)
    assert 0.3 * expected <= live.peak <= 1.2 * expected


def test_gathering_takes_the_rows_twice_in_float32() -> None:
    adapter = Adapter(tiny_model("mixtral", hidden_size=256))
    site = adapter.sites(0)[0]
    state, rows = empty_state(1, site.in_features, "cpu"), torch.randn(1024, site.in_features).bfloat16()
    with LiveBytes() as live:
        accumulate(state, 0, rows)
    assert live.peak == pytest.approx(gather_bytes([whole(site)], 1024), rel=0.15)


@pytest.mark.parametrize("rows", [256, 4096])
def test_gathering_all_experts_at_once_takes_their_rows_and_the_products_of_a_chunk(rows: int) -> None:
    site = next(s for s in Adapter(tiny_model("mixtral", hidden_size=128)).sites(0) if s.kind == "routed")
    state, pool = (empty_state(count, site.in_features, "cpu") for count in (site.num_experts, 1))
    x_NI, starts = torch.randn(rows, site.in_features).bfloat16(), [0, *[rows] * site.num_experts]
    with LiveBytes() as live:
        accumulate_groups(state, x_NI, torch.ones(rows), starts, 1.0, pool)
    assert live.peak == pytest.approx(gather_together_bytes([whole(site)], rows // 2, 2), rel=0.15)


@pytest.mark.parametrize("act_order", [True, False])
def test_a_solve_takes_its_stack_its_workspace_and_its_codes_twice(act_order: bool) -> None:
    adapter = Adapter(tiny_model("qwen3_moe", dtype=torch.bfloat16, **WIDE))
    site = next(site for site in adapter.sites(0) if site.kind == "routed" and site.stage == "mlp_in")
    num_experts, rows, width = site.num_experts, sum(site.rows), site.in_features
    plan = uniform_plan(weight_shapes(adapter), GridSpec(4, 64))
    (unit,) = make_units([whole(site)], plan, num_experts)
    inputs_EII = torch.randn(num_experts, width, width)
    hessian_EII = inputs_EII @ inputs_EII.mT
    with LiveBytes() as live:
        solve_unit(
            adapter, unit,
            lambda unit, w: gptq_solve(w, hessian_EII, unit.grid, SolveSpec(act_order=act_order), torch.bfloat16),
        )  # fmt: skip
    expected = stack_bytes(adapter, site, num_experts) + 2 * num_experts * rows * width
    expected += workspace_bytes(num_experts, rows, width, "cpu")
    assert live.peak == pytest.approx(expected, rel=0.25)


def test_a_block_file_has_packed_rows_scales_and_zero_points() -> None:
    shapes = weight_shapes(Adapter(tiny_model("mixtral")))
    plan = uniform_plan(shapes, GridSpec(3, 32))
    found = block_file_bytes(shapes, plan, 2, num_blocks=2)
    # 3 bits of 64 columns are 6 words, those of 32 columns are 3; a group of 32 has a scale of 2 bytes and 1 more.
    assert sum(found) == sum(shape.numel * 3 // 8 + shape.numel // 32 * 3 for shape in shapes)
    assert len(set(found)) == 1


def test_kernels_are_one_for_each_number_of_rows_up_to_what_the_library_keeps() -> None:
    site = next(site for site in Adapter(tiny_model("qwen3_moe")).sites(0) if site.kind == "routed")
    few, many = DataShape(1, 8, 1), DataShape(64, 256, 8)
    # 8 tokens that choose 2 of 8 experts are 2 for each, up to 8; gate, up and down.
    assert kernel_bytes(site, few, num_blocks=2, experts_per_token=2) == 3 * 8 * KERNEL_BYTES
    assert kernel_bytes(site, many, num_blocks=48, experts_per_token=2) == most_kernels() * KERNEL_BYTES


def test_data_are_counted_in_full_batches() -> None:
    data = DataShape(num_sequences=10, length=7, batch_size=4)
    assert (data.num_batches, data.batch_tokens, data.num_tokens) == (3, 28, 70)
    assert DataShape(2, 7, 4).batch_tokens == 14


@pytest.mark.parametrize(
    ("free", "other", "largest", "least", "expected"),
    [
        (20.0, 4.0, 3.3, 0.1, 3.375),  # no more than is of use
        (20.0, 4.07, 100.0, 0.1, 15.875),  # what is left
        (2000.0, 4.0, 1000.0, 0.1, 64.0),  # sensible at most
        (4.1, 4.0, 100.0, 0.1, 0.25),  # sensible at least
        (4.1, 4.0, 100.0, 0.6, 0.625),  # one expert has to fit
    ],
)
def test_the_bound_on_hessians_is_what_is_left_within_limits(
    free: float, other: float, largest: float, least: float, expected: float
) -> None:
    sizes = (int(gib * GIB) for gib in (free, other, largest, least))
    assert choose_hessian_gib(*sizes) == expected
    assert LEAST_HESSIAN_BYTES == GIB // 4
