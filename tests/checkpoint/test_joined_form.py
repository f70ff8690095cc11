"""Gate and up as one product."""

import pytest
import torch
from torch import Tensor

from benchmarks.speed.drawn import drawn_weight
from moeq.checkpoint.joined_form import joined
from moeq.checkpoint.nibble_forms import NibbleForm, SqueezedForm
from moeq.checkpoint.packed import PackedExpert
from moeq.checkpoint.packed_self import packed_self
from moeq.checkpoint.packed_weight import PackedFormat
from moeq.checkpoint.prepare import prepare
from moeq.kernels.nibbles import arrangement
from moeq.models.adapter import Adapter
from tests.tiny import tiny_model

pytestmark = pytest.mark.skipif(arrangement() is None, reason="torch has no operation on 4 bits for this processor")
IDS = torch.tensor([[5, 9, 200, 31, 7]])


def address(form: NibbleForm) -> tuple[int, int]:
    tensors = form.packed, form.scale_offset_GO2
    return tensors[0].untyped_storage().data_ptr(), tensors[1].untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "grid", [PackedFormat(4, 64, True), PackedFormat(3, 32, False), PackedFormat(2, None, True)], ids=str
)
def test_the_rows_of_two_products_are_those_of_one_and_both_are_given_back_to_the_bit(grid: PackedFormat) -> None:
    torch.manual_seed(0)
    weights = drawn_weight(64, 128, grid), drawn_weight(128, 128, grid)
    forms = [NibbleForm.of(weight) for weight in weights]
    found = joined(*forms)
    assert found is not None
    both, *halves = found
    few_MI, many_MI = torch.randn(3, 128).bfloat16(), torch.randn(200, 128).bfloat16()
    assert torch.equal(both.product(few_MI), torch.cat([form.product(few_MI) for form in forms], 1))
    torch.testing.assert_close(both.product(many_MI), torch.cat([form.product(many_MI) for form in forms], 1))
    for half, form, weight in zip(halves, forms, weights, strict=True):
        assert torch.equal(half.product(few_MI), form.product(few_MI))
        assert torch.equal(half.quantized().codes_OI, weight.codes_OI)
        assert torch.equal(half.quantized().scale_OG, weight.scale_OG)
        assert address(half) == address(both)


def test_weights_of_other_grids_and_forms_stay_apart() -> None:
    four = NibbleForm.of(drawn_weight(64, 128, PackedFormat(4, 64, True)))
    for grid in (PackedFormat(3, 64, True), PackedFormat(4, 32, True), PackedFormat(4, 64, False)):
        assert joined(four, NibbleForm.of(drawn_weight(64, 128, grid))) is None
    eight = NibbleForm.of(drawn_weight(64, 128, PackedFormat(8, 64, True)))
    assert joined(eight, eight) is None
    assert joined(four, SqueezedForm.of(drawn_weight(64, 128, PackedFormat(4, 64, True)))) is None
    assert joined(four, None) is None


@torch.no_grad()
def test_prepared_experts_multiply_by_gate_and_up_at_once_in_the_same_memory_and_write_what_they_read() -> None:
    model = packed_self(Adapter(tiny_model("qwen2_moe", dtype=torch.bfloat16, moe_intermediate_size=128)), 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepare(model, 1e9)
    experts = [module for module in model.modules() if isinstance(module, PackedExpert)]
    assert all(expert._joined is not None for expert in experts)
    logits = model(IDS).logits

    def by_two(expert: PackedExpert, x_MI: Tensor) -> Tensor:
        return torch.cat([expert.gate_proj(x_MI), expert.up_proj(x_MI)], 1)

    x_MI = torch.randn(2, experts[0].up_proj.in_features).bfloat16()
    assert torch.equal(experts[0].into(x_MI), by_two(experts[0], x_MI))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert experts[0]._joined is None
    assert torch.equal(model(IDS).logits, logits)
