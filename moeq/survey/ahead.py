"""Sweeps over the whole model that come before a survey's first pass: costs of the first block need the last one."""

from collections.abc import Sequence

import torch

from moeq.disk.waiting import WaitingStates
from moeq.distributed import rank_and_world
from moeq.models.adapter import Adapter
from moeq.survey.gradient_probe import GradientProbe
from moeq.survey.measured_scale import Variant, measured_divergences
from moeq.survey.survey_spec import SurveySpec
from moeq.survey.sweeps import BlockStates, Inputs, Show, sweep_forward


class SweepsAhead:
    """Gradients and measured divergences, as far as costs need them, on the first batches of the whole set.

    Args:
        adapter: The model, original weights.
        spec: Which costs, and on how many batches.
        waiting: Where inputs of blocks and gradients wait.
        device: Where the model computes.

    Attributes:
        gradients: Found by the sweep in reverse.
        divergences: KL of each structure at each choice, in nats per token.
    """

    def __init__(self, adapter: Adapter, spec: SurveySpec, waiting: WaitingStates, device: torch.device) -> None:
        self.adapter, self.spec, self._waiting = adapter, spec, waiting
        self.gradients = GradientProbe(adapter, spec, waiting, device)
        self.divergences: dict[Variant, float] = {}
        self._num_gradient = spec.num_gradient_batches if self.gradients.scores else 0
        self._num_kl = spec.num_kl_batches if "fisher_kl" in spec.costs else 0

    @property
    def num_batches(self) -> int:
        """Batches of this rank that ``sweep`` takes; batch i of rank r is number i * ranks + r of the whole set."""
        rank, world = rank_and_world()
        return len(range(rank, max(self._num_gradient, self._num_kl), world))

    def sweep(self, batches: Sequence[Inputs], show: Show) -> None:
        """Forward, forward with rounded structures, and in reverse.

        Args:
            batches: The first of this rank; those beyond ``num_batches`` are left out.
            show: Shows how far a sweep is.
        """
        rank, world = rank_and_world()
        numbered = {index * world + rank: inputs for index, inputs in enumerate(batches[: self.num_batches])}
        states = BlockStates(self._waiting)
        if numbered:
            sweep_forward(self.adapter, numbered, states, show)
        if self._num_kl:
            first = {number: inputs for number, inputs in numbered.items() if number < self._num_kl}
            self.divergences = measured_divergences(self.adapter, self.spec, first, states, show)
        first = {number: inputs for number, inputs in numbered.items() if number < self._num_gradient}
        self.gradients.find(first, states, show)
        states.clear()
