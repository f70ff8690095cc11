"""What gathering Kronecker factors is going to take.

    sums        8 (O^2 + I^2) E of every site of the block at once, float64
    a block     activations and their gradients
    waiting     inputs of all blocks, and gradients at one
    disk        4 (O^2 + I^2) (E + 1) of every site, float32, until the fit is over
    time        a sweep forward, one forward and back, and the products of the sums, about as much again

The writer of the sequences takes what it takes for calibration data.
"""

from collections.abc import Sequence

from moeq.fit.preflight import FitWork
from moeq.models.sites import Site
from moeq.models.sizes import forward_bytes, hidden_bytes
from moeq.preflight.phases import Moment, Phase
from moeq.survey.kronecker_spec import KroneckerSpec

KIND = "Kronecker factors"


def kronecker_phases(work: FitWork, spec: KroneckerSpec) -> Sequence[Phase]:
    """One phase before the first pass.

    Args:
        work: What is known of the fit.
        spec: Settings.
    """
    num_blocks = len(work.adapter.blocks)
    sums = [sum(map(_sum_bytes, work.adapter.sites(block))) for block in range(num_blocks)]
    largest = max(range(num_blocks), key=sums.__getitem__)
    num_tokens, batch_tokens = spec.num_sequences * spec.length, spec.batch_size * spec.length
    states = hidden_bytes(work.adapter, num_tokens) * (num_blocks + 1) // work.num_ranks
    held = {
        **work.model.held(largest),
        "sums": sums[largest],
        "activations": 3 * forward_bytes(work.adapter, largest, batch_tokens, spec.length),
    }
    seconds = None
    if work.speed is not None:
        seconds = 6 * num_blocks * work.speed.forward * num_tokens / work.num_ranks / work.data.batch_tokens
    moment = Moment(held, {"hidden states": min(work.hidden_bytes, states), **work.kernels})
    return (Phase(KIND, KIND, (moment,), factor_bytes(work), seconds),)


def factor_bytes(work: FitWork) -> int:
    """Bytes of the files of all blocks."""
    sites = work.adapter.all_sites()
    pools = sum(_sum_bytes(site) // site.num_experts for site in sites if site.num_experts > 1)
    return (sum(map(_sum_bytes, sites)) + pools) // 2


def _sum_bytes(site: Site) -> int:
    return 8 * (sum(site.rows) ** 2 + site.in_features**2) * site.num_experts
