"""Measuring a few operations of a fit on one real block, before hours are spent.

One block is loaded, a batch of the run's shape is run through it as its calibration passes will run it, and one expert
of every shape is solved; each operation once to warm up where that is quick, and once for the clock.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeq.disk.atomic import write_tensors
from moeq.fit.duration import Speed, block_products, stages_of
from moeq.fit.hessians import Hessians
from moeq.fit.schedule import Pass, SitePart
from moeq.models.adapter import Adapter
from moeq.models.blocks import BlockCall, capture_calls, hands_on, run_block, until_reached
from moeq.models.sizes import model_bytes
from moeq.quant.hessian import mean_hessian
from moeq.quant.spec import Routing

# Solve a stack of one expert: (weight_EOI float32, hessian_EII) -> anything.
TrySolve = Callable[[Tensor, Tensor], Any]
QUICK = 2.0  # seconds; what takes less is measured again, warm
PROBE_BYTES = 1 << 26  # written to learn how fast the disk of the run folder is


def measure_speed(
    adapter: Adapter,
    schedule: Sequence[Pass],
    ids_BT: Tensor,
    folder: Path,
    *,
    routing: Routing,
    experts_per_token: int,
    try_solve: TrySolve | None,
    read: float | None = None,
    rows: int | None = None,
) -> Speed:
    """Time the operations of a fit on the block that most passes are like: the largest one.

    Args:
        adapter: The model, placed on its device.
        schedule: Passes of the run.
        ids_BT: A batch of the run's shape, on that device; which tokens hardly matters.
        folder: Of the run, to which a file is written and removed again.
        routing: Which tokens the Hessians of routed experts are made of.
        experts_per_token: K.
        try_solve: Solves one expert; None where no step solves.
        read: Bytes of files per second, where it is known from loading the model.
        rows: Rows that are written at once, where the model writes the data.
    """
    # Blocks that are handed something by the one before cannot be run alone, except for the first.
    swept = {0} if hands_on(adapter.blocks) else {each.block for each in schedule}
    block = max(swept, key=lambda block: _numel(adapter, block))
    start = time.perf_counter()
    with adapter.resident(block), torch.no_grad():
        _settle(ids_BT.device)
        load = time.perf_counter() - start
        call = capture_calls(adapter.model, adapter.blocks, {"input_ids": ids_BT}, last=block)[-1]
        module = adapter.blocks[block]
        forward = _timed(lambda: run_block(module, call.hidden, call), ids_BT.device)
        step = None if rows is None else _step(adapter, block, ids_BT, rows)
        calibrated = [each for each in schedule if each.block == block and each.kind == "calibrate"]
        passes = {stages_of(each): each for each in reversed(calibrated)}
        sweeps: dict[str, float] = {}
        solves: dict[tuple[int, int], float] = {}
        for stages, current in passes.items():
            hessians = Hessians()
            hessians.open(current.parts, ids_BT.device)
            sweeps[stages] = _timed(partial(_sweep, adapter, current, call, hessians, routing), ids_BT.device)
            if try_solve is not None:
                _time_solves(adapter, current.parts, hessians, try_solve, solves)
    return Speed(
        block=block,
        read=read or model_bytes(adapter, streamed=True).stored[block] / max(load, 1e-6),
        write=_write_rate(folder),
        forward=forward,
        sweeps=sweeps,
        solves=solves,
        products=block_products(adapter.sites(block), ids_BT.numel(), experts_per_token),
        step=step,
    )


def _step(adapter: Adapter, block: int, ids_BT: Tensor, rows: int) -> float:
    """Seconds of one token of so many rows in a block, without what they attend to."""
    ids_N1 = ids_BT.flatten().repeat(-(-rows // ids_BT.numel()))[:rows, None]
    call = capture_calls(adapter.model, adapter.blocks, {"input_ids": ids_N1}, last=block)[-1]
    return _timed(lambda: run_block(adapter.blocks[block], call.hidden, call), ids_BT.device)


def _sweep(adapter: Adapter, current: Pass, call: BlockCall, hessians: Hessians, routing: Routing) -> None:
    """One batch of a calibration pass."""
    entered, finished = adapter.observed_modules(current.observed)
    with hessians.gathered(adapter, 1.0, routing), until_reached(entered, finished):
        run_block(adapter.blocks[current.block], call.hidden, call)


def _time_solves(
    adapter: Adapter,
    parts: Sequence[SitePart],
    hessians: Hessians,
    try_solve: TrySolve,
    solves: dict[tuple[int, int], float],
) -> None:
    """Seconds of one expert of each shape that is new; the one that saw most tokens, as a real one does."""
    for part in parts:
        shape = sum(part.site.rows), part.site.in_features
        if shape in solves:
            continue
        state = hessians[part.site]
        position = int(state.num_tokens_E.argmax())
        weight_EOI = adapter.get_weight(part.site, [part.experts.start + position]).float()
        one = type(state)(*(tensor[position : position + 1] for tensor in state.tensors()))
        hessian_EII = mean_hessian(one)
        solves[shape] = _timed(partial(try_solve, weight_EOI, hessian_EII), weight_EOI.device)


def _timed(operation: Callable[[], Any], device: torch.device) -> float:
    """Seconds of an operation; of its second time where the first was quick."""
    for _ in range(2):
        start = time.perf_counter()
        operation()
        _settle(device)
        seconds = time.perf_counter() - start
        if seconds > QUICK:
            break
    return seconds


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _write_rate(folder: Path) -> float:
    """Bytes per second that the disk of a folder takes, forced to it."""
    path, data = folder / "preflight.tmp", {"probe": torch.zeros(PROBE_BYTES, dtype=torch.uint8)}
    start = time.perf_counter()
    try:
        write_tensors(path, data, shared=True)
        return PROBE_BYTES / max(time.perf_counter() - start, 1e-6)
    finally:
        path.unlink(missing_ok=True)


def _numel(adapter: Adapter, block: int) -> int:
    return sum(parameter.numel() for parameter in adapter.blocks[block].parameters())
