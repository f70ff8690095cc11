"""Two weights that read the same inputs as one, so that gate and up of an expert are one product.

With few rows a call costs as much as a tenth of the product with a small weight (``benchmarks/LOG.md``).
"""

from dataclasses import replace

import torch

from moeq.checkpoint.nibble_forms import NibbleForm


def joined(first: object, second: object) -> tuple[NibbleForm, NibbleForm, NibbleForm] | None:
    """Two weights with the same inputs as one, the rows of the first above those of the second.

    Args:
        first: Of any kind.
        second: Likewise.

    Returns:
        Both as one, and each as a part of it, in the same memory; None unless both are ``NibbleForm`` of at most 4 bits
        on one grid.
    """
    if not (isinstance(first, NibbleForm) and isinstance(second, NibbleForm)):
        return None
    if first.frame.bits > 4 or _layout(first) != _layout(second):
        return None
    both = replace(
        first,
        packed=torch.cat([first.packed, second.packed]),
        scale_offset_GO2=torch.cat([first.scale_offset_GO2, second.scale_offset_GO2], 1),
    )
    codes = both.packed.split([first.rows, second.rows])
    scales = both.scale_offset_GO2.split([first.rows, second.rows], 1)
    upper, lower = (
        replace(form, packed=packed, scale_offset_GO2=scale)
        for form, packed, scale in zip((first, second), codes, scales, strict=True)
    )
    return both, upper, lower


def _layout(form: NibbleForm) -> tuple[object, ...]:
    frame = form.frame
    return frame.bits, frame.group_size, frame.zero_point_OG is None, form.columns, form.group_size
