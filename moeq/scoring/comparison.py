"""A model compared with the original that it was made from: per document, divergence and agreement.

    kl = sum over positions of KL(P || Q) in nats,  P the original's next-token distribution, Q the model's
    top1_agreement = positions with the same most likely token
    router_agreement = (token, block) pairs that go to the same set of experts

each with the number of positions or pairs as its weight, so that they add up over documents, batches and ranks.

Shapes: N predicted tokens of a batch, V vocabulary, T tokens that an experts module saw, J tokens of all requests (one
that several requests share is there for each), S parts of requests' rows, K experts per token.
"""

import torch
from torch import Tensor

from moeq.scoring.divergence import divergence_by_owner
from moeq.scoring.forward_plan import Spans
from moeq.scoring.routing import same_routing_by_owner
from moeq.scoring.scorer import Said
from moeq.tasks.task import Values


def compare(reference: Said, said: Said) -> dict[int, Values]:
    """Values ``kl``, ``top1_agreement`` and, where there are experts, ``router_agreement`` by number of the document.

    Args:
        reference: What the original said of a batch.
        said: What the model said of the same requests, in the same layout or another one.

    Raises:
        ValueError: The two have other vocabularies or experts modules, or ran other requests.
    """
    owner_N = said.scored.plan.owner_N
    num_owners = max(said.scored.plan.owners, default=-1) + 1
    sums = divergence_by_owner(reference.scored.logits_NV, said.scored.logits_NV, owner_N, num_owners)
    (routing, spans), (reference_routing, _) = _in_order(said), _in_order(reference)
    pairs = same_routing_by_owner(routing, reference_routing, spans, num_owners)
    values: dict[int, Values] = {}
    for owner, (kl, same, count, same_pairs, num_pairs) in enumerate(
        zip(*(x.tolist() for x in (*sums, *pairs)), strict=True)
    ):
        if count:
            values[owner] = {"kl": (kl, float(count)), "top1_agreement": (float(same), float(count))}
        if num_pairs:
            values[owner]["router_agreement"] = float(same_pairs), float(num_pairs)
    return values


def _in_order(said: Said) -> tuple[dict[str, Tensor], Spans]:
    """Chosen experts, ids_JK, of every token of every request in their order, whatever the layout; and their spans."""
    start_S, stop_S, owner_S = said.scored.plan.spans
    ranges = [torch.arange(*ends) for ends in zip(start_S.tolist(), stop_S.tolist(), strict=True)]
    token_J = torch.cat([torch.empty(0, dtype=torch.int64), *ranges])
    stop = (stop_S - start_S).cumsum(0)
    routing = {name: ids_TK[token_J.to(ids_TK.device)] for name, ids_TK in said.routing.items()}
    return routing, Spans(stop - (stop_S - start_S), stop, owner_S)
