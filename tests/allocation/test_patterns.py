"""Patterns over names: which weights they keep, and what grids they give to others."""

from fnmatch import fnmatchcase

import pytest

from moeq.allocation.patterns import Pattern, Wish, kinds_of, match_patterns
from moeq.quant.spec import GridSpec

NAMES = [
    f"model.layers.{layer}.{leaf}"
    for layer in range(2)
    for leaf in ("self_attn.q_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj", "mlp.experts.0.down_proj")
]
LISTS = [
    [Pattern("*", keep=True), Pattern("*.experts.*", bits=4)],
    [Pattern("*.experts.*", bits=4), Pattern("*", keep=True), Pattern("*.0.*", group_size=0)],
    [Pattern("*.self_attn.*", bits=8), Pattern("model.layers.0.*", group_size=32), Pattern("*.q_proj", bits=3)],
    [Pattern("model.layers.?.mlp.experts.[01].up_proj", group_size=0, bits=2)],
]


def reference_wishes(patterns: list[Pattern], names: list[str]) -> dict[str, tuple[int | None, int | None, bool]]:
    """Name by name, from the last pattern backwards, until everything is said."""
    found = {}
    for name in names:
        if not (said := [each for each in patterns if fnmatchcase(name, each.pattern)]):
            continue
        since_keep: list[Pattern] = []
        for each in reversed(said):
            if each.keep:
                break
            since_keep.append(each)
        bits = next((each.bits for each in since_keep if each.bits is not None), None)
        group_size = next((each.group_size for each in since_keep if each.group_size is not None), None)
        found[name] = (bits, group_size, said[-1].keep)
    return found


@pytest.mark.parametrize("patterns", LISTS)
def test_the_last_pattern_that_matches_wins(patterns: list[Pattern]) -> None:
    wishes = match_patterns(patterns, NAMES)
    found = {name: (wish.bits, wish.group_size, wish.keep) for name, wish in wishes.items()}
    assert found == reference_wishes(patterns, NAMES)


def test_a_wish_changes_of_a_grid_what_it_says() -> None:
    like = GridSpec(3, 64, symmetric=True)
    assert Wish(bits=8).grid(like) == GridSpec(8, 64, symmetric=True)
    assert Wish(group_size=32).grid(like) == GridSpec(3, 32, symmetric=True)
    assert Wish(group_size=0).grid(like) == GridSpec(3, None, symmetric=True)


def test_kinds_are_names_without_indices_and_patterns_of_all_of_them() -> None:
    kinds = kinds_of(NAMES)
    assert kinds["model.layers.*.mlp.experts.*.up_proj"] == 4
    assert sum(kinds.values()) == len(NAMES)
    for kind, num in kinds.items():
        assert sum(fnmatchcase(name, kind) for name in NAMES) == num


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (lambda: [Pattern("*.self_atn.*", bits=4)], r"'\*\.self_atn\.\*' matches none of the 8 .*near are .*self_attn"),
        (lambda: [Pattern("*", keep=True)], "keep all 8 weights, which leaves nothing to quantize"),
        (lambda: [Pattern("*.q_proj")], "'.*q_proj' says nothing; give bits, group_size or both, or keep: true"),
        (lambda: [Pattern("*", bits=4, keep=True)], "says both that weights are kept and how"),
        (lambda: [Pattern("*", bits=16)], r"bits \(16\) must be between 1 and 8; keep: true leaves"),
        (lambda: [Pattern("*", group_size=-1)], r"group_size \(-1\) must be positive, or 0"),
    ],
)
def test_mistakes_are_named(patterns, message: str) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match=message):
        match_patterns(patterns(), NAMES)
