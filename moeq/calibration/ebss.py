"""Expert-Balanced Self-Sampling (EBSS): a model writes its own calibration sequences, and writes them balanced.

Per sequence, w branches are kept.  Every branch S (l tokens, all of them routed already) offers extensions v at a cost

    cost(S v) = -(R_S + log P(v | S)) / (l + 1) + sigma(M, S) / tau       R_S = sum_i log P(S_i | S_<i)

(MoEQuant, arXiv 2505.03804, equations 11 and 13, with the log that equation 12 forgot), and the w *smallest* of them
survive (equation 14 prints "maximise", over a cost).  Sigma is that of S without v, whose routing is known only after
v was fed ("deferred imbalance", section 4.2 of the paper), so it re-ranks branches and never the tokens of a branch;
at most w children of one branch can survive, hence the top w of each branch and then the top w of those w*w is exact.
The first token is given; a phrase of ``prefix_length`` tokens is grown from it by one branch (so without any balance
term), then one branch becomes w distinct ones.  At the full length the last tokens are fed too, and the branch with the
least cost of equation 9, -R_S / l + sigma(M, S) / tau, is returned.

``mode="paper"`` takes the most likely tokens, and a small model then writes loops.  ``mode="stochastic"`` (ours) is
stochastic beam search (Kool, van Hoof and Welling 2019): R_S + log P is replaced by the perturbed log-probability G of
the branch, a Gumbel variable whose maximum over children is the G of their parent.  Without the balance term the best
branch is then one exact ancestral sample at the temperature, and the w branches are w samples without replacement;
with it, balance chooses among them.  The branches part in their first steps and hardly ever exchange afterwards (G of a
second child lies near log P of its whole branch, far below that of a first one), so this is a choice of the best of w
samples, at the cost of w; in paper mode branches replace each other at most steps.

Sequences go on past end-of-text tokens: documents flow into each other, as in the windows of a text.  Every sequence
has a random stream of its own, so results do not depend on which sequences share a batch, up to the arithmetic of the
model.  Legend: N sequences, W branches, C candidates of a branch, T tokens, V vocabulary, L blocks, E experts.
"""

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from moeq.calibration.balance import imbalance
from moeq.calibration.gumbel import draw_children

Mode = Literal["paper", "stochastic"]


