"""Language models small enough to enumerate: the next token and the experts depend on the last tokens by a table."""

import torch
from torch import Tensor


class TableNextToken:
    """Order-2 Markov model over V tokens; a token's experts depend on it and on the one before.

    Shapes: log_prob_VVV [before, last, next]; counts_VVLE [before, last, block, expert].
    """

    def __init__(self, vocabulary: int, generator: torch.Generator, *, sharpness: float = 1.0) -> None:
        shape = (vocabulary,) * 3
        self.log_prob_VVV = (sharpness * torch.randn(shape, generator=generator)).log_softmax(-1)
        one_hot = torch.eye(4, dtype=torch.int32)
        self.counts_VVLE = one_hot[torch.randint(4, (vocabulary, vocabulary, 2), generator=generator)]
        self.ids_NT = torch.empty(0, 0, dtype=torch.int64)
        self.num_steps = 0

    def prefill(self, ids_NT: Tensor) -> tuple[Tensor, Tensor]:
        self.ids_NT = ids_NT
        return self._next(), self.count(ids_NT)

    def step(self, parent_N: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
        self.num_steps += 1
        self.ids_NT = torch.cat([self.ids_NT[parent_N], token_N[:, None]], 1)
        return self._next(), self.counts_VVLE[self._before(self.ids_NT, -1), self.ids_NT[:, -1]]

    def _next(self) -> Tensor:
        return self.log_prob_VVV[self._before(self.ids_NT, -1), self.ids_NT[:, -1]]

    @staticmethod
    def _before(ids_NT: Tensor, t: int) -> Tensor:
        t = t % ids_NT.shape[1]
        return ids_NT[:, t - 1] if t else torch.zeros_like(ids_NT[:, 0])

    def count(self, ids_NT: Tensor) -> Tensor:
        """Experts of whole sequences, [N, L, E]."""
        per_token = [self.counts_VVLE[self._before(ids_NT, t), ids_NT[:, t]] for t in range(ids_NT.shape[1])]
        return torch.stack(per_token).sum(0)

    def log_likelihood(self, ids_NT: Tensor) -> Tensor:
        """Nats of all tokens but the first, float64 [N]."""
        terms = [
            self.log_prob_VVV[self._before(ids_NT, t), ids_NT[:, t], ids_NT[:, t + 1]].double()
            for t in range(ids_NT.shape[1] - 1)
        ]
        return torch.stack(terms).sum(0)
