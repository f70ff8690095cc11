"""Bytes of a model and of what running one of its blocks holds, from shapes alone: the meta device will do.

Shapes: D width of the model, N tokens of a batch, T of a sequence, O out features, I in features, K experts of a token.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from moeq.models.adapter import Adapter
from moeq.models.shapes import experts_per_token
from moeq.models.storage import storage_dtype


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


def forward_bytes(adapter: Adapter, block: int, num_tokens: int, length: int) -> int:
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
        num_tokens: N.
        length: T.
    """
    width, itemsize = _width(adapter)
    num_experts = experts_per_token(adapter.model.config)
    attention, inner = 3 * length * _heads_with_scores(adapter), 0
    for site in adapter.sites(block):
        rows = sum(site.rows)
        if site.stage == "attention_out":
            attention += site.in_features
        elif site.stage.startswith("attention"):
            attention += 2 * rows
        elif site.stage == "mlp_in":
            routed = site.kind == "routed"
            inner = max(inner, (num_experts if routed else 1) * (rows * 3 // 2 + (3 * width if routed else 0)))
    return itemsize * num_tokens * max(2 * width + attention, 3 * width + inner)


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
