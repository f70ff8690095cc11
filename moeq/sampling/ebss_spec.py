"""Settings of EBSS, the model as its search sees it, and what a search returns.

The paper (MoEQuant, arXiv 2505.03804) leaves open, and these options decide; the defaults are its reading:

- ``sigma_units``: the usage u in sigma is the fraction of tokens that choose an expert, as its published values fit
  (``token_fraction``), or the share of routed slots, k times smaller (``slot_share``).
- ``sigma_scope``: sigma is that of the branch alone (``sequence``), as equation 9 writes M, S, or of all finished and
  running sequences with it (``corpus``), which hardly moves once many are finished.
- ``prefix``: the first tokens of paper mode are the most likely ones (``greedy``) or drawn (``sampled``); the authors
  name both.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from moeq.sampling.balance import Units

SamplingMode = Literal["paper", "stochastic", "corpus"]
SigmaScope = Literal["sequence", "corpus"]
PrefixKind = Literal["greedy", "sampled"]


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
        branches: Branches per sequence that the search keeps (w of the paper).
        tau: Divides the expert imbalance in the cost of a branch; a large tau is little balance.
        prefix_length: Tokens (the first one included) that are grown before the sequence branches.
        mode: "corpus" draws the text and steers the set as a whole toward experts that are still short
            (``moeq.sampling.corpus``); "paper" always takes the most likely tokens, and a small model then loops.
            "stochastic" draws each sequence and balances it for itself, a control of studies (with one branch it is
            plain sampling): at 8,192 tokens and 3 bits it leaves 0.0514 +- 0.0010 nats of divergence where corpus mode
            leaves 0.0486 +- 0.0008, and 47 effective samples of the least used expert where corpus mode has 313
            (benchmarks/results/ebss_balance.md).
        temperature: Of the drawing; 1 in paper mode.
        balance: False leaves the expert imbalance out of the cost.
        seed: Of first tokens and draws.
        top_p: Draw from the likeliest tokens with this probability in total (but at least w of them); 1 draws from all.
        sigma_units: Usage in sigma is the fraction of tokens (token_fraction) or of routed slots (slot_share); corpus
            mode has no sigma in its score.
        sigma_scope: Sigma of the branch (sequence) or of all sequences with it (corpus); not in corpus mode.
        prefix: First tokens of paper mode, greedy or sampled; the other modes draw them.
        starts: Beginnings per sequence that corpus mode writes, to go on with those that wake starved experts; more
            find rarer domains, at little cost.
        segment: Tokens after which the branches of a sequence compete, in corpus mode.
        min_tokens_per_expert: Corpus mode stops after a chunk with which every expert has that many effective tokens,
            after num_sequences at the latest; 0 writes them all.
    """

    num_sequences: int = 128
    length: int = 512
    branches: int = 4
    tau: float = 1.2
    prefix_length: int = 4
    mode: SamplingMode = "corpus"
    temperature: float = 1.0
    balance: bool = True
    seed: int = 0
    top_p: float = 1.0
    sigma_units: Units = "token_fraction"
    sigma_scope: SigmaScope = "sequence"
    prefix: PrefixKind = "greedy"
    starts: int = 32
    segment: int = 8
    min_tokens_per_expert: float = 0.0

    def __post_init__(self) -> None:
        for name, usual in {
            "num_sequences": 128,
            "branches": 4,
            "prefix_length": 4,
            "starts": 32,
            "segment": 8,
        }.items():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1; the usual value is {usual}")
        if self.length <= self.prefix_length:
            raise ValueError(
                f"length ({self.length}) must exceed prefix_length ({self.prefix_length}); the usual values are 512 "
                "and 4"
            )
        if not self.tau > 0:
            raise ValueError(f"tau ({self.tau}) must be positive; the usual value is 1.2 (balance: false turns it off)")
        self._check_drawing()

    def _check_drawing(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature ({self.temperature}) must be positive; the usual value is 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be above 0 and at most 1; the usual values are 0.95 and 1")
        for name in ("temperature", "top_p"):
            if self.mode == "paper" and getattr(self, name) != 1:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be 1 in paper mode, which draws nothing; "
                    "choose mode stochastic"
                )
        if self.mode != "corpus" and self.min_tokens_per_expert:
            raise ValueError(
                f"min_tokens_per_expert ({self.min_tokens_per_expert}) must be 0 in {self.mode} mode, which writes "
                f"num_sequences ({self.num_sequences}); choose mode corpus"
            )
        if self.min_tokens_per_expert < 0:
            raise ValueError(f"min_tokens_per_expert ({self.min_tokens_per_expert}) must be at least 0; 0 turns it off")

    def check_vocabulary(self, num_tokens: int) -> None:
        """Raise ValueError where there are more branches than tokens that could tell them apart."""
        if self.branches > num_tokens:
            raise ValueError(f"branches ({self.branches}) must not exceed the vocabulary ({num_tokens}); choose 4")

    @property
    def sequential(self) -> bool:
        """True where a chunk of sequences depends on those finished before it."""
        return self.mode == "corpus" or self.sigma_scope == "corpus"


@dataclass(frozen=True)
class Usage:
    """Experts that finished sequences used: tokens of each expert, [L, E], and how many tokens there were."""

    counts_LE: Tensor
    num_tokens: int


@dataclass(frozen=True)
class Sampled:
    """The sequences that a search returns.

    Attributes:
        ids_NT: int64 token ids.
        nll_N: float32 nats under the model at temperature 1, summed over all tokens but the first.
        counts_NLE: int32 tokens of each sequence that chose each expert; its last token counts too.
        decisions_NS3: float32, for each of the S steps (corpus mode: segments) in which branches compete: range over
            the branches of the balance term (sigma / tau), range over the best candidates of the likelihood term (nats
            per token), 1 where the balance term changed what was kept.  Without that term S is 0, or it is zeros.
        redrawn_N: int32 degenerate sequences that were drawn in its place before it.
    """

    ids_NT: Tensor
    nll_N: Tensor
    counts_NLE: Tensor
    decisions_NS3: Tensor
    redrawn_N: Tensor
