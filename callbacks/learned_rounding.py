"""Learn the rounding of each finished block, so that it returns what the original block returned."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from moeq.callback import SolveStep, Step, module_of
from moeq.fit.learn_block import Learner, tune_block
from moeq.fit.preflight import FitWork, learning_phases
from moeq.module import MoEQuantModule
from moeq.preflight.phases import Phase
from moeq.quant.learned import LearnedSpec, learn
from moeq.quant.spec import Fallback


class LearnedRounding(Step):
    """Moves codes and scales of a block along gradients of its output error; put it after a method such as GPTQ.

    Costs about three forward passes of a block per step, in float32, on one batch (``--data.batch_size`` sequences).

    Args:
        **settings: Those of ``LearnedSpec``.
    """

    def __init__(self, **settings: Any) -> None:
        self.spec = LearnedSpec(**settings)
        self.learner: Learner = partial(learn, spec=self.spec)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for the outputs of the original blocks, and for what the solver knows of each weight."""
        module = module_of(pl_module)
        order = list(trainer.callbacks)  # type: ignore[attr-defined]
        if late := [step for step in order[order.index(self) :] if isinstance(step, SolveStep)]:
            name = type(late[0]).__name__
            raise ValueError(f"LearnedRounding starts from what {name} has solved; put {name} before LearnedRounding")
        module.run.needs.originals = module.run.needs.offsets = True

    def check(self, module: MoEQuantModule) -> None:
        """Refuse grids whose levels stand in a table: latents move between evenly spaced ones."""
        for name, grid in module.run.plan.items():
            if grid.table is not None:
                raise ValueError(
                    f"LearnedRounding moves evenly spaced levels, and {name} is to have {grid.kind}; leave it out, or "
                    "choose another grid"
                )

    def expected(self, module: MoEQuantModule, work: FitWork) -> Sequence[Phase]:
        """Each block is learned after its last solve."""
        return learning_phases(work, self.spec.num_steps)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tune a block after its last pass."""
        module = module_of(pl_module)
        current, run = module.current_pass, module.run
        if not current.ends_block:
            return
        everything = [name for site in module.adapter.sites(current.block) for name in site.weight_names()]
        names = [name for name in everything if name in run.plan]
        if not names:
            return  # all of the block is kept as it is
        if not run.offsets.keys() >= set(names):
            raise ValueError(
                f"LearnedRounding found weights of block {current.block} that are not quantized yet; "
                "put a method such as GPTQ before LearnedRounding"
            )
        start = time.perf_counter()
        with run.meter.phase("learned rounding", f"block {current.block} learned rounding"):
            before, after = tune_block(module.adapter, run, current.block, module.walk.block_batches(), self.learner)
        run.offsets.clear()
        rank_zero_info(f"Block {current.block}: output error {before:.4g} -> {min(before, after):.4g}")
        # Not into run.seconds, where the pass that it ends counts it already.
        measured = {"error_before": before, "error_after": min(before, after), "seconds": time.perf_counter() - start}
        module.log_dict({f"learned_rounding/{key}": value for key, value in measured.items()}, rank_zero_only=True)
        if not after < before:
            # By a weight of the block, as its file keeps the records of its weights for a resumed run.
            detail = f"output error of block {current.block} {before:.4g} -> {after:.4g}; all of it kept as solved"
            run.fallbacks.append(Fallback(names[0], "learned rounding did not help", detail))
