"""Corpus mode of EBSS: likely sequences, resampled (sequential Monte Carlo) so that the *set* feeds every expert.

In the stochastic beam search branches part early and never exchange, so that balance only picks one of w finished
samples.  Here it acts all along, in two places, both scored by what the whole set is short of (finished sequences, and
running ones by the mean of their branches; ``moeq.sampling.shortage`` has the weights a_l^e):

1. Beginnings.  ``starts`` times as many beginnings of ``prefix_length`` tokens as sequences are drawn, from distinct
   first tokens; those are picked, one after the other, that complete the use of experts best.  This is what finds a
   rare domain: an expert that only it wakes is short, so the few beginnings that enter it are worth most, and are
   picked several times, each time to be continued by other draws.
2. Segments.  A picked beginning is continued by w branches, each an ordinary sample (temperature, top-p).  After every
   ``segment`` tokens the branches of a sequence compete: w of them are drawn, with replacement, with probabilities

       p_i  ~  exp( sum over the tokens t of the segment of  worth(t) / tau )     worth(t) = mean of a_l^e chosen by t

   (systematic resampling; sequential Monte Carlo for the target P(S) exp(sum_t worth(t) / tau)).  At the end the branch
   of the greatest worth stays.

Likelihood is not in the score, since every branch is a sample of the model and a likelier one is a duller one; nothing
is added to the logits, so each segment is text that the model wrote.  Rows depend on each other and on all finished
sequences: results are the same for the same seed, settings, batch and number of ranks.

Legend: M beginnings, N sequences, W branches, R = N * W rows, T tokens, V vocabulary, L blocks, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moeq.decoding.gumbel import draw_children, tempered
from moeq.sampling.ebss_spec import EBSSSpec, NextToken, Sampled
from moeq.sampling.shortage import pick, weights, worth


def search_corpus(
    next_token: NextToken,
    spec: EBSSSpec,
    num_sequences: int,
    first_tokens_M: Tensor,
    generator: torch.Generator,
    finished_LE: Tensor,
) -> Sampled:
    """Write ``num_sequences`` sequences that complete the use of experts by the finished ones.

    Args:
        next_token: The model.
        spec: Settings; ``num_sequences`` and ``seed`` are not read.
        num_sequences: N.
        first_tokens_M: int64, at least N, on the device of the model; one beginning is written from each.
        generator: On the CPU.
        finished_LE: Tokens that each expert has in the finished ones; broadcast, so a zero will do.

    Raises:
        ValueError: More branches than tokens in the vocabulary.
    """
    rows = _begin(next_token, spec, num_sequences, first_tokens_M, generator, finished_LE)
    spec.check_vocabulary(rows.next_log_prob_RV.shape[-1])
    decisions = []
    parent_R = torch.arange(num_sequences, device=first_tokens_M.device).repeat_interleave(spec.branches)
    starts = range(spec.prefix_length, spec.length, spec.segment)
    for length in starts:
        before = rows.take(parent_R)
        for _ in range(min(spec.segment, spec.length - length)):
            rows = _draw(next_token, spec, rows, parent_R, generator)
            parent_R = torch.arange(len(rows.ids_RT), device=parent_R.device)
        parent_R, decision_N3 = _compete(spec, before, rows, generator, finished_LE)
        decisions.append(decision_N3)
    return _best(spec, rows, torch.stack(decisions, 1), finished_LE)


@dataclass(frozen=True)
class _Rows:
    """Running rows; every token in ``ids_RT`` has been fed."""

    ids_RT: Tensor
    next_log_prob_RV: Tensor
    counts_RLE: Tensor
    log_prob_R: Tensor  # nats at temperature 1, float64

    def take(self, index_R: Tensor) -> "_Rows":
        """Rows by index; the log-probabilities stay behind, as they are not read."""
        return _Rows(
            self.ids_RT[index_R], self.next_log_prob_RV, self.counts_RLE[index_R], self.log_prob_R[index_R]
        )  # fmt: skip


def _draw(next_token: NextToken, spec: EBSSSpec, rows: _Rows, parent_R: Tensor, generator: torch.Generator) -> _Rows:
    """Row r becomes row ``parent_R[r]`` and one token that is drawn for it."""
    log_prob_RV = rows.next_log_prob_RV[parent_R]
    zeros_R = torch.zeros(len(parent_R), dtype=torch.float64, device=log_prob_RV.device)
    uniform_RC2 = torch.rand(len(parent_R), 1, 2, generator=generator, dtype=torch.float64).to(log_prob_RV.device)
    drawn = draw_children(tempered(log_prob_RV, spec.temperature, spec.top_p, 1), zeros_R, zeros_R, uniform_RC2)
    next_log_prob_RV, counts_RLE = next_token.step(parent_R, drawn.token_RC[:, 0])
    return _Rows(
        ids_RT=torch.cat([rows.ids_RT[parent_R], drawn.token_RC], 1),
        next_log_prob_RV=next_log_prob_RV,
        counts_RLE=rows.counts_RLE[parent_R] + counts_RLE,
        log_prob_R=rows.log_prob_R[parent_R] + log_prob_RV.gather(1, drawn.token_RC)[:, 0].double(),
    )


def _begin(
    next_token: NextToken, spec: EBSSSpec, num: int, first_tokens_M: Tensor, generator: torch.Generator,
    finished_LE: Tensor,
) -> _Rows:  # fmt: skip
    """Beginnings of ``prefix_length`` tokens from every first token; the ``num`` rows that the set needs most."""
    parts = []
    # As many at once as there are rows later on.
    for first_R in first_tokens_M.split(num * spec.branches):
        log_prob_RV, counts_RLE = next_token.prefill(first_R[:, None])
        zeros_R = torch.zeros(len(first_R), dtype=torch.float64, device=first_R.device)
        rows = _Rows(first_R[:, None], log_prob_RV, counts_RLE, zeros_R)
        for _ in range(spec.prefix_length - 1):
            rows = _draw(next_token, spec, rows, torch.arange(len(first_R), device=first_R.device), generator)
        parts.append(rows)
    counts_MLE = torch.cat([rows.counts_RLE for rows in parts])
    picked_N = torch.arange(num, device=first_tokens_M.device)
    if spec.balance:
        picked_N = pick(counts_MLE, num, finished_LE, spec.length / spec.prefix_length)
    ids_NT = torch.cat([rows.ids_RT for rows in parts])[picked_N]
    log_prob_N = torch.cat([rows.log_prob_R for rows in parts])[picked_N]
    next_log_prob_NV, counts_NLE = next_token.prefill(ids_NT)
    return _Rows(ids_NT, next_log_prob_NV, counts_NLE, log_prob_N)


def _compete(
    spec: EBSSSpec, before: _Rows, after: _Rows, generator: torch.Generator, finished_LE: Tensor
) -> tuple[Tensor, Tensor]:
    """Parents of the next segment [R], and the decision of each sequence as in ``Sampled.decisions_NS3``."""
    branches, num_tokens = spec.branches, after.ids_RT.shape[1] - before.ids_RT.shape[1]
    uniform_N1 = torch.rand(len(after.ids_RT) // branches, 1, generator=generator, dtype=torch.float64)
    uniform_N1 = uniform_N1.to(after.ids_RT.device)
    gain_NW = torch.zeros(len(uniform_N1), branches, dtype=torch.float64, device=uniform_N1.device)
    if spec.balance:
        weights_LE = weights(finished_LE + _running(after.counts_RLE, branches))
        worth_R = worth(after.counts_RLE - before.counts_RLE, weights_LE)
        gain_NW = (num_tokens * worth_R / spec.tau).unflatten(0, (-1, branches))
    child_NW = systematic(gain_NW.softmax(-1), uniform_N1)
    nll_NW = (before.log_prob_R - after.log_prob_R).unflatten(0, (-1, branches)) / num_tokens
    unchanged_W = torch.arange(branches, device=child_NW.device)
    decision_N3 = torch.stack(
        [
            (gain_NW.amax(1) - gain_NW.amin(1)) / num_tokens,
            nll_NW.amax(1) - nll_NW.amin(1),
            (child_NW != unchanged_W).any(1).double(),
        ],
        -1,
    )
    first_N1 = torch.arange(len(child_NW), device=child_NW.device).unsqueeze(1) * branches
    return (first_N1 + child_NW).flatten(), decision_N3.float()


def systematic(probability_NW: Tensor, uniform_N1: Tensor) -> Tensor:
    """W draws with replacement per sequence, int64 [N, W] increasing; branch w comes W p_w times, up or down."""
    branches = probability_NW.shape[1]
    point_NW = (uniform_N1 + torch.arange(branches, device=uniform_N1.device)) / branches
    return torch.searchsorted(probability_NW.cumsum(-1), point_NW, right=True).clamp(max=branches - 1)


def _running(counts_RLE: Tensor, branches: int) -> Tensor:
    """Use of the running sequences, each the mean of its branches, [L, E]."""
    return counts_RLE.unflatten(0, (-1, branches)).double().mean(1).sum(0)


def _best(spec: EBSSSpec, rows: _Rows, decisions_NS3: Tensor, finished_LE: Tensor) -> Sampled:
    """The branch of each sequence that is worth most to the set; any of them, so the first, without balance."""
    branches = spec.branches
    weights_LE = weights(finished_LE + _running(rows.counts_RLE, branches))
    best_N = worth(rows.counts_RLE, weights_LE).unflatten(0, (-1, branches)).argmax(-1)
    if not spec.balance:
        best_N = torch.zeros_like(best_N)
    best_N = best_N + torch.arange(len(best_N), device=best_N.device) * branches
    return Sampled(
        ids_NT=rows.ids_RT[best_N],
        nll_N=-rows.log_prob_R[best_N].float(),
        counts_NLE=rows.counts_RLE[best_N],
        decisions_NS3=decisions_NS3,
        redrawn_N=torch.zeros_like(best_N, dtype=torch.int32),
    )
