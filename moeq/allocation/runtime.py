"""What the runtime that serves a model reads: which weights share a type, which grids have one, and its true size.

``research``   every weight on a grid of its own; moeq's packed checkpoint reads any.
``llama.cpp``  GGUF: all experts of one projection and block are one tensor of one type.
``mlx``        all experts of one projection and block are one layer of one type.
``vllm``       one scheme for all experts of a block, whose first one it looks up, and one for linears that it fuses
               (q, k, v; gate, up).
``sglang``     the same, and types of 4 and 8 bits only, none of grids with a name.
``gptqmodel``  one type per routed expert.

Weights that must share a type form a unit, which an allocator gives one choice.  The types, *carriers*, are those of
``moeq.quant.carrier``: a grid costs what its carrier takes, so 3 bits in 4-bit blocks of 32 cost 4.5 bits a weight.
"""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from moeq.allocation.plan import Choice, storage_bits
from moeq.quant.carrier import MERGED_LINEARS, Carrier, CarrierMode, FormatName, choose_carrier
from moeq.quant.spec import GridSpec, WeightShape

RuntimeName = Literal["research", "llama.cpp", "vllm", "sglang", "mlx", "gptqmodel"]


@dataclass(frozen=True)
class Runtime:
    """One runtime.

    Attributes:
        name: Its name.
        format: Of the files that it reads; None is moeq's own, which holds every grid as it is.
        key: Weights of equal key share a type.
        bits: Widths of the types that it computes with; None is all of the format.
        named: Whether it computes with the grids of the format that have a name.
    """

    name: RuntimeName
    format: FormatName | None
    key: Callable[[WeightShape], Hashable]
    bits: frozenset[int] | None = None
    named: bool = True

    def carrier(self, grid: GridSpec, in_features: int, mode: CarrierMode = "exact") -> Carrier:
        """The type of its files that holds a grid; ``format`` must not be None.

        Raises:
            ValueError: The groups do not divide the in-features, the format has no type, or the runtime does not read
                that one.
        """
        assert self.format is not None
        return _carrier(self, self.format, grid, in_features, mode)

    def holds(self, grid: GridSpec, in_features: int, mode: CarrierMode = "exact") -> bool:
        """Whether a weight can be on a grid."""
        try:
            if self.format is None:
                grid.num_groups(in_features)
            else:
                self.carrier(grid, in_features, mode)
        except ValueError:
            return False
        return True

    def file_bits(self, weight: WeightShape, grid: GridSpec, mode: CarrierMode = "exact") -> int:
        """Bits of a weight in its files: codes, scales and zero points; raises ValueError where it cannot read it."""
        if self.format is None:
            return sum(storage_bits(weight, grid))
        try:
            found = self.carrier(grid, weight.in_features, mode)
        except ValueError as error:
            raise ValueError(f"{weight.name}: {self.name} cannot read {_choice(grid).label}: {error}") from error
        return found.num_bits(weight.out_features, weight.in_features)


@lru_cache(1 << 12)
def _carrier(runtime: Runtime, name: FormatName, grid: GridSpec, in_features: int, mode: CarrierMode) -> Carrier:
    grid.num_groups(in_features)  # raises where they do not divide
    found = choose_carrier(name, grid, in_features, mode)
    if runtime.bits is not None and found.bits not in runtime.bits:
        widths = ", ".join(map(str, sorted(runtime.bits)))
        raise ValueError(f"{name} ({mode}) has it in {found.bits} bits, and {runtime.name} reads {widths}")
    if grid.is_named and not runtime.named:
        raise ValueError(f"{runtime.name} was not seen to compute with {found.name} of {name}; choose a uniform grid")
    return found


def _by_expert(weight: WeightShape) -> Hashable:
    return weight.name if weight.expert is None else weight.name.rpartition(".")[0]


def _by_projection(weight: WeightShape) -> Hashable:
    return weight.name if weight.expert is None else (weight.block, weight.linear)


def _by_fused_module(weight: WeightShape) -> Hashable:
    if weight.expert is not None:
        return weight.block
    parent, _, leaf = weight.name.rpartition(".")
    return parent, MERGED_LINEARS.get(leaf, leaf)


# vLLM computes 4 and 8 bits, NVFP4 and MXFP4 by Marlin, 2 bits by Humming; of SGLang the integers of Marlin are known.
RUNTIMES: dict[RuntimeName, Runtime] = {
    "research": Runtime("research", None, lambda weight: weight.name),
    "llama.cpp": Runtime("llama.cpp", "gguf", _by_projection),
    "vllm": Runtime("vllm", "compressed-tensors", _by_fused_module, frozenset({2, 4, 8})),
    "sglang": Runtime("sglang", "compressed-tensors", _by_fused_module, frozenset({4, 8}), named=False),
    "mlx": Runtime("mlx", "mlx", _by_projection),
    "gptqmodel": Runtime("gptqmodel", "gptq", _by_expert),
}


def find_runtime(name: str) -> Runtime:
    """A runtime by name; raises ValueError for any other."""
    if name not in RUNTIMES:
        raise ValueError(f"runtime ({name}) must be one of {', '.join(get_args(RuntimeName))}")
    return RUNTIMES[name]


def shared_width_units(weights: Sequence[WeightShape], runtime: Runtime) -> list[tuple[WeightShape, ...]]:
    """Weights that must share a type, in the order of the first of each unit."""
    units: dict[Hashable, list[WeightShape]] = {}
    for weight in weights:
        units.setdefault(runtime.key(weight), []).append(weight)
    return [tuple(unit) for unit in units.values()]


def check_kept(kept: Collection[str], weights: Sequence[WeightShape], runtime: Runtime) -> None:
    """Raise ValueError where some of the weights of a unit are kept as they are and others are not."""
    for unit in shared_width_units(weights, runtime) if kept else ():
        left = [weight.name for weight in unit if weight.name in kept]
        if 0 < len(left) < len(unit):
            raise ValueError(
                f"{left[0]} is kept as it is, and {runtime.name} reads these {len(unit)} weights in one way; keep all "
                "of them or none, or use research"
            )


def check_runtime(
    plan: Mapping[str, GridSpec], weights: Sequence[WeightShape], runtime: Runtime, mode: CarrierMode = "exact"
) -> None:
    """Raise ValueError where the runtime cannot read a plan, naming the first weight that stands against it.

    Grids of one unit may differ as long as one type holds them all.
    """
    check_kept({weight.name for weight in weights if weight.name not in plan}, weights, runtime)
    if runtime.format is None:
        return
    for unit in shared_width_units([weight for weight in weights if weight.name in plan], runtime):
        for weight in unit:
            runtime.file_bits(weight, plan[weight.name], mode)  # raises by name
        first, *others = ((weight, runtime.carrier(plan[weight.name], weight.in_features, mode)) for weight in unit)
        for weight, carrier in others:
            if carrier != first[1]:
                raise ValueError(
                    f"{weight.name} has {_choice(plan[weight.name]).label} ({carrier.name}), {first[0].name} has "
                    f"{_choice(plan[first[0].name]).label} ({first[1].name}): {runtime.name} reads one type for these "
                    f"{len(unit)} weights; make them equal, or use research"
                )


def _choice(grid: GridSpec) -> Choice:
    return Choice.of(grid)
