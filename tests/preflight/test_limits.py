"""A run that cannot fit is refused with the phase, the number, what is largest in it, and what would help."""

import pytest

from moeq.preflight.limits import SPARE_DISK_BYTES, Room, check_room
from moeq.preflight.phases import Forecast, Moment, Phase

GB = 10**9
REMEDIES = {
    "Hessians": ("set a smaller --model.hessian_gib",),
    "model": ("set --model.placement stream",),
    "disk": ("set --trainer.default_root_dir to a larger disk",),
}
PHASES = (
    Phase("load model", "model", (Moment({"model": 20 * GB}),), disk=0),
    Phase("solve", "block 3 solve", (Moment({"model": 20 * GB, "Hessians": 9 * GB}, {"codes": GB}),), disk=5 * GB),
    Phase("export", "export", (Moment({"model": 20 * GB}),), disk=6 * GB),
)


def check(room: Room, *, on_cpu: bool = True) -> None:
    check_room(Forecast((), PHASES, GB, on_cpu), room, REMEDIES)


def test_a_run_that_fits_passes_and_so_does_one_of_which_nothing_is_known() -> None:
    check(Room(None, 31 * GB, 11 * GB + SPARE_DISK_BYTES))
    check(Room(29 * GB, 2 * GB, None), on_cpu=False)
    check(Room(None, None, None))


def test_too_little_main_memory_names_the_phase_its_parts_and_the_options_of_the_largest() -> None:
    message = (
        r"this run does not fit: solve \(block 3 solve\) needs 31\.0 GB of main memory, where 30\.0 GB are free: "
        r"model 20\.0 GB, Hessians 9\.0 GB, codes 1\.0 GB; set --model\.placement stream or set a smaller "
        r"--model\.hessian_gib"
    )
    with pytest.raises(ValueError, match=message):
        check(Room(None, 30 * GB, None))


def test_on_an_accelerator_only_what_lies_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"needs 29\.0 GB on the device, where 28\.0 GB are free: model 20\.0 GB, Hes"):
        check(Room(28 * GB, 100 * GB, None), on_cpu=False)


def test_disk_that_earlier_phases_fill_is_not_there_for_later_ones() -> None:
    message = r"export \(export\) needs 6\.3 GB on the disk of the run folder, where 6\.0 GB are free; set --trainer"
    with pytest.raises(ValueError, match=message):
        check(Room(None, None, 11 * GB))


def test_little_work_needs_little_room() -> None:
    small = (Phase("export", "export", (Moment({"model": 9}),), disk=1 << 20),)
    check_room(Forecast((), small, GB, True), Room(None, 31 * GB, 4 << 20), REMEDIES)
    with pytest.raises(ValueError, match="on the disk of the run folder"):
        check_room(Forecast((), small, GB, True), Room(None, 31 * GB, 3 << 20), REMEDIES)


def test_where_no_option_helps_the_machine_has_to() -> None:
    with pytest.raises(ValueError, match="take a larger machine"):
        check_room(Forecast((), PHASES, GB, True), Room(None, GB, None), {})
