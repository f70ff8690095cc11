"""Log-likelihoods of continuations: the passes of a plan, and what they say of each request.

    log P(continuation | context) = sum_j log softmax(logits at the token before token j)[token j]

with the softmax in float32 and the sum in float64.  The output head runs on the positions that predict something and on
no others, and no [tokens, vocabulary] tensor of the rest ever exists.

Not every family's cache can be expanded and continued by several tokens at once (some raise, some forget the state), so
``Scorer`` tries each layout of the first batch that uses it on two of its documents, against passes without a cache.

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
from moeq.scoring.forward_plan import IGNORED, Plan, Segment, plan_requests
from moeq.scoring.pass_cost import Layout, row_of
from moeq.scoring.perplexity import CHUNK_TOKENS
from moeq.tasks.task import Outcome

# Root mean square difference of logits, in their standard deviations, averaged over positions, that is rounding.  Wrong
# caches are off by 0.2 and more, right ones by 1e-5 in float32 and 0.02 in bfloat16.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
_COARSE_ROUNDING = 0.1


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
            logits_KV, cache = _run_segment(model, segment, past, cache, keep_cache=not is_last)
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


class Scorer:
    """Runs plans on a model, in layouts that have been seen to work on it.

    Args:
        model: A causal LM in eval mode.

    Attributes:
        fallbacks: For each layout that does not work on this model: what happened, and what is done instead.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.fallbacks: list[str] = []
        self._problems: dict[Layout, str | None] = {"plain": None}

    def run(self, plan: Plan) -> Scored:
        """The result of ``settled(plan)``."""
        return run_plan(self.model, self.settled(plan))

    def settled(self, plan: Plan) -> Plan:
        """The plan, or the same requests in the cheapest layout that works on this model."""
        without = {layout for layout, problem in self._problems.items() if problem is not None}
        if _reaches_window(self.model, plan):
            without.add("tree")
        if plan.layout in without:
            return self.settled(plan_requests(plan.requests, plan.owners, without=without))
        if plan.layout in self._problems:
            return plan
        problem = self._problems[plan.layout] = _problem(self.model, plan)
        if problem is None:
            return plan
        self.fallbacks.append(f"layout {plan.layout}: {problem}; shared tokens are computed in another way, or again")
        return self.settled(plan)


def _reaches_window(model: Any, plan: Plan) -> bool:
    """Whether a tree is longer than a window of attention, of which a mask of one's own knows nothing."""
    config = getattr(model.config, "text_config", None) or model.config
    windows = [
        value
        for name, value in vars(config).items()
        if ("sliding_window" in name or "attention_chunk" in name) and isinstance(value, int) and value > 0
    ]
    return plan.layout == "tree" and plan.segments[0].ids_BL.shape[1] > min(windows, default=1 << 62)


def _problem(model: Any, plan: Plan) -> str | None:
    """What is wrong with a layout on a model, by the shortest and the longest document of a plan; None if nothing."""
    requests, owners = _two_documents(plan)
    expected_NV = run_plan(model, plan_requests(requests, owners, "plain")).logits_NV.float()
    try:
        logits_NV = run_plan(model, plan_requests(requests, owners, plan.layout)).logits_NV
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    difference_N = (logits_NV.float() - expected_NV).square().mean(-1).sqrt() / expected_NV.std(-1)
    allowed = _ROUNDING.get(logits_NV.dtype, _COARSE_ROUNDING)
    # Logits that are not finite without a cache either are no fault of the layout.
    if not expected_NV.isfinite().all() or float(difference_N.mean()) <= allowed:
        return None
    return f"logits differ by {float(difference_N.mean()):.2g} of their deviation, {allowed:g} is rounding"


def _two_documents(plan: Plan) -> tuple[list[Any], list[int]]:
    """Requests and owners of the documents with the shortest and the longest row, so that there is padding."""
    lengths = [len(row_of(request)) for request in plan.requests]
    chosen = {plan.owners[lengths.index(extreme(lengths))] for extreme in (min, max)}
    pairs = [pair for pair in zip(plan.requests, plan.owners, strict=True) if pair[1] in chosen]
    return [request for request, _ in pairs], [owner for _, owner in pairs]


def _run_segment(
    model: Any, segment: Segment, past: Segment | None, cache: Any, *, keep_cache: bool
) -> tuple[Tensor, Any]:
    """Logits at the positions that are read, logits_KV, and the cache if it is kept."""
    device = model.get_input_embeddings().weight.device
    inputs: dict[str, Any] = {"input_ids": segment.ids_BL.to(device), "use_cache": keep_cache or past is not None}
    if past is not None and segment.parent_B is not None:
        reorder_cache(cache, segment.parent_B.to(device))
        inputs["past_key_values"] = cache
    mask, position_ids_BL = _mask_and_positions(segment, past)
    if segment.branch_BL is not None:
        mask = _tree_mask(segment.branch_BL.to(device), model.dtype)
    # Padding at the right is seen by no token: without a mask, attention takes its fastest path.
    if mask is not None:
        inputs["attention_mask"] = mask.to(device)
    if position_ids_BL is not None:
        inputs["position_ids"] = position_ids_BL.to(device)
    # A pass that is run for its cache alone reads one position, which is dropped.
    read_K = (segment.read_K if segment.read_K.numel() else torch.zeros(1, dtype=torch.int64)).to(device)
    with _head_reads(model, segment.ids_BL.shape, read_K):
        output = model(**inputs)
    logits = output.logits
    # Unchanged where the head is no module of its own.
    is_whole = logits.shape[:2] == segment.ids_BL.shape
    logits_KV = logits.flatten(0, 1)[read_K] if is_whole else logits[0]
    return logits_KV[: segment.read_K.numel()], output.past_key_values if keep_cache else None


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
