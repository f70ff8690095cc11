"""Log-likelihoods of continuations: the passes of a plan, and what they say of each request.

    log P(continuation | context) = sum_j log softmax(logits at the token before token j)[token j]

with the softmax in float32 and the sum in float64.  The output head runs on the positions that predict something and on
no others, and no [tokens, vocabulary] tensor of the rest ever exists.

Shapes: B rows of a pass, L its columns, P columns of the pass before, K positions whose logits are computed, D hidden,
V vocabulary, N predicted tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeq.decoding.reorder import reorder_cache
from moeq.kernels.onednn import linears_by_onednn
from moeq.scoring.forward_plan import IGNORED, Plan, Segment
from moeq.scoring.perplexity import CHUNK_TOKENS
from moeq.tasks.task import Outcome


@dataclass(frozen=True)
class Scored:
    """What a model says of a plan.

    Attributes:
        plan: The plan that was run.
        logits_KV: In the dtype of the model, at the positions that were read; several tokens may be predicted from one.
    """

    plan: Plan
    logits_KV: Tensor

    @property
    def logits_NV(self) -> Tensor:
        """Logits at the position that predicts token n: a copy, unless each position predicts one, in order."""
        source_N = self.plan.source_N
        in_order = torch.equal(source_N, torch.arange(len(self.logits_KV)))
        return self.logits_KV if in_order else self.logits_KV[source_N.to(self.logits_KV.device)]


@torch.no_grad()
def run_plan(model: Any, plan: Plan) -> Scored:
    """The passes of a plan, on the device of the model's embeddings; everything in the result is there."""
    device = model.get_input_embeddings().weight.device
    logits: list[Tensor] = []
    cache, past = None, None
    with linears_by_onednn(model):
        for segment in plan.segments:
            is_last = segment is plan.segments[-1]
            inputs: dict[str, Any] = pass_inputs(model, segment, past)
            if past is not None and segment.parent_B is not None:
                reorder_cache(cache, segment.parent_B.to(device))
                inputs["past_key_values"] = cache
            logits_KV, output = run_pass(model, segment, use_cache=not is_last or past is not None, **inputs)
            cache = None if is_last else output.past_key_values
            logits.append(logits_KV)
            past = segment
    logits_KV = torch.cat(logits) if len(logits) > 1 else logits[0] if logits else torch.empty(0, 1, device=device)
    return Scored(plan, logits_KV)


@torch.no_grad()
def outcomes(scored: Scored, num_requests: int) -> list[Outcome]:
    """Log-likelihood of each request in nats, and whether each of its tokens is the most likely one."""
    device, plan = scored.logits_KV.device, scored.plan
    normalizer_K, best_K = [torch.empty(0, device=device)], [torch.empty(0, dtype=torch.int64, device=device)]
    for logits_TV in scored.logits_KV.split(CHUNK_TOKENS):
        normalizer_K.append(logits_TV.to(torch.float32).logsumexp(-1))
        best_K.append(logits_TV.argmax(-1))
    is_scored_N = plan.targets_N != IGNORED
    source_N, target_N, request_N = (
        numbers_N[is_scored_N].to(device) for numbers_N in (plan.source_N, plan.targets_N, plan.request_N)
    )
    log_prob_N = scored.logits_KV[source_N, target_N].to(torch.float32) - torch.cat(normalizer_K)[source_N]
    total_R = torch.zeros(num_requests, dtype=torch.float64, device=device)
    num_wrong_R = torch.zeros(num_requests, dtype=torch.int64, device=device)
    total_R.index_add_(0, request_N, log_prob_N.to(torch.float64))
    num_wrong_R.index_add_(0, request_N, (torch.cat(best_K)[source_N] != target_N).long())
    return [Outcome(*pair) for pair in zip(total_R.tolist(), (num_wrong_R == 0).tolist(), strict=True)]


