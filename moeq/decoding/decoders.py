"""Next-token logits of many rows that grow by a token each, with the model's own cache or without one.

With a cache, rows of any lengths share a batch.  Positions count a row's own tokens and a mask hides the padding, so it
changes no number but by rounding.  Where it stands depends on the cache:

- every layer plain attention: behind the prompt, in the middle of the row.  Causal attention needs no mask then until
  the first new token, which is the fast path of every kernel; tokens that all prompts begin with are computed once, as
  one row, and the cache is expanded;
- else in front of the prompt, since a sliding window would count padding in the middle of a row and a recurrence would
  run over it.

Not every family of transformers can do all this (5.23): some caches raise, some give other numbers, some forget the
padding after the prefill.  ``examine`` finds out on the model itself, and names the first way that gives what the model
says of each row alone: padding behind, padding in front, rows of equal length, no cache (which is right by definition,
and costs a forward pass of the whole text per token).

Legend: R rows, T tokens, S steps, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from moeq.decoding.cache import GrowingCache, grow_in_place
from moeq.decoding.decode_attention import decoding as decode_attention
from moeq.decoding.reorder import reorder_cache

Way = Literal["padding behind", "padding in front", "equal lengths", "no cache"]

# Fewer shared tokens cost less inside of every row than in a forward pass of their own.
_LEAST_SHARED = 16
# Largest difference of logits, in standard deviations of them, that is rounding (root mean square over V).  In tiny
# models wrong caches are off by 0.2 to 4, right ones by 4e-6 in float32 and 0.02 in bfloat16 (deep models: more).
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
_COARSE_ROUNDING = 0.3
_PROBE_LENGTHS = (4, 12, 8)
_PROBE_STEPS = 2


@dataclass(frozen=True)
class Decoding:
    """How a model is decoded.

    Attributes:
        way: "padding in front" is right for most models, "padding behind" faster for plain attention.  Rows have to be
            of equal length for the other two.
        reason: Why it is a slower way than those; empty where it is not.
    """

    way: Way = "padding in front"
    reason: str = ""

    @property
    def any_lengths(self) -> bool:
        """Whether rows of different lengths can share a batch."""
        return self.way.startswith("padding")


class Decoder(Protocol):
    """Rows of text and the model's logits after each."""

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Begin with these rows, none of them empty: logits_RV."""

    def select(self, index_R: Tensor) -> None:
        """Row r becomes old row ``index_R[r]``; rows may repeat, and their number may change."""

    def step(self, token_R: Tensor) -> Tensor:
        """Append a token to each row: logits_RV."""


class CachedDecoder:
    """With the model's cache, whose plain layers grow in place.

    Args:
        model: A causal LM in eval mode.
        padding_behind: Where padding stands; only for a cache that ``is_plain``.
    """

    def __init__(self, model: Any, *, padding_behind: bool = False) -> None:
        self._model, self._padding_behind = model, padding_behind
        self._device = model.get_input_embeddings().weight.device
        self._cache: Any = None
        self._length_R = self._mask_RT = torch.empty(0)

    @property
    def is_plain(self) -> bool:
        """Whether every layer of the cache is plain attention, which does not mind padding in the middle of a row."""
        return isinstance(self._cache, GrowingCache) and self._cache.num_in_place == len(self._cache.layers)

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Begin with these rows."""
        self._cache = None
        if self._padding_behind:
            self._fill([prompt[:-1] for prompt in prompts])
            logits_RV = self.step(torch.tensor([prompt[-1] for prompt in prompts]))
        else:
            ids_RT, self._mask_RT = (x.to(self._device) for x in pad_left(prompts))
            self._length_R = self._mask_RT.sum(1)
            logits_RV = self._forward(ids_RT, (self._mask_RT.cumsum(1) - 1).clamp_(min=0), self._mask_RT)
        self._cache = grow_in_place(self._cache, len(prompts))
        return logits_RV

    def select(self, index_R: Tensor) -> None:
        """Row r becomes old row ``index_R[r]``."""
        index_R = index_R.to(self._device)
        reorder_cache(self._cache, index_R)
        self._mask_RT, self._length_R = self._mask_RT[index_R], self._length_R[index_R]

    def step(self, token_R: Tensor) -> Tensor:
        """Append a token to each row."""
        self._mask_RT = torch.cat([self._mask_RT, self._mask_RT.new_ones(len(self._mask_RT), 1)], 1)
        position_R = self._length_R
        self._length_R = self._length_R + 1
        return self._forward(token_R.to(self._device)[:, None], position_R[:, None], self._mask_RT)

    def _fill(self, rows: Sequence[Sequence[int]]) -> None:
        """Put rows, some of which may be empty, into the cache, the padding behind them."""
        num_shared = _num_shared(rows)
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        column_T = torch.arange(longest, device=self._device)
        self._length_R = torch.tensor(lengths, device=self._device)
        self._mask_RT = (column_T < self._length_R[:, None]).to(torch.int64)
        if num_shared:
            self._forward(torch.tensor([rows[0][:num_shared]], device=self._device), column_T[None, :num_shared])
            reorder_cache(self._cache, torch.zeros(len(rows), dtype=torch.int64, device=self._device))
        if longest > num_shared:
            ids_RT = torch.tensor([[*row, *[0] * (longest - len(row))][num_shared:] for row in rows])
            self._forward(ids_RT.to(self._device), column_T[num_shared:].expand(len(rows), -1))

    @torch.no_grad()
    def _forward(self, ids_RT: Tensor, positions_RT: Tensor, mask_RT: Tensor | None = None) -> Tensor:
        output = self._model(
            input_ids=ids_RT,
            attention_mask=mask_RT,
            position_ids=positions_RT,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        return output.logits[:, -1]


class UncachedDecoder:
    """Every step runs the rows, which are of one length, again from their beginning.

    Args:
        model: A causal LM in eval mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = model.get_input_embeddings().weight.device
        self._ids_RT = torch.empty(0)

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Begin with these rows."""
        self._ids_RT = torch.tensor([list(prompt) for prompt in prompts], device=self._device)
        return self._forward()

    def select(self, index_R: Tensor) -> None:
        """Row r becomes old row ``index_R[r]``."""
        self._ids_RT = self._ids_RT[index_R.to(self._device)]

    def step(self, token_R: Tensor) -> Tensor:
        """Append a token to each row."""
        self._ids_RT = torch.cat([self._ids_RT, token_R.to(self._device)[:, None]], 1)
        return self._forward()

    @torch.no_grad()
    def _forward(self) -> Tensor:
        return self._model(input_ids=self._ids_RT, use_cache=False, logits_to_keep=1).logits[:, -1]


def make_decoder(model: Any, decoding: Decoding) -> Decoder:
    """The decoder of one way of decoding."""
    if decoding.way == "no cache":
        return UncachedDecoder(model)
    return CachedDecoder(model, padding_behind=decoding.way == "padding behind")


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """int64 (ids_RT, mask_RT) of prompts of any lengths, padded on the left with token 0."""
    longest = max(len(prompt) for prompt in prompts)
    ids_RT = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask_RT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids_RT, mask_RT


def examine(model: Any, prompts: Sequence[Sequence[int]]) -> Decoding:
    """The fastest way to decode a model that gives the logits it gives without a cache, one row at a time.

    Args:
        model: A causal LM in eval mode.
        prompts: Some of the real ones; short pieces of them are decoded.
    """
    pieces = [list(prompts[i % len(prompts)][-n:]) for i, n in enumerate(_PROBE_LENGTHS)]
    equal = [piece[-min(map(len, pieces)) :] for piece in pieces]
    # Of the weights: logits may come in float32 from a coarse model.
    rounding = _ROUNDING.get(model.get_input_embeddings().weight.dtype, _COARSE_ROUNDING)
    complaints: list[str] = []
    for decoding in (Decoding("padding behind"), Decoding("padding in front"), Decoding("equal lengths")):
        rows = pieces if decoding.any_lengths else equal
        decoder = CachedDecoder(model, padding_behind=decoding.way == "padding behind")
        complaint = ""
        try:
            with decode_attention(model):
                trace_SRV = _trace(decoder, rows)
        except Exception as error:  # whatever a family's code raises: the next way may do
            complaint = f"raises {type(error).__name__}: {str(error)[:120]}"
        else:
            difference = _difference(trace_SRV, torch.cat([_trace(UncachedDecoder(model), [row]) for row in rows], 1))
            if difference > rounding:
                complaint = f"gives other logits (by {difference:.2g} of their spread)"
        if decoding.way == "padding behind" and not decoder.is_plain:
            continue  # not for this model, whatever it gave
        if not complaint:
            return replace(decoding, reason="; ".join(complaints))
        complaints.append(f"its cache with {decoding.way} {complaint}")
    return Decoding("no cache", "; ".join(complaints))


def _trace(decoder: Decoder, rows: Sequence[Sequence[int]]) -> Tensor:
    """Logits_SRV of the start and of steps that append tokens of the rows, which change places in the decoder."""
    logits = [decoder.start(rows)]
    order_R = torch.arange(len(rows)).roll(1)
    decoder.select(order_R)
    for step in range(_PROBE_STEPS):
        token_R = torch.tensor([row[step % len(row)] for row in rows])
        logits.append(decoder.step(token_R[order_R])[order_R.argsort().to(logits[0].device)])
    return torch.stack(logits)


def _difference(logits_SRV: Tensor, expected_SRV: Tensor) -> float:
    """Largest root mean square error of a position's logits, relative to their spread; inf where not finite."""
    error_SR = (logits_SRV.float() - expected_SRV.float()).square().mean(-1).sqrt()
    return float((error_SR / expected_SRV.float().std(-1)).nan_to_num(torch.inf).max())


def _num_shared(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that all rows begin with; 0 where a forward pass of their own does not pay."""
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))
    return shared if shared >= _LEAST_SHARED and len(rows) > 1 else 0
