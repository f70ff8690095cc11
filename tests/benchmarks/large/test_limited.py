"""A command meets its limit, and its peak is seen although it resets what the kernel keeps."""

import sys
from pathlib import Path

from benchmarks.large.limited import Memory, read_memory, run_limited

MIB = 1 << 20
TOUCH = "x = bytearray({mib} << 20); x[::4096] = bytes(len(x[::4096]))"


def run(tmp_path: Path, mib: int, limit: int | None, then: str = "") -> tuple[int, Memory]:
    code = "\n".join([TOUCH.format(mib=mib), then])
    finished = run_limited([sys.executable, "-S", "-c", code], limit, tmp_path / "log")
    return finished.code, finished.peak


def test_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    code, peak = run(tmp_path, 400, 200 * MIB)
    assert code == 1
    assert "MemoryError" in (tmp_path / "log").read_text()
    assert peak.address_space <= 200 * MIB


def test_the_peak_outlives_a_reset(tmp_path: Path) -> None:
    then = "import time; time.sleep(0.5); del x; open('/proc/self/clear_refs', 'w').write('5'); time.sleep(0.2)"
    code, peak = run(tmp_path, 64, 300 * MIB, then)
    assert code == 0
    assert 64 * MIB < peak.anonymous <= peak.resident <= peak.address_space <= 300 * MIB


def test_fields_are_read_in_bytes() -> None:
    text = "Name:\tpython\nVmPeak:\t    30 kB\nVmSize:\t 5 kB\nVmHWM:\t  20 kB\nRssAnon:\t      10 kB\nThreads:\t1\n"
    assert read_memory(text) == Memory(resident=20 << 10, anonymous=10 << 10, address_space=30 << 10)
    assert read_memory("Name:\tpython\nState:\tZ (zombie)\n") == Memory()
