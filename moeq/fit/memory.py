"""Memory of a fit from shapes alone: the parts of which the moments of its phases consist.

All functions read shapes and dtypes, never values, so they serve a model on the meta device.  In bytes, with s bytes of
a number of the model in memory, d in its files:

    block        s * numbers of its parameters
    loading      beside a block that arrives: the parts, in the files' dtype, of its largest stack of experts
    activations  of one batch in one block: ``forward_bytes``
    waiting      hidden states between passes: s * tokens * width, as often as models are run (quantized, original)
    Hessians     8 I^2 (E + 1) float64 sums, + 4 I^2 E float32 working copies while they are solved with
                 (``moeq.fit.schedule``, which bounds them)
    to solve     weights of a stack as they are, side by side, and in float32: (2 s + 4) O I E, or 2 s O I E of float32
    workspace    of the solver (``moeq.quant.workspace``)
    codes        one byte per weight while a block is solved, twice for the stack that is being solved
    block file   packed codes, and the same again as they are written

Shapes: E experts, O out features, I in features, D width of the model, N tokens of a batch, K experts of a token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from torch import Tensor, nn

from moeq.fit.schedule import GIB, SitePart
from moeq.models.adapter import Adapter
from moeq.models.sites import Site
from moeq.models.storage import storage_dtype
from moeq.quant.hessian import PANEL
from moeq.quant.packing import num_words
from moeq.quant.spec import GridSpec, WeightShape

# Least and most that ``choose_hessian_gib`` gives where one Hessian does not need more.
LEAST_HESSIAN_BYTES, MOST_HESSIAN_BYTES = GIB // 4, 64 * GIB
_STEP = GIB // 8


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


@dataclass(frozen=True)
class ModelBytes:
    """A model in memory, by block.

    Attributes:
        outside: Embeddings, last norm, head.
        outside_stored: The same in the files.
        blocks: Each block.
        stored: Each block in the files.
        loading: What loading each block holds beside it for a moment, where blocks are streamed.
        streamed: Whether one block at a time is held, or all.
    """

    outside: int
    outside_stored: int
    blocks: tuple[int, ...]
    stored: tuple[int, ...]
    loading: tuple[int, ...]
    streamed: bool

    @property
    def total(self) -> int:
        """The whole model."""
        return self.outside + sum(self.blocks)

    def held(self, block: int) -> dict[str, int]:
        """What is there while a block is worked on, by name."""
        if self.streamed:
            return {"outside of blocks": self.outside, "block": self.blocks[block]}
        return {"model": self.total}


def model_bytes(adapter: Adapter, *, streamed: bool) -> ModelBytes:
    """Bytes of a model on any device, the meta device included."""
    model, blocks = adapter.model, adapter.blocks
    inside = {id(tensor) for _, tensor in _tensors(blocks)}
    outside = {name: tensor for name, tensor in _tensors(model) if id(tensor) not in inside}
    held, stored, loading = [], [], []
    for index, block in enumerate(blocks):
        named = [(f"{adapter.block_prefix}.{index}.{name}", tensor) for name, tensor in _tensors(block)]
        in_files = [tensor.numel() * storage_dtype(model, name).itemsize for name, tensor in named]
        stacks = [num_bytes for (_, tensor), num_bytes in zip(named, in_files, strict=True) if tensor.ndim > 2]
        held.append(sum(tensor.nbytes for _, tensor in named))
        stored.append(sum(in_files))
        loading.append(max(stacks, default=0))
    outside_bytes = sum(tensor.nbytes for tensor in outside.values())
    outside_stored = sum(tensor.numel() * storage_dtype(model, name).itemsize for name, tensor in outside.items())
    return ModelBytes(outside_bytes, outside_stored, tuple(held), tuple(stored), tuple(loading), streamed)


def hidden_bytes(adapter: Adapter, num_tokens: int) -> int:
    """Hidden states of some tokens at one block."""
    width, itemsize = _width(adapter)
    return num_tokens * width * itemsize


def forward_bytes(adapter: Adapter, block: int, data: DataShape, experts_per_token: int) -> int:
    """Most that running one batch through a block holds beside its weights.

    Attention: the residual stream, its normed input, what the linears give (twice: rotated, and for a while as it was),
    and their input on the way out; scores of all pairs of tokens, three times, where no fused kernel serves a family.
    Feed-forward: the residual stream, its normed input and its output, with the inner activations (gate, up and their
    product).  Routed experts see a token K times, and what they read and return is as wide as the model, before and
    after it is weighted.

        attention = s N (2 D + 2 O + I + 3 T heads)    dense = s N (3 D + 3/2 O)    routed = s N (3 D + K (3 D + 3/2 O))

    Args:
        adapter: The model.
        block: Which block.
        data: Its batches have N tokens, in sequences of T.
        experts_per_token: K.
    """
    width, itemsize = _width(adapter)
    attention, inner = 3 * data.length * _heads_with_scores(adapter), 0
    for site in adapter.sites(block):
        rows = sum(site.rows)
        if site.stage == "attention_out":
            attention += site.in_features
        elif site.stage.startswith("attention"):
            attention += 2 * rows
        elif site.stage == "mlp_in":
            routed = site.kind == "routed"
            inner = max(inner, (experts_per_token if routed else 1) * (rows * 3 // 2 + (3 * width if routed else 0)))
    return itemsize * data.batch_tokens * max(2 * width + attention, 3 * width + inner)


def gather_bytes(parts: Sequence[SitePart], num_tokens: int) -> int:
    """Most that adding a batch to the Hessians holds: float32 rows, with their weighted copy or a panel's product."""
    rows = num_tokens + max(num_tokens, 2 * PANEL)
    return max((4 * rows * part.site.in_features for part in parts), default=0)


