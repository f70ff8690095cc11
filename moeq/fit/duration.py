"""Time of a fit, from a few operations that were measured on one real block.

    pass     batches * seconds of one batch, as far as the pass runs the block and with the sums it gathers
    solve    sum over experts of the seconds of one of its shape
    reading  bytes / rate; a block is read once for each time that it becomes resident
    writing  bytes / rate

A block of other shapes than the measured one costs in proportion to its products.

Shapes: O out features, I in features, N tokens of a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeq.fit.schedule import Pass, SitePart
from moeq.models.sites import Site


@dataclass(frozen=True)
class Speed:
    """What was measured on one block and one batch of the run's shape.

    Attributes:
        block: Which block.
        read: Bytes of the model's files that are read per second, made into parameters.
        write: Bytes that are written per second, forced to the disk.
        forward: Seconds of one batch through the whole block.
        sweeps: Seconds of one batch through a calibration pass, by the stages it observes (``stages_of``).
        solves: Seconds to solve one expert, by the shape of its stack (rows, in features).
        products: Multiplications of one batch in the block, to compare it with others.
        step: Seconds of one token of every row that a search writes at once; None where nothing is written.
    """

    block: int
    read: float
    write: float
    forward: float
    sweeps: Mapping[str, float]
    solves: Mapping[tuple[int, int], float]
    products: int
    step: float | None = None


def block_products(sites: Sequence[Site], num_tokens: int, experts_per_token: int) -> int:
    """Multiplications by quantizable weights of one batch in one block."""
    return num_tokens * sum(
        sum(site.rows) * site.in_features * (experts_per_token if site.kind == "routed" else 1) for site in sites
    )


def stages_of(current: Pass) -> str:
    """What a calibration pass observes, such as "mlp_in", or "attention_in+attention_out+...": the name of its kind."""
    return "+".join(dict.fromkeys(site.stage for site in current.observed))


def pass_seconds(current: Pass, speed: Speed, num_batches: int, products: int) -> float:
    """Seconds of one sweep.

    Args:
        current: The pass.
        speed: What was measured.
        num_batches: Steps of the sweep.
        products: Those of the pass's block.
    """
    scale = products / speed.products if speed.products else 1.0
    known = speed.sweeps.get(stages_of(current), speed.forward) if current.kind == "calibrate" else speed.forward
    return num_batches * known * scale


def solve_seconds(parts: Sequence[SitePart], speed: Speed) -> float:
    """Seconds to solve the parts of a pass on one rank."""
    return sum(len(part.experts) * _seconds_of_one(sum(part.site.rows), part.site.in_features, speed) for part in parts)


def solve_products(rows: int, in_features: int) -> int:
    """Multiplications of a solve: the sweep, the energy of the output, and a factorisation of the Hessian."""
    return rows * in_features**2 * 3 // 2 + in_features**3 // 3


def _seconds_of_one(rows: int, in_features: int, speed: Speed) -> float:
    if not speed.solves:
        return 0.0
    if (rows, in_features) in speed.solves:
        return speed.solves[rows, in_features]
    near = min(speed.solves, key=lambda shape: abs(solve_products(*shape) - solve_products(rows, in_features)))
    return speed.solves[near] * solve_products(rows, in_features) / solve_products(*near)
