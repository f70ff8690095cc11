"""Observers: forward hooks that hand over the input rows of sites, with the affinity of every row.

The affinity is exactly the number that multiplies an expert's output: ``top_k_weights`` for routed experts, the sigmoid
of the shared expert's own gate where the family has one, and 1 (None) elsewhere.  Inputs and affinities are gathered
with one index, so that no row gets another token's weight.

With routing ``all_experts`` every routed expert is given every token (the output stays routed).  An experts module
receives the weights of the chosen experts alone, and families turn router logits into weights in ways of their own, so
an affinity of the other tokens is not defined for every family: all of them weigh 1.

On a GPU what costs is not the rows but the calls: with ``on_groups`` the routed experts of a block are observed
together, by a forward pass whose number of launches grows with the experts' two products alone.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeq.models.adapter import Adapter, Site
from moeq.models.experts import activate, project_down, project_in
from moeq.models.routed_rows import RoutedRows, routed_tokens, sort_by_expert
from moeq.quant.spec import Routing

OnRows = Callable[[Site, int, Tensor, Tensor | None], None]
# (site, x_NI, affinity_N, starts): rows of all experts of a site, those of expert e in [starts[e], starts[e + 1]).
OnGroups = Callable[[Site, Tensor, Tensor, list[int]], None]


@dataclass
class TokenMask:
    """Which tokens of the current batch count: bool [B * T], or None for all (padding is set to False)."""

    keep: Tensor | None = None


@contextmanager
def observe(
    adapter: Adapter,
    sites: tuple[Site, ...],
    on_rows: OnRows,
    routing: Routing = "routed",
    mask: TokenMask | None = None,
    on_groups: OnGroups | None = None,
) -> Iterator[TokenMask]:
    """Call ``on_rows(site, expert, x_TI, affinity_T)`` for every input of the sites; hooks come off at the end.

    With routing "all_experts" the experts of a block share the inputs of gate and up, which are given as those of
    expert 0.  With routing "routed" and ``on_groups``, that is called once for all routed experts of a site instead.

    Yields:
        The mask to set before each forward pass: the given one, where there is one.
    """
    mask = TokenMask() if mask is None else mask
    grouped = on_groups if routing == "routed" else None
    with ExitStack() as stack:
        for site in sites:
            if site.kind != "routed":
                _hook_linears(stack, adapter, site, on_rows, mask)
            elif site.stage == "mlp_in":
                _hook_expert_inputs(stack, adapter, site, on_rows, grouped, mask, routing)
            elif grouped is not None:
                stack.enter_context(_observing_experts(adapter, site, "moeq_observe_groups", grouped, mask))
            else:
                stack.enter_context(_observing_experts(adapter, site, "moeq_observe", on_rows, mask, routing))
        yield mask


@contextmanager
def observe_routing(modules: dict[str, nn.Module], on_routing: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``on_routing(path, ids_TK, weights_TK)`` whenever one of the experts modules runs."""
    with ExitStack() as stack:
        for path, module in modules.items():

            def hook(_: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
                on_routing(path, args[1], args[2])

            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


def _rows(x: Tensor, mask: TokenMask) -> Tensor:
    flat = x.detach().reshape(-1, x.shape[-1])
    return flat if mask.keep is None else flat[mask.keep]


def _hook_linears(stack: ExitStack, adapter: Adapter, site: Site, on_rows: OnRows, mask: TokenMask) -> None:
    gate = adapter.shared_affinity_gate(site)
    seen: dict[str, Tensor] = {}

    def on_shared_expert(_: nn.Module, args: tuple[Any, ...]) -> None:
        assert gate is not None
        seen["affinity"] = _rows(torch.sigmoid(gate(args[0]).float()), mask)[:, 0]

    waiting: set[str] = set()

    def on_linear(_: nn.Module, args: tuple[Any, ...], path: str) -> None:
        # The first of them to be called, in whichever order the block calls them, stands for all.
        if path not in waiting:
            waiting.update(site.modules)
            seen["input"] = args[0]
            on_rows(site, 0, _rows(args[0], mask), seen.get("affinity"))
        # Stacked linears are solved with one Hessian: a family in which they read different inputs must not pass.
        elif args[0] is not seen["input"] and not torch.equal(args[0], seen["input"]):
            raise ValueError(f"{site.modules} do not read the same input, so they cannot share a Hessian")
        waiting.discard(path)

    hooks: list[tuple[nn.Module, Callable[..., None]]] = []
    if gate is not None:
        hooks.append((adapter.shared_expert(site), on_shared_expert))
    hooks += [(adapter.model.get_submodule(path), partial(on_linear, path=path)) for path in site.modules]
    for module, hook in hooks:
        stack.callback(module.register_forward_pre_hook(hook).remove)


def _hook_expert_inputs(
    stack: ExitStack,
    adapter: Adapter,
    site: Site,
    on_rows: OnRows,
    on_groups: OnGroups | None,
    mask: TokenMask,
    routing: Routing,
) -> None:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden, ids_TK, weights_TK = args
        if on_groups is not None:
            rows = sort_by_expert(ids_TK, site.num_experts, mask.keep)
            affinity_N = weights_TK[rows.tokens_N, rows.slots_N].detach()
            on_groups(site, hidden[rows.tokens_N].detach(), affinity_N, rows.starts)
            return
        if routing == "all_experts":
            on_rows(site, 0, _rows(hidden, mask), None)
            return
        for expert, tokens, slots in routed_tokens(ids_TK, site.num_experts, mask.keep):
            on_rows(site, expert, hidden[tokens].detach(), weights_TK[tokens, slots].detach())

    stack.callback(adapter.model.get_submodule(site.modules[0]).register_forward_pre_hook(hook).remove)


@contextmanager
def _observing_experts(adapter: Adapter, site: Site, forward: str, *observer: Any) -> Iterator[None]:
    """Run one experts module with a forward pass that also sees the input of every down projection."""
    module: Any = adapter.model.get_submodule(site.modules[0])
    with experts_run_by(forward, module):
        module.moeq_observer = (site, *observer)
        try:
            yield
        finally:
            del module.moeq_observer


@contextmanager
def experts_run_by(implementation: str, module: Any) -> Iterator[None]:
    """Give one experts module, and no other, an implementation that is registered with transformers."""
    config = module.config
    module.config = copy.copy(config)
    module.config._experts_implementation = implementation  # transformers 5.23: in public only for a whole model
    try:
        yield
    finally:
        module.config = config


def _observing_forward(module: Any, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    site, on_rows, mask, routing = module.moeq_observer
    out = torch.zeros_like(hidden_TD)
    for expert in range(module.num_experts) if routing == "all_experts" else ():
        inner = activate(module, project_in(module, expert, hidden_TD))
        on_rows(site, expert, _rows(inner, mask), None)
    for expert, tokens, slots in routed_tokens(ids_TK, module.num_experts, None):
        inner = activate(module, project_in(module, expert, hidden_TD[tokens]))
        affinity = weights_TK[tokens, slots]
        if routing == "routed":
            counted = slice(None) if mask.keep is None else mask.keep[tokens]
            on_rows(site, expert, inner[counted].detach(), affinity[counted].detach())
        y = project_down(module, expert, inner)
        out.index_add_(0, tokens, (y * affinity[:, None]).to(out.dtype))
    return out


def _observing_forward_of_groups(module: Any, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    site, on_groups, mask = module.moeq_observer
    rows = sort_by_expert(ids_TK, module.num_experts)
    x_ND = hidden_TD[rows.tokens_N]
    z_NO = torch.cat([project_in(module, expert, x_ND[part]) for expert, part in rows.parts()])
    inner_NF, affinity_N = activate(module, z_NO), weights_TK[rows.tokens_N, rows.slots_N]
    choice_N = rows.tokens_N * ids_TK.shape[1] + rows.slots_N
    on_groups(site, *_counted(rows, inner_NF.detach(), affinity_N.detach(), choice_N, ids_TK, mask))
    y_ND = torch.cat([project_down(module, expert, inner_NF[part]) for expert, part in rows.parts()])
    # Back in the order of the choices and summed there: adding rows into tokens has no fixed order on a GPU.
    y_CD = y_ND.new_zeros(ids_TK.numel(), y_ND.shape[1])
    y_CD[choice_N] = y_ND * affinity_N[:, None].to(y_ND.dtype)
    return y_CD.unflatten(0, ids_TK.shape).sum(1).to(hidden_TD.dtype)


def _counted(
    rows: RoutedRows, inner_NF: Tensor, affinity_N: Tensor, choice_N: Tensor, ids_TK: Tensor, mask: TokenMask
) -> tuple[Tensor, Tensor, list[int]]:
    """The rows of tokens that count: all of them where there is no padding."""
    if mask.keep is None:
        return inner_NF, affinity_N, rows.starts
    kept = sort_by_expert(ids_TK, len(rows.starts) - 1, mask.keep)
    row_of_C = torch.empty(ids_TK.numel(), dtype=choice_N.dtype, device=choice_N.device)
    row_of_C[choice_N] = torch.arange(len(choice_N), device=choice_N.device)
    index_N = row_of_C[kept.tokens_N * ids_TK.shape[1] + kept.slots_N]
    return inner_NF[index_N], affinity_N[index_N], kept.starts


ALL_EXPERTS_FUNCTIONS.register("moeq_observe", _observing_forward)
ALL_EXPERTS_FUNCTIONS.register("moeq_observe_groups", _observing_forward_of_groups)
