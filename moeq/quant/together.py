"""Whether the experts of a stack are computed together or one after another."""

import torch


def taken_together(device: torch.device) -> bool:
    """On a CPU one after another: cache and arithmetic cost there, and the bits of one do not depend on its company.

    Elsewhere together: there each operation costs its launch, and each number that is read makes the device wait.
    """
    return device.type != "cpu"
