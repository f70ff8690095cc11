"""What a survey of the original model found: who is used, what changes the tokens, and what each choice would cost.

Rules and allocators decide from this alone; they see neither the model nor the data.  It is written as ``survey.json``
into the run folder, so that plans can be made later, without another survey.

Shapes: E experts of a block, L blocks.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeq.allocation.plan import Choice

EVIDENCE_VERSION = 1
# Weight name -> choice -> predicted damage: lower is better, and the costs of different weights may be added up.
CostTable = Mapping[str, Mapping[Choice, float]]


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


def read_evidence(path: Path) -> Evidence:
    """Read a ``survey.json``; raises ValueError where there is none or it cannot be read."""
    if not path.is_file():
        raise ValueError(f"no survey at {path}; give the survey.json of a run with callbacks.survey.Survey")
    try:
        return Evidence.from_json(json.loads(path.read_text(encoding="utf8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _list_of(values_L: Tensor | None) -> list[float | None] | None:
    if values_L is None:
        return None
    return [None if math.isnan(value) else value for value in values_L.tolist()]


def _tensor_of(values: list[float | None] | None) -> Tensor | None:
    if values is None:
        return None
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
