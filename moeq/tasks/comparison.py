"""A model compared with the original that it was made from: per document, divergence and agreement.

    kl = sum over positions of KL(P || Q) in nats,  P the original's next-token distribution, Q the model's
    top1_agreement = positions with the same most likely token
    router_agreement = (token, block) pairs that go to the same set of experts

each with the number of positions or pairs as its weight, so that they add up over documents, batches and ranks.

Shapes: N predicted tokens of a batch, V vocabulary, T tokens that an experts module saw, K experts per token, S tokens
of all requests, each as often as there are requests with it.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moeq.tasks.likelihood import Scored, Scorer, run_plan
from moeq.tasks.plan import Plan, Spans
from moeq.tasks.routing import record_routing, same_topk
from moeq.tasks.spec import Values

CHUNK_POSITIONS = 512


class Said(NamedTuple):
    """What a model said of a batch.

    Attributes:
        scored: Logits, with the plan that was run.
        routing: Chosen experts ids_TK by path of the experts module, of all tokens of the passes.
    """

    scored: Scored
    routing: dict[str, Tensor]


def ask(scorer: Scorer, plan: Plan) -> Said:
    """Run a plan, in a layout that works on the model, and note where its tokens go."""
    settled = scorer.settled(plan)  # which may run the model, so not below
    with record_routing(scorer.model) as routing:
        scored = run_plan(scorer.model, settled)
    return Said(scored, routing)


def compare(reference: Said, said: Said) -> dict[int, Values]:
    """Values ``kl``, ``top1_agreement`` and, where there are experts, ``router_agreement`` by number of the document.

    Args:
        reference: What the original said of a batch.
        said: What the model said of the same requests, in the same layout or another one.

    Raises:
        ValueError: The two have other vocabularies or experts modules.
    """
    kl_N, same_N = divergence(reference.scored.logits_NV, said.scored.logits_NV)
    values: dict[int, Values] = {}
    for owner, (kl, same, count) in _sums_by_owner(said.scored.plan.owner_N, kl_N, same_N).items():
        values[owner] = {"kl": (kl, count), "top1_agreement": (same, count)}
    if said.routing.keys() != reference.routing.keys():
        differing = sorted(said.routing.keys() ^ reference.routing.keys())
        raise ValueError(
            f"the models do not share the experts modules {differing}; "
            "compare a model with the original that it was made from"
        )
    if said.routing:
        token_S, owner_S = _tokens(said.scored.plan.spans)
        reference_token_S, _ = _tokens(reference.scored.plan.spans)
        num_same_S = torch.zeros(len(token_S))
        for name, ids_TK in said.routing.items():
            num_same_S += same_topk(ids_TK.cpu()[token_S], reference.routing[name].cpu()[reference_token_S])
        for owner, (same, count) in _sums_by_owner(owner_S, num_same_S).items():
            values[owner]["router_agreement"] = same, count * len(said.routing)
    return values


def divergence(reference_logits_NV: Tensor, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(reference || model) in nats, float32, and whether the most likely token is the same, of each position (CPU).

    Computed in float32 on the device of the model's logits, a chunk of positions at a time: of two large tensors of
    logits, one of which may lie on a disk, no whole copy is made.

    Raises:
        ValueError: The shapes differ.
    """
    if reference_logits_NV.shape != logits_NV.shape:
        raise ValueError(
            f"logits of shape {tuple(logits_NV.shape)} must have the reference's {tuple(reference_logits_NV.shape)}; "
            "compare a model with the original that it was made from"
        )
    kl, same = [torch.empty(0)], [torch.empty(0, dtype=torch.bool)]
    for p_NV, q_NV in zip(reference_logits_NV.split(CHUNK_POSITIONS), logits_NV.split(CHUNK_POSITIONS), strict=True):
        log_q_NV = q_NV.float().log_softmax(-1)
        log_p_NV = p_NV.to(q_NV.device).float().log_softmax(-1)
        kl.append(functional.kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(-1).cpu())
        same.append((log_p_NV.argmax(-1) == log_q_NV.argmax(-1)).cpu())
    return torch.cat(kl), torch.cat(same)


def _tokens(spans: Spans) -> tuple[Tensor, Tensor]:
    """Place token_S and document owner_S of every token of every request, in their order, whatever the layout."""
    ranges = [torch.arange(start, stop) for start, stop in zip(*(ends.tolist() for ends in spans[:2]), strict=True)]
    return torch.cat([torch.empty(0, dtype=torch.int64), *ranges]), spans.owner_S.repeat_interleave(
        spans.stop_S - spans.start_S
    )


def _sums_by_owner(owner: Tensor, *values: Tensor) -> dict[int, tuple[float, ...]]:
    """Sums of each of the values over the entries of an owner, in float64, and their number."""
    owners, index = owner.unique(return_inverse=True)
    sums = [
        torch.zeros(len(owners), dtype=torch.float64).index_add_(0, index, value.double())
        for value in (*values, torch.ones(len(owner)))
    ]
    return {key: tuple(row) for key, row in zip(owners.tolist(), torch.stack(sums, 1).tolist(), strict=True)}
