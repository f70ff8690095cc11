"""Where the models of validate are: in memory, together or one after the other, or a block at a time.

A model that does not fit is streamed, and an original runs before the model then: its logits wait on the disk.  A
packed export is never streamed, it is what fits.  A streamed model writes no text: that would read all of its blocks
once per token.
"""

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moeq.checkpoint.free_memory import free_bytes
from moeq.checkpoint.loading import load_config, model_bytes
from moeq.checkpoint.placement import Placement, choose_placement, stream_obstacle
from moeq.checkpoint.source_options import source_options
from moeq.distributed import gather_lists
from moeq.evaluation.reference_logits import ROOM, SPARE_BYTES, OriginalPlace, choose_mode
from moeq.evaluation.task_evaluation import TaskEvaluation
from moeq.scoring.pass_cost import Layout
from moeq.scoring.scorer import TWO_PASSES
from moeq.scoring.streamed import Waiting
from moeq.tasks.task import Generation

# The share of the free memory that waiting hidden states may take at most, whatever their bound.
WAITING_SHARE = 1 / 8


@dataclass(frozen=True)
class Places:
    """Where the models are.

    Attributes:
        model: The model under evaluation.
        original: What it is compared with, if anything.
        mode: Whether the original runs beside the model, or before it.
    """

    model: Placement
    original: Placement | None
    mode: OriginalPlace | None

    @property
    def by_role(self) -> dict[str, Placement]:
        """That of the "model" and, where there is one, of the "reference"."""
        return {"model": self.model} | ({} if self.original is None else {"reference": self.original})

    @property
    def streamed(self) -> list[Placement]:
        """Those that are streamed."""
        return [placement for placement in self.by_role.values() if placement.kind == "stream"]

    @property
    def without(self) -> Collection[Layout]:
        """Layouts that neither model uses: where one is streamed, both run the passes that it can run."""
        return TWO_PASSES if self.streamed else ()


def choose_places(settings: Mapping[str, Any], device: torch.device) -> Places:
    """Where the models go, before anything is loaded; every rank must call it, and has the same answer.

    Args:
        settings: Hyper-parameters of the module.
        device: Where models run.

    Raises:
        ValueError: A model can be neither held nor streamed, or a streamed one would have to run beside the other one.
    """
    name, reference = settings["name"], settings["reference"]
    how = settings["dtype"], settings["compute_dtype"], device
    # Ranks share their documents as batches are cut, and batches are cut for the passes of these places.
    free = min(gather_lists([min(free_bytes(device), free_bytes(torch.device("cpu")))]))
    asked = source_options(settings)
    sizes = {each: model_bytes(each, *how, **asked) for each in (name, reference) if each is not None}
    model, *original = (_place(settings, each, size, free) for each, size in sizes.items())
    if reference is None:
        return Places(model, None, None)
    places = Places(model, original[0] if original else model, "disk")
    if places.streamed and settings["reference_mode"] == "memory":
        raise ValueError(
            f"reference_mode 'memory' holds a model and its original whole, and {places.streamed[0].reason}; choose "
            "'disk' or 'auto'"
        )
    if places.streamed:
        return places
    mode = choose_mode(settings["reference_mode"], sizes[name], sizes[reference], free)
    return Places(places.model, places.original, mode)


def refuse_generation(placement: Placement, evaluations: Sequence[TaskEvaluation]) -> None:
    """Raise ValueError where a streamed model would have to write text for a task that is not finished."""
    names = [each.task.name for each in evaluations if isinstance(each.task, Generation) and each.unfinished]
    if names and placement.kind == "stream":
        raise ValueError(
            f"the tasks {names} need text that the model writes, which a streamed model does not: {placement.reason}; "
            "evaluate a packed export of it that fits, or leave these tasks out"
        )


def waiting_in(folder: Path, bound_bytes: int, reserved_bytes: int = 0) -> Waiting:
    """Where and how many hidden states wait.

    Args:
        folder: Where those wait that do not in memory; it is made where there is none.
        bound_bytes: Bound on those in memory.
        reserved_bytes: What else is going to be written there in the meantime.
    """
    folder.mkdir(parents=True, exist_ok=True)
    memory = min(bound_bytes, int(WAITING_SHARE * free_bytes(torch.device("cpu"))))
    free = max(0, shutil.disk_usage(folder).free - SPARE_BYTES - reserved_bytes)
    # The other half is for the experts that were chosen, what blocks hand on, and whoever else uses the disk.
    return Waiting(folder, memory, memory + free // 2)


def _place(settings: Mapping[str, Any], name: str, size: int, free: int) -> Placement:
    asked, source = settings["placement"], source_options(settings)
    obstacle = None if asked == "memory" else stream_obstacle(name, **source)
    if asked == "stream" and getattr(load_config(name, **source), "quantization_config", None) is not None:
        asked = "auto"  # of the two models it is the other one that is meant
    return choose_placement(asked, name, int(ROOM * size), free, obstacle)
