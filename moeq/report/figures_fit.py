"""Figures of a run as pure functions from plain data to a matplotlib figure (nothing is shown or written here).

matplotlib is imported inside the functions: it is slow to import, and most commands draw nothing.  Figures are made
without pyplot, so they need no display and leave no global state behind.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_BLOCK = re.compile(r"\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
# The order of the data flow through a block; other names follow in alphabetical order.
_PARENT_ORDER = ("self_attn", "mlp", "shared_expert", "shared_experts", "experts")
_LINEAR_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_TICKS = 32
MAX_CELLS_WITH_TEXT = 256


def usage_heatmap(usage: Mapping[str, Tensor]) -> "Figure":
    """Share of each block's routed tokens that went to each expert, in percent; never used experts are crossed.

    Args:
        usage: Tokens per expert, [E], by path of the experts module; blocks may differ in E.
    """
    paths = sorted(usage, key=_block_of)
    num_experts = max(counts.numel() for counts in usage.values())
    share_LE = torch.full((len(paths), num_experts), float("nan"), dtype=torch.float64)
    for row, path in enumerate(paths):
        counts_E = usage[path].to("cpu", torch.float64)
        share_LE[row, : counts_E.numel()] = 100 * counts_E / counts_E.sum().clamp(min=1)
    figure, axes = _new_figure(num_experts, len(paths))
    image = axes.imshow(share_LE.numpy(), cmap="viridis", aspect="auto", vmin=0, interpolation="nearest")
    _label(axes.xaxis, list(range(num_experts)))
    _label(axes.yaxis, [_block_of(path) for path in paths])
    _write_cells(axes, share_LE)
    unused = (share_LE == 0).nonzero()
    if len(unused):
        axes.scatter(unused[:, 1], unused[:, 0], marker="x", color="tab:red", label=f"never used ({len(unused)})")
        figure.legend(loc="outside lower right", frameon=False)
    even = 100 / num_experts
    bar = figure.colorbar(image, ax=axes, label="% of routed tokens")
    bar.ax.axhline(even, color="white", linewidth=1.5)
    axes.set(
        title=f"Share of each block's routed tokens by expert (even: {even:.3g}%)", xlabel="expert", ylabel="block"
    )
    return figure


def error_by_block(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Relative error of each linear by block: a line through the means over experts, a band from least to greatest.

    Args:
        rows: One per quantized weight, with ``weight`` (its canonical name), ``block`` and ``relative_error``.
    """
    blocks = sorted({int(row["block"]) for row in rows})
    figure, axes = _new_figure(max(22, len(blocks)), 12)
    by_linear: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        of_blocks = by_linear.setdefault(_linear_of(row["weight"]), {})
        of_blocks.setdefault(int(row["block"]), []).append(float(row["relative_error"]))
    for index, linear in enumerate(_ordered(by_linear)):
        errors = by_linear[linear]
        present = sorted(errors)
        means = [sum(errors[b]) / len(errors[b]) for b in present]
        color = f"C{index % 10}"
        axes.plot(present, means, marker="o", markersize=4, color=color, label=linear)
        lows, highs = [min(errors[b]) for b in present], [max(errors[b]) for b in present]
        axes.fill_between(present, lows, highs, color=color, alpha=0.12, linewidth=0)
    axes.set_xticks(blocks[:: _thinning(len(blocks))])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set(
        title=f"Quantization error by block: mean and range over {len(rows):,} weights",
        xlabel="block",
        ylabel="relative error of the output",
    )
    figure.legend(loc="outside right upper", frameon=False, title="linear")
    return figure


