"""Tune what is left free in the quantized model to predict what the original predicts, after the last block."""

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from moeq.callback import SolveStep, Step, module_of
from moeq.disk.waiting import WaitingStates
from moeq.fit.preflight import FitWork
from moeq.fit.schedule import GIB
from moeq.module import MoEQuantModule
from moeq.preflight.phases import Phase
from moeq.quant.spec import Fallback
from moeq.tuning.preflight import tuning_phases
from moeq.tuning.tuning_spec import TuningSpec

if TYPE_CHECKING:
    from torch import Tensor

    from moeq.tuning.tuned_blocks import TuningFolder

KIND = "end-to-end tuning"


class EndToEndTuning(Step):
    """Scales, codes, norms and routers learn the original's predictions; put it before Export.

    The original writes sequences of its own before anything is quantized, and what it predicts for them is kept in
    ``tuning/`` of the run folder.  A killed tuning begins again, with the same result.

    Args:
        sequences_at_once: Sequences per forward pass while the original writes.
        **settings: Those of ``TuningSpec``.
    """

    def __init__(self, sequences_at_once: int = 256, **settings: Any) -> None:
        self.spec = TuningSpec(**settings)
        if sequences_at_once < 1:
            raise ValueError(f"sequences_at_once ({sequences_at_once}) must be positive; the usual value is 256")
        self.sequences_at_once = sequences_at_once

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse before any work a list of callbacks and a number of ranks that cannot work."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        names = [type(step).__name__ for step in callbacks]
        if "Export" in names and names.index("Export") < callbacks.index(self):
            raise ValueError("Export writes what EndToEndTuning has tuned; put EndToEndTuning before Export")
        if not any(isinstance(step, SolveStep) for step in callbacks):
            raise ValueError("EndToEndTuning starts from quantized weights; add a method such as GPTQ to the callbacks")
        if not self.spec.num_steps(trainer.world_size):
            raise ValueError(
                f"num_sequences ({self.spec.num_sequences}) in batches of {self.spec.batch_size} leave fewer batches "
                f"than the {trainer.world_size} ranks to learn from; choose a smaller batch_size"
            )

    def expected(self, module: MoEQuantModule, work: FitWork) -> Sequence[Phase]:
        """Sequences and predictions before the first pass, and the steps behind the last one."""
        return tuning_phases(work, self.spec, module.trainer.world_size, module.model.config)

    def check(self, module: MoEQuantModule) -> None:
        """Refuse grids whose levels stand in a table: latents move between evenly spaced ones."""
        for name, grid in module.run.plan.items():
            if grid.table is not None:
                raise ValueError(
                    f"EndToEndTuning moves codes between evenly spaced levels, and {name} is to have {grid.label}; "
                    "leave it out, or choose grid: uniform"
                )

    def begin(self, module: MoEQuantModule) -> None:
        """Have the original write and predict, while it is what it is."""
        from moeq.tuning.tune_run import prepare_originals

        folder = self._folder(module)
        if module.hparams["restart"]:
            module.trainer.strategy.barrier("moeq_tuning_restart")
            if module.trainer.is_global_zero:
                folder.clear()
            module.trainer.strategy.barrier("moeq_tuning_cleared")
        if folder.record(len(module.adapter.blocks)) is not None:
            return
        start = time.perf_counter()
        with module.run.meter.phase("originals for tuning", "originals for tuning"):
            prepare_originals(
                module.adapter,
                folder,
                self.spec,
                lambda: self._write(module),
                self._waiting(module),
                self._show(module),
            )
        module.run.seconds["originals for tuning"] = time.perf_counter() - start

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tune, and report what it gave."""
        from moeq.tuning.tune_run import tune

        module = module_of(pl_module)
        run, start = module.run, time.perf_counter()
        with run.meter.phase(KIND, KIND):
            record = tune(
                module.adapter, run, module.walk.resume, self._folder(module), self.spec, self._waiting(module),
                self._show(module),
            )  # fmt: skip
        run.seconds[KIND] = time.perf_counter() - start
        told = f"{self.spec.loss} of held-out tokens {record['before']:.4g} -> {record['after']:.4g}"
        rank_zero_info(
            f"Tuning: {told} in {record['steps']} steps; {100 * record['codes_changed']:.2g}% of the codes changed; "
            f"{record['fewest_tokens']} tokens of {record['tokens']} came to the least used expert"
        )
        if not record["kept"]:
            run.fallbacks.append(Fallback("model", "end-to-end tuning did not help", f"{told}; kept as solved"))
        if trainer.logger is not None and trainer.is_global_zero:
            for step, loss in record["checks"]:
                trainer.logger.log_metrics({"tuning/held_out_loss": loss}, step=step)

    def _folder(self, module: MoEQuantModule) -> "TuningFolder":
        from moeq.tuning.tuned_blocks import TuningFolder

        return TuningFolder(module.run_dir / "tuning", module.walk.resume.fingerprint)

    def _waiting(self, module: MoEQuantModule) -> WaitingStates:
        return WaitingStates(int(module.walk_spec.hidden_gib * GIB), module.run_dir)

    def _show(self, module: MoEQuantModule) -> Any:
        hidden = module.trainer.progress_bar_callback is None or not module.trainer.is_global_zero

        def show(items: Iterable[int], label: str) -> Iterable[int]:
            return tqdm(items, label, disable=hidden)

        return show

    def _write(self, module: MoEQuantModule) -> "Tensor":
        from moeq.own_sequences import write_own
        from moeq.sampling.written import plain_spec

        spec = plain_spec(self.spec.num_sequences, self.spec.length, self.spec.seed)
        return write_own(module, spec, self.sequences_at_once, self._folder(module).sequences, "Tuning")
