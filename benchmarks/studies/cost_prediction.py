"""Do cost tables predict? Rank correlation of every table with the measured KL of rounding single weights.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.cost_prediction --json benchmarks/results/cost_prediction.json

Rounded are each linear of attention and shared experts, one linear of one routed expert, and one linear of all experts
of a block, to nearest at 2, 3 and 4 bits in groups of 64.  The survey and the measurement see the same prose, of which
a seed draws the windows, so this judges the approximation and not its transfer to other text.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.lab.study import MODEL, Study
from benchmarks.lab.tables import Row, cell, markdown
from moeq.allocation.evidence import Evidence
from moeq.allocation.plan import Choice
from moeq.checkpoint.loading import load_model, load_tokenizer
from moeq.disk.texts import read_documents, token_stream
from moeq.models.adapter import Adapter
from moeq.quant.grid import choose_qparams, dequantize, quantize
from moeq.quant.spec import GridSpec
from moeq.sampling.text import text_windows
from moeq.scoring.divergence import kl_sum_and_agreement
from moeq.survey.survey_spec import SurveySpec
from moeq.survey.surveyor import survey_model

TEXT = Path("assets/reference-moe/texts/wikitext2_validation.txt")
COSTS = ("fisher", "fisher_kl", "hessian", "gemq", "pmq", "block_output")


@dataclass(frozen=True)
class Case:
    """All roundings at one width, and a survey."""

    model: str
    seed: int
    bits: int
    costs: tuple[str, ...]


class CostPrediction(Study[Case]):
    """Every table at every width."""

    title = "Do cost tables predict"
    legend = (
        "Spearman's rank correlation with the measured KL, over all roundings and by kind of weight, +- over seeds; "
        "median of measured over predicted KL for tables that are in nats."
    )
    quick: ClassVar = {"seeds": [0], "bits": [3], "costs": ["fisher"]}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model", default=MODEL)
        parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
        parser.add_argument("--costs", nargs="+", default=list(COSTS), choices=COSTS)

    def cases(self) -> list[Case]:
        o = self.options
        return [Case(o.model, seed, bits, tuple(o.costs)) for seed in o.seeds for bits in o.bits]

    @cached_property
    def model(self) -> Any:
        """The model in float32, in which rounding one weight is all that changes."""
        return load_model(self.options.model, "float32")

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    def measure(self, case: Case) -> Row:
        stream = token_stream(read_documents(TEXT), load_tokenizer(case.model))
        windows_NL = text_windows(stream, 256, 32, case.seed)
        spec = SurveySpec(costs=case.costs, choices=(Choice(case.bits, 64),), solver="rtn", seed=case.seed)
        evidence = survey_model(self.model, windows_NL.split(8), spec)
        adapter, ids_NL = Adapter(self.model), windows_NL[:16]
        with torch.no_grad():
            original_NLV = self.model(ids_NL).logits
        found = []
        for kind, names, changed in roundings(adapter, case.bits):
            kl = measured_kl(adapter, changed, ids_NL, original_NLV)
            costs = {cost: predicted(evidence, cost, names, case.bits) for cost in case.costs}
            found.append({"kind": kind, "kl": kl, "predicted": costs})
        return {"roundings": found}

    def report(self, rows: Sequence[Row]) -> str:
        by_seed = [
            [{**one, "bits": row["bits"]} for row in rows if row["seed"] == seed for one in row["roundings"]]
            for seed in dict.fromkeys(row["seed"] for row in rows)
        ]
        kinds = list(dict.fromkeys(one["kind"] for one in by_seed[0]))
        lines = []
        for cost in dict.fromkeys(name for row in rows for name in row["costs"]):
            cells = [cell([_correlation(found, cost, kind) for found in by_seed], ".3f") for kind in (None, *kinds)]
            scale = cell([_scale(found, cost) for found in by_seed]) if cost.startswith("fisher") else ""
            lines.append([cost, *cells, scale])
        return markdown(["cost", f"all {len(by_seed[0])} roundings", *kinds, "median KL / predicted"], lines)


def _columns(found: Sequence[Row], cost: str, kind: str | None) -> tuple[Tensor, Tensor]:
    some = [one for one in found if kind in (None, one["kind"])]
    kl = torch.tensor([one["kl"] for one in some], dtype=torch.float64)
    return kl, torch.tensor([one["predicted"][cost] for one in some], dtype=torch.float64)


def _correlation(found: Sequence[Row], cost: str, kind: str | None) -> float:
    return rank_correlation(*_columns(found, cost, kind))


def _scale(found: Sequence[Row], cost: str) -> float:
    kl, costs = _columns(found, cost, None)
    return float((kl / costs).median())


def roundings(adapter: Adapter, bits: int) -> Iterator[tuple[str, list[str], dict[str, Tensor]]]:
    """Kind of the weights, their names, and weight_EOI of the sites that they change."""
    grid = GridSpec(bits=bits, group_size=64)
    for site in adapter.all_sites():
        weight_EOI = adapter.get_weight(site).float()
        qparams = choose_qparams(weight_EOI, grid, torch.bfloat16)
        codes_EOI = quantize(weight_EOI, qparams, grid)
        rounded_EOI = dequantize(codes_EOI, qparams.scale_EOG, qparams.zero_point_EOG, bits)
        end = 0
        for leaf, rows in zip(site.leaves, site.rows, strict=True):
            start, end = end, end + rows
            # An expert in the middle, then all of them.
            for experts in [[site.num_experts // 2], list(range(site.num_experts))][: 2 if site.num_experts > 1 else 1]:
                changed_EOI = weight_EOI.clone()
                changed_EOI[experts, start:end] = rounded_EOI[experts, start:end]
                yield site.kind, [site.weight_name(e, leaf) for e in experts], {site.name: changed_EOI}


@torch.no_grad()
def measured_kl(adapter: Adapter, changed: dict[str, Tensor], ids_NL: Tensor, original_NLV: Tensor) -> float:
    """Mean KL of the model with some weights replaced; the original ones are put back."""
    sites = [site for site in adapter.all_sites() if site.name in changed]
    before = {site: adapter.get_weight(site) for site in sites}
    for site in sites:
        adapter.set_weight(site, changed[site.name])
    kl_sum, _, num_tokens = kl_sum_and_agreement(original_NLV, adapter.model(ids_NL).logits)
    for site, weight_EOI in before.items():
        adapter.set_weight(site, weight_EOI)
    return float(kl_sum / num_tokens)


def predicted(evidence: Evidence, cost: str, names: Sequence[str], bits: int) -> float:
    """Sum of a table over some weights."""
    return sum(evidence.costs[cost][name][Choice(bits, 64)] for name in names)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, without ties."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


if __name__ == "__main__":
    CostPrediction.main()
