"""What end-to-end tuning is going to take.

    originals   a sweep, whose hidden states wait; on disk 8 + width bytes per token
    leaves      per weight 12 bytes where codes learn (master and two moments) and 1 where not, per group 12
    a block     per weight 16 bytes in float32 (the weight, what gradients pass through, gradients), where nothing runs
                again those of all blocks; activations and their gradients; logits of a few sequences, six times
    time        steps * blocks * (forward, forward again, backward of twice that), and the sweep

The writer of the sequences takes what it takes for calibration data.
"""

from collections.abc import Sequence
from typing import Any

from moeq.fit.preflight import FitWork
from moeq.models.sizes import forward_bytes, hidden_bytes
from moeq.preflight.phases import Moment, Phase
from moeq.tuning.prediction import LOGITS_AT_ONCE
from moeq.tuning.tuning_spec import TuningSpec

ORIGINALS, TUNING = "originals for tuning", "end-to-end tuning"


def tuning_phases(work: FitWork, spec: TuningSpec, num_ranks: int, config: Any) -> Sequence[Phase]:
    """The phase before the first pass, and the one behind the last.

    Args:
        work: What is known of the fit.
        spec: Settings.
        num_ranks: Ranks that divide batches.
        config: Of the model.
    """
    numels = [sum(_numel(site) for site in work.adapter.sites(block)) for block in range(len(work.adapter.blocks))]
    largest = max(range(len(numels)), key=numels.__getitem__)
    tokens, num_tokens = spec.batch_size * spec.length, spec.num_sequences * spec.length
    seconds = None
    if work.speed is not None:
        batch = work.speed.forward * tokens / work.data.batch_tokens * len(numels)
        seconds = (spec.num_batches / num_ranks * batch, 4 * spec.num_steps(num_ranks) * batch)
    states = hidden_bytes(work.adapter, num_tokens)
    activations = forward_bytes(work.adapter, largest, tokens, spec.length)
    waiting = min(work.hidden_bytes, states // num_ranks)
    sweep = Moment({**work.model.held(largest), "activations": activations}, {"hidden states": waiting})
    again = spec.recompute or work.model.streamed
    vocabulary = config.get_text_config().vocab_size
    held = {
        **work.model.held(largest),
        "leaves": 0 if work.model.streamed else _leaf_bytes(sum(numels), spec),
        "weights in float32": 16 * (numels[largest] if again else sum(numels)),
        "activations": (3 if again else 3 * len(numels)) * activations,
        "logits": 24 * max(LOGITS_AT_ONCE, vocabulary * spec.length),
    }
    waiting = min(work.hidden_bytes, _leaf_bytes(sum(numels), spec)) if work.model.streamed else 0
    steps = Moment(held, {"leaves that wait": waiting})
    return (
        Phase(ORIGINALS, ORIGINALS, (sweep,), 8 * num_tokens + states, None if seconds is None else seconds[0]),
        Phase(TUNING, TUNING, (steps,), sum(work.block_files), None if seconds is None else seconds[1]),
    )


def _numel(site: Any) -> int:
    return int(sum(site.rows) * site.in_features * site.num_experts)


def _leaf_bytes(numel: int, spec: TuningSpec) -> int:
    per_group = 12 * numel // 32  # groups of 32 at the smallest in use
    return (12 if spec.level_rate else 1) * numel + (per_group if spec.scale_rate else 0)
