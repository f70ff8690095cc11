"""Plans of the studies of files: one survey of every choice, and what a budget comes to for a runtime."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from callbacks.bit_allocation import BitAllocation
from moeq.allocation.plan import parse_choices
from moeq.disk.atomic import write_json
from moeq.quant.spec import GridSpec, SolveSpec
from moeq.survey.survey_spec import SurveySpec
from moeq.survey.surveyor import survey_model

DAMPING = 0.1


def make_survey(
    path: Path, model: nn.Module, ids_NL: Tensor, choices: Sequence[int | str], group_size: int = 64
) -> None:
    """Costs of every choice for every weight on full-range grids, unless the file is there.

    Args:
        path: Of the survey.
        model: The original.
        ids_NL: Calibration ids, of one set for all seeds.
        choices: As ``BitAllocation`` takes them.
        group_size: Of choices that say none.
    """
    if path.is_file():
        return
    spec = SurveySpec(
        costs=("fisher",), choices=parse_choices(choices, None), solve=SolveSpec(damping=DAMPING),
        grid=GridSpec(4, group_size, symmetric=True, kind="full_range"),
    )  # fmt: skip
    write_json(path, survey_model(model, ids_NL.split(8), spec).to_json())


def allocated(budget: float, survey: Path, choices: Sequence[int | str], runtime: str) -> BitAllocation:
    """Choices of least predicted divergence, of so many bits of a weight in the file.

    Args:
        budget: Bits with scales, on average.
        survey: Of ``make_survey``.
        choices: Among those of the survey.
        runtime: That is to read the file.
    """
    return BitAllocation(
        survey=str(survey), method="allocate", cost="fisher", budget=budget, budget_unit="average_bits",
        choices=choices, runtime=runtime,
    )  # fmt: skip
