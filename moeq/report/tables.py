"""Markdown tables whose columns are padded, so that they read well on a terminal too, and numbers for their cells."""

from collections.abc import Sequence
from math import isfinite


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A table of cells; ends with a newline.

    Args:
        header: Name of each column.
        rows: Cells, as many as there are columns.
        left: Columns that are aligned to the left; the others are numbers.
    """
    lines = [header, *rows]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]

    def padded(line: Sequence[str]) -> str:
        cells = (
            cell.ljust(widths[column]) if column in left else cell.rjust(widths[column])
            for column, cell in enumerate(line)
        )
        return f"| {' | '.join(cells)} |"

    rule = ["-" * width if column in left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([padded(header), padded(rule), *map(padded, rows)]) + "\n"


def number(value: float | None, digits: int) -> str:
    """A number for a cell: "-" for None, and a short form for what would widen the table."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isfinite(value) and abs(value) < 1e6 else f"{value:.2e}"
