"""Coverage policies for experts with few calibration tokens: no expert is zeroed, skipped or left random.

``shrink`` (default) pulls every expert's Hessian toward the pool of its block,

    H_e = (n_e M_e + kappa M) / (n_e + kappa),     M_e = S_e / sum_t w_t,     M = sum_e S_e / sum_et w_t,

with S_e = sum_t w_t x_t x_t^T, w_t = c_t^p the weight of a token, and Kish's effective sample size

    n_e = (sum_t w_t)^2 / sum_t w_t^2,

so kappa effective samples of an average expert are added to what the expert saw: little for a busy one, everything for
one that saw nothing.  M_e are weighted means: an expert whose affinities are small is not outweighed by the pool.
kappa is a number, or ``auto``: proportional to the in features, of which a Hessian needs several samples each.  ``rtn``
rounds experts below ``min_tokens`` to nearest; ``fail`` refuses them.

Shapes: E experts, I in features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moeq.quant.hessian import HessianState, effective_samples
from moeq.quant.spec import Fallback

CoveragePolicy = Literal["shrink", "rtn", "fail"]
Kappa = float | Literal["auto"]
POLICIES = ("shrink", "rtn", "fail")
SAMPLES_PER_FEATURE = 2.0  # of kappa auto; measured in benchmarks/LOG.md
FEW_TOKENS, NO_TOKENS = "few calibration tokens", "no calibration tokens"


@dataclass(frozen=True)
class CoverageSpec:
    """When an expert counts as badly covered, and what is done then.

    Attributes:
        policy: ``shrink`` toward the block's pooled Hessian, ``rtn`` round to nearest, ``fail``.
        min_tokens: Experts with fewer tokens are reported, and under ``rtn`` and ``fail`` not calibrated.
        kappa: Weight of the pooled Hessian under ``shrink``, in effective samples; 0 leaves the Hessians of reached
            experts alone, ``auto`` is ``SAMPLES_PER_FEATURE`` times the in features.
    """

    policy: CoveragePolicy = "shrink"
    min_tokens: int = 128
    kappa: Kappa = "auto"

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"coverage policy ({self.policy}) must be one of {', '.join(POLICIES)}; choose shrink")
        if self.min_tokens < 1:
            raise ValueError(f"min_tokens ({self.min_tokens}) must be at least 1; the usual value is 128")
        if self.kappa != "auto" and not 0.0 <= self.kappa < float("inf"):
            raise ValueError(f"kappa ({self.kappa}) must be auto or a finite number of samples, 0 or more; choose auto")

    def samples_of_pool(self, in_features: int) -> float:
        """The weight of the pool as a number."""
        return SAMPLES_PER_FEATURE * in_features if self.kappa == "auto" else self.kappa


def pool_of(state: HessianState) -> HessianState:
    """Sums over all experts, as the state of one."""
    return HessianState(*(tensor.sum(0, keepdim=True) for tensor in state.tensors()))


def shared_by(state: HessianState, num_experts: int) -> HessianState:
    """The state of one expert as that of several, without copies."""
    return HessianState(*(tensor.expand(num_experts, *tensor.shape[1:]) for tensor in state.tensors()))


def find_uncovered(
    state: HessianState, spec: CoverageSpec, names: Sequence[str], pool: HessianState | None = None
) -> tuple[Tensor, list[Fallback]]:
    """Experts to round to nearest instead of solving them, and a record of each departure.

    Args:
        state: Sums over all calibration tokens.
        spec: The policy.
        names: Weight name of each expert, for messages and records.
        pool: Sums over all experts of the block (E = 1) where there are several.

    Returns:
        use_rtn_E bool, and one Fallback for each expert below ``min_tokens``.

    Raises:
        ValueError: A sum is not finite, or the policy is ``fail`` and an expert has too few tokens.
    """
    if len(names) != len(state.num_tokens_E):
        raise ValueError(f"names ({len(names)}) must be as many as experts ({len(state.num_tokens_E)}); pass one each")
    _require_finite(state, names)
    few_E = state.num_tokens_E < spec.min_tokens
    if spec.policy == "fail" and bool(few_E.any()):
        raise ValueError(_refusal(state, spec, names))
    empty = float((state if pool is None else pool).num_tokens_E.sum()) == 0.0
    use_rtn_E = torch.ones_like(few_E) if empty else few_E & (spec.policy == "rtn")
    return use_rtn_E, _records(state, spec, names, use_rtn_E, pooled=pool is not None)


def hessians_to_solve(
    state: HessianState,
    spec: CoverageSpec,
    experts: Sequence[int],
    use_rtn_E: Tensor,
    pool: HessianState | None = None,
) -> Tensor:
    """Hessians of some experts as the policy wants them, float32 [len(experts), I, I].

    Those to be rounded to nearest get the identity, with which GPTQ is rounding to nearest and the error of an output
    that of the weight.

    Args:
        state: Sums over all calibration tokens.
        spec: The policy.
        experts: Which, by their position in the state.
        use_rtn_E: Of ``find_uncovered``.
        pool: As for ``find_uncovered``.
    """
    shape = (len(experts), *state.sum_EII.shape[1:])
    hessian_EII = torch.empty(shape, dtype=torch.float32, device=state.sum_EII.device)
    # Read at once: a number at a time makes a GPU wait for the host as often.
    weights, squares = _weights(state), state.weight_square_sum_E.tolist()
    mean_II = None if pool is None or spec.policy != "shrink" else pool.sum_EII[0] / _weights(pool)[0]
    samples_of_pool = 0.0 if mean_II is None else spec.samples_of_pool(shape[-1])
    for hessian_II, expert in zip(hessian_EII, experts, strict=True):
        weight, square = weights[expert], squares[expert]
        samples = weight**2 / square if square else 0.0
        if mean_II is None:
            torch.div(state.sum_EII[expert], weight, out=hessian_II)
        elif samples + samples_of_pool == 0.0:
            hessian_II.copy_(mean_II)  # the limit for kappa to 0
        else:
            share = samples / (samples + samples_of_pool)
            hessian_II.copy_(torch.lerp(mean_II, state.sum_EII[expert] / weight, share))
    hessian_EII[use_rtn_E[list(experts)]] = torch.eye(shape[-1], device=hessian_EII.device)
    return hessian_EII


def regularize(state: HessianState, spec: CoverageSpec, names: Sequence[str]) -> tuple[Tensor, list[Fallback]]:
    """Hessians to solve with, float32 [E, I, I], and a record of each departure, for whole sites."""
    pool = pool_of(state) if len(state.num_tokens_E) > 1 else None
    use_rtn_E, fallbacks = find_uncovered(state, spec, names, pool)
    return hessians_to_solve(state, spec, range(len(names)), use_rtn_E, pool), fallbacks


def _weights(state: HessianState) -> list[float]:
    """Summed weight of the tokens of each expert, 1 where there is none to divide by."""
    return [weight or 1.0 for weight in state.weight_sum_E.tolist()]


def _records(
    state: HessianState, spec: CoverageSpec, names: Sequence[str], use_rtn_E: Tensor, *, pooled: bool
) -> list[Fallback]:
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
        elif not pooled:
            done = "solved with its own Hessian, as it has no peers to pool with"
        else:
            samples = spec.samples_of_pool(state.sum_EII.shape[-1])
            done = f"Hessian shrunk toward the block's pool with the weight of {samples:g} effective samples"
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
