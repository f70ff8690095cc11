"""The quickstart is short unless everything is asked for, and README's table is everything."""

import pytest

from benchmarks.lab.readme import SHOWN
from benchmarks.quickstart import BEST, recipes


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_all_steps_run_only_when_everything_is_asked_for(bits: int) -> None:
    assert BEST not in recipes(bits, lowest=True, everything=False)
    assert (BEST in recipes(bits, lowest=True, everything=True)) == (bits == 3)


def test_everything_has_the_rows_of_the_readme_in_their_order() -> None:
    rows = [(each.label, bits) for bits in (3, 4) for each in recipes(bits, lowest=bits == 3, everything=True)]
    assert [row for row in rows if row in SHOWN] == list(SHOWN[1:])


def test_what_runs_without_everything_is_a_part_of_it_in_the_same_order() -> None:
    for bits, lowest in ((3, True), (4, False)):
        short, long = (recipes(bits, lowest=lowest, everything=everything) for everything in (False, True))
        assert [each for each in long if each in short] == short
