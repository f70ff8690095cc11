"""Decide the grid of every weight and write the plan."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from moeq.allocation.decide import AllocationSpec, Decision, Method, decide
from moeq.allocation.evidence import read_evidence
from moeq.allocation.plan import check_plan, plan_cost, plan_from_json
from moeq.allocation.plan_report import allocation_report, allocation_to_json
from moeq.allocation.problem import Budget, BudgetUnit, Floor
from moeq.allocation.rehearsal import rehearse
from moeq.allocation.rules import make_rule
from moeq.allocation.runtime import RuntimeName
from moeq.disk.atomic import write_json, write_text
from moeq.fit.block_files import block_path
from moeq.module import MoEQuantModule


class BitAllocation(Callback):
    """Bits by structure, by named rules, by an allocator under a budget, or as in the allocation.json of another run.

    Without arguments every weight has ``--model.bits``.  Rules and costs that need a survey take that of
    ``Survey``, which then stands before this callback, or a file of an earlier one.

    Args:
        attention: Bits of attention linears; null is ``--model.bits`` (or what the allocator chooses).
        shared: Bits of shared experts.
        dense: Bits of dense MLP blocks.
        routed: Bits of routed experts.
        plan: Path of an allocation.json; the other bits must then be left out.
        rules: Rules such as {rule: first_blocks, num: 2, bits: 4}; each raises the bits of what it selects.  For the
            allocator they are least widths.
        method: "rules", or "allocate": the least predicted damage within a budget.
        cost: Cost table of the survey that the allocator minimises, for example fisher.
        budget: Limit of the allocator; of rules or a given plan, checked.
        budget_unit: "code_bits" or "average_bits" per weight, "bytes", or "active_bytes" (of one token's weights).
        choices: What the allocator may give: bits (in groups of ``--model.group_size``), or labels such as "4g128" and
            "4g0" (no groups).
        runtime: What must read the result: "research" (any width by weight), "gptqmodel" (one width per expert), "vllm"
            (one per block's experts and per fused linear), "uniform_experts" (one for all experts).
        floors: Experts of every block that must stay wide, as {bits: 4, num_experts: 1}.
        survey: Path of the survey.json of an earlier run, in place of a survey in this one.
    """

    def __init__(
        self,
        attention: int | None = None,
        shared: int | None = None,
        dense: int | None = None,
        routed: int | None = None,
        plan: str | None = None,
        rules: list[dict[str, Any]] | None = None,
        method: Method = "rules",
        cost: str | None = None,
        budget: float | None = None,
        budget_unit: BudgetUnit = "code_bits",
        choices: list[int | str] | None = None,
        runtime: RuntimeName = "research",
        floors: list[Floor] | None = None,
        survey: str | None = None,
    ) -> None:
        bits = {"attention": attention, "shared": shared, "dense": dense, "routed": routed}
        self.spec = AllocationSpec(
            bits_by_kind={kind: value for kind, value in bits.items() if value is not None},
            plan=None if plan is None else Path(plan),
            rules=tuple(make_rule(rule) for rule in rules or ()),
            method=method,
            cost=cost,
            budget=None if budget is None else Budget(budget, budget_unit),
            choices=(2, 3, 4, 8) if choices is None else tuple(choices),
            runtime=runtime,
            floors=tuple(floors or ()),
        )
        self.survey = survey

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide, or make sure that a survey comes first and holds what the decision needs."""
        assert isinstance(pl_module, MoEQuantModule)

        weights, run = pl_module.weight_shapes(), pl_module.run
        if self.survey is not None:
            run.evidence = read_evidence(Path(self.survey), weights)
        if not self.spec.needs_evidence or run.evidence is not None:
            self._take(trainer, pl_module, decide(self.spec, weights, pl_module.grid, run.evidence))
        elif block_path(pl_module.run_dir, 0).exists() and not pl_module.hparams["restart"]:
            # A run that continues has no survey: finished blocks follow the plan that it made then.
            run.plan = plan_from_json(pl_module.run_dir / "allocation.json")
            check_plan(run.plan, weights)
        elif run.promise is None:
            raise ValueError(
                "BitAllocation has rules or costs that need a survey, and nothing makes one; put "
                "Survey before BitAllocation, or give survey: PATH"
            )
        else:
            run.needs.evidence = True
            rehearse(self.spec, weights, pl_module.grid, run.promise)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finished blocks of a run that continues must have the widths of the plan, which may have been edited."""
        assert isinstance(pl_module, MoEQuantModule)
        run = pl_module.run
        for name, weight in run.quantized.items():
            if (weight.bits, weight.group_size) != (run.plan[name].bits, run.plan[name].group_size):
                raise ValueError(
                    f"{name} was quantized to {weight.bits} bits before this run continued, the plan in "
                    f"{pl_module.run_dir} now says {run.plan[name].bits}; put the old value back, or set "
                    "--model.restart true"
                )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide at the end of the last pass of the survey."""
        assert isinstance(pl_module, MoEQuantModule)
        epoch, schedule = pl_module.current_epoch, pl_module.walk.schedule
        last = schedule[epoch].kind == "survey" and schedule[epoch + 1].kind != "survey"
        if last and self.spec.needs_evidence and self.survey is None:
            weights = pl_module.weight_shapes()
            self._take(trainer, pl_module, decide(self.spec, weights, pl_module.grid, pl_module.run.evidence))

    def _take(self, trainer: Trainer, module: MoEQuantModule, decision: Decision) -> None:
        """Make a decision the plan of the run, and write it down."""
        weights = module.weight_shapes()
        # Accelerators may differ in last digits, which can tip a choice: all ranks follow the first.
        module.run.plan = trainer.strategy.broadcast(decision.plan)
        cost = plan_cost(decision.plan, weights)
        rank_zero_info(
            f"Allocation: {cost.code_bits:.3f} bits per weight, {cost.average_bits:.3f} with scales and zero points "
            f"({cost.active_average_bits:.3f} over active weights), {cost.bytes / 1e6:.2f} MB"
        )
        if trainer.is_global_zero:
            write_json(module.run_dir / "allocation.json", allocation_to_json(decision, weights))
            write_text(module.run_dir / "allocation.md", allocation_report(decision, weights))
