"""What the passes of a survey are going to take beside the block and its activations.

Hessians   8 I^2 E of every site of the block at once, twice where the Fisher cost needs plain ones beside weighted
rounded    the block's weights at every choice, where damage is measured
solving    of one site: its Hessian in float32 and the stack of its weights, as in a calibration pass
search     candidates of all weights at every choice, up to the bound of what waits in memory; then a block in float32,
           its gradient and the sum of that over batches, and activations that are kept for the way back
"""

from dataclasses import replace

from moeq.fit.memory import stack_bytes
from moeq.fit.preflight import FitWork, sweep_phase
from moeq.models.sites import Site
from moeq.models.sizes import forward_bytes
from moeq.preflight.phases import Moment, Phase
from moeq.quant.workspace import workspace_bytes
from moeq.survey.survey_spec import FISHER, MEASURED, SOLVED, SurveySpec


def survey_phases(work: FitWork, spec: SurveySpec) -> tuple[Phase, ...]:
    """Phases that stand for the survey passes of a fit."""
    surveyed = [each.block for each in work.schedule if each.kind == "survey"]
    waiting = _candidates(work, spec) if work.needs.batches_apart else {}
    phases = tuple(_phase(work, spec, block, waiting) for block in surveyed)
    if not (surveyed and waiting):
        return phases
    return (*phases, *(_search_phase(work, block, waiting) for block in surveyed))


def _candidates(work: FitWork, spec: SurveySpec) -> dict[str, int]:
    sites = work.adapter.all_sites()
    size = sum(len(spec.choices_of(site)) * _numel(site) for site in sites) * work.adapter.storage_dtype.itemsize
    return {"candidates": min(work.hidden_bytes, size)}


def _search_phase(work: FitWork, block: int, waiting: dict[str, int]) -> Phase:
    """The sweeps of a search at one block."""
    sites = work.adapter.sites(block)
    itemsize = work.adapter.dtype_of(sites[0]).itemsize
    held = {
        **work.model.held(block),
        "weights in float32": 16 * sum(map(_numel, sites)),
        "activations": 8 // itemsize * forward_bytes(work.adapter, block, work.data.batch_tokens, work.data.length),
    }
    return Phase("search", f"block {block} search", (Moment(held, {**work.waiting, **waiting}),))


def _numel(site: Site) -> int:
    return sum(site.rows) * site.in_features * site.num_experts


def _phase(work: FitWork, spec: SurveySpec, block: int, waiting: dict[str, int]) -> Phase:
    current = next(each for each in work.schedule if each.kind == "survey" and each.block == block)
    swept, sites = sweep_phase(work, current), work.adapter.sites(block)
    gathered = {"Hessians": sum(_hessian_bytes(site, spec) for site in sites)} if spec.wants(SOLVED) else {}
    if spec.wants(MEASURED):
        gathered["rounded weights"] = (
            len(spec.choices) * sum(map(_numel, sites)) * work.adapter.dtype_of(sites[0]).itemsize
        )
    (moment,) = swept.moments
    host = {**moment.host, **waiting}
    moments = [Moment({**moment.device, **gathered}, host)]
    if spec.wants(SOLVED):
        held = {**work.model.held(block), **gathered}
        moments += [Moment({**held, **_solving(work, site)}, host) for site in sites]
    return replace(swept, moments=tuple(moments))


def _hessian_bytes(site: Site, spec: SurveySpec) -> int:
    weighted = bool(spec.affinity_power) and site.kind in ("routed", "shared") and spec.wants(FISHER)
    return 8 * site.in_features**2 * site.num_experts * (2 if weighted else 1)


def _solving(work: FitWork, site: Site) -> dict[str, int]:
    """Beside the sums: Hessians in float32 (of the solver, and plain ones), the stack, and what is made of it."""
    rows, num_experts = sum(site.rows), site.num_experts
    return {
        "Hessians to solve": 2 * 4 * site.in_features**2 * num_experts,
        "weights to solve": stack_bytes(work.adapter, site, num_experts) + 8 * rows * site.in_features * num_experts,
        "workspace": workspace_bytes(num_experts, rows, site.in_features, work.device_type),
        "codes of the stack": 2 * num_experts * rows * site.in_features,
    }
