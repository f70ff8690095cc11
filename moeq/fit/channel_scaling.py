"""Choose the channel scales of a stage of a block and move their inverse into what makes its inputs.

After it, the weights of the stage are to be quantized as ``W diag(s)``; no scale is left for run time:

- Inputs of attention and of the experts: into the norm.  Everything that reads the norm is compensated; what is not
  quantized (routers, gates of shared experts) in its own dtype.
- down: into the rows of up, per expert, and o: into the rows of v.  Those are quantized already, so their quantization
  scales are divided (``moeq.quant.awq.divide_rows``).

The scale is always the one that was really applied, after rounding to the dtype of the norm or of the quantization
scales.  Every fold is tried on the running block first; where it does not hold, the scale is 1, with a record.

Shapes: E experts, O out features, I in features, J channels.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeq.fit.hessians import hessians_of
from moeq.fit.run import Run
from moeq.fit.schedule import GIB, Pass, SitePart, whole
from moeq.fit.solve import change_parameters, commit, make_units, unit_rows
from moeq.models.adapter import Adapter, Site
from moeq.models.blocks import BlockCall, run_block
from moeq.models.input_rows import Producer, find_producer
from moeq.models.norms import (
    NormReaders,
    find_norm_readers,
    fold_difference,
    fold_into_norm,
    norm_weight,
    reader_weights,
)
from moeq.quant.awq import Reader, divide_rows, search_scale
from moeq.quant.coverage import CoverageSpec
from moeq.quant.spec import Fallback

NOT_SCALED = "channels not scaled"
MOVED = "took channel scales (AWQ)"
FROM_ROWS = ("attention_out", "mlp_down")  # stages whose input is made by a linear; the others read a norm


@dataclass(frozen=True)
class Inputs:
    """What is known of the input of a site: mean Hessian of each expert, and the summed weight of its tokens."""

    hessian_EII: Tensor
    weight_E: Tensor


def gather_inputs(run: Run, parts: Sequence[SitePart], coverage: CoverageSpec) -> dict[str, Inputs]:
    """Inputs of whole sites by name; experts with few tokens are treated and recorded as for GPTQ.

    Raises:
        ValueError: See ``moeq.quant.coverage.find_uncovered``.
    """
    hessians, fallbacks = hessians_of(run.hessians, parts, coverage)
    run.fallbacks += fallbacks
    return {
        part.site.name: Inputs(hessians(part.site, part.experts), run.hessians[part.site].weight_sum_E)
        for part in parts
    }


def refuse_chunks(schedule: Sequence[Pass]) -> None:
    """Raise ValueError where the Hessians of a stage do not fit into one pass: its inputs share a scale."""
    by_stage: dict[tuple[int, str], int] = defaultdict(int)
    for current in schedule:
        if current.chunk[1] > 1:
            by_stage[current.block, current.label.split(" (")[0]] += sum(part.bytes for part in current.parts)
    if by_stage:
        need = math.ceil(100 * max(by_stage.values()) / GIB) / 100
        raise ValueError(
            f"AWQ needs the Hessians of all experts of a block in one pass, {need:g} GiB; "
            f"set --model.hessian_gib {need:g} or more, or use GPTQ"
        )


def scale_stage(
    adapter: Adapter, run: Run, sites: Sequence[Site], inputs: Mapping[str, Inputs], call: BlockCall
) -> dict[str, Tensor]:
    """Scales of the sites of one stage of a block, float32 [E, I] by site name, moved out of their inputs.

    Args:
        adapter: The model; norms, routers and the rows of earlier linears change.
        run: Its plan is read; changed parameters, quantized weights and fallbacks are recorded.
        sites: Sites of one stage; earlier stages of the block are quantized.
        inputs: By site name.
        call: How the block is called on a few tokens (``moeq.fit.probe``).
    """
    block = sites[0].block
    scales = {
        site.name: torch.ones(site.num_experts, site.in_features, device=inputs[site.name].hessian_EII.device)
        for site in sites
    }
    if sites[0].stage in FROM_ROWS:
        for site in sites:
            producer = find_producer(adapter, site, lambda: run_block(adapter.blocks[block], call.hidden, call))
            if kept := _kept(run, [site]):
                _record(run, site, f"{kept} reads its input, and is kept as it is")
            elif producer is None or not _all_quantized(run, producer):
                _record(run, site, "no quantized rows that its input is proportional to")
            else:
                scales[site.name] = _scale_by_rows(adapter, run, site, producer, inputs[site.name])
        return scales
    unscaled = {site.name: site for site in sites}
    candidates = [site for site in adapter.sites(block) if site.stage not in FROM_ROWS]
    for readers in find_norm_readers(adapter, block, call.hidden, call):
        reading = [site for site in candidates if set(site.modules) & set(readers.readers)]
        here = [site for site in reading if unscaled.pop(site.name, None)]
        kept = _kept(run, reading)
        reason = f"{kept} reads {readers.norm}, and is kept as it is" if kept else None
        if here and (reason := reason or _obstacle(adapter, readers, reading, here, call)):
            for site in here:
                _record(run, site, reason)
        elif here:
            scale_I = _scale_by_norm(adapter, run, readers, here, inputs)
            scales |= {site.name: scale_I.expand(site.num_experts, -1) for site in here}
    for site in unscaled.values():
        _record(run, site, "its input is not the output of a norm")
    return scales


def _record(run: Run, site: Site, reason: str) -> None:
    run.fallbacks.append(Fallback(site.weight_name(0, site.leaves[0]), NOT_SCALED, reason))


def _kept(run: Run, sites: Sequence[Site]) -> str | None:
    """A weight of some sites that stays as it is, so that no scale may move into it; None where all are quantized."""
    return next((name for site in sites for name in site.weight_names() if name not in run.plan), None)


def _all_quantized(run: Run, producer: Producer) -> bool:
    """Whether the rows of every expert can be divided."""
    site = producer.site
    return all(site.weight_name(expert, producer.leaf) in run.quantized for expert in range(site.num_experts))


def _readers_of(adapter: Adapter, run: Run, site: Site, inputs: Inputs) -> list[list[Reader]]:
    """For each expert of a site, its linears; those on one grid are one stack."""
    weight_EOI = adapter.get_weight(site)
    readers: list[list[Reader]] = [[] for _ in range(site.num_experts)]
    for unit in make_units([whole(site)], run.plan, site.num_experts):
        for expert in unit.experts:
            weight_OI = torch.cat([weight_EOI[expert, rows] for rows in unit_rows(unit)])
            tokens = float(inputs.weight_E[expert])
            readers[expert].append(Reader(weight_OI, inputs.hessian_EII[expert], tokens, unit.grid))
    return readers


def _obstacle(
    adapter: Adapter, readers: NormReaders, reading: Sequence[Site], here: Sequence[Site], call: BlockCall
) -> str | None:
    """Why a scale cannot move into a norm, or None where it can."""
    if others := [site.name for site in reading if site not in here]:
        return f"{readers.norm} is read by {', '.join(others)} too, of another stage"
    if missing := [path for site in here for path in site.modules if path not in readers.readers]:
        return f"{', '.join(missing)} does not read {readers.norm}"
    norm = norm_weight(adapter.model.get_submodule(readers.norm))
    # Powers of two round nowhere, so that any difference means a reader that was not found.
    exponents = torch.randint(-2, 3, norm.shape, generator=torch.Generator().manual_seed(0))
    values = fold_into_norm(adapter, readers, torch.exp2(exponents.double()).to(norm.device))
    difference = fold_difference(adapter, here[0].block, call.hidden, call, values)
    # Norms that store m - 1 do round.
    tolerance = 1e-4 if adapter.model.get_parameter(f"{readers.norm}.weight").dtype == torch.float32 else 2e-2
    if not difference <= tolerance:
        return f"moving a scale into {readers.norm} changes the output of the block by {difference:.1e} (relative)"
    return None


def _scale_by_norm(
    adapter: Adapter, run: Run, readers: NormReaders, sites: Sequence[Site], inputs: Mapping[str, Inputs]
) -> Tensor:
    """Search the scale of the sites that read a norm, fold it, and return what was applied, [I]."""
    weights = [r for site in sites for expert in _readers_of(adapter, run, site, inputs[site.name]) for r in expert]
    scale_I = search_scale(weights, adapter.storage_dtype)
    norm = adapter.model.get_submodule(readers.norm)
    before_I = norm_weight(norm)
    change_parameters(adapter, run, fold_into_norm(adapter, NormReaders(readers.norm, ()), scale_I), MOVED)
    applied_I = before_I / norm_weight(norm)
    applied_I = torch.where(applied_I.isfinite() & (applied_I > 0), applied_I, scale_I)  # channels of weight 0
    quantized = {path for site in sites for path in site.modules}
    for path in readers.readers:
        for name, axis in {} if path in quantized else reader_weights(adapter.model, path).items():
            weight = adapter.model.get_parameter(name)
            shape = [-1 if axis % weight.ndim == position else 1 for position in range(weight.ndim)]
            change_parameters(adapter, run, {name: weight.double() * applied_I.view(shape)}, MOVED)
    return applied_I.float()


def _scale_by_rows(adapter: Adapter, run: Run, site: Site, producer: Producer, inputs: Inputs) -> Tensor:
    """Search the scale of each expert of a site, divide the producer's rows, and return what was applied, [E, I]."""
    channel_I = producer.channel_I.to(inputs.hessian_EII.device)
    applied = []
    for expert, readers in enumerate(_readers_of(adapter, run, site, inputs)):
        # Its tokens weigh alike for all linears of an expert; one that saw none has the pooled Hessian.
        readers = [replace(reader, tokens=1.0) for reader in readers]
        scale_J = search_scale(readers, adapter.storage_dtype, channel_I)
        name = producer.site.weight_name(expert, producer.leaf)
        run.quantized[name], applied_J = divide_rows(run.quantized[name], producer.row_J, scale_J.cpu())
        applied.append(applied_J)
    commit(adapter, [producer.site], run.quantized)
    if producer.site.kind != "routed":
        _divide_bias(adapter, run, producer, applied[0])
    return torch.stack(applied).to(channel_I.device)[:, channel_I]


def _divide_bias(adapter: Adapter, run: Run, producer: Producer, applied_J: Tensor) -> None:
    name = producer.site.weight_name(0, producer.leaf)
    bias_R = getattr(adapter.model.get_submodule(name), "bias", None)
    if isinstance(bias_R, Tensor):
        factor_R = torch.ones(len(bias_R), dtype=torch.float64)
        factor_R[producer.row_J] = 1 / applied_J.double()
        change_parameters(adapter, run, {f"{name}.bias": bias_R.double() * factor_R.to(bias_R.device)}, MOVED)
