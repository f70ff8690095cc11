"""Metrics as torchmetrics classes: a total and a count per metric, summed over batches and ranks, divided at the end.

The totals come from the functions of this package (``nll_sum_and_count``, ``kl_sum_and_agreement``,
``count_same_routing``); the classes only add, reduce and divide.  Sums are float64 or int64, so that neither the number
of tokens nor the number of ranks changes the result; a rank that saw nothing contributes zeros.  Without any data
``compute`` is NaN.
"""

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanMetric(Metric):
    """Quotient of a summed total and a summed count; the subclasses say of what."""

    is_differentiable = False
    full_state_update = False
    total_dtype = torch.int64
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=self.total_dtype), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, total: Tensor | float, count: Tensor | int) -> None:
        """Add the total and the count of one batch."""
        # A cast of the parent module (to bfloat16, say) reaches the states before the first batch; undo it.
        self.total = self.total.to(self.total_dtype) + total
        self.count = self.count + count

    def compute(self) -> Tensor:
        """Float64 total / count; NaN where nothing was counted."""
        return self.total.to(torch.float64) / self.count


class MeanKL(MeanMetric):
    """Mean over positions of KL(reference || model), in nats; total is the sum over positions."""

    higher_is_better = False
    total_dtype = torch.float64


class Perplexity(MeanMetric):
    """exp of the mean negative log-likelihood per scored token; total is the sum in nats."""

    higher_is_better = False
    total_dtype = torch.float64

    def compute(self) -> Tensor:
        """Float64 exp(total / count)."""
        return super().compute().exp()


class Agreement(MeanMetric):
    """Share of positions at which the model's most likely token is the reference's."""

    higher_is_better = True


class RouterAgreement(MeanMetric):
    """Share of (token, block) pairs whose set of chosen experts is the reference's."""

    higher_is_better = True


class ExactMatch(MeanMetric):
    """Share of problems whose generated answer is the right one."""

    higher_is_better = True
