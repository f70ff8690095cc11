"""Tiles of the kernel for packed weights, by the rows that an expert has on average, for H200-class cards.

These are predictions, from what a program does: with few rows the weight is all that is read, so that tiles are narrow
in rows, programs many, and several in flight on a multiprocessor; with many rows each dequantized weight should meet as
many of them as the accumulator holds.  No entry was measured so far.  ``python -m benchmarks.gpu --steps tiles`` times
the neighbours of each and prints the table anew.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """What one program computes, and how.

    Attributes:
        rows: Rows of an expert, 16 or more.
        outputs: Out features.
        inner: In features of a step.
        warps: Warps of a program.
        stages: Steps whose loads are in flight.
    """

    rows: int
    outputs: int
    inner: int
    warps: int
    stages: int


# (largest mean of rows per expert, tile); the last one serves all above it.
TILES: tuple[tuple[float, Tile], ...] = (
    (4, Tile(16, 64, 128, 4, 4)),
    (24, Tile(16, 128, 128, 4, 4)),
    (48, Tile(32, 128, 64, 4, 4)),
    (96, Tile(64, 128, 64, 4, 3)),
    (float("inf"), Tile(128, 128, 64, 8, 3)),
)


def tile_for(num_rows: int, num_experts: int) -> Tile:
    """The tile for so many rows, divided over at most so many experts.

    The experts that rows go to are not known without asking the device: few rows go to as many experts.
    """
    mean = num_rows / max(1, min(num_rows, num_experts))
    return next(tile for bound, tile in TILES if mean <= bound)
