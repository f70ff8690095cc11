"""Which rows of which linear make the input of an output projection, so that a scale can move there.

    down(act(gate x) * up x):   channel j of the input is proportional to row j of up
    o(attention(q, k, v)):      channel (query head h, d) is proportional to row (key/value head of h, d) of v

Where the rows are stands in the tables below, by the names that families use; whether it is true is asked of the
running model: its rows are divided by powers of two, and the input of the projection must be divided by the same.

Shapes: I in features of the projection, J distinct channels, R rows of the producer.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeq.activations import until_reached
from moeq.models.adapter import Adapter, Site

UP_LEAVES = ("up_proj", "w3")
VALUE_LEAVES = ("v_proj", "kv_b_proj")
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
    parent = adapter.model.get_submodule(consumer.modules[0].rpartition(".")[0])
    leaves = VALUE_LEAVES if consumer.stage == "attention_out" else UP_LEAVES
    found = _linear_of(adapter, consumer, leaves)
    if found is None:
        return None
    site, leaf = found
    rows = site.rows[site.leaves.index(leaf)]
    row_I = _value_rows(parent, leaf, rows, consumer.in_features)
    if row_I is None:
        return None
    row_J, channel_I = torch.unique(row_I, return_inverse=True)
    producer = Producer(site, leaf, row_J, channel_I)
    holds = _gate_is_linear_in_up if consumer.kind == "routed" else _input_follows_rows
    return producer if holds(adapter, producer, consumer, run) else None


def _linear_of(adapter: Adapter, consumer: Site, leaves: tuple[str, ...]) -> tuple[Site, str] | None:
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


def _value_rows(attention: nn.Module, leaf: str, rows: int, in_features: int) -> Tensor | None:
    """Row of every in feature; None where the sizes do not fit together."""
    index_I = torch.arange(in_features)
    if leaf in UP_LEAVES:
        return index_I if rows == in_features else None
    width = getattr(attention, "head_dim" if leaf == "v_proj" else "v_head_dim", None)
    if not isinstance(width, int) or in_features % width:
        return None
    head_I, inner_I, heads = index_I // width, index_I % width, in_features // width
    if leaf == "v_proj":
        shared = heads * width // rows  # query heads of a key/value head
        return head_I // shared * width + inner_I if shared * rows == in_features else None
    if rows % heads:
        return None
    stride = rows // heads  # each head has its keys before its values
    return head_I * stride + stride - width + inner_I


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
    return _same(module._apply_gate(gate_up_TR), module._apply_gate(divided_TR) * factor_J)


def _same(before: Tensor, after: Tensor) -> bool:
    return bool((after - before).norm() <= _TOLERANCE * before.norm())
