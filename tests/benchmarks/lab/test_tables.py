"""Cells have a mean, and a deviation where there are several values."""

import statistics

import pytest

from benchmarks.lab.tables import cell, grouped, markdown, mean_kl, router_agreement, worst_kl


@pytest.mark.parametrize(("form", "spread"), [(".2f", None), (".3g", ".2g")])
def test_a_cell_is_mean_and_sample_deviation(form: str, spread: str | None) -> None:
    values = [1.0, 2.0, 4.5]
    expected = f"{statistics.fmean(values):{form}} +- {statistics.stdev(values):{spread or form}}"
    assert cell(values, form, spread) == expected
    assert cell(values[:1], form, spread) == f"{1.0:{form}}"


def test_statistics_of_a_row_are_those_over_its_domains() -> None:
    row = {"domains": {"a": {"kl": 1.0, "router_agreement": 0.5}, "b": {"kl": 3.0, "router_agreement": 0.7}}}
    assert (mean_kl(row), worst_kl(row), router_agreement(row)) == (2.0, 3.0, pytest.approx(0.6))


def test_groups_keep_the_order_of_their_first_rows() -> None:
    rows = [{"a": 2, "b": 0}, {"a": 1, "b": 1}, {"a": 2, "b": 2}]
    assert list(grouped(rows, lambda row: row["a"]).items()) == [(2, [rows[0], rows[2]]), (1, [rows[1]])]


def test_a_table_is_markdown() -> None:
    assert markdown(["a", "b"], [[1, "x"], [2, "y"]]) == "| a | b |\n|---|---|\n| 1 | x |\n| 2 | y |\n"
