"""Where figures go: the run folder, and every logger that takes images (TensorBoard)."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def show_figure(name: str, figure: "Figure", folder: Path, loggers: Iterable[Any], step: int) -> None:
    """Write ``figures/<name>.png`` below the folder and hand the figure to the loggers."""
    path = folder / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    for logger in loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_figure"):
            experiment.add_figure(f"figures/{name}", figure, global_step=step)
