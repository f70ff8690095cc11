"""Named rules that raise the bits of some weights above a base width, and what each of them gave to whom.

    bits_w = max(base_w, max over the rules r that select w of bits_r)

What a rule selects is in ``heuristics.py``.  A rule never lowers bits, so the order of the rules changes only how the
report counts: a weight that two rules select was given by the first that raised it to its width.
"""

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moeq.allocation.evidence import Evidence
from moeq.allocation.heuristics import NEED_EVIDENCE, RULES
from moeq.allocation.plan import PlanCost, plan_cost
from moeq.quant.spec import GridSpec, WeightShape


@dataclass(frozen=True)
class Rule:
    """A selection by name and the bits it gives.

    Attributes:
        name: A key of ``RULES``.
        bits: Width that every selected weight gets at least.
        options: Arguments of the selection.
    """

    name: str
    bits: int
    options: Mapping[str, Any]

    @property
    def needs_evidence(self) -> bool:
        """Whether the selection reads what a survey gathers."""
        return self.name in NEED_EVIDENCE

    @property
    def label(self) -> str:
        """One line for reports: name, options, bits."""
        options = ", ".join(f"{key} {value}" for key, value in self.options.items())
        return f"{self.name}{f' ({options})' if options else ''} at {self.bits}"

    def apply(self, weights: Sequence[WeightShape], evidence: Evidence | None = None) -> set[str]:
        """Names of the selected weights; raises ValueError where nothing can be selected or evidence is missing."""
        if evidence is None and self.needs_evidence:
            raise ValueError(f"rule {self.name} needs evidence; put the callback Survey before BitAllocation")
        try:
            return RULES[self.name](weights, evidence, **self.options)
        except ValueError as error:
            raise ValueError(f"rule {self.name}: {error}") from error


@dataclass(frozen=True)
class RuleEffect:
    """What one rule did.

    Attributes:
        rule: Its label.
        selected: Names of the weights it selects.
        raised: Those whose bits it raised, as no earlier rule had given them as many.
        before: Cost of the plan before it; the difference to ``after`` is its budget.
        after: Cost of the plan after it.
    """

    rule: str
    selected: tuple[str, ...]
    raised: tuple[str, ...]
    before: PlanCost
    after: PlanCost


def apply_rules(
    base: Mapping[str, GridSpec],
    rules: Sequence[Rule],
    weights: Sequence[WeightShape],
    evidence: Evidence | None,
    fixed: Collection[str] = (),
) -> tuple[dict[str, GridSpec], list[RuleEffect]]:
    """Raise the bits of a base plan by the rules, in order, but for ``fixed``; returns it and what each rule did."""
    plan, effects = dict(base), []
    for rule in rules:
        selected = rule.apply(weights, evidence)
        free = selected - set(fixed)
        raised = [w.name for w in weights if w.name in free and plan[w.name].bits < rule.bits]
        before = plan_cost(plan, weights)
        plan |= {name: plan[name].with_bits(rule.bits) for name in raised}
        ordered = tuple(w.name for w in weights if w.name in selected)
        effects.append(RuleEffect(rule.label, ordered, tuple(raised), before, plan_cost(plan, weights)))
    return plan, effects


def make_rule(spec: Mapping[str, Any]) -> Rule:
    """A rule from its form in YAML, ``{rule: first_blocks, num: 2, bits: 4}``.

    Raises:
        ValueError: Unknown rule, unknown, missing or wrongly typed option; the possible ones are named.
    """
    options = dict(spec)
    name, bits = options.pop("rule", None), options.pop("bits", None)
    if name not in RULES:
        raise ValueError(f"rule ({name}) must be one of {', '.join(sorted(RULES))}")
    if not isinstance(bits, int):
        raise ValueError(f"rule {name}: bits ({bits}) must be a whole number, the width it gives; add for example 4")
    parameters = dict(list(inspect.signature(RULES[name]).parameters.items())[2:])
    hints = get_type_hints(RULES[name])
    for key, value in options.items():
        if key not in parameters:
            known = ", ".join(parameters) or "none"
            raise ValueError(f"rule {name} has no option {key!r}; it takes bits and: {known}")
        if not _matches(value, hints[key]):
            raise ValueError(f"rule {name}: {key} ({value!r}) must be {_name_of(hints[key])}")
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in options]
    if missing:
        raise ValueError(f"rule {name} needs {missing[0]} ({_name_of(hints[missing[0]])}); add it")
    return Rule(name, bits, options)


def _matches(value: Any, hint: Any) -> bool:
    """Whether a YAML value fits the annotation of an option."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if args := get_args(hint):
        return any(_matches(value, arg) for arg in args)
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float)) if hint is float else isinstance(value, hint)


def _name_of(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    parts = [arg for arg in get_args(hint) if arg is not type(None)]
    return (
        " or ".join(map(_name_of, parts)) if parts else {int: "a whole number", float: "a number", str: "a text"}[hint]
    )
