"""Memory of a run: what each pass should take, and what it took.

    expected = parameters and buffers of the model + hidden states that wait between passes + Hessians of the pass

The Hessians are counted as ``moeq/fit/schedule.py`` bounds them.  What is measured also has the temporary tensors of a
forward pass and of a solve: the inputs of one batch, and float32 copies of the weights that are solved together.
"""

from contextlib import suppress
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn

from moeq.fit.schedule import Pass

_CLEAR_REFS = Path("/proc/self/clear_refs")


class MemoryRow(TypedDict):
    """One pass, in bytes."""

    label: str
    model: int
    activations: int
    hessian_sums: int
    hessian_copies: int
    expected: int
    measured: int


def start_peak(device: torch.device) -> None:
    """Measure the peak from here on; where the system cannot (no Linux), it stays that of the process so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            _CLEAR_REFS.write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory since ``start_peak``: of the accelerator where the model is on one, else resident in the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_row(current: Pass, model: nn.Module, activation_bytes: int, measured: int) -> MemoryRow:
    """Expected and measured memory of a pass.

    Args:
        current: The pass.
        model: The model under quantization.
        activation_bytes: Hidden states on the same device as the Hessians.
        measured: Peak of the pass, without what the process had before the model was loaded.
    """
    parts = [*model.parameters(), *model.buffers()]
    model_bytes = sum(tensor.numel() * tensor.element_size() for tensor in parts)
    sums = sum(part.sum_bytes for part in current.parts)
    copies = sum(part.working_bytes for part in current.parts)
    return MemoryRow(
        label=current.label, model=model_bytes, activations=activation_bytes, hessian_sums=sums, hessian_copies=copies,
        expected=model_bytes + activation_bytes + sums + copies, measured=measured,
    )  # fmt: skip
