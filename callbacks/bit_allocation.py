"""Decide the grid of every weight and write the plan."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from moeq.allocation.decide import AllocationSpec, Decision, base_plan, decide
from moeq.allocation.dry_run import rehearse
from moeq.allocation.evidence import read_evidence
from moeq.allocation.plan import check_plan, kept_from_json, plan_from_json
from moeq.allocation.plan_report import allocation_report, allocation_to_json, cost_summary
from moeq.callback import Step, module_of
from moeq.disk.atomic import write_json, write_text
from moeq.fit.block_files import Grid, block_path
from moeq.module import MoEQuantModule


class BitAllocation(Step):
    """Bits by structure, name or rule, by an allocator under a budget, or as in the allocation.json of another run.

    Without arguments every weight has ``--model.bits``.  Rules and costs that need a survey take that of the callback
    ``Survey``, which then stands before this one, or a file of an earlier run.

    Args:
        survey: Path of the survey.json of an earlier run, in place of a survey in this one.
        **settings: Those of ``AllocationSpec``.
    """

    def __init__(self, survey: str | None = None, **settings: Any) -> None:
        self.spec = AllocationSpec(**settings)
        self.survey = survey
        self._decision: Decision | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide, or make sure that a survey comes first and holds what the decision needs."""
        module = module_of(pl_module)
        weights, run = module.weight_shapes(), module.run
        if self.survey is not None:
            run.evidence = read_evidence(Path(self.survey), weights)
        if not self.spec.needs_evidence or run.evidence is not None:
            self._decision = decide(self.spec, weights, module.grid, run.evidence)
            self._take(trainer, module, self._decision)
        elif block_path(module.run_dir, 0).exists() and not module.hparams["restart"]:
            # A run that continues has no survey: finished blocks follow the plan that it made then.
            path = module.run_dir / "allocation.json"
            run.plan = plan_from_json(path)
            check_plan(run.plan, weights, kept_from_json(path))
        elif run.promise is None:
            raise ValueError(
                "BitAllocation has rules or costs that need a survey, and nothing makes one; put "
                "Survey before BitAllocation, or give survey: PATH"
            )
        else:
            run.needs.evidence = True
            if self.spec.search is not None:
                run.needs.batches_apart = self.spec.search.num_batches
            # Until the survey has decided: what is kept is certain.
            run.plan, _ = base_plan(self.spec, weights, module.grid)
            rehearse(self.spec, weights, module.grid, run.promise)

    def check(self, module: MoEQuantModule) -> None:
        """Finished blocks of a run that continues must have the grids of the plan, which may have been edited."""
        run, resume = module.run, module.walk.resume
        sites = [site for block in range(resume.first_block) for site in module.adapter.sites(block)]
        for name in (name for site in sites for name in site.weight_names()):
            grid = run.plan.get(name)
            planned = None if grid is None else (grid.bits, grid.group_size, grid.stored_kind)
            done = resume.grids.get(name)
            if planned != done:
                raise ValueError(
                    f"{name} was {_said(done)} before this run continued, the plan in {module.run_dir} now says "
                    f"{_said(planned)}; put the old value back, or set --model.restart true"
                )

    def begin(self, module: MoEQuantModule) -> None:
        """Write down what was decided at the start."""
        if self._decision is not None:
            self._write(module, self._decision)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide at the end of the last pass of the survey."""
        module = module_of(pl_module)
        epoch, schedule = module.current_epoch, module.walk.schedule
        last = schedule[epoch].kind == "survey" and schedule[epoch + 1].kind != "survey"
        if last and self.spec.needs_evidence and self.survey is None:
            decision = decide(self.spec, module.weight_shapes(), module.grid, module.run.evidence, module.run.judge)
            module.run.judge = None  # its candidates are let go
            self._take(trainer, module, decision)
            self._write(module, decision)

    def _take(self, trainer: Trainer, module: MoEQuantModule, decision: Decision) -> None:
        """Make a decision the plan of the run."""
        weights = module.weight_shapes()
        # Accelerators may differ in last digits, which can tip a choice: all ranks follow the first.
        module.run.plan = trainer.strategy.broadcast(decision.plan)
        rank_zero_info(f"Allocation: {cost_summary(decision, weights)}")

    def _write(self, module: MoEQuantModule, decision: Decision) -> None:
        weights = module.weight_shapes()
        if module.trainer.is_global_zero:
            write_json(module.run_dir / "allocation.json", allocation_to_json(decision, weights))
            write_text(module.run_dir / "allocation.md", allocation_report(decision, weights))


def _said(grid: Grid | None) -> str:
    """Such as "quantized to 3 bits in groups of 64"."""
    if grid is None:
        return "kept"
    if grid[2] != "uniform":
        return f"quantized to {grid[2].upper()}"
    return f"quantized to {grid[0]} bits" + (f" in groups of {grid[1]}" if grid[1] is not None else "")
