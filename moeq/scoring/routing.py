"""Router agreement: does a quantized model send its tokens to the experts that the original chose?

Router agreement is the share of (token, block) pairs whose set of k chosen experts is unchanged; the order inside the
top-k does not matter.  The choice is read where it arrives, at the input of the experts module, which every family
that follows the experts interface of transformers v5 calls with ``(hidden_states, top_k_index, top_k_weights)``.
Router outputs are not read: their order differs between families and versions.  A packed experts module has the path
and the signature of the one it replaced, so the two models need not store their experts alike.

Shapes: T tokens, K chosen experts per token, S spans of tokens.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeq.models.adapter import is_experts_module
from moeq.scoring.forward_plan import Spans


def same_topk(ids_TK: Tensor, reference_ids_TK: Tensor) -> Tensor:
    """bool_T: True where the two rows of expert indices are equal as sets.

    Raises:
        ValueError: The shapes differ.
    """
    if ids_TK.shape != reference_ids_TK.shape:
        raise ValueError(
            f"chosen experts of shape {tuple(ids_TK.shape)} must have the reference's {tuple(reference_ids_TK.shape)}; "
            "run both models on the same tokens"
        )
    return (ids_TK.sort(dim=-1).values == reference_ids_TK.sort(dim=-1).values).all(dim=-1)


def count_same_routing(routing: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> tuple[int, int]:
    """(token, block) pairs with an unchanged set of experts, and all pairs, over the experts modules of two models.

    Raises:
        ValueError: The models have different experts modules.
    """
    _check_modules(routing, reference)
    same = [same_topk(ids_TK, reference[name]) for name, ids_TK in routing.items()]
    return sum(int(same_T.sum()) for same_T in same), sum(same_T.numel() for same_T in same)


def same_routing_by_owner(
    routing: Mapping[str, Tensor], reference: Mapping[str, Tensor], spans: Spans, num_owners: int
) -> tuple[Tensor, Tensor]:
    """The same for each document of a batch: int64 pairs with an unchanged set of experts, and all pairs, per owner.

    Args:
        routing: Chosen experts ids_TK by path of the experts module, of all passes of a plan.
        reference: The same of the reference; its ids may have another integer dtype.
        spans: Which of the T tokens belong to whom; those in no span (padding) do not count.
        num_owners: Number of documents.

    Raises:
        ValueError: The models have different experts modules, or did not run the same plan.
    """
    _check_modules(routing, reference)
    num_same, num_pairs = torch.zeros(2, num_owners, dtype=torch.int64).unbind()
    for name, ids_TK in routing.items():
        same_T = same_topk(ids_TK, reference[name].to(ids_TK)).cpu()
        same_before = functional.pad(same_T.long().cumsum(0), (1, 0))
        num_same.index_add_(0, spans.owner_S, same_before[spans.stop_S] - same_before[spans.start_S])
        num_pairs.index_add_(0, spans.owner_S, spans.stop_S - spans.start_S)
    return num_same, num_pairs


def _check_modules(routing: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
    if routing.keys() != reference.keys():
        differing = sorted(routing.keys() ^ reference.keys())
        raise ValueError(
            f"the models do not share the experts modules {differing}; "
            "compare a model with the original that it was made from"
        )


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the chosen experts, ids_TK by path of the experts module, of every forward pass in the context.

    Several passes are concatenated along T.  The hooks come off at the end, after an error too.
    """
    routing: dict[str, Tensor] = {}

    def recorder(name: str) -> Any:
        def record(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            ids_TK = args[1].detach()
            routing[name] = torch.cat([routing[name], ids_TK]) if name in routing else ids_TK

        return record

    handles = [
        module.register_forward_pre_hook(recorder(name))
        for name, module in model.named_modules()
        if is_experts_module(module)
    ]
    try:
        yield routing
    finally:
        for handle in handles:
            handle.remove()
