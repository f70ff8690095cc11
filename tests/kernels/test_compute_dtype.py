import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch

from moeq.kernels import compute_dtype as rule
from moeq.kernels.compute_dtype import ENVIRONMENT, compute_dtype, has_bfloat16_products

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> bool:
    """A processor with bfloat16 products or without, and nobody who overrules what it has."""
    monkeypatch.delenv(ENVIRONMENT)
    monkeypatch.setattr(rule, "has_bfloat16_products", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("products", [True, False], indirect=True)
def test_auto_is_what_the_processor_multiplies(products: bool) -> None:
    assert compute_dtype("auto", BF16) == (BF16 if products else F32)
    assert compute_dtype("auto", F16) == F32
    assert compute_dtype("auto", F32) == F32
    assert compute_dtype("auto", torch.float64) == torch.float64
    for stored in (BF16, F16, F32):
        assert compute_dtype("auto", stored, "cuda:1") == stored


@pytest.mark.parametrize("products", [True, False], indirect=True)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_choice_holds_on_every_processor(products: bool, device: str) -> None:
    assert compute_dtype("stored", BF16, device) == BF16
    assert compute_dtype("float32", BF16, device) == F32
    assert compute_dtype("float32", torch.float64, device) == torch.float64  # never narrower than the files


@pytest.mark.parametrize("products", [True, False], indirect=True)
def test_the_environment_decides_what_auto_is_and_nothing_else(products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("stored", BF16), ("float32", F32)):
        monkeypatch.setenv(ENVIRONMENT, value)
        assert compute_dtype("auto", BF16) == expected
        assert compute_dtype("stored", BF16) == BF16
    monkeypatch.setenv(ENVIRONMENT, "bfloat16")
    with pytest.raises(ValueError, match=r"MOEQ_COMPUTE_DTYPE \('bfloat16'\) must be float32 or stored; unset it"):
        compute_dtype("auto", BF16)


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compute_dtype \('half'\) must be one of auto, float32, stored"):
        compute_dtype("half", BF16)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "limits", [["ONEDNN_MAX_CPU_ISA=AVX2"], ["ATEN_CPU_CAPABILITY=avx2"], ["ONEDNN_MAX_CPU_ISA=AVX512_CORE"]]
)
def test_a_processor_that_is_emulated_has_no_bfloat16_products(limits: Sequence[str]) -> None:
    # The limits are read once per process, by torch or by oneDNN.
    script = "from moeq.kernels.compute_dtype import has_bfloat16_products; print(has_bfloat16_products())"
    environment = os.environ | dict(limit.split("=") for limit in limits)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    if os.uname().machine == "x86_64":
        assert done.stdout.strip() == "False"


def test_products_are_those_that_torch_says_it_has() -> None:
    limited = any(name in os.environ for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"))
    if os.uname().machine == "x86_64" and not limited:
        assert has_bfloat16_products() == torch.cpu._is_avx512_bf16_supported()
