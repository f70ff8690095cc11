"""What the original writes for a step of a fit, on all ranks: the part that knows the trainer."""

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info

from moeq.sampling.ebss_spec import EBSSSpec
from moeq.sampling.written import agreed_writer, write_sequences

if TYPE_CHECKING:
    from torch import Tensor

    from moeq.module import MoEQuantModule


def write_own(
    module: "MoEQuantModule", spec: EBSSSpec, sequences_at_once: int, folder: Path, step: str
) -> "Tensor":  # fmt: skip
    """Sequences of the original, [N, T], the same on all ranks; what an earlier process wrote is taken from its parts.

    All ranks must call it.

    Args:
        module: Of the fit, while the model is the original.
        spec: How many, of which length, and their seed.
        sequences_at_once: Per forward pass.
        folder: For the parts.
        step: For whom, in one word; it names the barrier and begins the message.
    """
    trainer = module.trainer
    writer = agreed_writer(
        module.adapter, module.device, sequences_at_once, spec.length, trainer.world_size // trainer.num_nodes
    )
    rank_zero_info(f"{step}: the model ({writer}) writes {spec.num_sequences} sequences of {spec.length} tokens")
    return write_sequences(
        module.adapter, module.tokenizer, spec, writer, sequences_at_once, folder, module.device,
        (trainer.global_rank, trainer.world_size), lambda: trainer.strategy.barrier(f"moeq_{step.lower()}_parts"),
    )  # fmt: skip
