import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moeq.checkpoint import plane_form
from moeq.checkpoint.nibble_forms import NibbleForm, SqueezedForm, nibble_bytes, why_no_nibbles
from moeq.checkpoint.packed_weight import PackedFormat
from moeq.checkpoint.plane_form import PlaneForm, why_no_planes
from moeq.kernels.crossover import FEW_ROWS
from moeq.kernels.nibbles import arrangement
from moeq.quant.spec import QuantizedWeight
from tests.export.rounding import real_weight, round_weight

SHAPE = (128, 256)
GRIDS = tuple(itertools.product((2, 3, 4, 5, 8), (32, None), (False, True)))
needs_nibbles = pytest.mark.skipif(arrangement() is None, reason="torch has no operation on 4 bits for this processor")
FORMS = (PlaneForm, *(pytest.param(form, marks=needs_nibbles) for form in (NibbleForm, SqueezedForm)))


def rounded(grid: tuple[int, int | None, bool], dtype: torch.dtype = torch.bfloat16) -> QuantizedWeight:
    return round_weight(torch.randn(SHAPE).to(dtype), *grid)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_form_gives_the_weight_back_as_it_was(grid: tuple[int, int | None, bool], form: type[PlaneForm]) -> None:
    weight = rounded(grid)
    found = form.of(weight).quantized()
    assert found.tensors().keys() == weight.tensors().keys()
    for name, tensor in weight.tensors().items():
        assert torch.equal(found.tensors()[name], tensor)
        assert found.tensors()[name].is_contiguous()
    assert (found.bits, found.group_size, found.dtype) == (weight.bits, weight.group_size, weight.dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", GRIDS)
def test_the_weight_that_many_rows_take_is_the_references_to_the_bit(
    grid: tuple[int, int | None, bool], form: type[PlaneForm], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plane_form, "CHUNK", 5000)
    weight = rounded(grid)
    made = form.of(weight)
    made = made.whole() if isinstance(made, SqueezedForm) else made
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(made.weight(dtype).mT, real_weight(weight).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("grid", [(3, 16, False), (4, None, True), (8, 64, False)])
def test_planes_hold_weights_of_other_dtypes(grid: tuple[int, int | None, bool], dtype: torch.dtype) -> None:
    weight = rounded(grid, dtype)
    assert torch.equal(PlaneForm.of(weight).weight(dtype).mT, real_weight(weight))


@pytest.mark.parametrize("form", [PlaneForm, pytest.param(SqueezedForm, marks=needs_nibbles)])
@pytest.mark.parametrize("grid", GRIDS)
def test_planes_and_squeezed_nibbles_take_the_bytes_of_the_file(
    grid: tuple[int, int | None, bool], form: type[PlaneForm]
) -> None:
    overhead = PackedFormat(*grid).spec.overhead_bits(SHAPE[1])
    assert form.of(rounded(grid)).nbytes == SHAPE[0] * (SHAPE[1] * grid[0] + overhead) // 8


@pytest.mark.parametrize("group_size", [32, None])
def test_one_bit_has_planes_alone_which_hold_it_in_the_bytes_of_its_file(group_size: int | None) -> None:
    weight, grid = rounded((1, group_size, True)), PackedFormat(1, group_size, symmetric=True)
    form = PlaneForm.of(weight)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(form.weight(dtype).mT, real_weight(weight).to(dtype))
    assert torch.equal(form.quantized().codes_OI, weight.codes_OI)
    assert torch.equal(form.quantized().scale_OG, weight.scale_OG)
    assert form.nbytes == SHAPE[0] * (SHAPE[1] + grid.spec.overhead_bits(SHAPE[1])) // 8
    assert why_no_planes(grid, SHAPE) is None
    assert why_no_nibbles(grid, SHAPE, torch.bfloat16, torch.bfloat16) == "levels that are no whole numbers"


@needs_nibbles
@pytest.mark.parametrize("grid", GRIDS)
def test_few_rows_by_4_bits_agree_with_the_reference_up_to_the_roundings_of_bfloat16(
    grid: tuple[int, int | None, bool],
) -> None:
    weight = rounded(grid)
    form = NibbleForm.of(weight)
    assert form.nbytes == nibble_bytes(PackedFormat(*grid), SHAPE)
    for rows in (1, FEW_ROWS, FEW_ROWS + 1):
        x_MI = torch.randn(rows, SHAPE[1]).bfloat16()
        expected = x_MI.double() @ real_weight(weight).double().mT
        dense = relative_error(torch.nn.functional.linear(x_MI, real_weight(weight)), expected)
        # Beside the result's own rounding, those of weights and, above 4 bits, of two results instead of one.
        assert torch.equal(SqueezedForm.of(weight).product(x_MI), form.product(x_MI))
        assert relative_error(form.product(x_MI), expected) < (2.0 if grid[0] <= 4 else 3.5) * dense
    assert form.product(x_MI[:0]).shape == (0, SHAPE[0])


@needs_nibbles
def test_scales_of_either_sign_are_multiplied_by_as_they_are() -> None:
    weight = rounded((3, 32, True))
    turned = replace(weight, scale_OG=weight.scale_OG * torch.where(torch.rand(weight.scale_OG.shape) < 0.5, -1, 1))
    x_MI = torch.randn(2, SHAPE[1]).bfloat16()
    expected = x_MI.double() @ real_weight(turned).double().mT
    for form in (NibbleForm, SqueezedForm, PlaneForm):
        assert relative_error(form.of(turned).product(x_MI), expected) < 0.004
        assert torch.equal(form.of(turned).quantized().scale_OG, turned.scale_OG)


@needs_nibbles
def test_symmetric_weights_of_4_bits_are_multiplied_exactly() -> None:
    weight = rounded((4, 32, True))
    x_MI = torch.zeros(1, SHAPE[1], dtype=torch.bfloat16)
    x_MI[0, 77] = 1.0
    assert torch.equal(NibbleForm.of(weight).product(x_MI)[0], real_weight(weight)[:, 77])


@needs_nibbles
def test_inputs_in_float32_are_multiplied_in_float32() -> None:
    weight = rounded((4, 32, False))
    x_MI = torch.randn(3, SHAPE[1])
    expected = x_MI.double() @ real_weight(weight).double().mT
    for form in (NibbleForm.of(weight), PlaneForm.of(weight)):
        torch.testing.assert_close(form.product(x_MI).double(), expected, rtol=1e-5, atol=1e-5)


def test_where_bfloat16_is_emulated_many_rows_are_multiplied_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plane_form, "has_bfloat16_products", lambda: False)
    weight = rounded((3, 32, False))
    x_MI = torch.randn(3, SHAPE[1]).bfloat16()
    expected = torch.nn.functional.linear(x_MI.float(), real_weight(weight).float()).bfloat16()
    torch.testing.assert_close(PlaneForm.of(weight).product(x_MI), expected)


def test_what_has_no_form_says_why() -> None:
    bfloat16 = (torch.bfloat16, torch.bfloat16)
    for kind, symmetric in (("q4_k", False), ("iq4_nl", True)):
        named, reason = PackedFormat(4, 32, symmetric, kind=kind), f"levels of {kind}"
        assert why_no_planes(named, SHAPE) == why_no_nibbles(named, SHAPE, *bfloat16) == reason
    assert "multiples of 8" in str(why_no_planes(PackedFormat(4, 32, symmetric=True), (12, 64)))
    assert why_no_planes(PackedFormat(4, 16, symmetric=True), (72, 48)) is None
    for grid, shape in ((PackedFormat(4, 16, symmetric=True), SHAPE), (PackedFormat(4, 32, symmetric=True), (72, 64))):
        assert "multiples of 64" in str(why_no_nibbles(grid, shape, *bfloat16))
    assert (
        why_no_nibbles(PackedFormat(4, 32, symmetric=True), SHAPE, torch.bfloat16, torch.float32) == "not in bfloat16"
    )