def hessian_bytes(parts: Sequence[SitePart]) -> dict[str, int]:
    """Sums of a pass, by name."""
    return {"Hessians": sum(part.sum_bytes for part in parts)}


def working_bytes(parts: Sequence[SitePart]) -> dict[str, int]:
    """Copies that a pass is solved with: those of one site at a time."""
    return {"Hessians to solve": max((part.working_bytes for part in parts), default=0)}


def stack_bytes(adapter: Adapter, site: Site, num_experts: int) -> int:
    """Weights of a stack that is solved: a copy, their rows side by side, and those in float32 unless they are."""
    itemsize = adapter.dtype_of(site).itemsize
    return num_experts * sum(site.rows) * site.in_features * (2 * itemsize + (4 if itemsize != 4 else 0))


def packed_bytes(shape: WeightShape, grid: GridSpec, scale_bytes: int) -> int:
    """Bytes of one quantized weight in a file: codes packed in rows, scales, zero points."""
    groups = shape.out_features * grid.num_groups(shape.in_features)
    zero_points = 0 if grid.symmetric else groups
    return 4 * shape.out_features * num_words(shape.in_features, grid.bits) + scale_bytes * groups + zero_points


def block_file_bytes(
    weights: Sequence[WeightShape], plan: Mapping[str, GridSpec], scale_bytes: int, num_blocks: int
) -> tuple[int, ...]:
    """Bytes of the file of every block."""
    totals = [0] * num_blocks
    for shape in weights:
        totals[shape.block] += packed_bytes(shape, plan[shape.name], scale_bytes)
    return tuple(totals)


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


def _width(adapter: Adapter) -> tuple[int, int]:
    """Width of the residual stream, and bytes of one of its numbers."""
    model = adapter.model
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return int(model.config.get_text_config().hidden_size), dtype.itemsize  # type: ignore[operator, union-attr]


def _heads_with_scores(adapter: Adapter) -> int:
    """Heads whose scores are made as a tensor: those of eager attention, and of values narrower than their keys."""
    config = adapter.model.config.get_text_config()  # type: ignore[operator, union-attr]
    key = getattr(config, "qk_nope_head_dim", 0) + getattr(config, "qk_rope_head_dim", 0)
    uneven = key and key != getattr(config, "v_head_dim", key)
    eager = getattr(config, "_attn_implementation", None) == "eager"
    return int(config.num_attention_heads) if uneven or eager else 0


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, tied ones once."""
    return [*module.named_parameters(), *module.named_buffers()]
