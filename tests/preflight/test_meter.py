"""Peaks are those of a phase: what came before it, and what happens in a phase inside it, does not count."""

from pathlib import Path

import pytest
import torch

from moeq.preflight.meter import Meter, folder_bytes, resident_bytes

SIZE = 200 << 20


def take(size: int = SIZE) -> None:
    """Touch and drop so many bytes."""
    assert int(torch.ones(size, dtype=torch.uint8)[-1]) == 1


def test_a_peak_covers_what_happens_within_and_nothing_before() -> None:
    meter, before = Meter(), resident_bytes()
    take()
    with meter.phase("small", "first"):
        take(SIZE // 4)
    with meter.phase("large", "second"):
        take()
    small, large = meter.measured
    assert small.host - before == pytest.approx(SIZE / 4, rel=0.3)
    assert large.host - before == pytest.approx(SIZE, rel=0.1)


def test_what_an_inner_phase_takes_is_its_own() -> None:
    meter, before = Meter(), resident_bytes()
    with meter.phase("outer", "outer"):
        take(SIZE // 4)
        with meter.phase("inner", "inner"):
            take()
        take(SIZE // 4)
    inner, outer = meter.measured
    assert (inner.kind, outer.kind) == ("inner", "outer")
    assert inner.host - before == pytest.approx(SIZE, rel=0.1)
    assert outer.host - before == pytest.approx(SIZE / 4, rel=0.3)
    assert outer.seconds >= 0


def test_bytes_that_a_phase_leaves_on_disk_are_counted_once(tmp_path: Path) -> None:
    meter = Meter()
    meter.folder = tmp_path
    with meter.phase("outer", "outer"):
        (tmp_path / "a").write_bytes(b"1234")
        with meter.phase("inner", "inner"):
            (tmp_path / "folder").mkdir()
            (tmp_path / "folder/b").write_bytes(b"12345678")
    inner, outer = meter.measured
    assert (inner.disk, outer.disk) == (8, 4)
    assert folder_bytes(tmp_path) == 12


def test_a_phase_that_fails_ends_too() -> None:
    meter = Meter()
    with pytest.raises(ValueError, match="broken"), meter.phase("outer", "outer"):
        raise ValueError("broken")
    assert [each.kind for each in meter.measured] == ["outer"]
