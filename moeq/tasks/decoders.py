"""Next-token logits of many rows that grow by a token each, with the model's own cache or without one.

With a cache, prompts are padded on the left; positions count a row's own tokens, so padding changes no number but by
rounding.  Tokens that all prompts begin with are computed once, as one row, and the cache is expanded; the padding then
stands between the shared tokens and the rest of a row.  Attention does not see it there, but a window counts it and a
recurrence runs over it, so that is done only where every layer of the cache is plain attention.

Not every family of transformers can do this (5.23): some caches raise, some give other numbers, some forget the padding
after the prefill.  ``examine`` finds out on the model itself, and names the first of these ways that gives what the
model says of each row alone:

    cached, any lengths  ->  cached, equal lengths  ->  uncached, any lengths  ->  uncached, equal lengths

The last is right by definition, and costs a forward pass of the whole text per token.

Legend: R rows, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Protocol

import torch
from torch import Tensor

from moeq.calibration.cache import GrowingCache, grow_in_place
from moeq.calibration.next_token import reorder_cache

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
    """How a model can be decoded.

    Attributes:
        cached: With its cache.
        any_lengths: Rows of different lengths in one batch.
        shared_prefix: Tokens that all prompts begin with are computed once.
        reason: Why not the fastest way; empty where it is.
    """

    cached: bool = True
    any_lengths: bool = True
    shared_prefix: bool = False
    reason: str = ""


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
        shared_prefix: Tokens that all prompts begin with are computed once.
    """

    def __init__(self, model: Any, *, shared_prefix: bool = False) -> None:
        self._model, self._shared_prefix = model, shared_prefix
        self._device = model.get_input_embeddings().weight.device
        self.cache: Any = None
        self._length_R = self._mask_RT = torch.empty(0)

    @property
    def is_plain(self) -> bool:
        """Whether every layer of the cache is plain attention, which does not mind padding in the middle of a row."""
        return isinstance(self.cache, GrowingCache) and self.cache.num_in_place == len(self.cache.layers)

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Begin with these rows."""
        self.cache = None
        num_shared = _num_shared(prompts) if self._shared_prefix else 0
        if num_shared:
            ids_1T = torch.tensor([prompts[0][:num_shared]], device=self._device)
            self._forward(ids_1T, torch.ones_like(ids_1T), torch.arange(num_shared, device=self._device)[None])
            reorder_cache(self.cache, torch.zeros(len(prompts), dtype=torch.int64, device=self._device))
        ids_RT, mask_RT = (x.to(self._device) for x in pad_left([prompt[num_shared:] for prompt in prompts]))
        self._mask_RT = torch.cat([mask_RT.new_ones(len(prompts), num_shared), mask_RT], 1)
        self._length_R = self._mask_RT.sum(1)
        positions_RT = (num_shared + mask_RT.cumsum(1) - 1).clamp_(min=0)
        logits_RV = self._forward(ids_RT, self._mask_RT, positions_RT)
        self.cache = grow_in_place(self.cache, len(prompts))
        return logits_RV

    def select(self, index_R: Tensor) -> None:
        """Row r becomes old row ``index_R[r]``."""
        index_R = index_R.to(self._device)
        reorder_cache(self.cache, index_R)
        self._mask_RT, self._length_R = self._mask_RT[index_R], self._length_R[index_R]

    def step(self, token_R: Tensor) -> Tensor:
        """Append a token to each row."""
        self._mask_RT = torch.cat([self._mask_RT, self._mask_RT.new_ones(len(self._mask_RT), 1)], 1)
        position_R = self._length_R
        self._length_R = self._length_R + 1
        return self._forward(token_R.to(self._device)[:, None], self._mask_RT, position_R[:, None])

    @torch.no_grad()
    def _forward(self, ids_RT: Tensor, mask_RT: Tensor, positions_RT: Tensor) -> Tensor:
        output = self._model(
            input_ids=ids_RT,
            attention_mask=mask_RT,
            position_ids=positions_RT,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        return output.logits[:, -1]


class UncachedDecoder:
    """Every step runs the rows again from their beginning; padding is on the right, where no token sees it.

    Args:
        model: A causal LM in eval mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = model.get_input_embeddings().weight.device
        self._rows: list[list[int]] = []

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Begin with these rows."""
        self._rows = [list(prompt) for prompt in prompts]
        return self._forward()

    def select(self, index_R: Tensor) -> None:
        """Row r becomes old row ``index_R[r]``."""
        self._rows = [list(self._rows[index]) for index in index_R.tolist()]

    def step(self, token_R: Tensor) -> Tensor:
        """Append a token to each row."""
        for row, token in zip(self._rows, token_R.tolist(), strict=True):
            row.append(token)
        return self._forward()

    @torch.no_grad()
    def _forward(self) -> Tensor:
        longest = max(len(row) for row in self._rows)
        ids_RT = torch.tensor([row + [0] * (longest - len(row)) for row in self._rows], device=self._device)
        last_R = torch.tensor([len(row) - 1 for row in self._rows], device=self._device)
        kept, place_R = last_R.unique(return_inverse=True)
        logits_RKV = self._model(input_ids=ids_RT, use_cache=False, logits_to_keep=kept).logits
        return logits_RKV[torch.arange(len(self._rows), device=self._device), place_R]


def make_decoder(model: Any, decoding: Decoding) -> Decoder:
    """The decoder of one way of decoding."""
    return CachedDecoder(model, shared_prefix=decoding.shared_prefix) if decoding.cached else UncachedDecoder(model)


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
    shortest = min(len(piece) for piece in pieces)
    # Of the weights: logits may come in float32 from a coarse model.
    rounding = _ROUNDING.get(model.get_input_embeddings().weight.dtype, _COARSE_ROUNDING)
    complaints = []
    for decoding in (Decoding(), Decoding(any_lengths=False), Decoding(cached=False)):
        rows = pieces if decoding.any_lengths else [piece[-shortest:] for piece in pieces]
        expected_SRV = torch.cat([_trace(UncachedDecoder(model), [row]) for row in rows], 1)
        decoder = make_decoder(model, decoding)
        try:
            difference = _difference(_trace(decoder, rows), expected_SRV)
        except Exception as error:  # whatever a family's code raises: the next way may do
            complaints.append(f"{_way(decoding)} raises {type(error).__name__}: {str(error)[:120]}")
            continue
        if difference <= rounding:
            plain = decoding.any_lengths and isinstance(decoder, CachedDecoder) and decoder.is_plain
            return replace(decoding, shared_prefix=plain, reason="; ".join(complaints))
        complaints.append(f"{_way(decoding)} gives other logits (by {difference:.2g} of their spread)")
    return Decoding(cached=False, any_lengths=False, reason="; ".join(complaints))


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


def _num_shared(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, each keeping one of its own; 0 where a pass of their own does not pay."""
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return shared if shared >= _LEAST_SHARED and len(prompts) > 1 else 0


def _way(decoding: Decoding) -> str:
    lengths = "any lengths" if decoding.any_lengths else "equal lengths"
    return f"decoding {'with' if decoding.cached else 'without'} its cache, {lengths},"
