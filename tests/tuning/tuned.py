"""A small quantized model whose original has been recorded, ready to be tuned."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moeq.disk.waiting import WaitingStates
from moeq.fit.resume import Resume
from moeq.fit.run import Run
from moeq.fit.solve import quantize_sites
from moeq.models.adapter import Adapter
from moeq.quant.rtn import round_to_nearest
from moeq.quant.spec import GridSpec
from moeq.tuning.tune_run import prepare_originals
from moeq.tuning.tuned_blocks import TuningFolder
from moeq.tuning.tuning_spec import TuningSpec

GRID = GridSpec(bits=3, group_size=16)
SPEC = TuningSpec(num_sequences=24, length=16, batch_size=2, num_epochs=2, num_checks=2)


def unseen(items: Iterable[int], _: str) -> Iterable[int]:
    return items


def written() -> Tensor:
    return torch.randint(1, 257, (SPEC.num_sequences, SPEC.length), generator=torch.Generator().manual_seed(0))


def quantized_run(adapter: Adapter, folder: Path, *, left_out: str = "") -> tuple[Run, Resume, TuningFolder]:
    """Originals recorded, every block rounded to nearest and on disk; one expert's gate has 4 bits.

    Args:
        adapter: Of a model in memory, which then is the quantized one.
        folder: Of the run.
        left_out: Weights with this in their names stay as they are.
    """
    place = TuningFolder(folder / "tuning", {"model": "tiny"})
    prepare_originals(adapter, place, SPEC, written, WaitingStates(1 << 20, folder), unseen)
    names = [name for site in adapter.all_sites() for name in site.weight_names()]
    plan = {name: GRID for name in names if not left_out or left_out not in name}
    plan |= {name: replace(GRID, bits=4) for name in plan if "experts.1.gate" in name}
    run = Run(plan=plan)
    resume = Resume(adapter, run, folder, place.fingerprint)
    for block in range(len(adapter.blocks)):
        quantize_sites(
            adapter, run, adapter.sites(block),
            lambda unit, weight_EOI: round_to_nearest(weight_EOI, unit.grid, torch.float32),
        )  # fmt: skip
        resume.save(block)
    return run, resume, place