def pass_inputs(model: Any, segment: Segment, past: Segment | None = None) -> dict[str, Tensor]:
    """What the model is given of a pass, but for the cache of the pass before, on the device of its embeddings."""
    device = model.get_input_embeddings().weight.device
    inputs = {"input_ids": segment.ids_BL}
    mask, position_ids_BL = _mask_and_positions(segment, past)
    if segment.branch_BL is not None:
        mask = _tree_mask(segment.branch_BL.to(device), model.dtype)
    # Padding at the right is seen by no token: without a mask, attention takes its fastest path.
    if mask is not None:
        inputs["attention_mask"] = mask
    if position_ids_BL is not None:
        inputs["position_ids"] = position_ids_BL
    return {name: value.to(device) for name, value in inputs.items()}


def run_pass(model: Any, segment: Segment, **inputs: Any) -> tuple[Tensor, Any]:
    """Logits at the positions that a pass reads, logits_KV, and all that the model returned."""
    # A pass that is run for its cache alone reads one position, which is dropped.
    read_K = segment.read_K if segment.read_K.numel() else torch.zeros(1, dtype=torch.int64)
    read_K = read_K.to(inputs["input_ids"].device)
    with _head_reads(model, segment.ids_BL.shape, read_K):
        output = model(**inputs)
    logits = output.logits
    # Unchanged where the head is no module of its own.
    is_whole = logits.shape[:2] == segment.ids_BL.shape
    logits_KV = logits.flatten(0, 1)[read_K] if is_whole else logits[0]
    return logits_KV[: segment.read_K.numel()], output


def _mask_and_positions(segment: Segment, past: Segment | None) -> tuple[Tensor | None, Tensor | None]:
    """attention_mask [B, P + L] where padding is at the left, and position_ids [B, L] where they are not 0..L-1."""
    length = segment.ids_BL.shape[1]
    if segment.branch_BL is not None:
        return None, segment.position_BL
    if past is None or segment.parent_B is None:
        mask_BL = _left_mask(segment)
        return mask_BL, None if mask_BL is None else (mask_BL.cumsum(1) - 1).clamp(min=0)
    position_ids_BL = past.length_B[segment.parent_B][:, None] + torch.arange(length)
    mask_BP = _left_mask(past)
    if mask_BP is None:
        return None, position_ids_BL
    mask_BP = mask_BP[segment.parent_B]
    return torch.cat([mask_BP, mask_BP.new_ones(len(mask_BP), length)], 1), position_ids_BL


def _left_mask(segment: Segment) -> Tensor | None:
    length = segment.ids_BL.shape[1]
    if not segment.pad_left or int(segment.length_B.min()) == length:
        return None
    return (torch.arange(length) >= length - segment.length_B[:, None]).long()


def _tree_mask(branch_BL: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores [B, 1, L, L]: 0 at earlier tokens of the stem and of the same branch."""
    length = branch_BL.shape[1]
    is_seen_BLL = (branch_BL[:, None, :] == 0) | (branch_BL[:, None, :] == branch_BL[:, :, None])
    is_seen_BLL &= torch.ones(length, length, dtype=torch.bool, device=branch_BL.device).tril()
    mask_BLL = torch.zeros(is_seen_BLL.shape, dtype=dtype, device=branch_BL.device)
    return mask_BLL.masked_fill_(~is_seen_BLL, torch.finfo(dtype).min)[:, None]


@contextmanager
def _head_reads(model: Any, shape: Sequence[int], read_K: Tensor) -> Iterator[None]:
    """The output head sees the hidden states [1, K, D] of these positions in place of [B, L, D]."""

    def pick(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden_BLD = args[0]
        if tuple(hidden_BLD.shape[:2]) != tuple(shape):
            return None
        return hidden_BLD.flatten(0, 1)[read_K][None], *args[1:]

    head = model.get_output_embeddings()
    # Before the hooks of linears_by_onednn, which change the layout.
    handle = head.register_forward_pre_hook(pick, prepend=True) if head is not None else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
