"""Preflight of a fit: what it is going to take is said, written down, and refused where it cannot fit, before any work.

The formulas are in ``moeq/fit/preflight.py``; here is what they need of the module, the data and the callbacks.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from moeq.allocation.plan import planned
from moeq.checkpoint.free_memory import free_bytes
from moeq.disk.atomic import write_json, write_text
from moeq.distributed import gather_lists
from moeq.export.preflight import ExportSizes
from moeq.fit.block_files import block_path
from moeq.fit.duration import Speed, block_products
from moeq.fit.memory import DataShape, block_file_bytes, choose_hessian_gib
from moeq.fit.preflight import FitWork, fit_phases, largest_hessians, least_hessians
from moeq.fit.schedule import GIB, Pass, build_schedule
from moeq.fit.speed import TrySolve, measure_speed
from moeq.models.shapes import experts_per_token
from moeq.models.sizes import model_bytes
from moeq.preflight.limits import Room, check_room
from moeq.preflight.meter import resident_bytes
from moeq.preflight.phases import Forecast, Moment, Phase
from moeq.preflight.tables import forecast_json, forecast_table, size, summary_line
from moeq.quant.gptq import gptq_solve
from moeq.quant.grid import choose_qparams, quantize
from moeq.quant.two_sided_solve import two_sided_solution

if TYPE_CHECKING:
    from moeq.module import MoEQuantModule

# A run is worth a minute of measuring where it has so many multiplications, or a model of so many bytes.
LONG_PRODUCTS, LARGE_MODEL = 1e13, 1 << 30
# What a process comes to take beside tensors after it has started: modules of the model, threads, buffers of libraries.
GROWTH = 64 << 20
# Of what is free, for a run whose Hessians take what is left: the rest is for what a forecast misses.
SHARE = 0.85
REMEDIES: Mapping[str, Sequence[str]] = {
    "model": ("set --model.placement stream",),
    "Hessians": ("set a smaller --model.hessian_gib",),
    "Hessians to solve": ("set a smaller --model.hessian_gib",),
    "activations": ("set a smaller --data.batch_size",),
    "hidden states": ("set --model.hidden_gib 0.5",),
    "writer": ("set --data.writer packed4", "give token ids that were written elsewhere (GivenIdsDataModule)"),
    "caches": ("set a smaller --data.sequences_at_once",),
    "dense copy": ("set formats: [moeq] for the callback Export",),
    "disk": ("set --trainer.default_root_dir to a larger disk", "set formats: [moeq] for the callback Export"),
}


def preflight_fit(module: "MoEQuantModule") -> Forecast | None:
    """Say what a fit is going to take; settles ``--model.hessian_gib auto``.

    Returns:
        None where the datamodule does not say how much data it gives.

    Raises:
        ValueError: The run does not fit, or its schedule is impossible.
        SystemExit: ``--model.preflight true``: after the table, which is written.
    """
    trainer: Any = module.trainer
    data = data_shape(trainer)
    work, room = _work(module, data or DataShape(1, 1, 1)), room_of(module)
    if module.hparams["hessian_gib"] == "auto":
        bound = min(gather_lists([_choose_bound(module, work, room)]))
        module.walk_spec = replace(module.walk_spec, hessian_gib=bound)
        work = replace(work, schedule=_schedule(module, bound))
    if room.disk is not None:
        # Hidden states that wait there are gone in the end, and need their place until then.
        room = replace(room, disk=room.disk - work.waiting_on_disk)
    check_room(_forecast(module, work), room, REMEDIES)  # of data that nothing is known of, as if they were one token
    if data is None:
        return None
    long, stops = is_long(work), module.hparams["preflight"]
    if work.schedule and (long or stops):
        rank_zero_info("Preflight: measuring a few operations on one block ...")
        work = replace(work, speed=_measure(module, work))
    forecast = _forecast(module, work)
    rank_zero_info(forecast_table(forecast) if long or stops else summary_line(forecast))
    if stops:
        write_forecast(module, forecast)
        raise SystemExit(0)
    return forecast


def write_forecast(module: "MoEQuantModule", forecast: Forecast) -> None:
    """``preflight.json`` and ``preflight.md``, by the first rank."""
    if module.trainer.is_global_zero:
        write_json(module.run_dir / "preflight.json", forecast_json(forecast))
        write_text(module.run_dir / "preflight.md", forecast_table(forecast))


def data_shape(trainer: Any) -> DataShape | None:
    """Sequences, tokens of each and batch size of the calibration data, before they are made."""
    shape = getattr(trainer.datamodule, "shape", None)
    data: DataShape | None = shape() if shape is not None else None
    if data is None:
        return None
    limit = trainer.limit_train_batches
    if isinstance(limit, int) and limit:
        data = replace(data, num_sequences=min(data.num_sequences, limit * trainer.world_size * data.batch_size))
    return data


def is_long(work: FitWork) -> bool:
    """Whether a run takes long enough to be measured before: ``LONG_PRODUCTS`` or ``LARGE_MODEL``."""
    products = sum(
        block_products(work.adapter.sites(current.block), work.data.num_tokens, work.experts_per_token)
        for current in work.schedule
    )
    return products > LONG_PRODUCTS or work.model.total > LARGE_MODEL


def _work(module: "MoEQuantModule", data: DataShape) -> FitWork:
    from moeq.callback import SolveStep

    trainer: Any = module.trainer
    adapter, run = module.adapter, module.run
    bound = module.hparams["hessian_gib"]
    return FitWork(
        adapter=adapter,
        schedule=_schedule(module, float("inf") if bound == "auto" else bound),
        model=model_bytes(adapter, streamed=module.placement.kind == "stream"),
        data=data,
        block_files=block_file_bytes(
            module.weight_shapes(), run.plan, adapter.storage_dtype.itemsize, len(adapter.blocks)
        ),
        num_quantized=sum(shape.numel for shape in planned(run.plan, module.weight_shapes())),
        experts_per_token=experts_per_token(adapter.model.config),
        needs=run.needs,
        hidden_bytes=int(module.walk_spec.hidden_gib * GIB),
        device_type=module.device.type,
        solved=any(isinstance(step, SolveStep) for step in trainer.callbacks),
        num_ranks=trainer.world_size,
    )


def _schedule(module: "MoEQuantModule", hessian_gib: float) -> tuple[Pass, ...]:
    """As the walk is going to build it; finished blocks are told by their files, which are not read yet."""
    adapter, needs, spec = module.adapter, module.run.needs, module.walk_spec
    blocks = range(len(adapter.blocks))
    fresh = module.hparams["restart"]
    first = next((b for b in blocks if fresh or not block_path(module.run_dir, b).exists()), len(blocks))
    return build_schedule(
        [adapter.sites(block) for block in blocks], survey=needs.survey and first == 0, sequential=spec.sequential,
        first_block=first, hessian_gib=hessian_gib, originals=needs.originals, routers=needs.routers,
        routing=spec.routing,
    )  # fmt: skip


def room_of(module: "MoEQuantModule") -> Room:
    """What there is for this run, with what it holds already."""
    host, device, folder = torch.device("cpu"), module.device, module.run_dir.absolute()
    on_device = None
    if device.type == "cuda":
        on_device = free_bytes(device) + torch.cuda.memory_reserved(device)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return Room(on_device, free_bytes(host) + resident_bytes(), shutil.disk_usage(existing).free)


def _choose_bound(module: "MoEQuantModule", work: FitWork, room: Room) -> float:
    """A bound on the Hessians from what is free beside everything else of the largest solve."""
    on_cpu = module.device.type == "cpu"
    names = ("Hessians", "Hessians to solve")
    others = [
        Moment({k: v for k, v in moment.device.items() if k not in names}, moment.host)
        for phase in fit_phases(work)
        for moment in phase.moments
    ]
    held = [moment.host_bytes(on_cpu) if on_cpu else moment.device_bytes(on_cpu) for moment in others]
    free = room.host if on_cpu else room.device
    other = max(held, default=0) + (_process_bytes(module) if on_cpu else 0)
    needs = largest_hessians(work.schedule), least_hessians(work.schedule)
    return choose_hessian_gib(int(SHARE * (free or 0)), other, *needs)


def _process_bytes(module: "MoEQuantModule") -> int:
    """The process without tensors of the model."""
    return module.run.meter.process_bytes + GROWTH


def _forecast(module: "MoEQuantModule", work: FitWork) -> Forecast:
    from moeq.callback import Step

    trainer: Any = module.trainer
    first = [_load_phase(module, work)]
    sampling = getattr(trainer.datamodule, "expected", None)
    first += sampling(work) if sampling is not None else [_data_phase(work)]
    added = [phase for step in trainer.callbacks if isinstance(step, Step) for phase in step.expected(module, work)]
    labels = {current.label for current in work.schedule}
    replaced = {phase.label: phase for phase in added if phase.label in labels}
    last = [phase for phase in added if phase.label not in labels]
    phases = (*first, *fit_phases(work, replaced), *last)
    return Forecast(_lines(module, work), phases, _process_bytes(module), module.device.type == "cpu")


def _load_phase(module: "MoEQuantModule", work: FitWork) -> Phase:
    """The model, or what lies outside of its blocks, comes from the files."""
    model = work.model
    if model.streamed:
        return Phase("load model", "model", (Moment({"outside of blocks": model.outside}),))
    files = {"mapped files": sum(model.stored), "parts from files": max(model.loading, default=0)}
    return Phase("load model", "model", (Moment({"model": model.total}, files),))


def _data_phase(work: FitWork) -> Phase:
    """Data that only have to be read."""
    held = {"outside of blocks": work.model.outside} if work.model.streamed else {"model": work.model.total}
    kernels = {} if work.speed is None else work.kernels  # of what was measured
    return Phase("sampling", "calibration data", (Moment(held, kernels),))


def _lines(module: "MoEQuantModule", work: FitWork) -> tuple[str, ...]:
    """What will happen, in sentences."""
    data, num_blocks = work.data, len(work.adapter.blocks)
    finished = num_blocks - len({current.block for current in work.schedule if current.kind == "calibrate"})
    resumed = f", {finished} of them finished by an earlier run" if finished else ""
    hessians = f"Hessians of a pass within {module.walk_spec.hessian_gib:g} GiB"
    hidden = size(work.waiting["hidden states"])
    on_disk = f" and {size(work.waiting_on_disk)} of the disk" if work.waiting_on_disk else ""
    return (
        f"Placement: {module.placement.reason}.",
        f"Data: {data.num_sequences} sequences of {data.length} tokens in {data.num_batches} batches.",
        f"Work: {len(work.schedule)} passes over {num_blocks} blocks{resumed}; {hessians}; hidden states wait in "
        f"{hidden} of memory{on_disk}.",
    )


def _measure(module: "MoEQuantModule", work: FitWork) -> Speed:
    trainer: Any = module.trainer
    vocabulary = module.model.config.get_text_config().vocab_size
    shape = min(work.data.batch_size, work.data.num_sequences), work.data.length
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocabulary, shape, generator=generator).to(module.device)
    loaded = next((each for each in module.run.meter.measured if each.kind == "load model"), None)
    read = None
    if not work.model.streamed and loaded is not None:
        read = work.model.total / max(loaded.seconds, 1e-3)
    return measure_speed(
        work.adapter, work.schedule, ids_BT, module.run_dir, routing=module.walk_spec.routing,
        experts_per_token=work.experts_per_token, try_solve=try_solve_of(module) if work.solved else None, read=read,
        rows=getattr(trainer.datamodule, "rows_at_once", None),
    )  # fmt: skip


def try_solve_of(module: "MoEQuantModule") -> TrySolve:
    """The solve of this run on one expert: GPTQ's where a step needs Hessians, or under two of them, else rounding."""
    from moeq.callback import SolveStep

    trainer: Any = module.trainer
    dtype, grid, two_sided = module.adapter.storage_dtype, module.grid, module.run.needs.factors
    needs_hessians = any(isinstance(step, SolveStep) and step.needs_hessians for step in trainer.callbacks)

    def try_solve(weight_EOI: Tensor, hessian_EII: Tensor) -> Any:
        if needs_hessians:
            solution = gptq_solve(weight_EOI, hessian_EII, grid, module.solve_spec, dtype)
            if two_sided is None or grid.is_named:
                return solution
            # In place of gradients, which are not known yet, what the weight makes of its inputs.
            made_EOO = weight_EOI @ hessian_EII @ weight_EOI.mT
            return two_sided_solution(solution, weight_EOI, hessian_EII, made_EOO, hessian_EII, grid, two_sided)
        return quantize(weight_EOI, choose_qparams(weight_EOI, grid, dtype), grid)

    return try_solve


def export_sizes(work: FitWork) -> ExportSizes:
    """Bytes of a fit's model and of its exports; of one block those of the largest."""
    model, adapter = work.model, work.adapter
    largest = max(range(len(model.blocks)), key=model.stored.__getitem__)
    source = model.outside_stored + sum(model.stored)
    return ExportSizes(
        held={**model.held(largest), **work.kernels},
        loading=model.loading[largest] if model.streamed else 0,
        outside=model.outside_stored,
        block=model.stored[largest],
        block_file=work.block_files[largest],
        source=source,
        packed=source - work.num_quantized * adapter.storage_dtype.itemsize + sum(work.block_files),
        widening=model.total / source,
    )
