"""DDP for a module that trains nothing: process groups and launcher of Lightning, no wrapper around the module.

Lightning's own strategy wraps the module in ``DistributedDataParallel``, which refuses one without trainable
parameters.  ``--trainer.strategy moeq_ddp`` selects this one.
"""

from datetime import timedelta
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from typing_extensions import override

from moeq.lifeline import Lifeline, Place, open_lifeline

STRATEGY = "moeq_ddp"


class UnwrappedDDPStrategy(DDPStrategy):
    """``ddp`` without ``DistributedDataParallel``: nothing is synchronised that a step did not ask for.

    Ranks wait for the first one while it samples or exports, which takes longer than the usual limit of half an hour.
    A rank that fails ends all of them at once all the same (``moeq/lifeline.py``).
    """

    def __init__(self, timeout_hours: float = 12.0, **kwargs: Any) -> None:
        super().__init__(timeout=timedelta(hours=timeout_hours), **kwargs)
        self._lifeline: Lifeline | None = None

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self.world_size > 1 and self._lifeline is None:
            assert self.cluster_environment is not None
            place = Place(self.global_rank, self.node_rank, self.local_rank)
            host = self.cluster_environment.main_address
            self._lifeline = open_lifeline(place, self.world_size, host, self.broadcast)

    @override
    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        # Before every batch of a fit, Lightning 2.6 broadcasts whether the first rank was told to stop.  That never
        # returns where ranks have different numbers of batches.  Here the lifeline ends all ranks.
        trainer.fit_loop.epoch_loop.__dict__["_broadcast_sigterm_tensor"] = lambda: None

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if self._lifeline is not None:
            self._lifeline.fail(f"{type(exception).__name__}: {exception}")

    @override
    def teardown(self) -> None:
        super().teardown()
        if self._lifeline is not None:
            self._lifeline.close()
            self._lifeline = None

    @override
    def configure_ddp(self) -> None:
        """Leave the module as it is."""


StrategyRegistry.register(
    STRATEGY, UnwrappedDDPStrategy, description="DDP without a wrapper, for calibration and evaluation"
)
