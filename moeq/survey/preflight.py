"""What the passes of a survey are going to take beside the block and its activations.

Hessians   8 I^2 E of every site of the block at once, twice where the Fisher cost needs plain ones beside weighted
rounded    the block's weights at every choice, where damage is measured
solving    of one site: its Hessian in float32 and the stack of its weights, as in a calibration pass
"""

from dataclasses import replace

from moeq.fit.memory import stack_bytes
from moeq.fit.preflight import FitWork, sweep_phase
from moeq.models.sites import Site
from moeq.preflight.phases import Moment, Phase
from moeq.quant.workspace import workspace_bytes
from moeq.survey.survey_spec import FISHER, MEASURED, SOLVED, SurveySpec


def survey_phases(work: FitWork, spec: SurveySpec) -> tuple[Phase, ...]:
    """Phases that stand for the survey passes of a fit."""
    return tuple(_phase(work, spec, each.block) for each in work.schedule if each.kind == "survey")


def _phase(work: FitWork, spec: SurveySpec, block: int) -> Phase:
    current = next(each for each in work.schedule if each.kind == "survey" and each.block == block)
    swept, sites = sweep_phase(work, current), work.adapter.sites(block)
    gathered = {"Hessians": sum(_hessian_bytes(site, spec) for site in sites)} if spec.wants(SOLVED) else {}
    if spec.wants(MEASURED):
        numel = sum(sum(site.rows) * site.in_features * site.num_experts for site in sites)
        gathered["rounded weights"] = len(spec.choices) * numel * work.adapter.dtype_of(sites[0]).itemsize
    (moment,) = swept.moments
    moments = [Moment({**moment.device, **gathered}, moment.host)]
    if spec.wants(SOLVED):
        held = {**work.model.held(block), **gathered}
        moments += [Moment({**held, **_solving(work, site)}, moment.host) for site in sites]
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
