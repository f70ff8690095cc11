"""Peaks of phases: what is held at one time adds up, what is held at different times does not."""

from moeq.preflight.phases import Forecast, Moment, Phase

LOAD = Moment({"block": 40}, {"parts from files": 30})
SWEEP = Moment({"block": 40, "activations": 15}, {"hidden states": 7})
PHASES = (
    Phase("load", "block 0 load", (LOAD,), seconds=2.0),
    Phase("pass", "block 0 pass", (LOAD, SWEEP), disk=100, seconds=5.0),
    Phase("pass", "block 1 pass", (SWEEP,), disk=50, seconds=6.0),
)


def forecast(*, on_cpu: bool) -> Forecast:
    return Forecast(("one line",), PHASES, process=1000, on_cpu=on_cpu)


def test_on_a_cpu_both_kinds_of_memory_are_one_and_the_process_is_in_it() -> None:
    found = forecast(on_cpu=True)
    assert [found.host_bytes(phase) for phase in PHASES] == [1070, 1070, 1062]
    assert [found.device_bytes(phase) for phase in PHASES] == [0, 0, 0]


def test_on_an_accelerator_the_two_have_peaks_of_their_own_at_moments_of_their_own() -> None:
    found = forecast(on_cpu=False)
    assert [found.host_bytes(phase) for phase in PHASES] == [1030, 1030, 1007]
    assert [found.device_bytes(phase) for phase in PHASES] == [40, 55, 55]


def test_a_row_has_the_largest_peak_of_its_kind_and_the_sums_of_disk_and_time() -> None:
    rows = forecast(on_cpu=True).rows()
    assert [(row.kind, row.count, row.host, row.disk, row.seconds) for row in rows] == [
        ("load", 1, 1070, 0, 2.0),
        ("pass", 2, 1070, 150, 11.0),
    ]
    total = forecast(on_cpu=True).total()
    assert (total.count, total.host, total.disk, total.seconds) == (3, 1070, 150, 13.0)
    assert total.parts == {"block": 40, "parts from files": 30}


def test_times_that_nobody_measured_are_unknown_not_zero() -> None:
    unknown = Forecast((), (Phase("load", "model", (LOAD,)),), 0, on_cpu=True)
    assert unknown.total().seconds is None
