"""Decide the grid of every weight and write the plan."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from moeq.allocation.plan import check_plan, plan_cost, plan_from_json, plan_to_json, uniform_plan
from moeq.module import MoEQuantModule
from moeq.run import write_json


class BitAllocation(Callback):
    """Uniform bits (``--model.bits``), other bits for some structures, or the allocation.json of an earlier run.

    Args:
        attention: Bits of attention linears; null is ``--model.bits``.
        shared: Bits of shared experts.
        dense: Bits of dense MLP blocks.
        routed: Bits of routed experts.
        plan: Path of an allocation.json; the other arguments must then be null.
    """

    def __init__(
        self,
        attention: int | None = None,
        shared: int | None = None,
        dense: int | None = None,
        routed: int | None = None,
        plan: str | None = None,
    ) -> None:
        bits = {"attention": attention, "shared": shared, "dense": dense, "routed": routed}
        self.bits_by_kind = {kind: value for kind, value in bits.items() if value is not None}
        self.plan = plan
        if plan is not None and self.bits_by_kind:
            raise ValueError(f"plan ({plan}) already states all bits; leave out {', '.join(self.bits_by_kind)}")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make or read the plan, check it against the model, write allocation.json."""
        assert isinstance(pl_module, MoEQuantModule)
        pl_module.prepare()
        weights = pl_module.weight_shapes()
        if self.plan is None:
            plan = uniform_plan(weights, pl_module.grid, self.bits_by_kind)
        else:
            plan = plan_from_json(Path(self.plan))
            check_plan(plan, weights)
        pl_module.run.plan = plan
        cost = plan_cost(plan, weights)
        rank_zero_info(
            f"Allocation: {cost.code_bits:.3f} bits per weight, {cost.average_bits:.3f} with scales and zero points "
            f"({cost.active_average_bits:.3f} over active weights), {cost.bytes / 1e6:.2f} MB"
        )
        if trainer.is_global_zero:
            write_json(pl_module.run_dir / "allocation.json", plan_to_json(plan, cost))