def bits_map(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Bits of every weight: blocks by linears, and for each linear of the routed experts blocks by experts.

    Args:
        rows: One per quantized weight, with ``weight`` (its canonical name), ``block`` and ``bits``.
    """
    from matplotlib.figure import Figure

    panels = _bits_by_panel(rows)
    blocks = sorted({int(row["block"]) for row in rows})
    low, high = int(min(row["bits"] for row in rows)), int(max(row["bits"] for row in rows))
    # One width for all weights would otherwise be a colour scale of no extent.
    high = max(high, low + 1)
    widths = [max(4, len(columns)) for columns, _ in panels.values()]
    size = (min(20.0, max(7.0, 2.5 + 0.28 * sum(widths))), min(12.0, max(3.4, 2.2 + 0.28 * len(blocks))))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True, gridspec_kw={"width_ratios": widths})[0]
    for axes, (title, (columns, cells)) in zip(all_axes, panels.items(), strict=True):
        bits_LC = torch.full((len(blocks), len(columns)), float("nan"), dtype=torch.float64)
        for (block, column), bits in cells.items():
            bits_LC[blocks.index(block), columns.index(column)] = bits
        image = axes.imshow(
            bits_LC.numpy(), cmap="viridis", aspect="auto", vmin=low, vmax=high, interpolation="nearest"
        )
        _write_cells(axes, bits_LC, middle=(low + high) / 2)
        step = _thinning(len(columns))
        axes.set_xticks(range(0, len(columns), step), columns[::step], rotation=90, fontsize=7)
        axes.set(title=title, xlabel="linear" if axes is all_axes[0] and not columns[0].isdigit() else "expert")
    _label(all_axes[0].yaxis, blocks)
    all_axes[0].set_ylabel("block")
    figure.colorbar(image, ax=list(all_axes), label="bits", ticks=range(low, high + 1))
    figure.suptitle(f"Bits of {len(rows):,} weights")
    return figure


def _bits_by_panel(
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, tuple[list[str], dict[tuple[int, str], float]]]:
    """Columns and bits by (block, column) of each panel: linears outside the experts, then one per expert linear."""
    panels: dict[str, dict[tuple[int, str], float]] = {}
    for row in rows:
        expert, linear = _EXPERT.search(row["weight"]), _linear_of(row["weight"])
        column = str(int(expert[1])) if expert else linear
        title = linear if expert else "other linears"
        panels.setdefault(title, {})[int(row["block"]), column] = float(row["bits"])
    titles = [*(["other linears"] if "other linears" in panels else []), *_ordered(panels.keys() - {"other linears"})]
    drawn = {}
    for title in titles:
        names = {column for _, column in panels[title]}
        columns = sorted(names, key=int) if next(iter(names)).isdigit() else _ordered(names)
        drawn[title] = (columns, panels[title])
    return drawn


def _new_figure(columns: int, rows: int) -> "tuple[Figure, Axes]":
    """A figure with room for a grid of cells, within 6 to 16 inches by 3.2 to 12."""
    from matplotlib.figure import Figure

    size = (min(16.0, max(6.0, 2.5 + 0.35 * columns)), min(12.0, max(3.2, 1.6 + 0.28 * rows)))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    return figure, figure.add_subplot()


def _label(axis: "Axis", labels: Sequence[object]) -> None:
    """Tick labels along one side of a grid of cells, evenly thinned to at most ``MAX_TICKS``."""
    step = _thinning(len(labels))
    axis.set_ticks(range(0, len(labels), step), [str(label) for label in labels[::step]])


def _thinning(count: int) -> int:
    return max(1, -(-count // MAX_TICKS))


def _write_cells(axes: "Axes", values_RC: Tensor, middle: float | None = None) -> None:
    """Write the value into every cell of a small grid, in black on bright cells (above ``middle``), else in white."""
    if values_RC.numel() > MAX_CELLS_WITH_TEXT:
        return
    if middle is None:
        middle = float(values_RC.nan_to_num(torch.inf).min() + values_RC.nan_to_num(-torch.inf).max()) / 2
    for row, column in (values_RC > 0).nonzero().tolist():
        value = float(values_RC[row, column])
        color = "black" if value > middle else "white"
        axes.text(column, row, f"{float(f'{value:.2g}'):g}", ha="center", va="center", color=color, fontsize=7)


def _block_of(path: str) -> int:
    match = _BLOCK.search(path)
    if match is None:
        raise ValueError(f"experts module {path!r} must have the number of its block in its path")
    return int(match[1])


def _linear_of(weight: str) -> str:
    """``experts.gate_proj`` for every routed expert, ``shared_expert.gate_proj``, ``self_attn.q_proj``, ..."""
    return ".".join(_EXPERT.sub(".experts.", weight).split(".")[-2:])


def _ordered(linears: Iterable[str]) -> list[str]:
    def position(linear: str) -> tuple[int, str, int, str]:
        parent, _, leaf = linear.rpartition(".")
        return _index(_PARENT_ORDER, parent), parent, _index(_LINEAR_ORDER, leaf), leaf

    return sorted(linears, key=position)


def _index(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)
