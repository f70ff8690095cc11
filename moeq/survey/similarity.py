"""Cosine similarity of tokens before and after each block's FFN, gathered while the blocks run.

"residual" compares the residual stream before the FFN with that behind it (behind minus the FFN's output, and behind),
"block" the FFN's own input, after the norm, with its own output.  The FFN of a block is the parent of its
experts module.

Shapes: B batch, T tokens of a sequence, D width, L blocks.
"""

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from moeq.distributed import sum_over_ranks
from moeq.models.adapter import Adapter
from moeq.survey.predictor import predicted_similarity, token_similarity, train_predictor
from moeq.survey.survey_spec import SurveySpec


class SimilarityProbe:
    """Measures the similarity, and trains a predictor of it on the tokens seen, block by block.

    With a predictor the FFN inputs of one block wait on the CPU.  Each rank trains on its own sequences, and the
    mean of the predictions is taken over all tokens.

    Args:
        adapter: The model.
        spec: Which similarity, whether to predict it, and the seed.
        device: Where the predictor is trained.
    """

    def __init__(self, adapter: Adapter, spec: SurveySpec, device: torch.device) -> None:
        self.adapter, self.spec, self._device = adapter, spec, device
        num_blocks = len(adapter.blocks)
        self.measured_L = torch.full((num_blocks,), math.nan, dtype=torch.float64)
        self.predicted_L = torch.full((num_blocks,), math.nan, dtype=torch.float64)

    def attach(self, stack: ExitStack, block: int) -> None:
        """Watch the FFN of a block."""
        self._ffn: tuple[Tensor, Tensor] | None = None
        self._sum, self._num_tokens = 0.0, 0.0
        self._tokens: list[Tensor] = []
        self._similarities: list[Tensor] = []
        prefix = f"{self.adapter.block_prefix}.{block}."
        for path in self.adapter.expert_modules():
            if path.startswith(prefix):
                ffn = self.adapter.model.get_submodule(path.rpartition(".")[0])
                stack.callback(ffn.register_forward_hook(self._on_ffn, with_kwargs=True).remove)

    def after_block(self, output_BTD: Tensor, mask_BT: Tensor | None) -> None:
        """Add one batch; ``output_BTD`` is the output of the block whose FFN has just run."""
        if self._ffn is None:
            return
        before, after = (part.reshape(output_BTD.shape) for part in self._ffn)
        self._ffn = None
        if self.spec.similarity == "residual":
            before, after = output_BTD - after, output_BTD
        for sequence in range(len(output_BTD)):
            kept = slice(None) if mask_BT is None else mask_BT[sequence].bool()
            before_TD, after_TD = before[sequence, kept], after[sequence, kept]
            similarity_T = token_similarity(before_TD, after_TD)
            self._sum += float(similarity_T.double().sum())
            self._num_tokens += len(similarity_T)
            if self.spec.predictor:
                self._tokens.append(before_TD.cpu())
                self._similarities.append(similarity_T.cpu())

    def finish(self, block: int) -> None:
        """Mean over all tokens of all ranks."""
        predicted = 0.0
        if self.spec.predictor and self._tokens:
            model = train_predictor(self._tokens, self._similarities, self.spec.seed, self._device)
            predicted, _ = predicted_similarity(model, self._tokens)
        sums = torch.tensor([self._sum, predicted, self._num_tokens], dtype=torch.float64, device=self._device)
        sum_over_ranks([sums])
        if float(sums[2]) > 0:
            self.measured_L[block] = sums[0] / sums[2]
            self.predicted_L[block] = sums[1] / sums[2] if self.spec.predictor else math.nan
        self._tokens, self._similarities = [], []

    def _on_ffn(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        self._ffn = (args[0] if args else kwargs["hidden_states"], after)
