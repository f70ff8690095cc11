"""What tuning end to end brings: scales, codes, norms and routers against the original's own predictions.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.tuning --json benchmarks/results/tuning.json

The bundled model at 3 bits in groups of 64, AGQ on 64 sequences that it wrote itself (EBSS, corpus mode), with and
without learned rounding behind it.  Every arm then learns from the same other sequences, sampled plainly, each once;
what is held out of them decides which of its states is kept.  Zero points are small integers here and no arm: one that
moves by a level moves all codes of its group, which the codes can do themselves.
"""

import argparse
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks.lab.sets import LENGTH, calibration_set
from benchmarks.lab.study import MODEL, Study
from benchmarks.lab.tables import Row, cell, grouped, markdown, mean_kl, router_agreement, worst_kl
from benchmarks.lab.trial import CachedGridGPTQ, fit
from callbacks.bit_allocation import BitAllocation
from callbacks.hessian_calibration import HessianCalibration
from callbacks.learned_rounding import LearnedRounding
from moeq.callback import Step
from moeq.disk.waiting import WaitingStates
from moeq.models.adapter import Adapter
from moeq.module import MoEQuantModule
from moeq.quant.spec import QuantizedWeight
from moeq.tuning.keeper import LeafKeeper
from moeq.tuning.leaves import BlockLeaves
from moeq.tuning.originals import record_originals
from moeq.tuning.tune_model import Tuning
from moeq.tuning.tuning_spec import TuningSpec

BITS, GROUP, BATCH = 3, 64, 8
STARTS = ("GPTQ", "learned rounding")
AS_SOLVED = "as solved"
SCALES = {"level_rate": 0.0, "norm_rate": 0.0, "router_rate": 0.0}
CODES = {"level_rate": 0.02}  # 64 steps of it lead just over the edge of a cell
OTHERS = {"level_rate": 0.0}
ARMS: dict[str, dict[str, Any]] = {
    AS_SOLVED: {},
    "scales": SCALES,
    "scales, codes": {**SCALES, **CODES},
    "scales, norms": {**SCALES, "norm_rate": 5e-4},
    "scales, routers": {**SCALES, "router_rate": 5e-4},
    "scales, norms, routers": OTHERS,
    "scales, norms, routers; top-k": {**OTHERS, "loss": "top_k"},
    "scales, norms, routers; hidden states": {**OTHERS, "loss": "hidden"},
    "all": CODES,
}


@dataclass(frozen=True)
class Case:
    """A quantized model and what learns in it."""

    seed: int
    start: str
    arm: str
    num_steps: int


class Collected(Step):
    """Keeps the quantized weights of every block; put it after all steps that change them."""

    def __init__(self) -> None:
        self.blocks: dict[int, dict[str, QuantizedWeight]] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MoEQuantModule)
        if pl_module.current_pass.ends_block:
            self.blocks[pl_module.current_pass.block] = dict(pl_module.run.quantized)