class NextToken(Protocol):
    """A language model as the search sees it; rows are branches."""

    def prefill(self, ids_NT: Tensor) -> tuple[Tensor, Tensor]:
        """Start N rows; returns float32 log P(next) [N, V] and the experts that all T tokens chose, [N, L, E]."""
        ...

    def step(self, parent_N: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
        """Row n becomes old row ``parent_N[n]`` plus a token; returns log P(next) and the counts of that token."""
        ...


@dataclass(frozen=True)
class EBSSSpec:
    """Settings of the search; defaults are the paper's, except the mode.

    Attributes:
        num_sequences: Sequences to write.
        length: Tokens of each, the first one included.
        branches: w, branches per sequence.
        tau: Divides the imbalance in the cost; a large tau is no balance.
        prefix_length: Tokens (the first one included) that are grown before the sequence branches.
        mode: ``paper`` keeps the most likely extensions, ``stochastic`` draws them.
        temperature: Of the drawing; 1 in paper mode.
        balance: False leaves the imbalance term out.
        seed: Of first tokens and draws.
    """

    num_sequences: int = 128
    length: int = 512
    branches: int = 4
    tau: float = 1.2
    prefix_length: int = 4
    mode: Mode = "stochastic"
    temperature: float = 1.0
    balance: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, usual in {"num_sequences": 128, "branches": 4, "prefix_length": 4}.items():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1; the usual value is {usual}")
        if self.length <= self.prefix_length:
            raise ValueError(
                f"length ({self.length}) must exceed prefix_length ({self.prefix_length}); the usual values are 512 "
                "and 4"
            )
        if not self.tau > 0:
            raise ValueError(f"tau ({self.tau}) must be positive; the usual value is 1.2 (balance: false turns it off)")
        if not self.temperature > 0:
            raise ValueError(f"temperature ({self.temperature}) must be positive; the usual value is 1")
        if self.mode == "paper" and self.temperature != 1:
            raise ValueError(
                f"temperature ({self.temperature}) must be 1 in paper mode, which draws nothing; choose mode stochastic"
            )


@dataclass(frozen=True)
class Sampled:
    """The sequences that a search returns.

    Attributes:
        ids_NT: int64 token ids.
        nll_N: float32 nats under the model at temperature 1, summed over all tokens but the first.
        counts_NLE: int32 tokens of each sequence that chose each expert; its last token counts too.
    """

    ids_NT: Tensor
    nll_N: Tensor
    counts_NLE: Tensor


def draw_first_tokens(candidates_V: Tensor, num_sequences: int, generator: torch.Generator) -> Tensor:
    """Distinct random first tokens, int64 [N], uniform over the candidate ids.

    Raises:
        ValueError: There are fewer candidates than sequences.
    """
    if num_sequences > candidates_V.numel():
        raise ValueError(
            f"num_sequences ({num_sequences}) must not exceed the {candidates_V.numel()} tokens that a sequence can "
            "start with, since first tokens are distinct; choose fewer, longer sequences"
        )
    return candidates_V[torch.randperm(candidates_V.numel(), generator=generator)[:num_sequences]]


def search(next_token: NextToken, spec: EBSSSpec, first_tokens_N: Tensor, generator: torch.Generator) -> Sampled:
    """Grow every sequence from its first token, all branches of all sequences in one batch.

    Args:
        next_token: The model.
        spec: Settings; ``num_sequences`` and ``seed`` are not read, N and the draws come from the other arguments.
        first_tokens_N: int64, on the device of the model.
        generator: On the CPU; gives one seed to each sequence in order, so sequences 0..a in one call and a..b in the
            next are the same as 0..b in one.

    Raises:
        ValueError: More branches than tokens in the vocabulary.
    """
    streams = _Streams(first_tokens_N.numel(), generator)
    state = _start(next_token, first_tokens_N)
    if spec.branches > state.next_log_prob_NWV.shape[-1]:
        raise ValueError(
            f"branches ({spec.branches}) must not exceed the vocabulary ({state.next_log_prob_NWV.shape[-1]}); choose 4"
        )
    for length in range(2, spec.length + 1):
        in_prefix = length <= spec.prefix_length
        if length == spec.prefix_length + 1:
            # The phrase is given: draws are perturbed from here on.
            state = replace(state, tempered_NW=torch.zeros_like(state.tempered_NW))
        state = _extend(next_token, spec, state, 1 if in_prefix else spec.branches, streams)
    return _best(spec, state)


@dataclass(frozen=True)
class _State:
    """All branches of all sequences; every token in ``ids_NWT`` has been fed."""

    ids_NWT: Tensor
    next_log_prob_NWV: Tensor
    counts_NWLE: Tensor
    log_prob_NW: Tensor  # R_S at temperature 1, float64
    tempered_NW: Tensor  # log-probability at the temperature, since the branches parted
    perturbed_NW: Tensor  # G, a Gumbel variable around tempered_NW


@dataclass(frozen=True)
class _Candidates:
    token_NWC: Tensor
    log_prob_NWC: Tensor
    tempered_NWC: Tensor
    perturbed_NWC: Tensor


class _Streams:
    """One CPU generator per sequence."""

    def __init__(self, num_sequences: int, generator: torch.Generator) -> None:
        seeds = torch.randint(2**62, (num_sequences,), generator=generator).tolist()
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform(self, *shape: int) -> Tensor:
        """float64 in [0, 1) of shape [N, *shape]."""
        return torch.stack([torch.rand(shape, generator=g, dtype=torch.float64) for g in self._generators])


def _start(next_token: NextToken, first_tokens_N: Tensor) -> _State:
    log_prob_NV, counts_NLE = next_token.prefill(first_tokens_N[:, None])
    zeros_NW = torch.zeros(first_tokens_N.numel(), 1, dtype=torch.float64, device=first_tokens_N.device)
    return _State(
        first_tokens_N[:, None, None], log_prob_NV[:, None], counts_NLE[:, None], zeros_NW, zeros_NW, zeros_NW
    )


def _extend(next_token: NextToken, spec: EBSSSpec, state: _State, keep: int, streams: _Streams) -> _State:
    """One token more: ``keep`` candidates per branch, of which the ``keep`` cheapest per sequence are fed."""
    num_sequences, branches, length = state.ids_NWT.shape
    if spec.mode == "paper":
        found = _most_likely(state, keep)
        cost_NWC = -found.log_prob_NWC / (length + 1)
    else:
        found = _drawn(state, spec, streams.uniform(branches, keep, 2))
        cost_NWC = -found.perturbed_NWC / (length + 1)
    if spec.balance and branches > 1:
        cost_NWC = cost_NWC + imbalance(state.counts_NWLE, length).unsqueeze(-1) / spec.tau
    # In the order of their parents, not of their cost: where every branch has one child, the cache stays as it is.
    chosen_NW = cost_NWC.flatten(1).topk(keep, largest=False).indices.sort().values
    sequence_N1 = torch.arange(num_sequences, device=chosen_NW.device).unsqueeze(1)
    parent_NW = sequence_N1 * branches + chosen_NW // keep
    token_NW = found.token_NWC.flatten(1).gather(1, chosen_NW)
    log_prob, counts = next_token.step(parent_NW.flatten(), token_NW.flatten())
    counts_NWLE = state.counts_NWLE.flatten(0, 1)[parent_NW] + counts.unflatten(0, (num_sequences, keep))
    return _State(
        ids_NWT=torch.cat([state.ids_NWT.flatten(0, 1)[parent_NW], token_NW.unsqueeze(-1)], -1),
        next_log_prob_NWV=log_prob.unflatten(0, (num_sequences, keep)),
        counts_NWLE=counts_NWLE,
        log_prob_NW=found.log_prob_NWC.flatten(1).gather(1, chosen_NW),
        tempered_NW=found.tempered_NWC.flatten(1).gather(1, chosen_NW),
        perturbed_NW=found.perturbed_NWC.flatten(1).gather(1, chosen_NW),
    )


def _most_likely(state: _State, num: int) -> _Candidates:
    if num == 1:  # max gives the first of equal values, as greedy decoding does; topk gives any of them
        log_prob_NWC, token_NWC = state.next_log_prob_NWV.max(-1, keepdim=True)
    else:
        log_prob_NWC, token_NWC = state.next_log_prob_NWV.topk(num, dim=-1)
    log_prob_NWC = state.log_prob_NW.unsqueeze(-1) + log_prob_NWC
    return _Candidates(token_NWC, log_prob_NWC, log_prob_NWC, log_prob_NWC)


def _drawn(state: _State, spec: EBSSSpec, uniform_NWC2: Tensor) -> _Candidates:
    num_sequences, branches, _ = state.ids_NWT.shape
    log_prob_RV = state.next_log_prob_NWV.flatten(0, 1)
    children = draw_children(
        log_prob_RV if spec.temperature == 1 else (log_prob_RV / spec.temperature).log_softmax(-1),
        state.tempered_NW.flatten(),
        state.perturbed_NW.flatten(),
        uniform_NWC2.to(log_prob_RV.device).flatten(0, 1),
    )
    token_NWC = children.token_RC.unflatten(0, (num_sequences, branches))
    return _Candidates(
        token_NWC=token_NWC,
        log_prob_NWC=state.log_prob_NW.unsqueeze(-1) + state.next_log_prob_NWV.gather(-1, token_NWC),
        tempered_NWC=state.tempered_NW.unsqueeze(-1) + children.log_prob_RC.unflatten(0, (num_sequences, branches)),
        perturbed_NWC=children.perturbed_RC.unflatten(0, (num_sequences, branches)),
    )


def _best(spec: EBSSSpec, state: _State) -> Sampled:
    """The cheapest branch of each sequence by equation 9: all tokens are fed, so no routing is missing."""
    length = state.ids_NWT.shape[-1]
    score_NW = state.log_prob_NW if spec.mode == "paper" else state.perturbed_NW
    cost_NW = -score_NW / length
    if spec.balance:
        cost_NW = cost_NW + imbalance(state.counts_NWLE, length) / spec.tau
    best_N = cost_NW.argmin(-1)
    sequence_N = torch.arange(best_N.numel(), device=best_N.device)
    return Sampled(
        ids_NT=state.ids_NWT[sequence_N, best_N],
        nll_N=-state.log_prob_NW[sequence_N, best_N].float(),
        counts_NLE=state.counts_NWLE[sequence_N, best_N],
    )
