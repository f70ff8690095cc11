"""Gather both Kronecker factors of the curvature of the original, so that a solver rounds under two Hessians."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from moeq.callback import SolveStep, Step, module_of
from moeq.disk.digest import digest
from moeq.disk.waiting import WaitingStates
from moeq.distributed import gather_lists
from moeq.fit.factors import Factors
from moeq.fit.fingerprint import describe_steps
from moeq.fit.preflight import FitWork
from moeq.fit.schedule import GIB
from moeq.module import MoEQuantModule
from moeq.preflight.phases import Phase
from moeq.quant.two_sided_solve import TwoSidedSpec
from moeq.survey.kronecker_preflight import KIND, kronecker_phases
from moeq.survey.kronecker_spec import KroneckerSpec

if TYPE_CHECKING:
    from torch import Tensor


class KroneckerFactors(Step):
    """GPTQ rounds under the curvature of inputs and outputs together (YAQA); put it behind Rotation, before the others.

    The original writes sequences of its own before anything is quantized; their inputs and the gradients of their
    log-likelihood are summed up in ``factors/`` of the run folder, which is deleted when the fit is over.

    Args:
        folder: Keeps the factors: later fits of the same model with the same settings take them from there, at any
            number of bits.  They are told apart by the steps that are listed before this one, too.
        sequences_at_once: Sequences per forward pass while the original writes.
        damping: Fraction of the mean diagonal added to the diagonals of both factors.
        num_sweeps: Of descent behind the rounding, at most.
        **settings: Those of ``KroneckerSpec``.
    """

    def __init__(
        self,
        folder: str | None = None,
        sequences_at_once: int = 256,
        damping: float = 0.1,
        num_sweeps: int = 8,
        **settings: Any,
    ) -> None:
        self.folder = folder
        self.spec, self.solve_spec = KroneckerSpec(**settings), TwoSidedSpec(damping, num_sweeps)
        if sequences_at_once < 1:
            raise ValueError(f"sequences_at_once ({sequences_at_once}) must be positive; the usual value is 256")
        self.sequences_at_once = sequences_at_once

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse before any work a list of callbacks that makes no use of the factors, or a family without them."""
        from moeq.models.families import survey_refusal

        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(step, SolveStep) and step.takes_factors for step in callbacks):
            raise ValueError("no callback solves with the factors that KroneckerFactors gathers; add GPTQ to the list")
        module = module_of(pl_module)
        if why := survey_refusal(module.model.config, (), of_output=False):
            raise ValueError(
                f"KroneckerFactors cannot go back through {type(module.model).__name__}: {why}; leave it out"
            )
        module.run.needs.factors = self.solve_spec

    def expected(self, module: MoEQuantModule, work: FitWork) -> Sequence[Phase]:
        """The sweeps before the first pass."""
        return kronecker_phases(work, self.spec)

    def begin(self, module: MoEQuantModule) -> None:
        """Gather, while the model is the original; what an earlier process wrote is taken from there."""
        factors = self._factors(module)
        module.run.factors = factors
        if module.hparams["restart"] and self.folder is None:
            module.trainer.strategy.barrier("moeq_factors_restart")
            if module.trainer.is_global_zero:
                factors.clear()
            module.trainer.strategy.barrier("moeq_factors_cleared")
        blocks = range(module.walk.resume.first_block, len(module.adapter.blocks))
        missing = sorted({block for found in gather_lists([factors.missing(blocks)]) for block in found})
        if not missing:
            if self.folder is not None:
                rank_zero_info(f"Factors: taken from {factors.path}")
            return
        start = time.perf_counter()
        with module.run.meter.phase(KIND, KIND):
            self._gather(module, factors, missing)
        module.run.seconds[KIND] = time.perf_counter() - start

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was solved with is not needed any more, unless it is kept for other fits."""
        factors = module_of(pl_module).run.factors
        if factors is not None and self.folder is None and trainer.is_global_zero:
            factors.clear()

    def _factors(self, module: MoEQuantModule) -> Factors:
        """Of this run alone, or of all whose original is the same when they are gathered."""
        of_run = module.walk.resume.fingerprint
        if self.folder is None:
            return Factors(module.run_dir / "factors", of_run, self.solve_spec)
        steps: list[Any] = module.trainer.callbacks  # type: ignore[attr-defined]
        before = describe_steps(steps[: steps.index(self)])
        mark = {name: of_run[name] for name in ("model", "compute dtype")}
        mark["factors"] = digest({"settings": asdict(self.spec), "steps before": before})
        return Factors(Path(self.folder) / digest(mark), mark, self.solve_spec)

    def _gather(self, module: MoEQuantModule, factors: Factors, missing: list[int]) -> None:
        from moeq.survey.kronecker import gather_factors, rank_batches

        batches = rank_batches(self._write(module, factors), self.spec.batch_size, module.device)
        with WaitingStates(int(module.walk_spec.hidden_gib * GIB), module.run_dir) as waiting:
            gather_factors(
                module.adapter, batches, missing, factors, self.spec.seed, waiting, module.device, self._show(module)
            )

    def _show(self, module: MoEQuantModule) -> Any:
        hidden = module.trainer.progress_bar_callback is None or not module.trainer.is_global_zero

        def show(blocks: Iterable[int], sweep: str) -> Iterable[int]:
            return tqdm(blocks, f"factors {sweep}", unit="block", disable=hidden)

        return show

    def _write(self, module: MoEQuantModule, factors: Factors) -> "Tensor":
        from moeq.own_sequences import write_own
        from moeq.sampling.written import plain_spec

        spec = plain_spec(self.spec.num_sequences, self.spec.length, self.spec.seed)
        return write_own(module, spec, self.sequences_at_once, factors.sequences, "Factors")
