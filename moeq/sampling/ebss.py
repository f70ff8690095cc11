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

import torch
from torch import Tensor

from moeq.decoding.gumbel import draw_children, tempered
from moeq.sampling.balance import imbalance
from moeq.sampling.ebss_spec import EBSSSpec, NextToken, Sampled, Usage

__all__ = ["EBSSSpec", "NextToken", "Sampled", "Usage", "draw_first_tokens", "search"]


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


def search(
    next_token: NextToken,
    spec: EBSSSpec,
    first_tokens_N: Tensor,
    generator: torch.Generator,
    finished: Usage | None = None,
) -> Sampled:
    """Grow every sequence from its first token, all branches of all sequences in one batch.

    Args:
        next_token: The model.
        spec: Settings; ``num_sequences`` and ``seed`` are not read, N and the draws come from the other arguments.
        first_tokens_N: int64, on the device of the model.
        generator: On the CPU; gives one seed to each sequence in order, so sequences 0..a in one call and a..b in the
            next are the same as 0..b in one.
        finished: What the sequences of earlier calls used; read with sigma of the corpus.

    Raises:
        ValueError: More branches than tokens in the vocabulary, or corpus mode, which is ``search_corpus``.
    """
    if spec.mode == "corpus":
        raise ValueError(f"mode ({spec.mode}) must be paper or stochastic in this search; call search_corpus")
    streams = _Streams(first_tokens_N.numel(), generator)
    state = _start(next_token, first_tokens_N)
    sigma = _Sigma(spec, finished)
    spec.check_vocabulary(state.next_log_prob_NWV.shape[-1])
    for length in range(2, spec.length + 1):
        in_prefix = length <= spec.prefix_length
        if length == spec.prefix_length + 1:
            # The phrase is given: draws are perturbed from here on.
            state = replace(state, tempered_NW=torch.zeros_like(state.tempered_NW))
        state = _extend(next_token, spec, state, 1 if in_prefix else spec.branches, streams, sigma)
    return _best(spec, state, sigma)


@dataclass(frozen=True)
class _State:
    """All branches of all sequences; every token in ``ids_NWT`` has been fed."""

    ids_NWT: Tensor
    next_log_prob_NWV: Tensor
    counts_NWLE: Tensor
    log_prob_NW: Tensor  # R_S at temperature 1, float64
    tempered_NW: Tensor  # log-probability at the temperature, since the branches parted
    perturbed_NW: Tensor  # G, a Gumbel variable around tempered_NW
    decisions_NS3: Tensor  # of the steps so far, as in Sampled


@dataclass(frozen=True)
class _Sigma:
    """Sigma of every branch, in the units and the scope of the settings."""

    spec: EBSSSpec
    finished: Usage | None

    def __call__(self, counts_NWLE: Tensor, length: int) -> Tensor:
        if self.spec.sigma_scope == "sequence":
            return imbalance(counts_NWLE, length, self.spec.sigma_units)
        # A branch among the others: of each other running sequence the mean of its branches.
        mean_NLE = counts_NWLE.float().mean(1)
        total_NWLE = counts_NWLE + (mean_NLE.sum(0) - mean_NLE).unsqueeze(1)
        num_tokens = len(counts_NWLE) * length
        if self.finished is not None:
            total_NWLE, num_tokens = total_NWLE + self.finished.counts_LE, num_tokens + self.finished.num_tokens
        return imbalance(total_NWLE, num_tokens, self.spec.sigma_units)


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
        first_tokens_N[:, None, None], log_prob_NV[:, None], counts_NLE[:, None], zeros_NW, zeros_NW, zeros_NW,
        zeros_NW.new_zeros(len(zeros_NW), 0, 3, dtype=torch.float32),
    )  # fmt: skip


def _extend(
    next_token: NextToken, spec: EBSSSpec, state: _State, keep: int, streams: _Streams, sigma: _Sigma
) -> _State:
    """One token more: ``keep`` candidates per branch, of which the ``keep`` cheapest per sequence are fed."""
    num_sequences, branches, length = state.ids_NWT.shape
    if spec.mode == "stochastic":
        found = _drawn(state, spec, streams.uniform(branches, keep, 2))
        likelihood_NWC = -found.perturbed_NWC / (length + 1)
    elif spec.prefix == "sampled" and length < spec.prefix_length:
        found = _drawn(state, spec, streams.uniform(branches, keep, 2))
        likelihood_NWC = -found.log_prob_NWC / (length + 1)
    else:
        found = _most_likely(state, keep)
        likelihood_NWC = -found.log_prob_NWC / (length + 1)
    cost_NWC, balance_NW = likelihood_NWC, None
    if spec.balance and branches > 1:
        balance_NW = sigma(state.counts_NWLE, length) / spec.tau
        cost_NWC = likelihood_NWC + balance_NW.unsqueeze(-1)
    # In the order of their parents, not of their cost: where every branch has one child, the cache stays as it is.
    chosen_NW = cost_NWC.flatten(1).topk(keep, largest=False).indices.sort().values
    decisions_NS3 = state.decisions_NS3
    if balance_NW is not None:
        decisions_NS3 = torch.cat([decisions_NS3, _decision(likelihood_NWC, balance_NW, chosen_NW)], 1)
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
        decisions_NS3=decisions_NS3,
    )


def _decision(likelihood_NWC: Tensor, balance_NW: Tensor, chosen_NW: Tensor) -> Tensor:
    """What the balance term did in one step, the columns of ``Sampled.decisions_NS3``, [N, 1, 3]."""
    best = likelihood_NWC.flatten(1).topk(chosen_NW.shape[1], largest=False)
    changed_N = (best.indices.sort().values != chosen_NW).any(1)
    likelihood_N = best.values.amax(1) - best.values.amin(1)
    return torch.stack([balance_NW.amax(1) - balance_NW.amin(1), likelihood_N, changed_N], -1).float().unsqueeze(1)


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
        tempered(log_prob_RV, spec.temperature, spec.top_p, spec.branches),
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


def _best(spec: EBSSSpec, state: _State, sigma: _Sigma) -> Sampled:
    """The cheapest branch of each sequence by equation 9: all tokens are fed, so no routing is missing."""
    length = state.ids_NWT.shape[-1]
    score_NW = state.log_prob_NW if spec.mode == "paper" else state.perturbed_NW
    cost_NW = -score_NW / length
    if spec.balance:
        cost_NW = cost_NW + sigma(state.counts_NWLE, length) / spec.tau
    best_N = cost_NW.argmin(-1)
    sequence_N = torch.arange(best_N.numel(), device=best_N.device)
    return Sampled(
        ids_NT=state.ids_NWT[sequence_N, best_N],
        nll_N=-state.log_prob_NW[sequence_N, best_N].float(),
        counts_NLE=state.counts_NWLE[sequence_N, best_N],
        decisions_NS3=state.decisions_NS3,
        redrawn_N=torch.zeros_like(best_N, dtype=torch.int32),
    )
