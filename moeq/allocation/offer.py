"""What each weight may get under a runtime, and what that takes of a budget."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from moeq.allocation.constraints import BudgetUnit, Constraints
from moeq.allocation.plan import Choice, storage_bits
from moeq.allocation.price import symmetry_note
from moeq.allocation.runtime import Runtime, check_runtime, find_runtime
from moeq.quant.carrier import Carrier
from moeq.quant.spec import GridSpec, WeightShape

# Parts of a millisecond: times are counted in nanoseconds.
PER_MILLISECOND = 1_000_000


@dataclass(frozen=True)
class Offer:
    """What each weight may get, and at what size.

    Attributes:
        constraints: What a plan has to keep to.
        runtime: Whose files.
        grids: Grids of the choices that some weight can have there, from small to large.
        types: Types that fixed weights give the units that they are part of, by the runtime's key.
    """

    constraints: Constraints
    runtime: Runtime
    grids: Mapping[Choice, GridSpec]
    types: Mapping[Hashable, Carrier]

    @classmethod
    def of(cls, weights: Sequence[WeightShape], constraints: Constraints) -> "Offer":
        """Raises ValueError where the runtime can hold no choice at all, or not the fixed weights."""
        runtime, mode = find_runtime(constraints.runtime), constraints.carrier
        grids = {choice: choice.grid(constraints.like) for choice in sorted({*constraints.choices})}
        if runtime.format is None:
            return cls(constraints, runtime, grids, {})
        told, sizes = [w for w in weights if w.name in constraints.fixed], {w.in_features for w in weights}
        check_runtime(constraints.fixed, told, runtime, mode)
        types = {runtime.key(w): runtime.carrier(constraints.fixed[w.name], w.in_features, mode) for w in told}
        held = {c: grid for c, grid in grids.items() if any(runtime.holds(grid, size, mode) for size in sizes)}
        offer = cls(constraints, runtime, held, types)
        if not held and len(told) < len(weights):
            labels, any_grid = ", ".join(choice.label for choice in grids), next(iter(grids.values()))
            try:
                runtime.carrier(any_grid, min(sizes), mode)
            except ValueError as error:
                reason = f"{error}{offer.hint(weights)}"
            raise ValueError(f"{runtime.name} reads none of the choices {labels}: {reason}")
        return offer

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Choices that some weight can have, from small to large."""
        return tuple(self.grids)

    def fits(self, weight: WeightShape, choice: Choice) -> bool:
        """Whether a weight may get a choice: least bits, group size, a type, and that of fixed weights of its unit."""
        asked, grid = self.constraints, self.grids[choice]
        if choice.bits < asked.minimum_bits.get(weight.name, 0):
            return False
        if asked.group_sizes.get(weight.name, choice.group_size) != choice.group_size:
            return False
        if not self.runtime.holds(grid, weight.in_features, asked.carrier):
            return False
        same = self.types.get(self.runtime.key(weight))
        return same is None or self.runtime.carrier(grid, weight.in_features, asked.carrier) == same

    def size(self, weight: WeightShape, grid: GridSpec, unit: BudgetUnit, denominator: int) -> int:
        """What a weight takes, in parts of a budget's unit."""
        if unit == "milliseconds":
            assert self.constraints.times is not None
            return round(PER_MILLISECOND * 1e3 * weight.active_share * self.constraints.times.of(weight, grid))
        if unit == "code_bits":
            return storage_bits(weight, grid)[0]
        bits = self.runtime.file_bits(weight, grid, self.constraints.carrier)
        return int(bits * exact_share(weight) * denominator) if unit == "active_bytes" else bits

    def refusal(self, unit: Sequence[WeightShape]) -> str:
        """Why there is no choice for a unit, by name."""
        asked, runtime = self.constraints, self.runtime
        alone = next((w for w in unit if not any(self.fits(w, choice) for choice in self.grids)), None)
        named = unit if alone is None else (alone,)
        who = named[0].name + (f" and {len(named) - 1} more that {runtime.name} reads as one" if alone is None else "")
        least = max(asked.minimum_bits.get(weight.name, 0) for weight in unit)
        sizes = {asked.group_sizes[weight.name] for weight in unit if weight.name in asked.group_sizes}
        why = f", which the patterns want to be {' and '.join(str(size or 0) for size in sizes)}" if sizes else ""
        if runtime.format is not None:
            why += f", in a type of {runtime.name}'s files ({asked.carrier})"
        if (same := self.types.get(runtime.key(unit[0]))) is not None:
            why += f", which must be {same.name}, that of weights beside it that have bits of their own"
        in_features = ", ".join(map(str, sorted({weight.in_features for weight in named})))
        return (
            f"{who}: none of the choices {', '.join(choice.label for choice in self.grids)} has at least {least} bits "
            f"and a group size that divides its in_features ({in_features})"
            f"{why}; add one{self.hint(unit)}"
        )

    def note(self, weights: Sequence[WeightShape]) -> str:
        """Where symmetric grids would be smaller, or nothing."""
        asked = self.constraints
        grids = ((w, choice.grid(asked.like)) for w in weights for choice in asked.choices)
        return symmetry_note(grids, self.runtime, asked.carrier)

    def hint(self, weights: Sequence[WeightShape]) -> str:
        """The note, to follow a message."""
        note = self.note(weights)
        return f"; {note}" if note else ""


def exact_share(weight: WeightShape) -> Fraction:
    """The active share k / E, exactly."""
    return Fraction(weight.active_share).limit_denominator(1 << 14)


def share_denominator(weights: Sequence[WeightShape]) -> int:
    """The least number that makes every active share whole."""
    return math.lcm(*{exact_share(weight).denominator for weight in weights})
