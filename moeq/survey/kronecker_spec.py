"""Settings of Kronecker factors."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KroneckerSpec:
    """What the factors are gathered on.

    Attributes:
        num_sequences: Sequences that the original writes for them.
        length: Tokens of each.
        batch_size: Sequences of a step on each rank.
        seed: Of the sequences, and of the labels that are drawn.
    """

    num_sequences: int = 1024
    length: int = 256
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        usual = {"num_sequences": 1024, "length": 256, "batch_size": 64}
        for name, value in usual.items():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1; the usual value is {value}")
