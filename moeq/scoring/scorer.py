"""What a model says of a batch, in a layout that has been seen to work on it.

Not every family's cache can be expanded and continued by several tokens at once (some raise, some forget the state),
nor does every attention take any mask, so each layout is tried on two documents of the first batch that uses it,
against passes that share nothing.

Shapes: T tokens of the passes, K experts per token.
"""

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeq.scoring.forward_plan import Plan, plan_requests
from moeq.scoring.likelihood import Scored, run_plan
from moeq.scoring.pass_cost import Layout, row_of
from moeq.scoring.routing import record_routing

# Layouts of a second pass, which continues the cache of the first.
TWO_PASSES: frozenset[Layout] = frozenset({"prefix", "document"})
# What a layout that does not work on a family raises, somewhere in it.
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
# Root mean square difference of logits, in their standard deviations, averaged over positions, that is rounding.  Wrong
# caches are off by 0.2 and more, right ones by 1e-5 in float32 and 0.02 in bfloat16.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
_COARSE_ROUNDING = 0.1


class Said(NamedTuple):
    """What a model said of a batch.

    Attributes:
        scored: Logits, with the plan that was run.
        routing: Chosen experts ids_TK by path of the experts module, of all tokens of the passes.
    """

    scored: Scored
    routing: dict[str, Tensor]


class Scorer:
    """Runs batches through a model in memory.

    Args:
        model: A causal LM in eval mode.
        without: Layouts that are not used, whether they work or not.

    Attributes:
        fallbacks: For each layout that does not work on this model: what happened, and what is done instead.
    """

    def __init__(self, model: Any, without: Collection[Layout] = ()) -> None:
        self.model = model
        self.fallbacks: list[str] = []
        self._without = frozenset(without)
        self._problems: dict[Layout, str | None] = {"plain": None}

    @property
    def device(self) -> torch.device:
        """Where passes begin and end."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def expect(self, task: str, plans: Iterable[Plan]) -> None:
        """Say which batches of a task are going to come, in this order; a model in memory needs no preparation."""

    def said(self, plan: Plan) -> Said:
        """What the model says of a batch, in the layout of the plan or another one that works."""
        settled = self.settled(plan)  # which may run the model, so not below
        with record_routing(self.model) as routing:
            scored = run_plan(self.model, settled)
        return Said(scored, routing)

    def run(self, plan: Plan) -> Scored:
        """The logits of ``said``."""
        return self.said(plan).scored

    def run_again(self, plan: Plan) -> None:
        """Repeat the passes of a plan just as they are, to look for what went wrong in them."""
        run_plan(self.model, plan)

    def settled(self, plan: Plan) -> Plan:
        """The plan, or the same requests in the cheapest layout that works on this model."""
        plan = self.possible(plan)
        if plan.layout in self._problems:
            return plan
        alone, together = trial_plans(plan)
        expected = run_plan(self.model, alone)
        try:
            problem = difference(run_plan(self.model, together), expected)
        except torch.OutOfMemoryError:
            raise
        except FAILURES as error:
            problem = described(error)
        self.note(plan.layout, problem)
        return self.settled(plan)

    def possible(self, plan: Plan) -> Plan:
        """The plan, or the same requests in the cheapest layout of which nothing speaks against it so far."""
        without = {*self._without, *(layout for layout, problem in self._problems.items() if problem is not None)}
        if _reaches_window(self.model, plan):
            without.add("tree")
        if plan.layout in without:
            return self.possible(plan_requests(plan.requests, plan.owners, without=without))
        return plan

    def note(self, layout: Layout, problem: str | None) -> None:
        """Remember what is wrong with a layout that was tried, or that nothing is."""
        self._problems[layout] = problem
        if problem is not None:
            self.fallbacks.append(f"layout {layout}: {problem}; shared tokens are computed in another way, or again")


def trial_plans(plan: Plan) -> tuple[Plan, Plan]:
    """The shortest and the longest document of a plan, so that there is padding: alone, and in the plan's layout."""
    lengths = [len(row_of(request)) for request in plan.requests]
    chosen = {plan.owners[lengths.index(extreme(lengths))] for extreme in (min, max)}
    pairs = [pair for pair in zip(plan.requests, plan.owners, strict=True) if pair[1] in chosen]
    requests, owners = [request for request, _ in pairs], [owner for _, owner in pairs]
    return plan_requests(requests, owners, "plain"), plan_requests(requests, owners, plan.layout)


def difference(scored: Scored, expected: Scored) -> str | None:
    """How the logits of a layout differ from those of passes that share nothing; None where that is rounding."""
    logits_NV, expected_NV = scored.logits_NV, expected.logits_NV.float()
    difference_N = (logits_NV.float() - expected_NV).square().mean(-1).sqrt() / expected_NV.std(-1)
    allowed = _ROUNDING.get(logits_NV.dtype, _COARSE_ROUNDING)
    # Logits that are not finite without sharing either are no fault of the layout.
    if not expected_NV.isfinite().all() or float(difference_N.mean()) <= allowed:
        return None
    return f"logits differ by {float(difference_N.mean()):.2g} of their deviation, {allowed:g} is rounding"


def described(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"


def _reaches_window(model: Any, plan: Plan) -> bool:
    """Whether a tree is longer than a window of attention, of which a mask of one's own knows nothing."""
    config = getattr(model.config, "text_config", None) or model.config
    windows = [
        value
        for name, value in vars(config).items()
        if ("sliding_window" in name or "attention_chunk" in name) and isinstance(value, int) and value > 0
    ]
    return plan.layout == "tree" and plan.segments[0].ids_BL.shape[1] > min(windows, default=1 << 62)
