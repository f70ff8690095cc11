"""Pictures of a run: expert usage, error by block and the bits map, in TensorBoard and in the run folder."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L

from moeq.report.figures_fit import bits_map, error_by_block, usage_heatmap
from moeq.report.gallery import show_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moeq.fit.run import Run


class Figures(L.Callback):
    """Draws what the run recorded, once, at the end of ``fit``; a figure without data is left out.

    Reads ``pl_module.run.usage`` and ``pl_module.run.errors``; writes ``figures/*.png`` in the run folder and images
    to every logger that takes them (TensorBoard).
    """

    affects_weights = False

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        module: Any = pl_module
        for name, draw in _drawings(module.run).items():
            show_figure(name, draw(), Path(module.run_dir), trainer.loggers, trainer.current_epoch)


def _drawings(run: "Run") -> "dict[str, Callable[[], Figure]]":
    """Functions that draw the figures for which the run has data, by name."""
    drawings: dict[str, Callable[[], Figure]] = {}
    if run.usage:
        drawings["expert_usage"] = lambda: usage_heatmap(run.usage)
    if run.errors:
        drawings["error_by_block"] = lambda: error_by_block(run.errors)
        drawings["bits_map"] = lambda: bits_map(run.errors)
    return drawings