class Solved:
    """A model that was quantized, and can be what it was then again."""

    def __init__(self, module: MoEQuantModule, blocks: Mapping[int, Mapping[str, QuantizedWeight]]) -> None:
        self.module, self.blocks = module, blocks
        self._weights = {name: value.detach().clone() for name, value in module.model.named_parameters()}

    def restore(self) -> None:
        """Undo what a tuning wrote into the model."""
        self.write(self._weights)

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Give parameters of the model values."""
        for name, value in values.items():
            self.module.model.get_parameter(name).copy_(value)

    def leaves(self, block: int, spec: TuningSpec) -> BlockLeaves:
        """What learns in a block, as it begins."""
        return BlockLeaves(self.module.adapter, self.module.run, block, self.blocks[block], spec)


def tuned(solved: Solved, spec: TuningSpec, originals: Path) -> Row:
    """Tune a model and leave its best state in it.

    Returns:
        Loss per held-out token ``before`` and at its ``best``, ``codes_changed`` as a share, processor ``seconds``.
    """
    adapter, start = solved.module.adapter, time.process_time()
    keeper = LeafKeeper(lambda block: solved.leaves(block, spec), None)
    best: dict[str, Tensor] = {}
    changed: list[tuple[int, int]] = []

    def better() -> None:
        changed.clear()
        for block, weights in solved.blocks.items():
            leaves = keeper.leaves(block)
            for name, value in leaves.parameters().items():
                best[f"{adapter.block_prefix}.{block}.{name}"] = value.detach().clone()
            for name, weight in leaves.close(weights)[0].items():
                changed.append((int((weight.codes_OI != weights[name].codes_OI).sum()), weight.codes_OI.numel()))

    progress = Tuning(adapter, keeper, spec, originals, streamed=False).run(better, show)
    solved.write(best)
    num_changed, num_codes = map(sum, zip(*changed, strict=True)) if changed else (0, 1)
    return {
        "before": progress.before,
        "best": progress.best,
        "codes_changed": num_changed / num_codes,
        "seconds": time.process_time() - start,
    }


def show(items: Iterable[int], label: str) -> Iterable[int]:
    """Without a progress bar."""
    return items


class TuningStudy(Study[Case]):
    """Every arm on every start."""

    title = "What tuning end to end brings"
    legend = (
        "KL to the original in thousandths of a nat per token, mean over four domains and the worst, and over that of "
        "the start, paired by seed; router agreement in percent; the loss on sequences that are held out, over that "
        "of the start (each arm's own loss); share of the codes that changed; processor seconds of the tuning; +- over "
        "seeds. A ratio of 1 on held-out sequences: no state was better than the start, which was kept."
    )
    quick: ClassVar = {"seeds": [0], "starts": ["GPTQ"], "arms": [AS_SOLVED, "scales"], "num_steps": 8}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        steps = f"of {BATCH} sequences of {LENGTH} tokens; a sixteenth more is held out"
        parser.add_argument("--num-steps", type=int, default=64, help=steps)
        parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=STARTS, metavar="START")
        parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
        parser.add_argument("--sets", type=Path, default=Path("runs/calibration_data"), help="sampled sets")

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self._solved: tuple[tuple[int, str], Solved] | None = None

    def cases(self) -> list[Case]:
        o = self.options
        return [Case(seed, start, arm, o.num_steps) for seed in o.seeds for start in o.starts for arm in o.arms]

    def spec(self, arm: str) -> TuningSpec:
        """Settings of an arm."""
        num_batches = self.options.num_steps + max(1, self.options.num_steps // 16)
        settings = {"num_sequences": num_batches * BATCH, "length": LENGTH, "batch_size": BATCH}
        return TuningSpec(**settings, recompute=False, **ARMS[arm])

    def solved(self, seed: int, start: str) -> Solved:
        """The model that the arms of a seed begin with; one at a time."""
        if self._solved is None or self._solved[0] != (seed, start):
            ids_NL = calibration_set(self.yardstick, "corpus", 64, seed, self.options.sets)
            collected = Collected()
            learned = [LearnedRounding()] if start == STARTS[1] else []
            steps = [BitAllocation(), HessianCalibration(), CachedGridGPTQ(), *learned, collected]
            settings: dict[str, Any] = {"bits": BITS, "group_size": GROUP, "affinity_power": 1.0}
            module = fit(ids_NL, steps, name=MODEL, damping=0.1, **settings)
            self._solved = (seed, start), Solved(module, collected.blocks)
        return self._solved[1]

    def originals(self, seed: int) -> Path:
        """Folder of what the original says of the sequences of a seed, made when it is first needed."""
        spec = self.spec(AS_SOLVED)
        folder: Path = self.options.folder / f"originals-{spec.num_batches}-{seed}"
        if not folder.is_dir():
            ids_NL = calibration_set(self.yardstick, "plain", spec.num_sequences, seed, self.options.sets)
            order_N = torch.randperm(len(ids_NL), generator=torch.Generator().manual_seed(seed))
            made, waiting = folder.with_suffix(".made"), WaitingStates(1 << 30, self.options.folder)
            record_originals(Adapter(self.yardstick.model), ids_NL[order_N], spec.batch_size, made, {}, waiting, show)
            made.rename(folder)
        return folder

    def measure(self, case: Case) -> Row:
        self.options.sets.mkdir(parents=True, exist_ok=True)
        originals = self.originals(case.seed)
        solved = self.solved(case.seed, case.start)
        solved.restore()
        found = {} if case.arm == AS_SOLVED else tuned(solved, self.spec(case.arm), originals)
        return {**found, "domains": self.yardstick.row(solved.module.model)}

    def report(self, rows: Sequence[Row]) -> str:
        known = {(row["seed"], row["start"]): mean_kl(row) for row in rows if row["arm"] == AS_SOLVED}
        cells = grouped(rows, lambda row: (STARTS.index(row["start"]), list(ARMS).index(row["arm"])))
        lines = []
        for (start, arm), found in sorted(cells.items()):
            mean, worst = (cell([1e3 * of(row) for row in found], ".2f") for of in (mean_kl, worst_kl))
            line = [STARTS[start], list(ARMS)[arm], len(found), mean, worst]
            places = [(row["seed"], row["start"]) for row in found]
            ratios = [mean_kl(row) / known[place] for row, place in zip(found, places, strict=True) if place in known]
            line += [cell(ratios, ".3f") if ratios else "", cell([100 * router_agreement(row) for row in found], ".1f")]
            if "before" in found[0]:
                line += [cell([row["best"] / row["before"] for row in found], ".3f")]
                line += [f"{cell([100 * row['codes_changed'] for row in found])}%"]
                line += [cell([row["seconds"] for row in found], ".0f")]
            lines.append([*line, *[""] * (10 - len(line))])
        head = ["start", "what learns", "seeds", "mean KL", "worst domain", "over the start", "router"]
        return markdown([*head, "held out", "codes changed", "seconds"], lines)


if __name__ == "__main__":
    TuningStudy.main()
