"""What becomes of experts that the calibration data hardly reached: no expert is zeroed, skipped or left random.

``shrink`` (default) pulls every expert's Hessian toward the token-weighted pool of its block,

    H_e = (S_e + kappa H_pool) / (n_e + kappa),        H_pool = sum_e S_e / sum_e n_e,

that is kappa tokens of an average expert are added to what the expert saw: little for a busy one, everything for one
that saw nothing.  ``rtn`` rounds experts below ``min_tokens`` to nearest; ``fail`` refuses them.

Shapes: E experts, I in features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moeq.quant.hessian import HessianState, effective_samples, mean_hessian
from moeq.quant.spec import Fallback

CoveragePolicy = Literal["shrink", "rtn", "fail"]
POLICIES = ("shrink", "rtn", "fail")
FEW_TOKENS, NO_TOKENS = "few calibration tokens", "no calibration tokens"


@dataclass(frozen=True)
class CoverageSpec:
    """When an expert counts as badly covered, and what is done then.

    Attributes:
        policy: ``shrink`` toward the block's pooled Hessian, ``rtn`` round to nearest, ``fail``.
        min_tokens: Experts with fewer tokens are reported, and under ``rtn`` and ``fail`` not calibrated.
        kappa: Weight of the pooled Hessian under ``shrink``, in tokens; 0 leaves the Hessians of reached experts alone.
    """

    policy: CoveragePolicy = "shrink"
    min_tokens: int = 128
    kappa: float = 256.0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"coverage policy ({self.policy}) must be one of {', '.join(POLICIES)}; choose shrink")
        if self.min_tokens < 1:
            raise ValueError(f"min_tokens ({self.min_tokens}) must be at least 1; the usual value is 128")
        if not 0.0 <= self.kappa < float("inf"):
            raise ValueError(f"kappa ({self.kappa}) must be a finite number of tokens, 0 or more; choose 128 to 512")


def regularize(state: HessianState, spec: CoverageSpec, names: Sequence[str]) -> tuple[Tensor, Tensor, list[Fallback]]:
    """Hessians to solve with, experts to round to nearest instead, and a record of each departure.

    Args:
        state: Sums over all calibration tokens.
        spec: The policy.
        names: Weight name of each expert, for messages and records.

    Returns:
        hessian_EII float32, use_rtn_E bool, and one Fallback for each expert below ``min_tokens``.

    Raises:
        ValueError: A sum is not finite, or the policy is ``fail`` and an expert has too few tokens.
    """
    if len(names) != len(state.num_tokens_E):
        raise ValueError(f"names ({len(names)}) must be as many as experts ({len(state.num_tokens_E)}); pass one each")
    _require_finite(state, names)
    tokens_E = state.num_tokens_E
    few_E = tokens_E < spec.min_tokens
    if spec.policy == "fail" and bool(few_E.any()):
        raise ValueError(_refusal(state, spec, names))
    empty = float(tokens_E.sum()) == 0.0
    use_rtn_E = torch.ones_like(few_E) if empty else few_E & (spec.policy == "rtn")
    shrink = spec.policy == "shrink" and len(names) > 1 and not empty
    hessian_EII = _shrunk(state, spec.kappa) if shrink else mean_hessian(state)
    return hessian_EII, use_rtn_E, _records(state, spec, names, use_rtn_E)


def _shrunk(state: HessianState, kappa: float) -> Tensor:
    """Every Hessian pulled toward the pool with the weight of ``kappa`` tokens."""
    tokens_E = state.num_tokens_E
    pool_II = state.sum_EII.sum(0) / tokens_E.sum()
    hessian_EII = torch.add(
        state.sum_EII, pool_II, alpha=kappa, out=torch.empty_like(state.sum_EII, dtype=torch.float32)
    )
    hessian_EII /= (tokens_E + kappa).float().view(-1, 1, 1)
    hessian_EII[tokens_E == 0] = pool_II.float()  # its limit, also where kappa is 0
    return hessian_EII


def _records(state: HessianState, spec: CoverageSpec, names: Sequence[str], use_rtn_E: Tensor) -> list[Fallback]:
    """One record for each expert that was not calibrated on enough tokens of its own."""
    records = []
    measured = zip(
        names, state.num_tokens_E.tolist(), effective_samples(state).tolist(), use_rtn_E.tolist(), strict=True
    )
    for name, tokens, effective, use_rtn in measured:
        if tokens >= spec.min_tokens:
            continue
        seen = f"{tokens:.0f} tokens ({effective:.1f} effective), fewer than min_tokens ({spec.min_tokens})"
        if use_rtn:
            done = "rounded to nearest"
        elif len(names) == 1:
            done = "solved with its own Hessian, as it has no peers to pool with"
        else:
            done = f"Hessian shrunk toward the block's pool with the weight of {spec.kappa:g} tokens"
        records.append(Fallback(name, FEW_TOKENS if tokens else NO_TOKENS, f"{seen}; {done}"))
    return records


def _refusal(state: HessianState, spec: CoverageSpec, names: Sequence[str]) -> str:
    """Message for the worst expert: its tokens, how many more there are, and what to do."""
    tokens_E = state.num_tokens_E
    worst = int(tokens_E.argmin())
    others = int((tokens_E < spec.min_tokens).sum()) - 1
    return (
        f"{names[worst]} has {int(tokens_E[worst])} calibration tokens ({float(effective_samples(state)[worst]):.1f} "
        f"effective), fewer than min_tokens ({spec.min_tokens}), and so have {others} more experts of this block; "
        "use more or better balanced calibration data, a lower min_tokens, or the coverage policy shrink or rtn"
    )


def _require_finite(state: HessianState, names: Sequence[str]) -> None:
    flat_EN = state.sum_EII.flatten(1)  # the extremes are not finite where any value is not, and take no memory
    bad_E = ~(torch.isfinite(flat_EN.amin(1)) & torch.isfinite(flat_EN.amax(1)))
    if bool(bad_E.any()):
        name = names[int(bad_E.nonzero()[0])]
        raise ValueError(
            f"the calibration inputs of {name} have NaN or infinite values ({int(bad_E.sum())} of {len(names)} "
            "experts); check the model's weights, or load it in bfloat16 or float32 rather than float16"
        )
