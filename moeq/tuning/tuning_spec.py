"""Settings of end-to-end tuning."""

from dataclasses import dataclass
from typing import Literal, get_args

Loss = Literal["kl", "top_k", "hidden"]
# Of all sequences this share is never learned from, at least one batch.
HELD_OUT = 1 / 16


@dataclass(frozen=True)
class TuningSpec:
    """How a quantized model learns the original's predictions.

    Attributes:
        num_sequences: Sequences that the original writes for it; a sixteenth of them is held out.
        length: Tokens of each.
        batch_size: Sequences of a step on each rank.
        num_epochs: How often a sequence may be learned from.
        loss: "kl" is the divergence of the predictions; "top_k" that over the ``top_k`` likeliest tokens of the
            original and the rest as one, for large vocabularies; "hidden" the relative error of the last hidden states.
        top_k: Tokens of that loss.
        scale_rate: Step size of the logarithms of the scales.
        level_rate: Step size of the codes, in levels; 0 keeps them.
        norm_rate: Step size of norms and biases of the blocks; 0 keeps them.
        router_rate: Step size of the weights of routers; 0 keeps them.
        warmup: Share of the steps in which the rates rise from zero; then they fall along a cosine.
        num_checks: How often the held-out sequences are measured; the best state is kept.
        recompute: Run blocks again in the backward pass instead of keeping what they made: less memory, a third slower.
            Streamed blocks are always run again.
        seed: Of the sequences and of their order.
    """

    num_sequences: int = 1024
    length: int = 256
    batch_size: int = 16
    num_epochs: int = 1
    loss: Loss = "kl"
    top_k: int = 64
    scale_rate: float = 5e-4
    level_rate: float = 0.01
    norm_rate: float = 5e-4
    router_rate: float = 5e-4
    warmup: float = 0.1
    num_checks: int = 4
    recompute: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in get_args(Loss):
            raise ValueError(f"loss ({self.loss}) must be one of {', '.join(get_args(Loss))}; choose kl")
        usual = {"num_sequences": 1024, "length": 256, "batch_size": 16, "num_epochs": 1, "top_k": 64, "num_checks": 4}
        for name, value in usual.items():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1; the usual value is {value}")
        for name in ("scale_rate", "level_rate", "norm_rate", "router_rate"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0 and below 1; 0 is no step")
        if not any((self.scale_rate, self.level_rate, self.norm_rate, self.router_rate)):
            raise ValueError("all rates are 0, so nothing would learn; set scale_rate to 0.0005")
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"warmup ({self.warmup}) must be at least 0 and below 1; the usual value is 0.1")
        if self.num_sequences < 2 * self.batch_size:
            raise ValueError(
                f"num_sequences ({self.num_sequences}) must be two batches of batch_size ({self.batch_size}) at least, "
                "one to learn from and one that is held out; choose a smaller batch_size"
            )

    @property
    def num_batches(self) -> int:
        """All of them, in whole batches: what is left over is not used."""
        return self.num_sequences // self.batch_size

    @property
    def num_held_out(self) -> int:
        """Batches that are never learned from."""
        return max(1, round(self.num_batches * HELD_OUT))

    def num_steps(self, num_ranks: int) -> int:
        """Steps of the whole tuning: in each, every rank takes a batch of its own."""
        return (self.num_batches - self.num_held_out) // num_ranks * self.num_epochs
