"""DDP for a module that trains nothing: process groups and launcher of Lightning, no wrapper around the module.

Lightning's own strategy wraps the module in ``DistributedDataParallel``, which refuses one without trainable
parameters.  ``--trainer.strategy moeq_ddp`` selects this one.
"""

from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from typing_extensions import override

STRATEGY = "moeq_ddp"


class UnwrappedDDPStrategy(DDPStrategy):
    """``ddp`` without ``DistributedDataParallel``: nothing is synchronised that a step did not ask for.

    Ranks wait for the first one while it samples or exports, which takes longer than the usual limit of half an hour.
    """

    def __init__(self, timeout_hours: float = 12.0, **kwargs: Any) -> None:
        super().__init__(timeout=timedelta(hours=timeout_hours), **kwargs)

    @override
    def configure_ddp(self) -> None:
        """Leave the module as it is."""


StrategyRegistry.register(
    STRATEGY, UnwrappedDDPStrategy, description="DDP without a wrapper, for calibration and evaluation"
)
