"""Random requests of the kinds that tasks make, and what a model says of each when it runs alone, without padding."""

from random import Random
from typing import Any

import torch
from torch import Tensor

from moeq.scoring.routing import record_routing
from moeq.tasks.documents import Document, Request


def random_ids(random: Random, low: int, high: int) -> tuple[int, ...]:
    """Between ``low`` and ``high`` ids of the tiny tokenizer."""
    return tuple(random.randrange(1, 257) for _ in range(random.randint(low, high)))


def random_requests(seed: int, num_documents: int = 3, shared: int = 12) -> tuple[list[Request], list[int]]:
    """Requests and owners: after the same examples, choices of all lengths, of one or of several contexts."""
    random = Random(seed)
    examples = random_ids(random, shared, shared)
    requests, owners = [], []
    for owner in range(num_documents):
        context = examples + random_ids(random, 1, 12)
        for _ in range(random.randint(1, 4)):
            own = context + random_ids(random, 1, 2) if owner % 3 == 2 else context
            open_end = owner % 4 == 3
            requests.append(Request(own, random_ids(random, 1, 1 if owner % 3 == 1 else 7), open_end))
            owners.append(owner)
    return requests, owners


def random_documents(seed: int, num_documents: int, shared: int = 0) -> list[Document]:
    """The same as documents."""
    requests, owners = random_requests(seed, num_documents, shared)
    return [
        Document(
            index, str(index), {}, (), tuple(r for r, owner in zip(requests, owners, strict=True) if owner == index)
        )
        for index in range(num_documents)
    ]


@torch.no_grad()
def reference_logits(model: Any, requests: list[Request]) -> Tensor:
    """logits_NV of each request run alone."""
    logits = []
    for request in requests:
        ids = request.context + request.continuation
        row = ids if request.open_end else ids[:-1]
        output = model(torch.tensor([row]), use_cache=False)
        logits.append(output.logits[0, len(request.context) - 1 :])
    return torch.cat(logits)


@torch.no_grad()
def reference_routing(model: Any, request: Request) -> dict[str, Tensor]:
    """Chosen experts of one request run alone."""
    ids = request.context + request.continuation
    with record_routing(model) as routing:
        model(torch.tensor([ids if request.open_end else ids[:-1]]), use_cache=False)
    return routing
