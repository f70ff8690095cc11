"""The parts of a survey that need the weights alone: scores, and AlphaQ's cost table."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from moeq.allocation.plan import Choice
from moeq.distributed import gather_lists, rank_and_world
from moeq.models.adapter import Adapter, Site
from moeq.survey.scores import alphaq_costs, hill_alpha, score_weight
from moeq.survey.survey_spec import SurveySpec


def weight_scores(adapter: Adapter, spec: SurveySpec, sites: Sequence[Site]) -> dict[str, dict[str, float]]:
    """Score name -> weight name -> value, for the scores of the spec; sites, all resident, are divided over ranks."""
    rank, world = rank_and_world()
    found: list[tuple[str, str, float]] = []
    for site in sites[rank::world] if spec.scores else ():
        size = spec.grid.group_size
        fitting = size if size is None or site.in_features % size == 0 else None
        for name, weight_OI in site_weights(adapter, site):
            found += [(score, name, score_weight(score, weight_OI, fitting)) for score in spec.scores]
    scores: dict[str, dict[str, float]] = {score: {} for score in spec.scores}
    for score, name, value in gather_lists(found):
        scores[score][name] = value
    return scores


def spectra(adapter: Adapter, sites: Sequence[Site]) -> dict[str, tuple[float, float]]:
    """``hill_alpha`` and variance of every weight, by name; sites, all resident, are divided over ranks."""
    rank, world = rank_and_world()
    found: list[tuple[str, float, float]] = []
    for site in sites[rank::world]:
        for name, weight_OI in site_weights(adapter, site):
            found.append((name, hill_alpha(weight_OI), float(weight_OI.float().var(correction=0))))
    return {name: (alpha, variance) for name, alpha, variance in gather_lists(found)}


def alphaq_table(
    found: Mapping[str, tuple[float, float]], spec: SurveySpec, sites: Sequence[Site]
) -> dict[str, dict[Choice, float]]:
    """AlphaQ's cost table over all weights of the sites, from their ``spectra``."""
    alphas = {name: alpha for name, (alpha, _) in found.items()}
    variances = {name: variance for name, (_, variance) in found.items()}
    choices = {name: spec.choices_of(site) for site in sites for name in site.weight_names()}
    return alphaq_costs(alphas, variances, choices)


def site_weights(adapter: Adapter, site: Site) -> list[tuple[str, Tensor]]:
    """Name and weight [O, I] of every weight of a site, expert by expert."""
    pairs = []
    for expert in range(site.num_experts):
        parts = adapter.get_weight(site, (expert,))[0].split(site.rows)
        pairs += [(site.weight_name(expert, leaf), part) for leaf, part in zip(site.leaves, parts, strict=True)]
    return pairs
