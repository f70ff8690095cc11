"""Heuristics of QuantMoE-Bench as selections of weights, and the controls beside each.

Source: arXiv 2406.08155, section 3: attention, shared experts, dense blocks, most-used experts, first blocks, kind of
linear, outlier-aware linear scorer, block importance predictor.  Each is a function from the weights of a model (and,
for some, the evidence of a survey) to names of weights; ``rules.py`` adds the width.

"First l blocks" counts every block, dense ones too, and means their MLP ("MoE block" in the paper) unless ``part`` is
"all"; similarities exist only for blocks with routed experts, so random blocks, their control, are drawn from those.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from moeq.allocation.evidence import Evidence
from moeq.quant.spec import WeightKind, WeightShape

Weights = Sequence[WeightShape]
BlockPart = Literal["mlp", "all"]
# (block, expert): a routed expert.
Expert = tuple[int, int]

RULES: dict[str, Callable[..., set[str]]] = {}
NEED_EVIDENCE: set[str] = set()


def rule(select: Callable[..., set[str]]) -> Callable[..., set[str]]:
    """Register a selection ``(weights, evidence, **options) -> names`` under its own name."""
    RULES[select.__name__] = select
    return select


def surveyed(select: Callable[..., set[str]]) -> Callable[..., set[str]]:
    """Mark a selection that reads evidence."""
    NEED_EVIDENCE.add(select.__name__)
    return select


# -- structures


@rule
def attention(weights: Weights, evidence: Evidence | None) -> set[str]:
    """Attention linears."""
    return {w.name for w in weights if w.kind == "attention"}


@rule
def shared(weights: Weights, evidence: Evidence | None) -> set[str]:
    """Linears of shared experts."""
    return {w.name for w in weights if w.kind == "shared"}


@rule
def dense(weights: Weights, evidence: Evidence | None) -> set[str]:
    """Linears of dense MLP blocks."""
    return {w.name for w in weights if w.kind == "dense"}


@rule
def linear(weights: Weights, evidence: Evidence | None, linear: str, kind: WeightKind = "routed") -> set[str]:
    """One type of linear: gate_proj, up_proj or down_proj of the routed experts, or of another structure."""
    found = {w.name for w in weights if w.linear == linear and w.kind == kind}
    if not found:
        known = sorted({w.linear for w in weights if w.kind == kind})
        raise ValueError(f"linear ({linear}) must be one of the {kind} linears of the model: {', '.join(known)}")
    return found


# -- experts


@surveyed
@rule
def most_used_experts(
    weights: Weights, evidence: Evidence, num: int | None = None, share: float | None = None,
    by: Literal["tokens", "affinity"] = "tokens", scope: Literal["block", "model"] = "block",
) -> set[str]:  # fmt: skip
    """Experts with the most tokens, or the largest sum of routing weights, of each block or of the whole model."""
    usage = evidence.tokens if by == "tokens" else evidence.affinity
    value: dict[Expert, float] = {}
    for w in weights:
        if w.expert is not None:
            path = w.name.rsplit(".", 2)[0]
            if path not in usage:
                raise ValueError(f"the survey has no {by} for {path}; it is of another model, make it again")
            value[w.block, w.expert] = float(usage[path][w.expert])
    # Ties go to the first expert.
    return _experts(weights, [_top(group, value, num, share) for group in _groups(value, scope)])


@rule
def random_experts(
    weights: Weights, evidence: Evidence | None, seed: int, num: int | None = None, share: float | None = None,
    scope: Literal["block", "model"] = "block",
) -> set[str]:  # fmt: skip
    """The control of ``most_used_experts``: as many experts, drawn at random."""
    generator = random.Random(seed)
    value = dict.fromkeys(sorted({(w.block, w.expert) for w in weights if w.expert is not None}), 0.0)
    groups = _groups(value, scope)
    return _experts(weights, [_draw(generator, group, num, share, "experts") for group in groups])


def _groups(experts: Iterable[Expert], scope: str) -> list[list[Expert]]:
    """The experts of each block, or all experts as one group."""
    ordered = sorted(experts)
    if scope == "model":
        return [ordered]
    return [[e for e in ordered if e[0] == block] for block in sorted({block for block, _ in ordered})]


def _experts(weights: Weights, chosen: Iterable[Sequence[Expert]]) -> set[str]:
    experts = {expert for group in chosen for expert in group}
    return {w.name for w in weights if w.expert is not None and (w.block, w.expert) in experts}


# -- blocks


@rule
def first_blocks(
    weights: Weights,
    evidence: Evidence | None,
    num: int | None = None,
    share: float | None = None,
    part: BlockPart = "mlp",
) -> set[str]:
    """The first blocks; ``share: 0.5, part: all`` with one bit more than the base is the depth split."""
    blocks = _blocks(weights)
    return _of_blocks(weights, blocks[: _count(num, share, len(blocks), "blocks")], part)


@rule
def last_blocks(
    weights: Weights,
    evidence: Evidence | None,
    num: int | None = None,
    share: float | None = None,
    part: BlockPart = "mlp",
) -> set[str]:
    """The last blocks."""
    blocks = _blocks(weights)
    return _of_blocks(weights, blocks[len(blocks) - _count(num, share, len(blocks), "blocks") :], part)


@rule
def random_blocks(
    weights: Weights, evidence: Evidence | None, seed: int, num: int | None = None, share: float | None = None,
    part: BlockPart = "mlp",
) -> set[str]:  # fmt: skip
    """Blocks with routed experts, drawn at random: the control of first, last and (least) similar blocks."""
    blocks = _blocks(w for w in weights if w.kind == "routed")
    return _of_blocks(weights, _draw(random.Random(seed), blocks, num, share, "blocks"), part)


@surveyed
@rule
def least_similar_blocks(
    weights: Weights, evidence: Evidence, num: int | None = None, share: float | None = None,
    by: Literal["measured", "predicted"] = "measured", part: BlockPart = "mlp",
) -> set[str]:  # fmt: skip
    """Blocks whose MLP turns its input most: least cosine similarity of input and output token."""
    similarity = _similarity(weights, evidence, by)
    return _of_blocks(weights, _top(sorted(similarity), {b: -s for b, s in similarity.items()}, num, share), part)


@surveyed
@rule
def most_similar_blocks(
    weights: Weights, evidence: Evidence, num: int | None = None, share: float | None = None,
    by: Literal["measured", "predicted"] = "measured", part: BlockPart = "mlp",
) -> set[str]:  # fmt: skip
    """The opposite of ``least_similar_blocks``, as the published scripts leave open which end gets the bits."""
    similarity = _similarity(weights, evidence, by)
    return _of_blocks(weights, _top(sorted(similarity), similarity, num, share), part)


def _similarity(weights: Weights, evidence: Evidence, by: str) -> dict[int, float]:
    """Similarity of each block with routed experts."""
    values_L = evidence.similarity_L if by == "measured" else evidence.predicted_similarity_L
    if values_L is None:
        remedy = "set predictor: true in" if by == "predicted" else "make it again with"
        raise ValueError(f"the survey holds no {by} similarity of blocks; {remedy} the callback Survey")
    return {block: float(values_L[block]) for block in _blocks(w for w in weights if w.kind == "routed")}


def _blocks(weights: Iterable[WeightShape]) -> list[int]:
    return sorted({w.block for w in weights})


def _of_blocks(weights: Weights, blocks: Sequence[int], part: str) -> set[str]:
    return {w.name for w in weights if w.block in blocks and (part == "all" or w.kind != "attention")}


# -- single linears


@surveyed
@rule
def top_scored(
    weights: Weights, evidence: Evidence, score: str, num: int | None = None, share: float | None = None,
    kind: WeightKind = "routed",
) -> set[str]:  # fmt: skip
    """The weights of a structure with the largest data-free score (``outlier`` is the scorer of the paper)."""
    if score not in evidence.scores:
        known = ", ".join(evidence.scores) or "none"
        raise ValueError(
            f"the survey holds no score {score!r} (it has: {known}); add it to scores of the callback Survey"
        )
    names = [w.name for w in weights if w.kind == kind]
    return set(_top(names, evidence.scores[score], num, share))


@rule
def random_linears(
    weights: Weights, evidence: Evidence | None, seed: int, num: int | None = None, share: float | None = None,
    kind: WeightKind = "routed",
) -> set[str]:  # fmt: skip
    """The control of ``top_scored``: as many weights, drawn at random."""
    names = [w.name for w in weights if w.kind == kind]
    return set(_draw(random.Random(seed), names, num, share, f"{kind} linears"))


def _top(items: Sequence[Any], value: Mapping[Any, float], num: int | None, share: float | None) -> list[Any]:
    """The items of largest value; ties go to the first."""
    return sorted(items, key=lambda item: -value[item])[: _count(num, share, len(items), "of them")]


def _draw(generator: random.Random, items: Sequence[Any], num: int | None, share: float | None, what: str) -> list[Any]:
    """Items at random; with the same seed more items are the fewer ones and others, as for the rules they control."""
    return generator.sample(items, len(items))[: _count(num, share, len(items), what)]


def _count(num: int | None, share: float | None, available: int, what: str) -> int:
    """How many to select: ``num``, or a share of those there are (rounded half up)."""
    if (num is None) == (share is None):
        raise ValueError(f"num ({num}) and share ({share}): give exactly one of them")
    if share is not None:
        if not 0 < share <= 1:
            raise ValueError(f"share ({share}) must be above 0 and at most 1; 0.25 is a quarter")
        return int(share * available + 0.5)
    assert num is not None
    if not 1 <= num <= available:
        raise ValueError(f"num ({num}) must be between 1 and {available}, as there are {available} {what}")
    return num
