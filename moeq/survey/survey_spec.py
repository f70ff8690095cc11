"""Settings of a survey: cost tables, scores, choices of bits and the data they take."""

from dataclasses import dataclass, field
from typing import Literal

from moeq.allocation.plan import DEFAULT_CHOICES, Choice, parse_choices
from moeq.models.adapter import Site
from moeq.quant.coverage import CoverageSpec
from moeq.quant.spec import GridSpec, SolveSpec
from moeq.survey.scores import SCORES

COSTS = ("fisher", "fisher_kl", "hessian", "gemq", "pmq", "block_output", "alphaq")
FISHER = {"fisher", "fisher_kl"}
SOLVED, MEASURED = FISHER | {"hessian"}, {"gemq", "pmq", "block_output"}
Similarity = Literal["residual", "block"]


@dataclass(frozen=True)
class SurveyOptions:
    """What to find out about the original model.

    Attributes:
        costs: Tables of predicted damage: fisher, fisher_kl, hessian, gemq, pmq, block_output, alphaq.
        scores: Scores without data: outlier, outlier_group, kurtosis, spectral_tail.
        solver: Whose errors fisher, fisher_kl and hessian judge: "gptq" as in the run, or "rtn", which is faster.
        num_gradient_batches: Batches, of all ranks together, for backward passes and measured changes.
        num_kl_batches: Of those, batches on which fisher_kl measures.
        similarity: "residual" compares tokens before and after the FFN with the residual stream, "block" without.
        predictor: Train the paper's predictor of the similarity in each block, too.
        seed: Of sampled tokens and of the predictor.
    """

    costs: tuple[str, ...] = ("fisher",)
    scores: tuple[str, ...] = ()
    solver: Literal["gptq", "rtn"] = "gptq"
    num_gradient_batches: int = 8
    num_kl_batches: int = 2
    similarity: Similarity = "residual"
    predictor: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for what, given, allowed in (("costs", self.costs, COSTS), ("scores", self.scores, SCORES)):
            if unknown := [name for name in given if name not in allowed]:
                raise ValueError(f"{what} ({unknown[0]}) must be among {', '.join(allowed)}; choose {allowed[0]}")
        for field_name, value, options in (
            ("solver", self.solver, ("gptq", "rtn")), ("similarity", self.similarity, ("residual", "block")),
        ):  # fmt: skip
            if value not in options:
                raise ValueError(f"{field_name} ({value}) must be {' or '.join(options)}; choose {options[0]}")
        for what, number, usual in (
            ("num_gradient_batches", self.num_gradient_batches, 8), ("num_kl_batches", self.num_kl_batches, 2),
        ):  # fmt: skip
            if number < 1:
                raise ValueError(f"{what} ({number}) must be positive; choose {usual}")


@dataclass(frozen=True)
class SurveySpec(SurveyOptions):
    """What to find out, and with which quantizer.

    Attributes:
        choices: What a weight may get; one whose groups do not divide a weight's in-features is left out for it.
        grid: Symmetry and clip search of all choices; its group size is that of ``outlier_group``.
        solve: Of GPTQ.
        affinity_power: Weight of a token in the solver's Hessians, as in ``moeq.quant.hessian``.
        coverage: What experts with few tokens get.
    """

    choices: tuple[Choice, ...] = parse_choices(DEFAULT_CHOICES, GridSpec.group_size)
    grid: GridSpec = field(default_factory=GridSpec)
    solve: SolveSpec = field(default_factory=SolveSpec)
    affinity_power: float = 1.0
    coverage: CoverageSpec = field(default_factory=CoverageSpec)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.costs and not self.choices:
            raise ValueError(
                "costs are asked for but choices is empty; give the widths to choose from, such as [2, 3, 4]"
            )

    def wants(self, names: set[str]) -> bool:
        """True where one of these costs is asked for."""
        return not names.isdisjoint(self.costs)

    def choices_of(self, site: Site) -> list[Choice]:
        """Choices that fit the weights of a site, in increasing order.

        Raises:
            ValueError: None does.
        """
        fitting = sorted(choice for choice in self.choices if choice.fits(site.in_features))
        if not fitting:
            raise ValueError(
                f"{site.name}: no group size of the choices ({', '.join(c.label for c in self.choices)}) divides its "
                f"{site.in_features} in-features; add choices with smaller groups, or without groups such as '4'"
            )
        return fitting
