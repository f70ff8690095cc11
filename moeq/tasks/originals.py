"""A model compared with the original that it was made from: per document, divergence and agreement.

    kl = sum over positions of KL(P || Q) in nats,  P the original's next-token distribution, Q the model's
    top1_agreement = positions with the same most likely token
    router_agreement = (token, block) pairs that go to the same set of experts

each with the number of positions or pairs as its weight, so that they add up over documents.  The original either runs
beside the model on every batch, or has run before it and is read from disk (``moeq.tasks.stored``).

Shapes: N compared positions of a batch, V vocabulary, T tokens that an experts module saw, K experts per token.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from moeq.tasks.routing import same_topk
from moeq.tasks.spec import Values
from moeq.tasks.stored import Said

Mode = Literal["memory", "disk"]
CHUNK_POSITIONS = 512
# Models need room to run in: activations, caches and logits.
ROOM = 1.15


def choose_mode(
    requested: Literal["auto", "memory", "disk"], model_bytes: int, original_bytes: int, free_bytes: int
) -> Mode:
    """Whether the original runs beside the model ("memory") or before it, leaving its logits ("disk").

    Args:
        requested: What the user asked for; "auto" is memory where both fit.
        model_bytes: Parameters and buffers of the model.
        original_bytes: Those of the original.
        free_bytes: Memory of the device before either is loaded.

    Raises:
        ValueError: Memory was asked for, and not even the parameters of the two fit.
    """
    both = model_bytes + original_bytes
    if requested == "memory" and both > free_bytes:
        raise ValueError(
            f"the model ({model_bytes / 1e9:.1f} GB) and its original ({original_bytes / 1e9:.1f} GB) do not both fit "
            f"into {free_bytes / 1e9:.1f} GB; choose 'disk' or 'auto'"
        )
    if requested == "auto":
        return "memory" if both * ROOM <= free_bytes else "disk"
    return requested


def compare(reference: Said, said: Said, owner_N: Tensor, owners_T: Mapping[str, Tensor]) -> dict[int, Values]:
    """Values ``kl``, ``top1_agreement`` and, where there are experts, ``router_agreement`` by document.

    Args:
        reference: What the original said of a batch.
        said: What the model said of it.
        owner_N: Document of each compared position; negative where it counts for none.
        owners_T: Document of each token that an experts module saw, by path of the module; negative at padding.

    Raises:
        ValueError: The two have other vocabularies, positions or experts modules.
    """
    kl_N, same_N = divergence(reference.logits_NV, said.logits_NV)
    values: dict[int, Values] = {}
    for owner, (kl, same, count) in _sums_by_owner(owner_N, kl_N, same_N, torch.ones_like(same_N)).items():
        values[owner] = {"kl": (kl, count), "top1_agreement": (same, count)}
    if said.routing.keys() != reference.routing.keys():
        differing = sorted(said.routing.keys() ^ reference.routing.keys())
        raise ValueError(
            f"the models do not share the experts modules {differing}; "
            "compare a model with the original that it was made from"
        )
    for name, ids_TK in said.routing.items():
        same_T = same_topk(ids_TK.cpu(), reference.routing[name].cpu())
        for owner, (same, count) in _sums_by_owner(owners_T[name], same_T, torch.ones_like(same_T)).items():
            before = values.setdefault(owner, {}).get("router_agreement", (0.0, 0.0))
            values[owner]["router_agreement"] = before[0] + same, before[1] + count
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


def _sums_by_owner(owner: Tensor, *values: Tensor) -> dict[int, tuple[float, ...]]:
    """Sums of each of the values over the entries of an owner, in float64; entries of negative owners are left out."""
    owner = owner.cpu()
    owners, index = owner[owner >= 0].unique(return_inverse=True)
    sums = [
        torch.zeros(len(owners), dtype=torch.float64).index_add_(0, index, value[owner >= 0].double())
        for value in values
    ]
    return {key: tuple(row) for key, row in zip(owners.tolist(), torch.stack(sums, 1).tolist(), strict=True)}
