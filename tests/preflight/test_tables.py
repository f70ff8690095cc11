"""Tables of a preflight: fit a terminal, say sizes as people do, and put expected beside measured."""

import json

import pytest

from moeq.preflight.meter import Measured
from moeq.preflight.phases import Forecast, Moment, Phase
from moeq.preflight.tables import (
    WIDTH,
    comparison_table,
    duration,
    forecast_json,
    forecast_table,
    memory_rows,
    size,
    summary_line,
)

LINES = ("Placement: a model of a long name needs 61.1 GB in memory, of 24.0 GB, so its blocks are streamed. " * 2,)
PHASES = (
    Phase("load block", "block 0 load", (Moment({"outside of blocks": 2 * 10**9, "block": 10**9}, {"parts": 10**9}),)),
    Phase("calibrate attention_out", "block 0 all", (Moment({"block": 10**9}),), 10**7, 90.0),
)
MEASURED = (
    Measured("load block", "block 0 load", 4_100_000_000, 0, 0, 3.0),
    Measured("solve", "block 0 all solve", 10**9, 0, 0, 61.0),
)


def forecast(*, on_cpu: bool = True) -> Forecast:
    return Forecast(LINES, PHASES, process=5 * 10**8, on_cpu=on_cpu)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 kB"), (12_400, "12 kB"), (335e6, "335 MB"), (4.04e9, "4.0 GB"), (671e9, "671 GB"), (1.3e12, "1.3 TB")],
)
def test_sizes_have_two_or_three_digits(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "< 1 s"), (99.0, "99 s"), (720.0, "12 min"), (12_600.0, "3.5 h"), (181_440.0, "2.1 days")],
)
def test_durations_are_as_exact_as_an_estimate(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_table_fits_a_terminal_of_100_columns(on_cpu: bool) -> None:
    text = forecast_table(forecast(on_cpu=on_cpu))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert ("device" in text) is not on_cpu
    assert "outside of blocks 2.0 GB" in text


def test_the_line_of_a_short_run_has_the_peak_the_disk_and_the_time() -> None:
    expected = "Preflight: 4.5 GB of main memory at most, 10 MB on disk, about 90 s"
    assert summary_line(forecast()) == expected


def test_expected_stands_beside_measured_by_kind_and_label() -> None:
    rows = memory_rows(forecast(), MEASURED)
    assert [row["phase"] for row in rows] == ["load block", "solve"]
    assert (rows[0]["host_expected"], rows[0]["host_measured"]) == (4_500_000_000, 4_100_000_000)
    assert rows[1]["host_expected"] == ""
    table = comparison_table(forecast(), MEASURED).splitlines()
    assert [cell.strip() for cell in table[2].split("|")[1:5]] == ["load block", "1", "4.5 GB", "4.1 GB"]
    assert max(map(len, table)) <= WIDTH


def test_without_a_forecast_what_was_measured_is_kept() -> None:
    assert [row["host_measured"] for row in memory_rows(None, MEASURED)] == [4_100_000_000, 10**9]


def test_the_json_holds_every_moment() -> None:
    found = json.loads(json.dumps(forecast_json(forecast())))
    assert found["total"]["host"] == 4_500_000_000
    assert found["phases"][0]["moments"][0]["host"] == {"parts": 10**9}
