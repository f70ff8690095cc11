"""The study of zero points: what stands beside what, and which cases there are."""

from argparse import Namespace

import pytest

from benchmarks.studies.symmetric import METHODS, Case, Symmetric, at_size


def row(grid: str, size: float, kl: float, group_size: int = 64) -> dict:
    domains = {"prose": {"kl": kl}, "python": {"kl": 3 * kl}}
    return {
        "seed": 0,
        "bits": 4,
        "group_size": group_size,
        "grid": grid,
        "method": "AGQ",
        "size": size,
        "domains": domains,
    }


def test_a_divergence_between_two_sizes_lies_between_theirs() -> None:
    known = [(4.5, 0.01), (4.0, 0.04), (4.25, 0.02)]
    assert at_size(known, 4.25) == pytest.approx(0.02)
    assert at_size(known, 4.375) == pytest.approx((0.02 * 0.01) ** 0.5)
    assert at_size(known, 4.6) is None
    assert at_size([], 4.0) is None


def test_grids_stand_beside_asymmetric_ones_of_their_size() -> None:
    rows = [row("asymmetric", 4.3, 0.008), row("asymmetric", 4.7, 0.004, 32), row("full-range", 4.5, 0.005, 32)]
    text = Symmetric(Namespace()).report(rows)
    assert "| AGQ | 4 | 32 | full-range | 4.5 | 1 | 10.00 | 15.00 | 11.31 |" in text
    assert text.index("asymmetric | 4.7") < text.index("full-range | 4.5") < text.index("asymmetric | 4.3")


def test_tables_are_tried_where_they_are_and_methods_without_data_once() -> None:
    asked = {"seeds": [0, 1], "bits": [3, 4], "groups": [32, 64], "grids": ["full-range", "IQ4_NL"], "methods": METHODS}
    cases = Symmetric(Namespace(**asked)).cases()
    tables = [case for case in cases if case.grid == "IQ4_NL"]
    assert {(case.bits, case.group_size) for case in tables} == {(4, 32)}
    assert sorted((case.method, case.seed) for case in tables) == [("AGQ", 0), ("AGQ", 1), ("RTN", 0)]
    assert Case(0, 3, 64, "full-range", "AGQ, learned") in cases
    assert len(set(cases)) == len(cases)
