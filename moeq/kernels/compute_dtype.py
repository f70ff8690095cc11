"""Which dtype a processor computes a model in, whose files may hold another.

Without bfloat16 products (AVX512-BF16 or AMX, bf16 of ARM) a CPU emulates them: a linear of 256 to 4096 outputs then
takes 12 times (AVX2) or 5 times (AVX-512) as long in bfloat16 as in float32.  There the same weights are held and
multiplied in float32, without bfloat16's roundings between, and take twice the memory, as hidden states do.  float16 is
computed in float32 on every CPU.

The answer follows from what the processor has, never from a timing, so that runs on one kind of processor agree; and
it follows the limits that torch and oneDNN read (``ATEN_CPU_CAPABILITY``, ``ONEDNN_MAX_CPU_ISA``), so that a processor
can be emulated on a better one.
"""

import os
import platform
from typing import Literal, get_args

import torch

ComputeDType = Literal["auto", "float32", "stored"]
# Answers for "auto" in this process and those that it starts: "float32" or "stored".  Tests set it, so that what they
# see does not depend on the processor.
ENVIRONMENT = "MOEQ_COMPUTE_DTYPE"
_X86 = ("x86_64", "amd64")
# Values of ONEDNN_MAX_CPU_ISA that leave bfloat16 products out.
_BELOW_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


def compute_dtype(choice: ComputeDType, stored: torch.dtype, device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype of a model's parameters in memory.

    Args:
        choice: "stored" is the dtype of the files, "float32" at least that; "auto" is float32 on a CPU that does not
            multiply the files' dtype, and "stored" everywhere else.
        stored: Dtype of the files.
        device: Where the model runs.

    Raises:
        ValueError: The choice, or the one of the environment, is none of these.
    """
    if choice == "auto":
        choice = _environment() or ("stored" if _multiplies(stored, torch.device(device)) else "float32")
    if choice not in ("float32", "stored"):
        raise ValueError(f"compute_dtype ({choice!r}) must be one of {', '.join(get_args(ComputeDType))}; choose auto")
    return torch.float32 if choice == "float32" and stored.itemsize < 4 else stored


def has_bfloat16_products() -> bool:
    """Whether the libraries that torch calls multiply bfloat16 on this CPU, within the limits they were given."""
    if not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() not in _X86:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return (
        torch.cpu._is_avx512_bf16_supported()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and limit not in _BELOW_BFLOAT16
    )


def _multiplies(stored: torch.dtype, device: torch.device) -> bool:
    if device.type != "cpu":
        return True
    return has_bfloat16_products() if stored == torch.bfloat16 else stored.itemsize >= 4


def _environment() -> Literal["float32", "stored"] | None:
    value = os.environ.get(ENVIRONMENT, "")
    if value in ("float32", "stored"):
        return value  # type: ignore[return-value]
    if value:
        raise ValueError(f"{ENVIRONMENT} ({value!r}) must be float32 or stored; unset it to let the processor decide")
    return None
