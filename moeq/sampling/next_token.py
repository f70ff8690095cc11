"""Any causal LM of transformers as the ``NextToken`` of the search: KV cache, log-probabilities, chosen experts.

The cache is the model's own (``past_key_values=None, use_cache=True``, then what the output holds), so hybrid and
sliding-window families get theirs; its plain layers are replaced by ones that grow in place (moeq.decoding.cache).
Rows are reordered, repeated and dropped by its ``reorder_cache`` with one index, which is skipped where the rows stay
as they are.  Chosen experts come from hooks on the experts modules, whose
arguments are the same in every family; they stay on the device and are counted once per step for all blocks.

Legend: N rows, T tokens, L experts modules (blocks with routed experts), E experts, K chosen per token, V vocabulary.
"""

from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeq.decoding.cache import GrowingCache, grow_in_place
from moeq.decoding.decode_attention import decoding
from moeq.decoding.reorder import reorder_cache
from moeq.models.adapter import is_experts_module
from moeq.models.observe import observe_routing


class ExpertCounter:
    """Counts, while it is entered, which experts the tokens of each row chose in the last forward pass.

    Raises:
        ValueError: The model has no routed experts, or blocks with different numbers of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = {name: module for name, module in model.named_modules() if is_experts_module(module)}
        numbers = sorted({int(module.num_experts) for module in self._modules.values()})
        if len(numbers) != 1:
            raise ValueError(
                f"{type(model).__name__} has {f'blocks with {numbers} experts' if numbers else 'no routed experts'}, "
                "whose balance is not defined; calibrate on text (TextDataModule)"
            )
        self.num_experts = numbers[0]
        self._chosen: dict[str, Tensor] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        self._hooks.enter_context(observe_routing(self._modules, self._on_routing))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()
        self._chosen.clear()

    def _on_routing(self, path: str, ids_TK: Tensor, weights_TK: Tensor) -> None:
        self._chosen[path] = ids_TK

    def take(self, num_rows: int) -> Tensor:
        """int32 counts_NLE of the last forward pass."""
        device = self._chosen[next(iter(self._modules))].device
        # Rows of all blocks at once: no synchronisation per block, and none at all on one device.
        chosen_NLC = torch.stack(
            [self._chosen[path].to(device).reshape(num_rows, -1) for path in self._modules], 1
        ).to(torch.int64)  # fmt: skip
        counts_NLE = chosen_NLC.new_zeros(num_rows, len(self._modules), self.num_experts, dtype=torch.int32)
        return counts_NLE.scatter_add_(-1, chosen_NLC, torch.ones_like(chosen_NLC, dtype=torch.int32))


class ModelNextToken:
    """The search's view of a model; use it as a context manager, which takes the hooks off.

    Args:
        model: A causal LM in eval mode; inputs must be on the device of its embeddings.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._counter = ExpertCounter(model)
        self._cache: Any = None
        self._length = 0
        self._entered = ExitStack()

    def __enter__(self) -> Self:
        self._entered.enter_context(decoding(self._model))
        self._entered.enter_context(self._counter)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cache = None
        self._entered.close()

    @property
    def layers_in_place(self) -> int:
        """Cache layers that grow in place since the last prefill; all others are the model's own."""
        return self._cache.num_in_place if isinstance(self._cache, GrowingCache) else 0

    def prefill(self, ids_NT: Tensor) -> tuple[Tensor, Tensor]:
        """Start N rows of T tokens: float32 log P(next) [N, V], counts [N, L, E]."""
        self._cache, self._length = None, 0
        log_prob_NV, counts_NLE = self._forward(ids_NT)
        self._cache = grow_in_place(self._cache, self._rows)
        return log_prob_NV, counts_NLE

    def step(self, parent_N: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
        """Row n becomes old row ``parent_N[n]`` plus ``token_N[n]``; the number of rows may change."""
        if self._rows != parent_N.numel() or not torch.equal(
            parent_N, torch.arange(self._rows, device=parent_N.device)
        ):
            reorder_cache(self._cache, parent_N)
        return self._forward(token_N[:, None])

    @torch.no_grad()
    def _forward(self, ids_NT: Tensor) -> tuple[Tensor, Tensor]:
        self._rows, num_tokens = ids_NT.shape
        # Given, because some families would number the new tokens from zero.
        positions = torch.arange(self._length, self._length + num_tokens, device=ids_NT.device).expand(self._rows, -1)
        output = self._model(
            input_ids=ids_NT, position_ids=positions, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cache, self._length = output.past_key_values, self._length + num_tokens
        return F.log_softmax(output.logits[:, -1], dim=-1, dtype=torch.float32), self._counter.take(self._rows)


@torch.no_grad()
def score_sequences(model: nn.Module, ids_NT: Tensor, batch_size: int = 4) -> tuple[Tensor, Tensor]:
    """What a model makes of given sequences, without a cache: nll_N (float32 nats over T - 1 tokens) and counts_NLE.

    Args:
        model: A causal LM in eval mode.
        ids_NT: On the device of its embeddings.
        batch_size: Rows per forward pass; [batch_size, T, V] logits are held at once.
    """
    nll: list[Tensor] = []
    counts: list[Tensor] = []
    with ExpertCounter(model) as counter:
        for ids_BT in ids_NT.split(batch_size):
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
            counts.append(counter.take(ids_BT.shape[0]))
            nll.extend(
                F.cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="sum")
                for logits_TV, ids_T in zip(logits_BTV, ids_BT, strict=True)
            )
    return torch.stack(nll), torch.cat(counts)
