"""Memory of a fit from shapes alone: the parts of which the moments of its phases consist.

All functions read shapes and dtypes, never values, so they serve a model on the meta device.  In bytes, with s bytes of
a number of the model in memory, d in its files:

    block        s * numbers of its parameters
    loading      beside a block that arrives: the parts, in the files' dtype, of its largest stack of experts
    activations  of one batch in one block: ``forward_bytes``
    waiting      hidden states between passes: s * tokens * width, as often as models are run (quantized, original)
    Hessians     8 I^2 (E + 1) float64 sums (``moeq.fit.schedule``, which bounds them)
    to solve     of a stack of E' experts (``moeq.fit.share``): 4 I^2 E' of Hessians, and its weights as they are, side
                 by side, and in float32: (2 s + 4) O I E', or 2 s O I E' of float32
    workspace    of the solver (``moeq.quant.workspace``)
    codes        one byte per weight while a block is solved, twice for the stack that is being solved
    block file   packed codes, and the same again as they are written
    kernels      that the CPU's library keeps, one for each shape of a product in bfloat16: ``kernel_bytes``

Shapes: E experts, O out features, I in features, D width of the model, N tokens of a batch, K experts of a token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from moeq.allocation.plan import planned
from moeq.fit.schedule import GIB, SitePart
from moeq.kernels.onednn import most_kernels
from moeq.models.adapter import Adapter
from moeq.models.sites import Site
from moeq.quant.hessian import PANEL
from moeq.quant.hessian_groups import groups_bytes
from moeq.quant.kinds import SUPER_BLOCK
from moeq.quant.packing import num_words
from moeq.quant.spec import GridSpec, WeightShape

# Least and most that ``choose_hessian_gib`` gives where one Hessian does not need more.
LEAST_HESSIAN_BYTES, MOST_HESSIAN_BYTES = GIB // 4, 64 * GIB
_STEP = GIB // 8
# Of a kernel of oneDNN: 0.2 MB of wide linears to 0.9 MB of narrow ones, on AMX.
KERNEL_BYTES = 800_000
# Tokens of a popular expert, in those of the mean.
SPREAD = 4


@dataclass(frozen=True)
class DataShape:
    """The calibration data.

    Attributes:
        num_sequences: Of all ranks together.
        length: Tokens of each.
        batch_size: Sequences per step.
    """

    num_sequences: int
    length: int
    batch_size: int

    @property
    def num_batches(self) -> int:
        """Steps of one sweep."""
        return ceil(self.num_sequences / self.batch_size)

    @property
    def batch_tokens(self) -> int:
        """Tokens of a full batch."""
        return min(self.batch_size, self.num_sequences) * self.length

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return self.num_sequences * self.length


def gather_bytes(parts: Sequence[SitePart], num_tokens: int) -> int:
    """Most that adding a batch to the Hessians holds: float32 rows, with their weighted copy or a panel's product."""
    rows = num_tokens + max(num_tokens, 2 * PANEL)
    return max((4 * rows * part.site.in_features for part in parts), default=0)


def gather_together_bytes(parts: Sequence[SitePart], num_tokens: int, experts_per_token: int) -> int:
    """The same on a GPU, where the rows of all experts of a site are added at once.

    Args:
        parts: Of the pass.
        num_tokens: Of a batch.
        experts_per_token: K.
    """
    sizes = [
        (part.num_sums, part.site.in_features, num_tokens * (experts_per_token if part.pooled else 1)) for part in parts
    ]
    return max((groups_bytes(*size) for size in sizes), default=0)


def hessian_bytes(parts: Sequence[SitePart]) -> dict[str, int]:
    """Sums of a pass, by name."""
    return {"Hessians": sum(part.sum_bytes for part in parts)}


def stack_bytes(adapter: Adapter, site: Site, num_experts: int) -> int:
    """Weights of a stack that is solved: a copy, their rows side by side, and those in float32 unless they are."""
    itemsize = adapter.dtype_of(site).itemsize
    return num_experts * sum(site.rows) * site.in_features * (2 * itemsize + (4 if itemsize != 4 else 0))


def packed_bytes(shape: WeightShape, grid: GridSpec, scale_bytes: int) -> int:
    """Bytes of one quantized weight in a file: codes packed in rows, scales, zero points."""
    groups = shape.out_features * grid.num_groups(shape.in_features)
    zero_points = 0 if grid.symmetric else groups
    if grid.two_level is not None:  # integers of a byte, and float16 of the super-blocks
        supers = shape.out_features * shape.in_features // SUPER_BLOCK * (2 if grid.symmetric else 4)
        scale_bytes, zero_points = 1, zero_points + supers
    return 4 * shape.out_features * num_words(shape.in_features, grid.bits) + scale_bytes * groups + zero_points


def block_file_bytes(
    weights: Sequence[WeightShape], plan: Mapping[str, GridSpec], scale_bytes: int, num_blocks: int
) -> tuple[int, ...]:
    """Bytes of the file of every block."""
    totals = [0] * num_blocks
    for shape in planned(plan, weights):
        totals[shape.block] += packed_bytes(shape, plan[shape.name], scale_bytes)
    return tuple(totals)


def kernel_bytes(site: Site, data: DataShape, num_blocks: int, experts_per_token: int) -> int:
    """What oneDNN keeps of products in bfloat16 on a CPU: a kernel for each number of rows that a linear has seen.

    Experts see another number of tokens each time, up to several times the mean; ``most_kernels`` are kept.

    Args:
        site: Into the routed experts.
        data: The calibration data.
        num_blocks: Of the model.
        experts_per_token: K.
    """
    mean = data.batch_tokens * experts_per_token // site.num_experts
    seen = min(data.num_batches * site.num_experts * num_blocks, SPREAD * mean)
    return KERNEL_BYTES * min(most_kernels(), (len(site.leaves) + 1) * seen)


def choose_hessian_gib(free_bytes: int, other_bytes: int, largest_need_bytes: int, least_need_bytes: int = 0) -> float:
    """Bound on the Hessians of a pass, in GiB, where the user gave none; codes do not depend on it.

    What remains after everything else, in whole eighths of a GiB, so that a few bytes less of free memory rarely make
    another schedule; no more than the largest pass can use, and no less than the Hessians of one expert.

    Args:
        free_bytes: What the run may take where the Hessians lie.
        other_bytes: What it takes there beside them, at the same moment.
        largest_need_bytes: Hessians of the largest pass if nothing is cut.
        least_need_bytes: Those of the largest single expert.
    """
    room = min(free_bytes - other_bytes, MOST_HESSIAN_BYTES) // _STEP * _STEP
    useful = -(-largest_need_bytes // _STEP) * _STEP
    least = max(LEAST_HESSIAN_BYTES, -(-least_need_bytes // _STEP) * _STEP)
    return max(least, min(room, useful)) / GIB
