r"""Short regular expressions for many names of weights: by place in the block, with the numbers of the blocks.

``model.layers.0.self_attn.q_proj``, ``model.layers.1.self_attn.k_proj``, ... become
``model\.layers\.(0|1)\.self_attn\.(k_proj|q_proj)``.  Within a universe of names, exactly those given match.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable

# Stands for a number in a name; no name holds it.
_NUMBER = "#"
_ANY = r"\d+"


def patterns(names: Iterable[str], universe: Iterable[str]) -> list[str]:
    """Regular expressions, for ``re.fullmatch``, that match some names and no other name of a universe.

    Names with one number (of the block) or two (of block and expert) share expressions; others have their own.

    Args:
        names: That must match, all of the universe.
        universe: Every name.
    """
    chosen, known = _by_template(names), _by_template(universe)
    # (what stands before the last part, expression of the experts, blocks) -> last parts
    rules: dict[tuple[str, str, tuple[int, ...] | None], list[str]] = defaultdict(list)
    found = []
    for template, places in chosen.items():
        numbers = template.count(_NUMBER)
        if numbers not in (1, 2):
            found += [re.escape(_filled(template, place)) for place in sorted(places)]
            continue
        for experts, blocks in _by_experts(places, known[template]).items():
            parent, _, leaf = template.rpartition(".")
            every = {place[0] for place in known[template]}
            rules[parent, experts, None if blocks == every else tuple(sorted(blocks))].append(leaf)
    for (parent, experts, some), leaves in rules.items():
        numbers_of = [_ANY if some is None else _one_of(map(str, some)), experts]
        parts = [re.escape(part) for part in parent.split(".")]
        filled = [numbers_of.pop(0) if part == re.escape(_NUMBER) else part for part in parts]
        found.append(r"\.".join([*filled, _one_of(sorted(leaves))]))
    return found


def _by_template(names: Iterable[str]) -> dict[str, set[tuple[int, ...]]]:
    """Numbers in names by what is left of the names."""
    found: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for name in names:
        parts = name.split(".")
        template = ".".join(_NUMBER if part.isdecimal() else part for part in parts)
        found[template].add(tuple(int(part) for part in parts if part.isdecimal()))
    return found


def _by_experts(places: Collection[tuple[int, ...]], known: Collection[tuple[int, ...]]) -> dict[str, set[int]]:
    """Blocks by the expression for the experts that are chosen in them; "" where names have no second number."""
    found: dict[str, set[int]] = defaultdict(set)
    for block in {place[0] for place in places}:
        chosen = {place[1:] for place in places if place[0] == block}
        if chosen == {()}:
            found[""].add(block)
        elif chosen == {place[1:] for place in known if place[0] == block}:
            found[_ANY].add(block)
        else:
            found[_one_of(str(expert) for (expert,) in sorted(chosen))].add(block)
    return found


def _one_of(words: Iterable[str]) -> str:
    escaped = [re.escape(word) for word in words]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"


def _filled(template: str, numbers: tuple[int, ...]) -> str:
    left = list(numbers)
    return ".".join(str(left.pop(0)) if part == _NUMBER else part for part in template.split("."))
