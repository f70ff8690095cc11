"""oneDNN's products and linears compute what torch's do, and nothing of them stays."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from moeq.kernels.onednn import (
    ONEDNN_ROWS,
    add_product_,
    by_onednn,
    keep_fewer_kernels,
    linears_by_onednn,
    most_kernels,
)


@pytest.mark.parametrize("size", [ONEDNN_ROWS - 1, ONEDNN_ROWS])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_product_is_that_of_float64_and_an_experts_own_whatever_its_company(
    size: int, sign: int, generator: torch.Generator
) -> None:
    total, left, right = torch.randn(3, 3, size, size + 5, generator=generator)
    left, right = left[..., :size], right.contiguous()
    expected = total.double() + sign * left.double() @ right.double()
    together, alone = total.clone(), total[1].clone()
    add_product_(together, left, right, sign)
    add_product_(alone, left[1], right[1], sign)
    torch.testing.assert_close(together.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(together[1], alone)
    assert by_onednn(alone, left[1]) == (size >= ONEDNN_ROWS and torch.backends.mkldnn.is_available())


@pytest.mark.parametrize("num_tokens", [1, ONEDNN_ROWS - 1, ONEDNN_ROWS, ONEDNN_ROWS + 37])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_differ_in_rounding_alone(num_tokens: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear, inputs_BTD = nn.Linear(48, 96, bias=bias), torch.randn(1, num_tokens, 48)
    expected = inputs_BTD.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    with torch.no_grad(), linears_by_onednn(linear):
        outputs = linear(inputs_BTD)
    assert outputs.layout == torch.strided
    torch.testing.assert_close(outputs.double(), expected, rtol=1e-5, atol=1e-5)


def test_large_inputs_of_a_float32_linear_are_seen_in_onednns_layout() -> None:
    seen: dict[str, bool] = {}

    class Probe(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            seen["subclass"] = input.is_mkldnn
            return super().forward(input)

    linear, half, subclass = nn.Linear(64, 64), nn.Linear(64, 64).bfloat16(), Probe(64, 64)
    model = nn.ModuleList([linear, half, subclass])
    inputs_TD = torch.randn(ONEDNN_ROWS, 64)
    with torch.no_grad(), linears_by_onednn(model):
        linear.register_forward_pre_hook(lambda _, args: seen.update(linear=args[0].is_mkldnn))
        linear(inputs_TD)
        half.register_forward_pre_hook(lambda _, args: seen.update(half=args[0].is_mkldnn))
        half(inputs_TD.bfloat16())
        subclass(inputs_TD)
    assert seen == {"linear": torch.backends.mkldnn.is_available(), "half": False, "subclass": False}


def test_hooked_linears_are_left_alone_and_no_hook_stays() -> None:
    hooked, linear = nn.Linear(64, 64), nn.Linear(64, 64)
    layouts: list[torch.layout] = []
    hooked.register_forward_pre_hook(lambda _, args: layouts.append(args[0].layout))
    with torch.no_grad(), linears_by_onednn(nn.ModuleList([hooked, linear])):
        hooked(torch.randn(ONEDNN_ROWS, 64))
    assert layouts == [torch.strided]
    assert not linear._forward_pre_hooks
    assert not linear._forward_hooks
    assert len(hooked._forward_pre_hooks) == 1


def test_the_number_of_kernels_is_the_users_where_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    keep_fewer_kernels()
    assert most_kernels() == 7
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    assert most_kernels() == 1024


# Products of 300 numbers of rows, twice: all of the second are there already, or none of them.
SWEEPS = """
import torch
from moeq.kernels.onednn import keep_fewer_kernels
if {fewer}:
    keep_fewer_kernels()
linear = torch.nn.Linear(16, 16).requires_grad_(False)
for sweep in range(2):
    print("sweep", flush=True)
    for rows in range(1, 301):
        linear(torch.zeros(rows, 16).to_mkldnn())
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize(("fewer", "compiled"), [(False, 0), (True, 300)])
def test_onednn_keeps_as_many_kernels_as_it_was_told(fewer: bool, compiled: int) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ONEDNN")}
    output = subprocess.run(
        [sys.executable, "-c", SWEEPS.format(fewer=fewer)],
        env={**environment, "ONEDNN_VERBOSE": "2"}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    second = output.split("sweep\n")[2]
    assert second.count("create:cache_miss,cpu,inner_product") == compiled
