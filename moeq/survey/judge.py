"""The judge of a search: plans of a surveyed model, assembled from its candidates and measured on other batches."""

from collections.abc import Sequence

from moeq.allocation.evidence import CostTable
from moeq.survey.assembled import AssembledModels
from moeq.survey.candidates import Plan
from moeq.survey.slopes import Choices, plan_slopes
from moeq.survey.sweeps import Show, unseen


class SurveyJudge:
    """Implements ``moeq.allocation.outer.Judge``.

    Args:
        models: The surveyed model with its candidates, and the batches.
        choices: Of every site.
        show: Shows how far a sweep is.
    """

    def __init__(self, models: AssembledModels, choices: Choices, show: Show = unseen) -> None:
        self._models, self._choices, self._show = models, choices, show

    def measure(self, plans: Sequence[Plan]) -> list[float]:
        """KL to the original of every plan, in nats per token; one sweep over the blocks."""
        return self._models.measure(plans, self._show) if plans else []

    def slopes(self, plan: Plan) -> CostTable:
        """First-order change of the KL of a plan by weight and choice; a sweep forward and one back."""
        return plan_slopes(self._models, plan, self._choices, self._show)
