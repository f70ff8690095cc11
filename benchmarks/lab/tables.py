"""Cells and tables of results: mean +- standard deviation over seeds, and what rows of divergences come to.

A row that has ``domains`` holds for each evaluated domain the numbers of a ``Divergence`` (see ``yardstick.py``).
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from statistics import fmean, stdev
from typing import Any, TypeVar

Row = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)


def cell(values: Sequence[float], form: str = ".2f", spread: str | None = None) -> str:
    """Mean, and standard deviation where there are several values.

    Args:
        values: One per seed.
        form: Format of the mean.
        spread: Format of the deviation; None is that of the mean.
    """
    deviation = f" +- {stdev(values):{spread or form}}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{deviation}"


def markdown(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table without padding; ends with a newline."""
    lines = [_line(head), "|" + "---|" * len(head), *map(_line, rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def grouped(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    """Rows by key, keys in the order in which they first appear."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def mean_kl(row: Row) -> float:
    """Mean over domains, nats per token."""
    return fmean(domain["kl"] for domain in row["domains"].values())


def worst_kl(row: Row) -> float:
    """Of the domain with the largest divergence, nats per token."""
    return max(domain["kl"] for domain in row["domains"].values())


def router_agreement(row: Row) -> float:
    """Share of (token, block) pairs that keep their experts, mean over domains."""
    return fmean(domain["router_agreement"] for domain in row["domains"].values())
