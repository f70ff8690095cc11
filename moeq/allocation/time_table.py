"""Seconds of products with packed weights, measured on one machine (``python -m moeq.timing``), and those of a plan.

    milliseconds of a token = 1000 sum_w active share_w seconds(choice_w, shape_w)

over the quantized weights: attention and shared experts always, routed experts by the share of tokens that use them.
What else a token takes (attention itself, norms, routers, the head, Python between products) no plan changes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moeq.allocation.plan import Choice, planned
from moeq.quant.spec import GridSpec, WeightShape

TABLE_VERSION = 1
COMMAND = "python -m moeq.timing"


@dataclass(frozen=True)
class Machine:
    """What decides how long a product takes.

    Attributes:
        processor: Its name.
        capability: Instructions that torch uses on it.
        torch: Its version.
        threads: Of torch.
        dtype: Of activations.
    """

    processor: str
    capability: str
    torch: str
    threads: int
    dtype: str

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.processor} ({self.capability}), torch {self.torch}, {threads}, {self.dtype}"


def this_machine(dtype: torch.dtype) -> Machine:
    """The one that this runs on."""
    return Machine(
        _processor(), torch.backends.cpu.get_cpu_capability(), str(torch.__version__), torch.get_num_threads(),
        str(dtype).removeprefix("torch."),
    )  # fmt: skip


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    if (name := next(names, "")) != "":
        return name
    import platform

    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class TimeTable:
    """Seconds of one product by what is multiplied.

    Attributes:
        machine: Where they were measured.
        symmetric: Whether uniform grids had no zero points.
        room: Whether weights had more memory than their files, see ``moeq.checkpoint.prepare``.
        seconds: By (label of the choice, out features, in features, rows of the input).
    """

    machine: Machine
    symmetric: bool
    room: bool
    seconds: Mapping[tuple[str, int, int, int], float]

    def of(self, weight: WeightShape, grid: GridSpec, num_rows: int = 1) -> float:
        """Seconds of a product with a weight on a grid.

        Raises:
            ValueError: They were not measured.
        """
        label = Choice.of(grid).label
        if not grid.is_named and grid.symmetric != self.symmetric:
            kind, other = ("symmetric grids", "has zero points") if self.symmetric else ("zero points", "is symmetric")
            raise ValueError(
                f"times are of {kind}, and the grid of {weight.name} {other}; measure again with --grid "
                f"{'full_range' if grid.symmetric else 'uniform'}: {COMMAND} --help"
            )
        key = label, weight.out_features, weight.in_features, num_rows
        if key not in self.seconds:
            known = ", ".join(dict.fromkeys(one for one, *rest in self.seconds if tuple(rest) == key[1:]))
            shape = f"{weight.out_features} x {weight.in_features}"
            raise ValueError(
                f"times have no {label} for weights of {shape} such as {weight.name} (of this shape they have: "
                f"{known or 'nothing'}); measure the same model with --choices {label}: {COMMAND} --help"
            )
        return self.seconds[key]

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        rows = [
            {"choice": label, "shape": [out_features, in_features], "rows": num_rows, "seconds": seconds}
            for (label, out_features, in_features, num_rows), seconds in self.seconds.items()
        ]
        machine, settings = asdict(self.machine), {"symmetric": self.symmetric, "room": self.room}
        return {"version": TABLE_VERSION, "machine": machine, **settings, "products": rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TimeTable":
        """The inverse; raises ValueError for another version, a missing part, or times that are none."""
        try:
            if data["version"] != TABLE_VERSION:
                raise ValueError(f"version ({data['version']}) must be {TABLE_VERSION}; measure again")
            found = {(row["choice"], *row["shape"], row["rows"]): row["seconds"] for row in data["products"]}
            if wrong := [seconds for seconds in found.values() if not 0 < seconds < float("inf")]:
                raise ValueError(f"seconds ({wrong[0]}) must be positive; measure again")
            return cls(Machine(**data["machine"]), data["symmetric"], data["room"], found)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no table that moeq wrote ({error!r}); measure again") from error


def read_times(path: Path, *, served_elsewhere: bool = False) -> TimeTable:
    """Read a table.

    Args:
        path: The file.
        served_elsewhere: Whether it may be of another machine than this one.

    Raises:
        ValueError: There is none, it cannot be read, or it is of another machine.
    """
    if not path.is_file():
        raise ValueError(f"no times at {path}; measure them: {COMMAND} --help")
    try:
        table = TimeTable.from_json(json.loads(path.read_text(encoding="utf8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    here = this_machine(torch.bfloat16)
    for what in ("processor", "capability", "torch"):
        theirs, ours = getattr(table.machine, what), getattr(here, what)
        if theirs != ours and not served_elsewhere:
            raise ValueError(
                f"{path} is of another machine ({what} {theirs}, here {ours}); measure here: {COMMAND} --help, or "
                "say served_elsewhere: true where the result is served on that one"
            )
    return table


def plan_milliseconds(plan: Mapping[str, GridSpec], weights: Sequence[WeightShape], times: TimeTable) -> float:
    """Milliseconds that one token spends on products with the weights of a plan; kept weights count for nothing.

    Raises:
        ValueError: Some were not measured.
    """
    return 1e3 * sum(w.active_share * times.of(w, plan[w.name]) for w in planned(plan, weights))
