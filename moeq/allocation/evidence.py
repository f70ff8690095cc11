"""Findings of a survey of the original model: expert usage, similarities, scores, and the cost of each choice of bits.

Rules and allocators decide from this alone; they see neither the model nor the data.  It is written as ``survey.json``
into the run folder, so that plans can be made later, without another survey.

Shapes: E experts of a block, L blocks.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeq.allocation.plan import Choice
from moeq.quant.spec import WeightShape

EVIDENCE_VERSION = 1
# Weight name -> choice -> predicted damage: lower is better, and the costs of different weights may be added up.
CostTable = Mapping[str, Mapping[Choice, float]]


@dataclass(frozen=True)
class Promise:
    """What a survey will hold besides expert usage and similarity, known before it is made.

    Attributes:
        costs: Names of its cost tables.
        scores: Names of its scores.
        choices: What its cost tables know of every weight that they fit.
        predictor: Whether it holds the predicted similarity.
    """

    costs: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()
    choices: tuple[Choice, ...] = ()
    predictor: bool = False


@dataclass(frozen=True)
class Evidence:
    """Measurements on the original model.

    Attributes:
        tokens: By path of the experts module: int64 [E], tokens routed to each expert.
        affinity: Same keys: float64 [E], summed routing weights.
        similarity_L: float64: mean cosine similarity of the tokens before and after the FFN; NaN for blocks without
            routed experts, None where it was not asked for.
        predicted_similarity_L: The same, as a trained predictor sees it.
        scores: Importance without data: score name -> weight name -> value (higher asks for more bits).
        costs: Predicted damage: cost name -> table.
    """

    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    affinity: Mapping[str, Tensor] = field(default_factory=dict)
    similarity_L: Tensor | None = None
    predicted_similarity_L: Tensor | None = None
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    costs: Mapping[str, CostTable] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON form; NaN becomes null, a choice its label."""
        return {
            "version": EVIDENCE_VERSION,
            "tokens": {path: counts.tolist() for path, counts in self.tokens.items()},
            "affinity": {path: sums.tolist() for path, sums in self.affinity.items()},
            "similarity": _list_of(self.similarity_L),
            "predicted_similarity": _list_of(self.predicted_similarity_L),
            "scores": {name: dict(values) for name, values in self.scores.items()},
            "costs": {
                name: {
                    weight: {choice.label: cost for choice, cost in by_choice.items()}
                    for weight, by_choice in table.items()
                }
                for name, table in self.costs.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Evidence":
        """The inverse of ``to_json``; raises ValueError for another version or a missing part."""
        try:
            if data["version"] != EVIDENCE_VERSION:
                raise ValueError(f"version ({data['version']}) must be {EVIDENCE_VERSION}; make the survey again")
            return cls(
                tokens={path: torch.tensor(counts, dtype=torch.int64) for path, counts in data["tokens"].items()},
                affinity={path: torch.tensor(sums, dtype=torch.float64) for path, sums in data["affinity"].items()},
                similarity_L=_tensor_of(data["similarity"]),
                predicted_similarity_L=_tensor_of(data["predicted_similarity"]),
                scores=data["scores"],
                costs={
                    name: {
                        weight: {Choice.from_label(label): cost for label, cost in by_label.items()}
                        for weight, by_label in table.items()
                    }
                    for name, table in data["costs"].items()
                },
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"this is not a survey that moeq wrote ({error!r}); make the survey again") from error


def num_experts_by_path(weights: Sequence[WeightShape]) -> dict[str, int]:
    """Number of routed experts by path of the experts module, the keys of ``Evidence.tokens``."""
    experts: dict[str, int] = {}
    for weight in weights:
        if weight.expert is not None:
            path = weight.name.rsplit(".", 2)[0]
            experts[path] = max(experts.get(path, 0), weight.expert + 1)
    return experts


def check_evidence(evidence: Evidence, weights: Sequence[WeightShape]) -> None:
    """Raise ValueError where findings are not about these weights; what a survey was not asked for may be missing."""
    experts = num_experts_by_path(weights)
    for usage in (evidence.tokens, evidence.affinity):
        found = {path: len(values) for path, values in usage.items()}
        if found and found != experts:
            path, _ = min(experts.items() ^ found.items())
            given, surveyed = experts.get(path, 0), found.get(path, 0)
            raise ValueError(
                f"{path} has {given} experts and {surveyed} in the survey: it is of another model; make it again"
            )
    names = {weight.name for weight in weights}
    for table in (*evidence.scores.values(), *evidence.costs.values()):
        if different := names ^ table.keys():
            first = min(different)
            lacks = "the survey lacks" if first in names else "the model lacks"
            raise ValueError(f"{lacks} {first}: they are of different models; make the survey again")


def read_evidence(path: Path, weights: Sequence[WeightShape] | None = None) -> Evidence:
    """Read a ``survey.json``.

    Args:
        path: The file.
        weights: All quantizable weights of the model that it must be about; None does not check.

    Raises:
        ValueError: There is none, it cannot be read, or it is about another model.
    """
    if not path.is_file():
        raise ValueError(f"no survey at {path}; give the survey.json of a run with the callback Survey")
    try:
        evidence = Evidence.from_json(json.loads(path.read_text(encoding="utf8")))
        if weights is not None:
            check_evidence(evidence, weights)
        return evidence
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def find_costs(evidence: Evidence | None, name: str) -> CostTable:
    """A cost table of the survey; raises ValueError where it was not gathered, naming those that were."""
    tables = {} if evidence is None else evidence.costs
    if name not in tables:
        raise ValueError(
            f"the survey holds no cost {name!r} (it has: {', '.join(tables) or 'none'}); "
            f"add {name} to costs of the callback Survey"
        )
    return tables[name]


def _list_of(values_L: Tensor | None) -> list[float | None] | None:
    if values_L is None:
        return None
    return [None if math.isnan(value) else value for value in values_L.tolist()]


def _tensor_of(values: list[float | None] | None) -> Tensor | None:
    if values is None:
        return None
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
