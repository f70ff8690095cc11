"""Options of Lightning's Trainer under which the numbers of a run would be others: refused in one line, or told apart.

A run goes through its data as the walk says, in the dtypes of the weights.  What shortens a training, adds up gradients
or multiplies in another dtype has no meaning here, or an unwanted one: autocast would reach into the sums of Hessians.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.strategies import ParallelStrategy

from moeq.quant.spec import Fallback
from moeq.strategy import STRATEGY, UnwrappedDDPStrategy

BOTH, FIT = ("fit", "validate"), ("fit",)
FEWER_DATA = "the schedule decides when a run is over; for a shorter one set fewer --data sequences or windows"
NOT_TRAINED = "the trainer makes no gradient step"
DTYPES = "set --model.dtype for weights and exports, --model.compute_dtype for products; sums have dtypes of their own"
# By option: the commands that refuse it, the values that change nothing, and why with what to do in its place.
REFUSED: dict[str, tuple[tuple[str, ...], tuple[Any, ...], str]] = {
    "precision": (BOTH, (None, 32, "32", "32-true"), DTYPES),
    "fast_dev_run": (BOTH, (False,), "it would stop half-way; for a look ahead set --model.preflight true"),
    "overfit_batches": (BOTH, (0,), "set --trainer.limit_train_batches, or limit_val_batches for validate"),
    "use_distributed_sampler": (BOTH, (False,), "ranks divide the data without duplicates; leave it out"),
    "max_epochs": (FIT, (None, -1), FEWER_DATA),
    "min_epochs": (FIT, (None,), FEWER_DATA),
    "max_steps": (FIT, (-1,), FEWER_DATA),
    "min_steps": (FIT, (None,), FEWER_DATA),
    "max_time": (FIT, (None,), "a run that is killed goes on where it was: end it yourself and start it again"),
    "accumulate_grad_batches": (FIT, (1,), f"{NOT_TRAINED}; set --data.batch_size"),
    "gradient_clip_val": (FIT, (None, 0), f"{NOT_TRAINED}; leave it out"),
    "gradient_clip_algorithm": (FIT, (None,), f"{NOT_TRAINED}; leave it out"),
    "reload_dataloaders_every_n_epochs": (FIT, (0,), "every pass goes over the same batches; leave it out"),
}


def refuse_options(command: str, settings: Mapping[str, Any]) -> None:
    """Refuse options of the Trainer that a command cannot honour.

    Args:
        command: "fit" or "validate".
        settings: Options of the Trainer by name.

    Raises:
        ValueError: The first of them, why, and what to do in its place.
    """
    for name, (commands, harmless, reason) in REFUSED.items():
        if command in commands and name in settings and settings[name] not in harmless:
            raise ValueError(f"--trainer.{name} {settings[name]} cannot be honoured by {command}: {reason}")
    if command == "fit" and settings.get("limit_train_batches") == 0:
        raise ValueError("--trainer.limit_train_batches 0 calibrates on nothing; leave it out for all batches")


def refuse_limit(limit: int | float, num_batches: int) -> None:
    """Raise ValueError where a share of so many calibration batches, on each rank, is less than one."""
    if isinstance(limit, float) and num_batches and int(limit * num_batches) == 0:
        raise ValueError(
            f"--trainer.limit_train_batches {limit} of {num_batches} batches calibrates on nothing; set a number of "
            f"batches, or a share of at least {1 / num_batches:.3g}"
        )


def refuse_trainer(trainer: Trainer) -> None:
    """The same for a Trainer however it was made: plugins, strategy and device as they are.

    Raises:
        ValueError: It would cast what a module computes, cannot train nothing, or has a device without float64.
    """
    precision = trainer.precision_plugin.precision
    if precision != "32-true":
        raise ValueError(f"precision {precision} of the Trainer cannot be honoured: {DTYPES}")
    if isinstance(trainer.strategy, ParallelStrategy) and not isinstance(trainer.strategy, UnwrappedDDPStrategy):
        name = type(trainer.strategy).__name__
        raise ValueError(f"{name} needs a model that is trained; set --trainer.strategy {STRATEGY} for several ranks")
    refuse_device(trainer.strategy.root_device)


def refuse_device(device: torch.device) -> None:
    """Raise ValueError for a device without float64, in which sums over many tokens are made."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except TypeError as error:  # of MPS
        raise ValueError(f"{device} has no float64, which sums need; set --trainer.accelerator cpu") from error


def is_alone(settings: Mapping[str, Any]) -> bool:
    """Whether options of the Trainer ask for one process and leave the rest to Lightning."""
    devices = settings.get("devices")
    single = devices in (1, "1") or (isinstance(devices, list) and len(devices) == 1)
    others = settings.get("strategy", "auto") == "auto" and settings.get("plugins") is None
    return single and others and settings.get("num_nodes", 1) == 1


def default_device(accelerator: Any) -> tuple[Any, Fallback | None]:
    """The accelerator that "auto" stands for here, and a record where it is not the one of the machine.

    Args:
        accelerator: As given; anything but "auto" is returned as it is.
    """
    if accelerator != "auto" or not MPSAccelerator.is_available():
        return accelerator, None
    detail = "the GPU of this machine (MPS) has no float64, which sums need: the run is on the CPU"
    return "cpu", Fallback("accelerator", "not on the GPU", detail)


def numeric_switches() -> dict[str, bool]:
    """Switches of torch that the Trainer sets (deterministic, benchmark) where they are on: last bits may differ."""
    on = {"deterministic": torch.are_deterministic_algorithms_enabled(), "benchmark": torch.backends.cudnn.benchmark}
    return {name: value for name, value in on.items() if value}
