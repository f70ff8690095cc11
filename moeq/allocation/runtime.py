"""Runtime constraints: which weights must share a width, and which widths the runtime that serves the model reads.

``research``         every weight has its own width; moeq's own packed checkpoint reads any.
``gptqmodel``        one width per routed expert; GPTQModel loads experts of different widths.
``vllm``             one width for all experts of a block, and one for linears that vLLM fuses (q, k, v; gate, up):
                     it looks up the scheme of expert 0 and gives it to all.
``uniform_experts``  one width for the routed experts of the whole model: what most published checkpoints have.

Weights that must share a width form a unit, which an allocator gives one choice.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from moeq.allocation.plan import Choice
from moeq.quant.spec import GridSpec, WeightShape

RuntimeName = Literal["research", "gptqmodel", "vllm", "uniform_experts"]
# Linears that vLLM merges into one: q, k and v; the two first projections of multi-head latent attention; gate and up.
VLLM_FUSED = {
    "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv",
    "q_a_proj": "qkv_a", "kv_a_proj_with_mqa": "qkv_a",
    "gate_proj": "gate_up", "up_proj": "gate_up",
}  # fmt: skip


@dataclass(frozen=True)
class Runtime:
    """One runtime.

    Attributes:
        name: Its name.
        bits: Widths it reads; None is every width of the grid.
        group_sizes: Group sizes it reads (None among them is one scale per channel); None is every size.
        key: Weights of equal key share a width.
    """

    name: RuntimeName
    bits: frozenset[int] | None
    group_sizes: frozenset[int | None] | None
    key: Callable[[WeightShape], Hashable]

    def admits(self, choice: Choice) -> bool:
        """Whether it reads this width and group size."""
        return (self.bits is None or choice.bits in self.bits) and (
            self.group_sizes is None or choice.group_size in self.group_sizes
        )


def _by_expert(weight: WeightShape) -> Hashable:
    return weight.name if weight.expert is None else weight.name.rpartition(".")[0]


def _by_fused_module(weight: WeightShape) -> Hashable:
    if weight.expert is not None:
        return weight.block
    parent, _, leaf = weight.name.rpartition(".")
    return parent, VLLM_FUSED.get(leaf, leaf)


def _by_structure(weight: WeightShape) -> Hashable:
    return weight.name if weight.expert is None else None


# GPTQModel packs 5, 6 and 7 bits only in a layout of its own.  vLLM reads 4 and 8 bits by Marlin, 2 by Humming kernels.
RUNTIMES: dict[RuntimeName, Runtime] = {
    "research": Runtime("research", None, None, lambda weight: weight.name),
    "gptqmodel": Runtime(
        "gptqmodel", frozenset({2, 3, 4, 8}), frozenset({None, 16, 32, 64, 128, 256, 512, 1024}), _by_expert
    ),
    "vllm": Runtime("vllm", frozenset({2, 4, 8}), frozenset({None, 32, 64, 128}), _by_fused_module),
    "uniform_experts": Runtime("uniform_experts", None, None, _by_structure),
}


def find_runtime(name: str) -> Runtime:
    """A runtime by name; raises ValueError for any other."""
    if name not in RUNTIMES:
        raise ValueError(f"runtime ({name}) must be one of {', '.join(get_args(RuntimeName))}")
    return RUNTIMES[name]


def shared_width_units(weights: Sequence[WeightShape], runtime: Runtime) -> list[tuple[WeightShape, ...]]:
    """Weights that must share a width, in the order of the first of each unit."""
    units: dict[Hashable, list[WeightShape]] = {}
    for weight in weights:
        units.setdefault(runtime.key(weight), []).append(weight)
    return [tuple(unit) for unit in units.values()]


def check_runtime(plan: Mapping[str, GridSpec], weights: Sequence[WeightShape], runtime: Runtime) -> None:
    """Raise ValueError where the runtime cannot read a plan, naming the first weight that stands against it."""
    for unit in shared_width_units(weights, runtime):
        kept = [weight.name for weight in unit if weight.name not in plan]
        if 0 < len(kept) < len(unit):
            raise ValueError(
                f"{kept[0]} is kept as it is, and {runtime.name} reads these {len(unit)} weights in one way; keep all "
                "of them or none, or use research"
            )
        if kept:
            continue
        first = _choice(plan[unit[0].name])
        for weight in unit:
            choice = _choice(plan[weight.name])
            if not runtime.admits(choice):
                raise ValueError(
                    f"{weight.name}: {runtime.name} cannot read {choice.label}; it reads {_readable(runtime)}"
                )
            if choice != first:
                raise ValueError(
                    f"{weight.name} has {choice.label}, {unit[0].name} has {first.label}: "
                    f"{runtime.name} reads one width for these {len(unit)} weights; make them equal, or use research"
                )


def _choice(grid: GridSpec) -> Choice:
    return Choice(grid.bits, grid.group_size)


def _readable(runtime: Runtime) -> str:
    bits = "2 to 8" if runtime.bits is None else ", ".join(map(str, sorted(runtime.bits)))
    sizes = sorted(size for size in runtime.group_sizes or () if size is not None)
    return f"{bits} bits" + (f" in groups of {', '.join(map(str, sizes))} or per channel" if sizes else "")
