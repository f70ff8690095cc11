"""README's table is a part of the quickstart's, and nothing else of the page changes."""

import pytest

from benchmarks.lab.readme import BEGIN, END, SHOWN, rewritten, shown, table

ROWS = [
    {
        "method": method, "bits": bits, "average_bits": bits + 0.304, "bytes": 5_460_000 + i, "kl_mean": 0.01 * i,
        "kl_worst": 0.02 * i, "top1_agreement": 0.9, "seconds": 3.4,
    }
    for i, (method, bits) in enumerate([*SHOWN, ("another", 3)])
]  # fmt: skip


def test_the_shown_rows_come_in_their_order_with_fewer_columns() -> None:
    lines = table(list(reversed(ROWS))).splitlines()
    labels = [f"{method} {bits}" for method, bits in SHOWN[1:]]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["original", *labels]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == [
        "RTN 3",
        "3.30",
        "5.5",
        "0.0100",
        "0.0200",
        "90.0",
        "3",
    ]


def test_a_missing_row_is_named() -> None:
    with pytest.raises(ValueError, match="no row for original at 16 bits, RTN at 4 bits"):
        table([row for row in ROWS if (row["method"], row["bits"]) not in {("original", 16), ("RTN", 4)}])


def test_only_what_stands_between_the_markers_is_replaced() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    new = rewritten(page, "| new |\n")
    assert new == f"before\n{BEGIN}\n| new |\n{END}\nafter\n"
    assert shown(new) == "| new |\n"
    assert shown("no markers") is None
    with pytest.raises(ValueError, match="has no lines"):
        rewritten("no markers", "| new |\n")
