"""Cost table fisher_kl: predicted damage, scaled to the KL that is measured with whole structures of a block rounded.

    fisher_kl(w, choice) = fisher(w, choice) * KL(S at choice) / sum over w' in S of fisher(w', choice)

S is a structure of one block (its attention, its shared experts, its routed experts), all of it rounded to nearest in
both the measured KL of the model's output and the prediction it is divided by.  The second-order term says how damage
is divided inside S; the measurement adds what no derivative sees: later routers that choose other experts.  That makes
early blocks up to three times as costly as ``fisher`` says.

Shapes: C choices, last dimension 2: KL summed over tokens, and tokens.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moeq.allocation.plan import Choice
from moeq.distributed import sum_over_ranks
from moeq.models.adapter import Adapter, Site
from moeq.scoring.divergence import kl_sum_and_agreement
from moeq.survey.cost_tables import BlockFindings, solved_costs
from moeq.survey.sensitivity import round_trip
from moeq.survey.survey_spec import SurveySpec

Factors = dict[tuple[str, Choice], float]


@torch.no_grad()
def anchor_factors(
    adapter: Adapter, spec: SurveySpec, found: BlockFindings, batches: Sequence[dict[str, Tensor]]
) -> Factors:
    """Measured over predicted damage of each structure of a block, by kind of its weights and choice.

    Args:
        adapter: The model, original weights in place.
        spec: The choices.
        found: What was gathered of the block, added up over ranks.
        batches: Batches (of this rank) to measure on.
    """
    kinds = list(dict.fromkeys(site.kind for site in found.sites))
    predicted = solved_costs(adapter, replace(spec, costs=("fisher",), solver="rtn"), found, found.sites)["fisher"]
    choices = sorted(spec.choices)
    sums = {kind: torch.zeros(len(choices), 2, dtype=torch.float64, device=_device(adapter)) for kind in kinds}
    for batch in batches:
        reference_BTV = adapter.model(**batch, use_cache=False).logits
        for kind in kinds:
            structure = [site for site in found.sites if site.kind == kind]
            sums[kind] += _kl_sums(adapter, spec, structure, choices, batch, reference_BTV)
    sum_over_ranks(list(sums.values()))
    factors: Factors = {}
    for kind in kinds:
        names = [name for site in found.sites if site.kind == kind for name in site.weight_names()]
        for index, choice in enumerate(choices):
            total = sum(predicted[name].get(choice, 0.0) for name in names)
            kl_sum, num_tokens = sums[kind][index].tolist()
            factors[kind, choice] = kl_sum / num_tokens / total if total > 0 and num_tokens > 0 else 1.0
    return factors


def anchored(
    fisher: dict[str, dict[Choice, float]], sites: Sequence[Site], factors: Factors
) -> dict[str, dict[Choice, float]]:
    """``fisher_kl`` of the weights of some sites that ``fisher`` has."""
    kinds = {name: site.kind for site in sites for name in site.weight_names()}
    return {
        name: {choice: cost * factors[kinds[name], choice] for choice, cost in costs.items()}
        for name, costs in fisher.items()
        if name in kinds
    }


def _kl_sums(
    adapter: Adapter, spec: SurveySpec, sites: Sequence[Site], choices: Sequence[Choice],
    batch: dict[str, Tensor], reference_BTV: Tensor,
) -> Tensor:  # fmt: skip
    """KL of the model's output on a batch with all weights of the sites rounded, float64 [C, 2]."""
    originals = {site: adapter.get_weight(site) for site in sites}
    sums = torch.zeros(len(choices), 2, dtype=torch.float64, device=_device(adapter))
    for index, choice in enumerate(choices):
        try:
            for site, weight_EOI in originals.items():
                if choice in spec.choices_of(site):
                    grid = choice.grid(spec.grid)
                    adapter.set_weight(site, round_trip(weight_EOI, grid, adapter.storage_dtype, None, spec.solve))
            logits_BTV = adapter.model(**batch, use_cache=False).logits
        finally:
            for site, weight_EOI in originals.items():
                adapter.set_weight(site, weight_EOI)
        kl_sum, _, num_tokens = kl_sum_and_agreement(reference_BTV, logits_BTV, batch.get("attention_mask"))
        sums[index] = torch.stack([kl_sum, num_tokens.double()])
    return sums


def _device(adapter: Adapter) -> torch.device:
    device: torch.device = next(adapter.model.parameters()).device
    return device
