"""A table of times for people."""

from collections.abc import Sequence

from moeq.allocation.time_table import TimeTable
from moeq.quant.spec import WeightShape


def summary(table: TimeTable, weights: Sequence[WeightShape]) -> str:
    """Microseconds of a product by shape and choice, and milliseconds of a token with every weight on one choice.

    Args:
        table: With one row at a time, and perhaps more.
        weights: Of the model that it was measured for.
    """
    labels = list(dict.fromkeys(label for label, *_ in table.seconds))
    keys = list(dict.fromkeys((rows, out, into) for _, out, into, rows in table.seconds))
    lines = [" ".join(["microseconds of a product".ljust(34), *(label.rjust(9) for label in labels)])]
    for rows, out_features, into in sorted(keys):
        name = f"{out_features} x {into}, {rows} token{'s' if rows > 1 else ''}"
        found = (table.seconds.get((label, out_features, into, rows)) for label in labels)
        cells = (("-" if one is None else f"{1e6 * one:.1f}").rjust(9) for one in found)
        lines.append(" ".join([name.ljust(34), *cells]))
    totals = ("-" if one is None else f"{1e3 * one:.3f}" for one in (_total(table, weights, label) for label in labels))
    return "\n".join(
        [*lines, " ".join(["milliseconds of a token, all alike".ljust(34), *(t.rjust(9) for t in totals)])]
    )


def _total(table: TimeTable, weights: Sequence[WeightShape], label: str) -> float | None:
    """Seconds of a token with every weight on one choice; None where some do not take it."""
    found = [table.seconds.get((label, w.out_features, w.in_features, 1)) for w in weights]
    shares = [weight.active_share for weight in weights]
    return None if None in found else sum(s * one for s, one in zip(shares, found, strict=True) if one is not None)
