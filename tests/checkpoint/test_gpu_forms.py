"""What a GPU multiplies packed weights by, with the kernel's twin on a CPU; with the kernel where there is a GPU."""

import itertools

import pytest
import torch
from transformers import PreTrainedModel

from moeq.checkpoint import forms, gpu_forms
from moeq.checkpoint.gpu_forms import KernelForm, why_no_kernel
from moeq.checkpoint.gpu_forward import forward_by_kernel, stacks_of
from moeq.checkpoint.packed import PackedExperts
from moeq.checkpoint.packed_self import packed_self
from moeq.checkpoint.packed_weight import PackedFormat
from moeq.checkpoint.prepare import model_bytes, prepare
from moeq.models.adapter import Adapter
from moeq.quant.spec import QuantizedWeight
from tests.export.rounding import real_weight, round_weight
from tests.tiny import tiny_model

GRIDS = tuple(itertools.product((2, 3, 4, 8), (32, None), (False, True)))
FAMILIES = ("qwen2_moe", "mixtral", "gpt_oss", "nemotron_h")
IDS = torch.tensor([[5, 9, 200, 31, 7], [3, 3, 80, 2, 150]])


def rounded(grid: tuple[int, int | None, bool], dtype: torch.dtype = torch.bfloat16) -> QuantizedWeight:
    return round_weight(torch.randn(40, 64).to(dtype), *grid)


def packed_model(family: str, dtype: torch.dtype = torch.float32, bits: int = 4) -> PreTrainedModel:
    return packed_self(Adapter(tiny_model(family, dtype=dtype)), bits)


@pytest.fixture
def kernel_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights on a CPU are prepared as those on a GPU are."""
    monkeypatch.setattr(gpu_forms, "find_spec", lambda _: True)
    monkeypatch.setitem(forms.CHOICE, "cpu", forms.choose_on_gpu)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_form_has_the_bytes_of_the_file_and_gives_the_weight_back(grid: tuple[int, int | None, bool]) -> None:
    weight = rounded(grid)
    form = KernelForm.of(weight)
    found = form.quantized()
    assert (found.bits, found.group_size, found.dtype) == (weight.bits, weight.group_size, weight.dtype)
    assert found.tensors().keys() == weight.tensors().keys()
    for name, tensor in weight.tensors().items():
        assert torch.equal(found.tensors()[name], tensor)
    assert form.nbytes <= forms.file_bytes(PackedFormat(*grid), (40, 64), torch.bfloat16) * 1.05 + 32


@pytest.mark.parametrize("grid", GRIDS)
def test_a_linear_multiplies_by_the_references_numbers(grid: tuple[int, int | None, bool]) -> None:
    weight, x_MI = rounded(grid), torch.randn(5, 64).bfloat16()
    expected = x_MI.float() @ real_weight(weight).float().mT
    found = KernelForm.of(weight).product(x_MI)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-2)


def test_grids_without_a_kernel_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_no_kernel(PackedFormat(4, 32, True, "q4_k"), (8, 256)) == "grid q4_k"
    monkeypatch.setattr(gpu_forms, "find_spec", lambda _: None)
    assert why_no_kernel(PackedFormat(4, 32, True), (8, 256)) == "triton is not installed"
    monkeypatch.setattr(gpu_forms, "find_spec", lambda _: True)
    assert why_no_kernel(PackedFormat(4, 32, True), (8, 256)) is None
    assert why_no_kernel(PackedFormat(4, None, True), (8, 36)) == "rows of 36 in groups of 36 are no multiples of 8"


@pytest.mark.usefixtures("kernel_forms")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_experts_give_the_outputs_of_the_reference_and_skip_slots_of_other_ranks(family: str) -> None:
    model = packed_model(family)
    experts = next(module for module in model.modules() if isinstance(module, PackedExperts))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, experts[0].up_proj.in_features, generator=generator)
    ids = torch.rand(9, len(experts) + 1, generator=generator).topk(3, 1).indices  # the last index is elsewhere
    weights = torch.rand(9, 3, generator=generator)
    expected = experts(hidden, ids, weights)
    assert (ids == len(experts)).any()
    prepare(model)
    stacks = stacks_of(experts)
    assert stacks is not None
    torch.testing.assert_close(forward_by_kernel(experts, stacks, hidden, ids, weights), expected, rtol=1e-4, atol=1e-5)
    assert stacks_of(experts) is stacks


@pytest.mark.usefixtures("kernel_forms")
@torch.no_grad()
def test_experts_of_mixed_widths_are_one_stack_for_each() -> None:
    model, other = packed_model("mixtral"), packed_model("mixtral", bits=8)
    experts, wide = (next(m for m in each.modules() if isinstance(m, PackedExperts)) for each in (model, other))
    for index in (1, 4, 5):
        experts[index] = wide[index]
    hidden, ids = torch.randn(20, 64), torch.rand(20, 8).topk(2, 1).indices
    expected = experts(hidden, ids, torch.full((20, 2), 0.5))
    prepare(model)
    stacks = stacks_of(experts)
    assert stacks is not None
    assert [chosen.tolist() for chosen, _ in stacks.by_leaf["up_proj"]] == [[0, 2, 3, 6, 7], [1, 4, 5]]
    found = forward_by_kernel(experts, stacks, hidden, ids, torch.full((20, 2), 0.5))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("kernel_forms")
def test_a_block_that_is_moved_or_saved_lets_its_stacks_go() -> None:
    model = packed_model("mixtral")
    experts = next(module for module in model.modules() if isinstance(module, PackedExperts))
    for change in (lambda: model.to("cpu"), model.state_dict):
        prepare(model)
        assert stacks_of(experts) is not None
        change()
        assert experts.stacks is None
        assert stacks_of(experts) is None


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prepared_model_on_a_gpu_gives_the_logits_of_the_reference(family: str) -> None:
    model = packed_model(family, bits=3).cuda()
    expected, before = model(IDS.cuda()).logits, model_bytes(model)
    result = prepare(model)
    assert set(result.forms) == {"KernelForm"}
    assert result.num_bytes[0] <= 1.05 * before
    torch.testing.assert_close(model(IDS.cuda()).logits, expected, rtol=1e-3, atol=1e-3)
