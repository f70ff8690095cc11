"""The judge of a search: plans of a surveyed model, assembled from its candidates and measured on other batches."""

from collections.abc import Mapping, Sequence

import torch

from moeq.allocation.evidence import CostTable
from moeq.disk.waiting import WaitingStates
from moeq.models.adapter import Adapter
from moeq.survey.assembled import AssembledModels
from moeq.survey.candidates import Candidates, Plan
from moeq.survey.slopes import Choices, plan_slopes
from moeq.survey.survey_spec import SurveySpec
from moeq.survey.sweeps import BlockStates, Inputs, Show, unseen


class SurveyJudge:
    """Implements ``moeq.allocation.outer.Judge``.

    Args:
        models: The surveyed model with its candidates, and the batches.
        choices: Of every site.
        show: Shows how far a sweep is.
    """

    def __init__(self, models: AssembledModels, choices: Choices, show: Show = unseen) -> None:
        self._models, self._choices, self._show = models, choices, show

    @property
    def candidates(self) -> Candidates:
        """Of the model, for a survey to fill."""
        return self._models.candidates

    @property
    def batches(self) -> Mapping[int, Inputs]:
        """Of this rank, by number in the whole set."""
        return self._models.batches

    def measure(self, plans: Sequence[Plan]) -> list[float]:
        """KL to the original of every plan, in nats per token; one sweep over the blocks."""
        return self._models.measure(plans, self._show) if plans else []

    def slopes(self, plan: Plan) -> CostTable:
        """First-order change of the KL of a plan by weight and choice; a sweep forward and one back."""
        return plan_slopes(self._models, plan, self._choices, self._show)


def open_judge(
    adapter: Adapter, spec: SurveySpec, batches: Mapping[int, Inputs], waiting: WaitingStates,
    device: torch.device | str = "cpu", show: Show = unseen,
) -> SurveyJudge:  # fmt: skip
    """A judge whose candidates a survey is still to solve.

    Args:
        adapter: The model, original weights.
        spec: The survey's.
        batches: Of this rank, by number in the whole set.
        waiting: Where candidates and hidden states wait; one that nobody else clears.
        device: Where the model computes.
        show: Shows how far a sweep is.
    """
    models = AssembledModels(adapter, Candidates(adapter, waiting), batches, BlockStates(waiting), device)
    return SurveyJudge(models, {site: spec.choices_of(site) for site in adapter.all_sites()}, show)


def check_apart(num_apart: int, num_batches: int) -> None:
    """Raise ValueError where batches that are kept apart for a search leave none for the survey."""
    if num_apart and num_apart >= num_batches:
        raise ValueError(
            f"num_batches ({num_apart}) of search are kept apart from the survey, and the data are {num_batches} "
            "batches; give more data, a smaller --data.batch_size, or fewer num_batches"
        )
