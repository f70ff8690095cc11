"""How many experts a solve advances together, and the memory that takes beside weights and Hessians.

Of one expert a sweep holds, in float32: its weight in visiting order (and a copy, stacked with the others), the scales
and lowest levels of every column, deltas and targets, which are ``6 O I`` numbers with the search for the scales; and
its feedback matrix, stacked as well, with one more copy while it is factorised, which are ``3 I^2``.

Shapes: O out features, I in features.
"""

GPU_WORKSPACE_BYTES = 8 << 30
# On a CPU weights of at most so many rows are swept together, as many as have TOGETHER_ROWS in all.
FEW_ROWS, TOGETHER_ROWS = 1024, 8192


def workspace_of_one(out_features: int, in_features: int) -> int:
    """Bytes that the sweep of one expert takes."""
    return 4 * in_features * (3 * in_features + 6 * out_features)


def num_together(out_features: int, in_features: int, device_type: str) -> int:
    """Experts that advance together: on a CPU where they have few rows, elsewhere as many as the workspace holds."""
    if device_type == "cpu":
        return max(1, TOGETHER_ROWS // out_features) if out_features <= FEW_ROWS else 1
    return max(1, GPU_WORKSPACE_BYTES // workspace_of_one(out_features, in_features))


def workspace_bytes(num_experts: int, out_features: int, in_features: int, device_type: str) -> int:
    """Bytes that the solve of a stack takes beside its weights and Hessians."""
    together = min(num_experts, num_together(out_features, in_features, device_type))
    return together * workspace_of_one(out_features, in_features)


def two_sided_numbers(out_features: int, in_features: int) -> int:
    """Float32 numbers that rounding one expert under two Hessians holds, the Hessians included.

    Five copies of each Hessian: the mean, damped, in visiting order, and two while it is factorised; fourteen numbers
    per weight: scale and zero point twice, both and the weight in tiles, A D, D, codes and what the descent keeps.
    """
    return 5 * (out_features**2 + in_features**2) + 14 * out_features * in_features
