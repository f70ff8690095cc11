"""Quality report of a calibration set, with the same columns for sampled sequences and for any text of equal size.

Beside balance and likelihood (``moeq.sampling.balance``): effective samples per expert, and distinct n-grams, the
number of different n-grams of tokens over the number of n-grams (n-grams do not cross sequences), which falls where a
set repeats itself within sequences or between them.

Legend: N sequences, T tokens, L blocks with routed experts, E routed experts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moeq.sampling.balance import balance_columns
from moeq.sampling.ebss_spec import Sampled
from moeq.sampling.effective import ExpertEvidence

NGRAMS = (1, 2, 3, 4)


def set_columns(
    sampled: Sampled, evidence: ExpertEvidence, decode: Callable[[Tensor], Sequence[str]]
) -> dict[str, Any]:
    """All columns of one set: numbers, and the lists of tokens and effective samples by block and expert."""
    ids_NT, counts_LE, effective_LE = sampled.ids_NT, sampled.counts_NLE.sum(0), evidence.effective_LE()
    return {
        **balance_columns(sampled.counts_NLE, sampled.nll_N, ids_NT.shape[1], decode(ids_NT)),
        "effective_samples_per_expert_min": float(effective_LE.min()),
        "effective_samples_per_expert_mean": float(effective_LE.mean()),
        **{f"distinct_{n}_grams": distinct_ngrams(ids_NT, n) for n in NGRAMS},
        "tokens_per_expert": counts_LE.tolist(),
        "effective_samples_per_expert": [[round(n, 1) for n in row] for row in effective_LE.tolist()],
    }


def distinct_ngrams(ids_NT: Tensor, n: int) -> float:
    """Share of the n-grams of tokens that are different ones; 0 where sequences are shorter than n."""
    if ids_NT.shape[1] < n:
        return 0.0
    ngrams_Xn = ids_NT.unfold(1, n, 1).reshape(-1, n)
    return len(torch.unique(ngrams_Xn, dim=0)) / len(ngrams_Xn)


DECISIONS = ("balance_term_range", "likelihood_term_range", "steps_changed_by_balance")


def decision_columns(decisions_NS3: Tensor, redrawn_N: Tensor) -> dict[str, float]:
    """What the balance term decided while the set was written, and how many sequences were drawn again.

    Means over sequences and steps; 0 where no branches competed.
    """
    steps = decision_steps(decisions_NS3)
    means = {name: sum(step[name] for step in steps) / max(len(steps), 1) for name in DECISIONS}
    return {**means, "redrawn_sequences": float(redrawn_N.sum())}


def decision_steps(decisions_NS3: Tensor) -> list[dict[str, float]]:
    """The same three columns of every step, means over sequences."""
    return [dict(zip(DECISIONS, step_3, strict=True)) for step_3 in decisions_NS3.double().mean(0).tolist()]


def set_scalars(columns: dict[str, Any], prefix: str) -> dict[str, float]:
    """The numbers among the columns, for a logger."""
    return {f"{prefix}/{name}": value for name, value in columns.items() if isinstance(value, float)}
