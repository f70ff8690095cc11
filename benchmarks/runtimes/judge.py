"""How far the log-probabilities of a runtime are from those of the file's values, and whether that is its own noise."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

# "absent": the runtime is not installed here.
Verdict = Literal["right", "wrong", "refused by moeq", "refused by the runtime", "absent"]
VERDICTS: tuple[Verdict, ...] = ("right", "wrong", "refused by moeq", "refused by the runtime", "absent")
FACTOR, FLOOR = 3.0, 1e-6  # of the bound


@dataclass(frozen=True)
class Agreement:
    """Of a runtime with transformers in float32 on the same values.

    Attributes:
        kl: Mean Kullback-Leibler divergence from transformers, nats per token.
        top1: Share of tokens whose most probable successor is the same.
        worst: Largest divergence of a token, nats.
    """

    kl: float
    top1: float
    worst: float


def agreement(ours_NLV: Tensor, theirs_NLV: Tensor) -> Agreement:
    """Compare log-probabilities of the same windows, all positions but the last of each.

    Args:
        ours_NLV: Of transformers; it may have further windows.
        theirs_NLV: Of the runtime.

    Raises:
        ValueError: The shapes differ, or a value is not finite.
    """
    ours, theirs = (part[: len(theirs_NLV), :-1].double().log_softmax(-1) for part in (ours_NLV, theirs_NLV))
    if ours.shape != theirs.shape:
        raise ValueError(f"the runtime gave {tuple(theirs.shape)} log-probabilities, transformers {tuple(ours.shape)}")
    if not theirs.isfinite().all():
        raise ValueError("the runtime gave log-probabilities that are not finite")
    kl_NL = (ours.exp() * (ours - theirs)).sum(-1)
    same_NL = ours.argmax(-1) == theirs.argmax(-1)
    return Agreement(float(kl_NL.mean()), float(same_NL.double().mean()), float(kl_NL.max()))


def bound(noises: list[float]) -> float:
    """The largest divergence that is the runtime's own arithmetic.

    Args:
        noises: Divergences that its arithmetic alone makes: in its own run of the unquantized model, and where it
            rounds activations, by that rounding in transformers.
    """
    return FACTOR * max(noises) + FLOOR


def judge(found: Agreement, largest: float) -> Verdict:
    """Whether a divergence is within its bound."""
    return "right" if found.kl <= largest else "wrong"
