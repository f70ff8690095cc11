"""Per-weight rules: patterns over canonical names that leave weights alone, or say their bits or group size.

Patterns are those of a shell: ``*`` any text, ``?`` one character, ``[ab]`` one of some.  They are read in their order,
and of those that match a weight the last one wins: it overrides what earlier ones said of the same thing, so that
``{pattern: "*", keep: true}, {pattern: "*.experts.*", bits: 4}`` quantizes the experts alone.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import translate

from moeq.quant.kinds import NAMED, Kind
from moeq.quant.spec import MAX_BITS, MIN_BITS, GridSpec

UNIFORM_BESIDE_TWO_LEVEL = 32  # in-features that share a scale


@dataclass(frozen=True)
class Pattern:
    """What some weights get.

    Attributes:
        pattern: Of canonical names, such as "*.self_attn.*".
        bits: Bits of these weights; null says nothing of them.
        group_size: In-features that share a scale, 0 for one scale per output channel; null says nothing of them.
        keep: Leave these weights as they are.
        grid: A two-level or table grid, such as "q6_k"; null says nothing of it.
    """

    pattern: str
    bits: int | None = None
    group_size: int | None = None
    keep: bool = False
    grid: Kind | None = None

    def __post_init__(self) -> None:
        uniform = self.bits is not None or self.group_size is not None
        told = uniform or self.grid is not None
        if told == self.keep:
            what = "says both that weights are kept and how they are quantized" if told else "says nothing"
            raise ValueError(f"pattern {self.pattern!r} {what}; give bits, group_size or both, or keep: true")
        if self.grid is not None and (uniform or self.grid not in NAMED):
            raise ValueError(
                f"pattern {self.pattern!r}: grid ({self.grid}) must be one of {', '.join(NAMED)}, without bits and "
                "group_size, which follow from it; give bits and group_size alone for a uniform grid"
            )
        if self.bits is not None and not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(
                f"pattern {self.pattern!r}: bits ({self.bits}) must be between {MIN_BITS} and {MAX_BITS}; keep: true "
                "leaves weights as they are"
            )
        if self.group_size is not None and self.group_size < 0:
            raise ValueError(
                f"pattern {self.pattern!r}: group_size ({self.group_size}) must be positive, or 0 for one scale per "
                "channel"
            )


@dataclass(frozen=True)
class Wish:
    """What all patterns together say of one weight; None where they say nothing, 0 as in ``Pattern``.

    Bits or a group size take back a two-level grid that an earlier pattern gave, and the other way round.
    """

    bits: int | None = None
    group_size: int | None = None
    keep: bool = False
    two_level: Kind | None = None

    def after(self, pattern: Pattern) -> "Wish":
        """What is said once one more pattern has matched."""
        if pattern.keep:
            return Wish(keep=True)
        if pattern.grid is not None:
            return Wish(two_level=pattern.grid)
        bits = self.bits if pattern.bits is None else pattern.bits
        return Wish(bits, self.group_size if pattern.group_size is None else pattern.group_size)

    def grid(self, like: GridSpec) -> GridSpec:
        """A grid with the bits and group size that are said, else those of another.

        Where the other one has a name, what is said is on a full-range grid, in groups of 32 unless a size is said: the
        blocks of the runtime for which grids with names are made.
        """
        if self.two_level is not None:
            return GridSpec.of_kind(self.two_level, clip_search=like.clip_search)
        if like.is_named and (self.bits is not None or self.group_size is not None):
            like = GridSpec(like.bits, UNIFORM_BESIDE_TWO_LEVEL, True, like.clip_search, "full_range")
        bits = like.bits if self.bits is None else self.bits
        group_size = like.group_size if self.group_size is None else self.group_size or None
        return replace(like, group_size=group_size).with_bits(bits)


def match_patterns(patterns: Sequence[Pattern], names: Collection[str]) -> dict[str, Wish]:
    """What patterns say of weights, by name; those that none matches are left out.

    Raises:
        ValueError: A pattern matches no weight (near names are given), or all weights are kept.
    """
    wishes: dict[str, Wish] = {}
    for pattern in patterns:
        matches = re.compile(translate(pattern.pattern)).match
        matched = [name for name in names if matches(name)]
        if not matched:
            raise ValueError(_unmatched(pattern.pattern, names))
        wishes |= {name: wishes.get(name, Wish()).after(pattern) for name in matched}
    if len(wishes) == len(names) and all(wish.keep for wish in wishes.values()):
        raise ValueError(f"the patterns keep all {len(names)} weights, which leaves nothing to quantize; keep fewer")
    return wishes


def kinds_of(names: Iterable[str]) -> dict[str, int]:
    """How many weights there are of each kind: a name with ``*`` for its indices, which is a pattern of all of them."""
    kinds: dict[str, int] = {}
    for name in names:
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def _unmatched(pattern: str, names: Collection[str]) -> str:
    kinds = list(kinds_of(names))
    near = get_close_matches(pattern, kinds, n=3, cutoff=0.3) or kinds[:3]
    return (
        f"pattern {pattern!r} matches none of the {len(names)} weights that can be quantized (no routers, no norms); "
        f"near are {', '.join(near)}; correct it or leave it out"
    )
