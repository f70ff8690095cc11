"""What exports are expected to take: their bytes on disk, the block they are made of, and what is read back."""

from dataclasses import replace

import pytest

from moeq.export.preflight import ExportSizes, Rates, export_phases
from moeq.export.reopen import WHOLE_BYTES

SIZES = ExportSizes(
    held={"outside of blocks": 1000, "block": 400}, loading=300, outside=1000, block=400, block_file=110, source=5000,
    packed=2100,
)  # fmt: skip


def test_each_folder_is_written_and_read_back() -> None:
    phases = export_phases(SIZES, dense=True, streamed=True, rates=None)
    assert [phase.kind for phase in phases] == [
        "export", "export verified", "dense copy", "dense copy verified"
    ]  # fmt: skip
    assert [phase.disk for phase in phases] == [2100, 0, 5000, 0]
    assert {phase.seconds for phase in phases} == {None}
    assert len(export_phases(SIZES, dense=False, streamed=True, rates=None)) == 2


def test_what_is_carried_takes_disk_and_time_in_both_folders_and_no_memory() -> None:
    rates = Rates(read=10.0, write=5.0)
    before = export_phases(SIZES, dense=True, streamed=True, rates=rates)
    after = export_phases(replace(SIZES, carried=700), dense=True, streamed=True, rates=rates)
    assert [phase.disk for phase in after] == [2800, 0, 5700, 0]
    assert [phase.moments for phase in after] == [phase.moments for phase in before]
    more = [new.seconds - old.seconds for new, old in zip(after, before, strict=True)]
    assert more == pytest.approx([70 + 140, 2 * 70, 70 + 140, 2 * 70])


def test_all_of_it_lies_in_main_memory() -> None:
    for phase in export_phases(SIZES, dense=True, streamed=True, rates=None):
        for moment in phase.moments:
            assert not moment.device
            assert moment.host["block"] == 400


def test_a_small_export_is_opened_whole_and_a_large_one_block_by_block() -> None:
    small = export_phases(SIZES, dense=False, streamed=True, rates=None)[1].moments[0].host
    assert small["export read back"] == 2 * SIZES.packed
    sizes = replace(SIZES, packed=WHOLE_BYTES + 1)
    large = export_phases(sizes, dense=False, streamed=True, rates=None)[1].moments[0].host
    assert large["export read back"] == SIZES.outside + 2 * SIZES.block_file


@pytest.mark.parametrize(("streamed", "source"), [(True, 5000), (False, 0)])
def test_time_is_the_bytes_that_are_read_and_written(streamed: bool, source: int) -> None:
    rates = Rates(read=10.0, write=5.0)
    write, verify = export_phases(SIZES, dense=False, streamed=streamed, rates=rates)
    assert write.seconds == source / 10 + 2100 / 5
    assert verify.seconds == (source + 2 * 2100) / 10
