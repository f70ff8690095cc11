"""Cost table fisher_kl: predicted damage, scaled to the KL that is measured with whole structures of a block rounded.

    fisher_kl(w, choice) = fisher(w, choice) * KL(S at choice) / sum over w' in S of fisher(w', choice)

S is a structure of one block (its attention, its shared experts, its routed experts), all of it rounded to nearest in
both the measured KL of the model's output and the prediction it is divided by.  The second-order term says how damage
is divided inside S; the measurement adds what no derivative sees: later routers that choose other experts.  That makes
early blocks up to three times as costly as ``fisher`` says.

Shapes: B batch, T tokens of a sequence, V variants, last dimension 2: KL summed over tokens, and tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from moeq.allocation.plan import Choice
from moeq.distributed import sum_over_ranks
from moeq.models.adapter import Adapter, Site
from moeq.models.blocks import BlockCall, hand_on
from moeq.models.head import logits_behind
from moeq.scoring.divergence import kl_sum_and_agreement
from moeq.survey.cost_tables import solved_costs
from moeq.survey.findings import BlockFindings
from moeq.survey.sensitivity import round_trip
from moeq.survey.survey_spec import SurveySpec
from moeq.survey.sweeps import BlockStates, Inputs, Key, Show, captured, entered, original, visit

# A structure that is rounded, all of it and nothing else: block, kind of its weights, choice.
Variant = tuple[int, str, Choice]
Factors = dict[tuple[str, Choice], float]


def measured_divergences(
    adapter: Adapter, spec: SurveySpec, batches: Mapping[int, Inputs], states: BlockStates, show: Show
) -> dict[Variant, float]:
    """KL of the model's output for every structure and choice, in nats per token, over the batches of all ranks.

    One sweep over the blocks: a variant branches off at its block, and goes on through the later ones beside the
    others; what it is meanwhile waits.

    Args:
        adapter: The model, original weights.
        spec: The choices.
        batches: Batches (of this rank) to measure on, by number.
        states: What ``sweep_forward`` left of them; it stays.
        show: Shows how far this is.
    """
    variants = _variants(adapter, spec)
    device = adapter.model.get_input_embeddings().weight.device  # type: ignore[operator]
    sums_V2 = torch.zeros(len(variants), 2, dtype=torch.float64, device=device)
    if batches:
        _run_variants(adapter, spec, variants, batches, states, show)
        for batch, inputs in batches.items():
            _add_divergences(sums_V2, adapter, batch, inputs, states)
        for variant in range(len(variants)):
            for batch, inputs in batches.items():
                for row in range(len(inputs["input_ids"])):
                    states.drop((*_key(variant, batch), row))
    sum_over_ranks([sums_V2])
    pairs = zip(variants, sums_V2.tolist(), strict=True)
    return {variant: kl_sum / num_tokens for variant, (kl_sum, num_tokens) in pairs if num_tokens}


def anchor_factors(
    adapter: Adapter, spec: SurveySpec, found: BlockFindings, divergences: Mapping[Variant, float]
) -> Factors:
    """Measured over predicted damage of each structure of a block, by kind of its weights and choice.

    Args:
        adapter: The model; the block is resident, with original weights.
        spec: The choices.
        found: What was gathered of the block, added up over ranks.
        divergences: Of ``measured_divergences``.
    """
    predicted = solved_costs(adapter, replace(spec, costs=("fisher",), solver="rtn"), found, found.sites)["fisher"]
    factors: Factors = {}
    for kind, sites in _structures(found.sites).items():
        names = [name for site in sites for name in site.weight_names()]
        for choice in sorted(spec.choices):
            total = sum(predicted[name].get(choice, 0.0) for name in names)
            measured = divergences.get((sites[0].block, kind, choice))
            factors[kind, choice] = measured / total if measured is not None and total > 0 else 1.0
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


def _structures(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """Sites of one block by kind."""
    kinds = dict.fromkeys(site.kind for site in sites)
    return {kind: [site for site in sites if site.kind == kind] for kind in kinds}


def _variants(adapter: Adapter, spec: SurveySpec) -> list[Variant]:
    """Structures with the choices that fit any of their weights, in the order of the blocks."""
    return [
        (block, kind, choice)
        for block in range(len(adapter.blocks))
        for kind, sites in _structures(adapter.sites(block)).items()
        for choice in sorted(spec.choices)
        if any(choice in spec.choices_of(site) for site in sites)
    ]


def _key(variant: int, batch: int) -> Key:
    return "variant", variant, batch


@torch.no_grad()
def _run_variants(
    adapter: Adapter, spec: SurveySpec, variants: Sequence[Variant], batches: Mapping[int, Inputs],
    states: BlockStates, show: Show,
) -> None:  # fmt: skip
    """Take every variant from its block to behind the last one."""
    for block in show(range(len(adapter.blocks)), "divergence"):
        with visit(adapter, block, block + 1):
            calls = {batch: captured(adapter, inputs, block) for batch, inputs in batches.items()}
            for index, (start, kind, choice) in enumerate(variants):
                if start < block:
                    _run_block(adapter, block, index, calls, states, branches=False)
                elif start == block:
                    with _rounded(adapter, spec, _structures(adapter.sites(block))[kind], choice):
                        _run_block(adapter, block, index, calls, states, branches=True)


def _run_block(
    adapter: Adapter, block: int, variant: int, calls: Mapping[int, BlockCall], states: BlockStates, *, branches: bool
) -> None:
    """Run one block of a variant, which comes from the original model or has its own hidden states."""
    for batch, call in calls.items():
        key = _key(variant, batch)
        if block:
            call = entered(call, *states.read(original(batch, block) if branches else key, call.hidden.device))
        hidden, handed = hand_on(adapter.blocks[block], call.hidden, call)
        states.drop(key)
        if block + 1 < len(adapter.blocks):
            states.put(key, hidden, handed)
        else:
            states.put_rows(key, hidden)


@torch.no_grad()
def _add_divergences(sums_V2: Tensor, adapter: Adapter, batch: int, inputs: Inputs, states: BlockStates) -> None:
    """Add KL and tokens of one batch, one sequence at a time: logits are large."""
    model, blocks = adapter.model, adapter.blocks
    for row in range(len(inputs["input_ids"])):
        sequence = {name: value[row : row + 1] for name, value in inputs.items()}

        def logits(key: Key, sequence: Inputs = sequence, row: int = row) -> Tensor:
            return logits_behind(model, blocks, sequence, states.read((*key, row), sums_V2.device)[0])

        reference_1TV = logits(original(batch, len(blocks)))
        for variant, sums_2 in enumerate(sums_V2):
            mask_1T = sequence.get("attention_mask")
            kl_sum, _, num_tokens = kl_sum_and_agreement(reference_1TV, logits(_key(variant, batch)), mask_1T)
            sums_2 += torch.stack([kl_sum, num_tokens.double()])


@contextmanager
def _rounded(adapter: Adapter, spec: SurveySpec, sites: Sequence[Site], choice: Choice) -> Iterator[None]:
    """Round all weights of some sites of a resident block that a choice fits, for a while."""
    fitting = [site for site in sites if choice in spec.choices_of(site)]
    originals = {site: adapter.get_weight(site) for site in fitting}
    try:
        for site, weight_EOI in originals.items():
            grid = choice.grid(spec.grid)
            adapter.set_weight(site, round_trip(weight_EOI, grid, adapter.storage_dtype, None, spec.solve))
        yield
    finally:
        for site, weight_EOI in originals.items():
            adapter.set_weight(site, weight_EOI)
