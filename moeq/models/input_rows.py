"""Producers of an output projection's input: the rows of v and up into which a channel scale can move.

    down(act(gate x) * up x):   channel j of the input is proportional to row j of up
    o(attention(q, k, v)):      channel (query head h, d) is proportional to row (key/value head of h, d) of v

Where the rows are stands in tables, by the names that families use; whether it is true is asked of the running model:
its rows are divided by powers of two, and the input of the projection must be divided by the same.

Shapes: I in features of the projection, J distinct channels, R rows of the producer.
"""

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeq.models.adapter import Adapter, Site
from moeq.models.blocks import until_reached
from moeq.models.heads import ValueHeads, find_value_heads

UP_LEAVES = frozenset({"up_proj", "w3"})
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Producer:
    """Rows of a linear that are proportional to the channels of another one's input.

    Attributes:
        site: Site of the producing linear.
        leaf: Its name there.
        row_J: Row of each channel.
        channel_I: Channel of each in feature.
    """

    site: Site
    leaf: str
    row_J: Tensor
    channel_I: Tensor


@torch.no_grad()
def find_producer(adapter: Adapter, consumer: Site, run: Callable[[], Any]) -> Producer | None:
    """Producer of the input of a projection, or None where there is none that a scale can move to.

    Args:
        adapter: The model.
        consumer: A site of stage "attention_out" or "mlp_down".
        run: Runs the block of the site on a small input.
    """
    heads = find_value_heads(adapter, consumer.block) if consumer.stage == "attention_out" else None
    if isinstance(heads, str) or (heads is None and consumer.stage == "attention_out"):
        return None
    found = _linear_of(adapter, consumer, UP_LEAVES if heads is None else {heads.value.rpartition(".")[2]})
    if found is None:
        return None
    site, leaf = found
    rows, in_features = site.rows[site.leaves.index(leaf)], consumer.in_features
    if heads is None and rows != in_features:
        return None
    row_I = torch.arange(in_features) if heads is None else _value_rows(heads, rows, in_features)
    row_J, channel_I = torch.unique(row_I, return_inverse=True)
    producer = Producer(site, leaf, row_J, channel_I)
    holds = _gate_is_linear_in_up if consumer.kind == "routed" else _input_follows_rows
    return producer if holds(adapter, producer, consumer, run) else None


def _linear_of(adapter: Adapter, consumer: Site, leaves: AbstractSet[str]) -> tuple[Site, str] | None:
    """Site and name of a linear beside the consumer (for routed experts: of the same experts module)."""
    parent = consumer.modules[0].rpartition(".")[0]
    for site in adapter.sites(consumer.block):
        for leaf in site.leaves:
            if leaf not in leaves or site.name == consumer.name:
                continue
            routed = site.kind == consumer.kind == "routed" and site.modules == consumer.modules
            if routed or (consumer.kind != "routed" and f"{parent}.{leaf}" in site.modules):
                return site, leaf
    return None


def _value_rows(heads: ValueHeads, rows: int, in_features: int) -> Tensor:
    """Row of every in feature: query heads share those of their key/value head, whose values are its last rows."""
    index_I, stride = torch.arange(in_features), rows // heads.num_heads
    head_I = index_I // heads.size * heads.num_heads // (in_features // heads.size)
    return head_I * stride + stride - heads.size + index_I % heads.size


def _powers_of_two(num: int) -> Tensor:
    """Factors between 1/4 and 4 that round nowhere; the same on every rank."""
    return torch.exp2(torch.randint(-2, 3, (num,), generator=torch.Generator().manual_seed(0)).float())


def _input_follows_rows(adapter: Adapter, producer: Producer, consumer: Site, run: Callable[[], Any]) -> bool:
    """Divide the producer's rows and see whether the consumer's input is divided likewise."""
    maker = adapter.model.get_submodule(producer.site.weight_name(0, producer.leaf))
    reader = adapter.model.get_submodule(consumer.modules[0])
    factor_J = _powers_of_two(len(producer.row_J))
    factor_R = torch.ones(producer.site.rows[producer.site.leaves.index(producer.leaf)])
    factor_R[producer.row_J] = 1 / factor_J
    seen: list[Tensor] = []
    for divide in (False, True):
        with ExitStack() as stack:
            if divide:
                hook: Any = lambda _m, _a, y: y * factor_R.to(y)  # noqa: E731
                stack.callback(maker.register_forward_hook(hook).remove)
            look: Any = lambda _m, a: seen.append(a[0].detach().float())  # noqa: E731
            stack.callback(reader.register_forward_pre_hook(look).remove)
            with until_reached([reader], []):
                run()
    before, after = seen
    return _same(before, after * factor_J[producer.channel_I].to(after))


def _gate_is_linear_in_up(adapter: Adapter, producer: Producer, consumer: Site, run: Callable[[], Any]) -> bool:
    """Divide the up half of a random input of the experts' gate and see whether its output is divided likewise."""
    module: Any = adapter.model.get_submodule(producer.site.modules[0])
    if not module.has_gate or getattr(module, "has_bias", False):
        return False
    width = consumer.in_features
    generator = torch.Generator().manual_seed(0)
    gate_up_TR = 8 * torch.randn(16, 2 * width, generator=generator)  # large enough for a clamp to show
    factor_J = _powers_of_two(width)
    divided_TR = gate_up_TR.clone()
    divided_TR[:, width:] /= factor_J
    # Without the reordering of ``experts.activate``: this is asked of the gate alone.
    return _same(module._apply_gate(gate_up_TR), module._apply_gate(divided_TR) * factor_J)


def _same(before: Tensor, after: Tensor) -> bool:
    return bool((after - before).norm() <= _TOLERANCE * before.norm())
